"""What tests share: small random checkpoints, prompts, and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from minipyramid import LLM, Conversation, PyramidConfig, SamplingParams
from minipyramid.calibrate.contexts import Window
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile

WEIGHTS = Path(__file__).parent.parent / "weights" / "storyteller"

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors under Hugging Face's names, large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    D = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {p + "self_attn.q_proj.weight": (q, hidden), p + "self_attn.o_proj.weight": (hidden, q)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (kv, hidden) for n in "kv"}
        shapes |= {p + f"mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (hidden, ffn)
    return {
        name: torch.randn(shape, generator=generator) * (1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.1)
        + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def write_checkpoint(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny checkpoint of random weights; `changes` to `TINY`."""
    config = {**TINY, **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), directory / "model.safetensors")
    return directory


def train_pieces(directory: Path, **how: Any) -> Path:
    """A Llama-like tokenizer.model of 320 pieces; further arguments are the trainer's."""
    text = [
        "Once upon a time there was a little fox.",
        "The fox said: \u201cwho is there?\u201d and went home again.",
    ] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **how,
    )
    return directory / "tokenizer.model"


STEEP = PyramidConfig(
    recent_ratio=0.1,
    prefill_decay_ratio=0.5,
    min_context_length=4,
    exceed_length_to_compress=8,
    gen_decay_ratio=0.2,
)


CONFIGS = st.builds(
    PyramidConfig,
    prefill_full_layers=st.sampled_from([1, 2, 4]),
    recent_ratio=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    prefill_decay_ratio=st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]),
    prefill_decay_strategy=st.sampled_from(["cosine", "linear", "constant"]),
    min_context_length=st.integers(0, 20),
    layerwise_downsample_interval=st.integers(1, 3),
    streamingllm_sink_len=st.integers(0, 6),
    distance_weight=st.sampled_from([0.5, 1.0, 1.2]),
    gen_decay_ratio=st.sampled_from([0.0, 0.1, 1.0]),
    gen_decay_strategy=st.sampled_from(["cosine", "linear", "constant"]),
    exceed_length_to_compress=st.integers(1, 9),
    gen_compress_ratio=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)


def level_of(computed: list[float], held: list[float], scores: list[str], newest: list[float]) -> Level:
    """A level whose lists are mended: what is computed never rises, and nothing more is held."""
    most = [1.0]
    for share in computed[1:]:
        most.append(min(share, most[-1]))
    shares = tuple(min(h, c) for h, c in zip(held, most, strict=True))
    return Level(tuple(most), shares, tuple(scores), tuple(newest))


def lines_of(layers: int, kv_heads: int = 2, head_dim: int = 8) -> torch.Tensor:
    """Lines of the score `fitted` that were fitted to nothing."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(layers, kv_heads, 2 * head_dim + 4, generator=generator)


def stand_ins_of(layers: int, kv_heads: int = 2, head_dim: int = 8) -> torch.Tensor:
    """Keys and values that were fitted to nothing."""
    generator = torch.Generator().manual_seed(11)
    return 3 * torch.randn(layers, kv_heads, 2, head_dim, generator=generator)


def with_stand_ins(levels: Iterable[Level], size: float = 1.0) -> tuple[Level, ...]:
    """The levels with stand-ins, other ones for each; they are as large as `size`."""
    return tuple(
        replace(level, stand_ins=size * (1 + i) * stand_ins_of(len(level.held)))
        for i, level in enumerate(levels)
    )


# Without a policy's name, for what a test of every policy needs where the checkpoint has no profile.
PROFILE = Profile(
    with_stand_ins(
        (
            level_of([1, 0.8, 0.5], [0.2, 0.5, 0.1], ["newest", "fitted", "votes"], [1.0, 0.25, 0.5]),
            level_of(
                [1, 1, 0.7], [0.5, 0.9, 0.4], ["keydiff+votes", "fitted+newest", "votes"], [0.5, 0.25, 0.5]
            ),
        )
    ),
    share=0.6,
    fewest=4,
    fewest_recent=4,
    lines=lines_of(3),
)


def by_name(name: str) -> str | Profile:
    """A policy by its name; the profile is `PROFILE`."""
    return PROFILE if name == "profile" else name


_SCORES = st.sampled_from(
    ["newest", "votes", "keydiff", "fitted", "repeat", "votes+keydiff", "fitted+newest"]
)
_SHARES = st.lists(st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.8, 1.0]), min_size=3, max_size=3)
_LEVELS = st.builds(
    level_of,
    _SHARES,
    _SHARES,
    st.lists(_SCORES, min_size=3, max_size=3),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=3),
)


def ascending(levels: list[Level], stand_ins: bool) -> tuple[Level, ...]:
    """By what they hold, with stand-ins or without."""
    ordered = tuple(sorted(levels, key=lambda level: level.share))
    return with_stand_ins(ordered) if stand_ins else ordered


def guesses_of(depth: int) -> torch.Tensor:
    """Guesses of the tiny model that were fitted to nothing, of the layers behind so many."""
    generator = torch.Generator().manual_seed(13)
    return torch.randn(3 - depth, 32 + 32 + 1, 2 * 2 * 8, generator=generator) / 4


def with_guesses(profile: Profile, depth: int, behind: float, held: list[float]) -> Profile:
    """The same, cut behind `depth` layers, where its levels hold these shares, or a half or a third."""
    computed = (1.0,) * depth + (behind,) * (3 - depth)
    levels = [
        replace(level, computed=computed, held=tuple(share / (i + 1) for share in held))
        for i, level in enumerate(profile.levels)
    ]
    return replace(profile, levels=tuple(levels[::-1]), guesses=guesses_of(depth))


_PROFILES = st.builds(
    Profile,
    st.tuples(
        st.lists(_LEVELS, min_size=1, max_size=3, unique_by=lambda level: round(level.share, 6)),
        st.booleans(),
    ).map(lambda drawn: ascending(*drawn)),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]),
    generated_share=st.sampled_from([None, 0.0, 0.3, 1.0]),
    sinks=st.integers(0, 5),
    fewest=st.sampled_from([0, 1, 5, 64]),
    fewest_recent=st.sampled_from([0, 3, 64]),
    lines=st.just(lines_of(3)),
)
PROFILES = st.one_of(
    _PROFILES,
    st.builds(
        with_guesses, _PROFILES, st.sampled_from([1, 2]), st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.8]), _SHARES
    ),
)


def heads_of(kept: list[Any]) -> list[list[int]]:
    """A layer's positions by head, where all heads alike are given once."""
    return kept if kept and isinstance(kept[0], list) else [kept, kept]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    """Random token ids, other ones for other lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def book_windows(llm: LLM, count: int) -> list[Window]:
    """Stretches of a book, one after the other."""
    tokens = ids_of_text(llm, WEIGHTS.parent / "books-fit.txt")
    parts = [tokens[start : start + 340] for start in range(0, 340 * count, 340)]
    return [Window(part[:300], part[300:340], part[50:90]) for part in parts]


def ids_of_text(llm: LLM, file: Path) -> list[int]:
    """A text's tokens, as its tokenizer cuts it."""
    return llm.engine.need_tokenizer().encode(file.read_text(), continues=True)


def say(llm: LLM, prompt: Any, params: SamplingParams, conversation: Conversation) -> Any:
    """A turn of a conversation; returns its completion."""
    pieces = llm.stream(prompt, params, conversation)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
