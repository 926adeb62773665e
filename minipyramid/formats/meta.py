"""Weights and configuration as Meta publishes them: `params.json` and `consolidated.00.pth`, `.01.pth` ...

They differ from Hugging Face's in names, in how a matrix is cut into shards (each holds a part of every
matrix), and in the order of a head's components: rotated pairs lie side by side, not half a head apart. What
params.json does not say and cannot be told is refused.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig, read_json
from minipyramid.errors import CheckpointError, ConfigError
from minipyramid.formats.torch_files import load_tensors
from minipyramid.formats.weights import Stored

FIRST = "consolidated.00.pth"
PARAMS = "params.json"
# Meta's names, Hugging Face's, and the axis on which shards are joined; None where all hold the same.
NAMES: dict[str, tuple[str, int | None]] = {
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
IN_LAYER: dict[str, tuple[str, int | None]] = {
    "attention_norm.weight": ("input_layernorm.weight", None),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
}
EMBEDDING = "tok_embeddings.weight"
IN_FIRST = "layers.0.attention.wq.weight"
# The context that each generation was trained for, which params.json leaves out, by what tells them apart.
CONTEXT_OF_THETA = {500000.0: 8192, 1000000.0: 16384}  # Llama 3, CodeLlama
CONTEXT_OF_EPS = {1e-5: 4096, 1e-6: 2048}  # Llama 2, the first Llama


def shards(directory: Path) -> list[Path]:
    """The files of weights, in their order."""
    return sorted(directory.glob("consolidated.[0-9][0-9].pth"))


def config_fields(directory: Path) -> dict[str, Any]:
    """What `config.json` would say. Raises `ConfigError` where params.json does not say enough."""
    file = directory / PARAMS
    given = read_json(file, holds="Meta's layout")
    if given.get("use_scaled_rope"):
        problem = "does not say the factor of its scaled rotary positions, nor whether the head is tied"
        raise ConfigError(f"{file} {problem}; take the same model in the Hugging Face layout")
    try:
        dim, heads, multiple = (int(given[name]) for name in ("dim", "n_heads", "multiple_of"))
        factor, vocab = float(given.get("ffn_dim_multiplier") or 1.0), int(given.get("vocab_size", -1))
        eps, theta = float(given["norm_eps"]), float(given.get("rope_theta") or 10000.0)
        layers, kv_heads = int(given["n_layers"]), int(given.get("n_kv_heads") or heads)
        ffn = multiple * -(-int(factor * int(8 * dim / 3)) // multiple)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{file} is malformed ({error}); expected dim, n_layers, n_heads ...") from error
    context = CONTEXT_OF_THETA.get(theta) or CONTEXT_OF_EPS.get(eps)
    if context is None:
        raise ConfigError(f"{file} is of no Llama whose context is known; take the Hugging Face layout")
    if (context, layers, kv_heads) == (4096, 80, heads):
        context = 2048  # the first Llama's largest has Llama 2's eps, but not its grouped heads
    if vocab < 1:  # Llama 2's says -1
        vocab = _vocabulary(directory)
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "dtype": "bfloat16",
    }


def open_tensors(directory: Path, config: ModelConfig) -> dict[str, Stored]:
    """Every tensor under its Hugging Face name, joined and reordered when it is read."""
    parts = _load_all(directory)
    first = parts[0]
    _check_complete(directory, parts, config)
    rows = len(first.get(EMBEDDING, ()))
    names = {**NAMES, EMBEDDING: ("model.embed_tokens.weight", 0 if rows < config.vocab_size else 1)}
    for i in range(config.num_hidden_layers):
        for meta, (name, axis) in IN_LAYER.items():
            names[f"layers.{i}.{meta}"] = (f"model.layers.{i}.{name}", axis)
    tensors = {}
    for meta in first:
        name, axis = names.get(meta, (meta, None))
        if not all(meta in part for part in parts):
            raise CheckpointError(f"{directory}: {meta} is not in every shard; fetch them again")
        shape = list(first[meta].shape)
        others = [[n for i, n in enumerate(part[meta].shape) if i != axis] for part in parts]
        if len(shape) <= (axis or 0) or any(other != others[0] for other in others):
            raise CheckpointError(f"{directory}: {meta} has the shape {shape} in a shard; fetch them again")
        if axis is not None:
            shape[axis] = sum(part[meta].shape[axis] for part in parts)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((count for key, count in heads.items() if key in name), 0)
        pieces = [part[meta] for part in parts]
        if name != "rope.freqs":  # computed here
            tensors[name] = Stored(directory / FIRST, shape, partial(_joined, pieces, axis, turned))
    return tensors


def _vocabulary(directory: Path) -> int:
    """Tokens, by the embedding, whose shards have all of them where params.json does not say how many.

    By the tokenizer, as in Meta's own code, while weights are not fetched yet.
    """
    if shards(directory) or not (directory / "tokenizer.model").exists():
        return len(_load_all(directory)[0][EMBEDDING])
    from minipyramid.formats.sentencepiece import open_model

    return open_model(directory / "tokenizer.model").vocab_size()


def _load_all(directory: Path) -> list[dict[str, Tensor]]:
    loaded = [load_tensors(path) for path in shards(directory)]
    if not loaded or EMBEDDING not in loaded[0] or loaded[0][EMBEDDING].dim() != 2:
        raise CheckpointError(f"{directory / FIRST} has no {EMBEDDING}; expected Meta's weights")
    return loaded


def _check_complete(directory: Path, parts: list[dict[str, Tensor]], config: ModelConfig) -> None:
    """Raise `CheckpointError` where a shard is missing: together they have every row of a query matrix."""
    names = [f"consolidated.{i:02}.pth" for i in range(len(parts))]
    for path, name in zip(shards(directory), names, strict=True):
        if path.name != name:
            raise CheckpointError(f"{directory} lacks {name}, but has {path.name}; fetch it")
    rows = sum(part[IN_FIRST].shape[:1].numel() for part in parts if IN_FIRST in part)
    expected = config.num_attention_heads * config.head_dim
    if 0 < rows < expected:
        problem = f"{len(parts)} files consolidated.*.pth hold {rows} of {expected} rows of a matrix"
        raise CheckpointError(f"{directory}: {problem}; fetch the missing ones")


def _joined(pieces: list[Tensor], axis: int | None, heads: int) -> Tensor:
    """The whole matrix; queries and keys of so many heads with each head's pairs half a head apart."""
    whole = pieces[0].clone() if axis is None else torch.cat(pieces, axis)
    if heads:
        whole = whole.view(heads, -1, 2, whole.shape[1]).transpose(1, 2).reshape(whole.shape)
    return whole
