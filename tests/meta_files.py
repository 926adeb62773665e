"""Checkpoints as Meta's own code saves them, of the same weights as the others in the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import TINY, random_tensors

CONFIG = {**TINY, "intermediate_size": 96, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}


def write_meta(directory: Path, count: int, llama3: bool, **params: Any) -> None:
    """The same weights as Meta's code would have saved them on `count` devices."""
    tensors, D = random_tensors(CONFIG), 8
    kinds = {"self_attn.q_proj": ("attention.wq", 0, 4), "self_attn.k_proj": ("attention.wk", 0, 2),
             "self_attn.v_proj": ("attention.wv", 0, 0), "self_attn.o_proj": ("attention.wo", 1, 0),
             "mlp.gate_proj": ("feed_forward.w1", 0, 0), "mlp.up_proj": ("feed_forward.w3", 0, 0),
             "mlp.down_proj": ("feed_forward.w2", 1, 0), "input_layernorm": ("attention_norm", None, 0),
             "post_attention_layernorm": ("ffn_norm", None, 0), "model.norm": ("norm", None, 0),
             "model.embed_tokens": ("tok_embeddings", 0 if llama3 else 1, 0),
             "lm_head": ("output", 0, 0)}  # fmt: skip
    parts: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(count)]
    for name, tensor in tensors.items():
        key = next(
            key
            for key in kinds
            if f"{key}.weight" in name and (key != "model.norm" or name == "model.norm.weight")
        )
        meta, axis, heads = kinds[key]
        whole = tensor
        if heads:  # component 2 i there is component i here, and 2 i + 1 is i + D / 2
            order = [half * D // 2 + i for i in range(D // 2) for half in range(2)]
            whole = tensor.view(heads, D, -1)[:, order].reshape(tensor.shape)
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else ""
        full = f"layers.{layer}.{meta}.weight" if layer else f"{meta}.weight"
        cut = [whole] * count if axis is None else whole.chunk(count, axis)
        for part, piece in zip(parts, cut, strict=True):
            part[full] = piece.clone()
    for i, part in enumerate(parts):
        torch.save(part, directory / f"consolidated.0{i}.pth")
    (directory / "params.json").write_text(json.dumps({**PARAMS, **params}))
