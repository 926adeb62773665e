"""A Llama written to be obviously right and for nothing else: float32, one sequence, no cache, head by head.

It reads the checkpoint's own tensors and `config.json` and shares no line with the engine.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Oracle:
    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = {name: t.float() for name, t in load_file(directory / "model.safetensors").items()}

    def logits(self, ids: list[int]) -> Tensor:
        """Every position's scores of its next token, all recomputed.  [T, vocab_size]"""
        c, w = self.config, self.tensors
        T, heads = len(ids), c["num_attention_heads"]
        D = c.get("head_dim") or c["hidden_size"] // heads
        group = heads // (c.get("num_key_value_heads") or heads)
        theta = c["rope_theta"] if "rope_theta" in c else c["rope_parameters"]["rope_theta"]
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            h = self.norm(x, w[p + "input_layernorm.weight"])
            out = []
            for head in range(heads):
                rows = slice(head * D, (head + 1) * D)
                shared = slice(head // group * D, (head // group + 1) * D)
                q = self.rotate(h @ w[p + "self_attn.q_proj.weight"][rows].T, theta)
                k = self.rotate(h @ w[p + "self_attn.k_proj.weight"][shared].T, theta)
                v = h @ w[p + "self_attn.v_proj.weight"][shared].T
                scores = q @ k.T / math.sqrt(D)
                scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
                out.append(scores.softmax(-1) @ v)
            x = x + torch.cat(out, -1) @ w[p + "self_attn.o_proj.weight"].T
            h = self.norm(x, w[p + "post_attention_layernorm.weight"])
            gate = h @ w[p + "mlp.gate_proj.weight"].T
            up = h @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
        head_weight = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self.norm(x, w["model.norm.weight"]) @ head_weight.T

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """`new` tokens, each after recomputing all."""
        ids = list(ids)
        for _ in range(new):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-new:]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        eps = float(self.config["rms_norm_eps"])
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    @staticmethod
    def rotate(x: Tensor, theta: float) -> Tensor:
        """As complex numbers, unlike the engine."""
        T, D = x.shape
        angles = torch.outer(torch.arange(T).double(), theta ** (-torch.arange(0, D, 2).double() / D))
        pairs = torch.complex(x[:, : D // 2].double(), x[:, D // 2 :].double()) * torch.polar(
            torch.ones(()).double(), angles
        )
        return torch.cat((pairs.real, pairs.imag), -1).float()
