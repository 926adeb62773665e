"""PyramidInfer, one sequence, as its definition reads and as slowly: every probability is kept, every list
rebuilt.

Written from the specification, not from the engine: positions are kept token by token, votes are summed over
the voters' remembered probabilities when a judgement is due.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from oracle import Oracle
from torch import Tensor

from minipyramid.pyramid import PyramidConfig


@dataclass
class LayerCache:
    positions: list[int] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)  # [K, D] by position
    values: dict[int, Tensor] = field(default_factory=dict)
    probs: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (voter, key): of every query head


def ratio(strategy: str, p: float, i: int, layers: int) -> float:
    if strategy == "cosine":
        return p + (1 - p) * (1 + math.cos(math.pi * i / layers)) / 2
    return 1 - (1 - p) * i / layers if strategy == "linear" else p


class SlowPyramid(Oracle):
    def __init__(self, directory: Path, pyramid: PyramidConfig) -> None:
        super().__init__(directory)
        self.pyramid = pyramid
        self.layers = [LayerCache() for _ in range(self.config["num_hidden_layers"])]

    def run(self, prompt: list[int], new: int) -> tuple[list[int], list[Tensor]]:
        """Greedy tokens and the scores that each was taken from; the last token is computed as well."""
        logits = [self.forward(prompt, 0, is_prompt=True)]
        tokens: list[int] = []
        judged = 0
        for _ in range(new):
            tokens.append(int(logits[-1].argmax()))
            logits.append(self.forward(tokens[-1:], len(prompt) + len(tokens) - 1, is_prompt=False))
            judged += self.judge(len(prompt), len(tokens), judged)
        return tokens, logits[:-1]

    def forward(self, ids: list[int], start: int, is_prompt: bool) -> Tensor:
        c, w, cfg = self.config, self.tensors, self.pyramid
        layers, heads = c["num_hidden_layers"], c["num_attention_heads"]
        D = c["hidden_size"] // heads
        group = heads // c["num_key_value_heads"]
        positions = list(range(start, start + len(ids)))
        N = len(ids)
        R = int(N * cfg.recent_ratio)
        m = min(cfg.min_context_length, N - 1 - R)
        x = w["model.embed_tokens.weight"][ids]
        for i, cache in enumerate(self.layers):
            p = f"model.layers.{i}."
            h = self.norm(x, w[p + "input_layernorm.weight"])
            q = self.turn((h @ w[p + "self_attn.q_proj.weight"].T).view(len(x), heads, D), positions)
            k = self.turn((h @ w[p + "self_attn.k_proj.weight"].T).view(len(x), -1, D), positions)
            v = (h @ w[p + "self_attn.v_proj.weight"].T).view(len(x), -1, D)
            for t, position in enumerate(positions):
                cache.positions.append(position)
                cache.keys[position], cache.values[position] = k[t], v[t]
            out = []
            for t, position in enumerate(positions):
                seen = [s for s in cache.positions if s <= position]
                keys = torch.stack([cache.keys[s] for s in seen]).repeat_interleave(group, 1)  # [n, H, D]
                values = torch.stack([cache.values[s] for s in seen]).repeat_interleave(group, 1)
                probs = (torch.einsum("hd,nhd->hn", q[t], keys) / math.sqrt(D)).softmax(-1)
                out.append(torch.einsum("hn,nhd->hd", probs, values).flatten())
                for other, prob in zip(seen, probs.T, strict=True):
                    cache.probs[position, other] = prob
            x = x + torch.stack(out) @ w[p + "self_attn.o_proj.weight"].T
            h = self.norm(x, w[p + "post_attention_layernorm.weight"])
            gate = h @ w[p + "mlp.gate_proj.weight"].T
            x = (
                x
                + (gate * gate.sigmoid() * (h @ w[p + "mlp.up_proj.weight"].T))
                @ w[p + "mlp.down_proj.weight"].T
            )
            s = ratio(cfg.prefill_decay_strategy, cfg.prefill_decay_ratio, i, layers)
            context, tail = positions[: len(positions) - 1 - R], positions[len(positions) - 1 - R :]
            count = int(len(context) * s)
            due = i + 1 >= cfg.prefill_full_layers and i % cfg.layerwise_downsample_interval == 0
            if is_prompt and due and len(context) > m and s < 1 and count > m:
                votes = {key: self.vote(cache, tail, key) for key in context}
                votes |= dict.fromkeys(context[: cfg.streamingllm_sink_len], math.inf)
                stay = sorted(sorted(context, key=lambda key: -votes[key])[:count]) + tail
                x = x[[positions.index(position) for position in stay]]
                positions = stay
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self.norm(x[-1], w["model.norm.weight"]) @ head.T

    def judge(self, prompt: int, generated: int, judged: int) -> int:
        """Judge the pending tokens of every layer if enough are; returns how many were."""
        cfg, total = self.pyramid, prompt + generated
        R = int(total * cfg.recent_ratio)
        pending = [s for s in range(prompt + judged, total) if s < total - 1 - R]
        if len(pending) < cfg.exceed_length_to_compress:
            return 0
        for i, cache in enumerate(self.layers):
            s = ratio(cfg.gen_decay_strategy, cfg.gen_decay_ratio, i, len(self.layers))
            count = max(1, int(cfg.exceed_length_to_compress * cfg.gen_compress_ratio * s))
            votes = {key: self.vote(cache, list(range(total - 1 - R, total)), key) for key in pending}
            stay = sorted(pending, key=lambda key: -votes[key])[:count]
            cache.positions = [s for s in cache.positions if s not in pending or s in stay]
        return len(pending)

    def vote(self, cache: LayerCache, voters: list[int], key: int) -> float:
        weights = torch.linspace(1, self.pyramid.distance_weight, len(voters)).tolist()
        none = torch.zeros(self.config["num_attention_heads"])
        looked = [w * cache.probs.get((v, key), none) for w, v in zip(weights, voters, strict=True)]
        heads = torch.stack(looked).sum(0) / len(voters)
        return float(heads.mean())

    @staticmethod
    def turn(x: Tensor, positions: list[int]) -> Tensor:
        D = x.shape[-1]
        angles = torch.outer(
            torch.tensor(positions).double(), 10000.0 ** (-torch.arange(0, D, 2).double() / D)
        )
        pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
        pairs = pairs * torch.polar(torch.ones(()).double(), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), -1).float()
