"""Small random checkpoints, written as transformers writes them or by hand, and a tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from minipyramid import LLM

# The same examples every time, so that a run says something about the change and not about its luck;
# `--hypothesis-profile=default` draws others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

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
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
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


def train_pieces(directory: Path) -> Path:
    """A Llama-like tokenizer.model of 320 pieces."""
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
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    train_pieces(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, pyramid="off")
