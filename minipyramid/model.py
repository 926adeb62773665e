"""The Llama decoder: a packed list of tokens in, their last hidden states out, keys and values into the cache.

Sequences are never padded. The tokens of all of them lie one after the other in one axis `T`, which is all that
norms, projections and feed-forward need to know; only attention takes them apart again. So a batch of prompts
of any lengths, one more token of each sequence, and a continuation of one are the same call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipyramid.attention import attend, attend_one_each
from minipyramid.cache import KVCache
from minipyramid.config import ModelConfig
from minipyramid.pyramid import PyramidConfig, Voting, keep
from minipyramid.rope import inverse_frequencies, rotate, rotations


def rms_norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """Scale each token's vector to a root mean square of 1, then by `weight`.  [T, hidden_size] -> same"""
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


class Layer(nn.Module):
    """Attention, then SwiGLU, each on a normed input and added to the residual stream.

    Projections that read the same input are one matrix: q, k and v; gate and up.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, ffn, D = config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = nn.Parameter(torch.empty(hidden))
        self.qkv_proj = nn.Parameter(torch.empty((H + 2 * K) * D, hidden))
        self.o_proj = nn.Parameter(torch.empty(hidden, H * D))
        self.post_attention_layernorm = nn.Parameter(torch.empty(hidden))
        self.gate_up_proj = nn.Parameter(torch.empty(2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, ffn))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D] and keys [T, K, D], rotated, and values [T, K, D], of the normed input."""
        H, K, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        heads = F.linear(rms_norm(x, self.input_layernorm, self.config), self.qkv_proj).view(-1, H + 2 * K, D)
        q, k = torch.split(rotate(heads[:, : H + K], cos, sin), [H, K], dim=1)
        return q, k, heads[:, H + K :]

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU of the normed input.  [T, hidden_size] -> same"""
        gate, up = F.linear(rms_norm(x, self.post_attention_layernorm, self.config), self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class Model(nn.Module):
    """Parameters are created where the caller says (`torch.device("meta")` to load a checkpoint)."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(
        self,
        ids: Tensor,
        counts: list[int],
        rows: list[int],
        cache: KVCache,
        *,
        pyramid: PyramidConfig | None = None,
        voting: Voting | None = None,
    ) -> Tensor:
        """Run `counts[i]` new tokens of the sequence in row `rows[i]`, for every i, and append them to the cache.

        With `pyramid` the tokens are prompts, and what is dropped after a layer is in no deeper one. With `voting`
        they are one generated token of every row, which votes for those before it.

        ids [T] packed, T = sum(counts)  ->  the last layer's hidden states, before the last norm  [T', hidden_size]
        """
        starts = [cache.positions[row] for row in rows]
        spans = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        positions = torch.cat(spans).to(ids.device)  # [T]
        cos, sin = rotations(positions, self.inv_freq, self.embed_tokens.dtype)  # [T, 1, D / 2]
        # One more token of every row: all of them attend in one batched product.
        one_each = pyramid is None and max(counts) == 1 and rows == list(range(len(cache.positions)))
        prompts = counts
        planned = [pyramid.prompt_lengths(n, self.config.num_hidden_layers) for n in prompts] if pyramid else []
        # Of all layers at once: a copy to the device for each would stall it as often.
        lengths = torch.tensor(cache.lengths, device=ids.device) if one_each else None  # [L, B]
        x = F.embedding(ids, self.embed_tokens)  # [T, hidden_size]
        for i, layer in enumerate(cast("Iterable[Layer]", self.layers)):
            q, k, v = layer.qkv(x, cos, sin)
            if lengths is not None:
                mixed, probs = attend_one_each(q, *cache.append_one_each(i, k, v, lengths[i]))  # [T, H * D]
                if voting is not None:
                    cache.vote(i, probs.mean((1, 2)), voting, lengths[i])
            else:
                queries = torch.split(q, counts)
                parts = zip(rows, *(torch.split(t, counts) for t in (k, v, positions)), strict=True)
                held = [cache.append(i, *part) for part in parts]
                mixed = torch.cat([attend(q_, *kv) for q_, kv in zip(queries, held, strict=True)])  # [T, H * D]
                if pyramid is not None and i + 1 < len(planned[0]):
                    kept = keep(pyramid, queries, [keys for keys, _ in held], prompts, [p[i + 1] for p in planned])
                    # Before the projection and feed-forward, which nobody would read of a dropped token.
                    x, mixed, positions, cos, sin = (t[torch.cat(kept)] for t in (x, mixed, positions, cos, sin))
                    counts = [len(k) for k in kept]
            x = x + F.linear(mixed, layer.o_proj)
            x = x + layer.mlp(x)
        for row, count in zip(rows, prompts, strict=True):
            cache.positions[row] += count
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token.  [T, hidden_size] -> [T, vocab_size] float32"""
        return F.linear(rms_norm(x, self.norm, self.config), self.lm_head).float()
