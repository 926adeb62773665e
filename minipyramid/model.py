"""The Llama decoder: a packed list of tokens in, their last hidden states out, keys and values into the
cache.

No padding is ever computed. The tokens of all sequences lie one after the other in one axis `T`, which is all
that norms, projections and feed-forward need to know; only attention takes them apart again. Two ways lead
through the layers: `extend` runs many tokens of some sequences, prompts above all, and prunes between layers;
`step` runs one token of every sequence of some caches.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipyramid.attention import attend
from minipyramid.cache import KVCache, LayerCache, Span
from minipyramid.config import ModelConfig
from minipyramid.linear import Linear
from minipyramid.policy import Seen
from minipyramid.rope import inverse_frequencies, rotate_, rotations

# Tokens that the feed-forward runs over at a time, by device. Its activation (2 * intermediate_size) is the
# widest, and is quickest where it stays near the processor: 8 prompts of 512 tokens took 7.4 s in pieces of
# 4,096 tokens on two AVX2 cores, and 6.4 s in pieces of 512 (12 layers, hidden size 768, float32).
MLP_PIECE = {"cpu": 512, "cuda": 4096, "mps": 4096}


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
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.input_layernorm = nn.Parameter(torch.empty(hidden))
        self.qkv_proj = Linear(sum(self.heads) * D, hidden)
        if config.qkv_bias:
            self.qkv_bias = nn.Parameter(torch.empty(sum(self.heads) * D))
        if config.head_norms:
            self.q_norm, self.k_norm = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.o_proj = Linear(hidden, self.heads[0] * D)
        self.post_attention_layernorm = nn.Parameter(torch.empty(hidden))
        self.gate_up_proj = Linear(2 * ffn, hidden)
        self.down_proj = Linear(hidden, ffn)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries [T, H, D] and keys [T, K, D], rotated, and values [T, K, D], of the normed input."""
        qkv = self.qkv_proj(rms_norm(x, self.input_layernorm, self.config))
        if self.config.qkv_bias:
            qkv += self.qkv_bias
        heads = qkv.view(len(x), sum(self.heads), -1)
        if self.config.head_norms:
            q, k, _ = torch.split(heads, self.heads, dim=1)
            q.copy_(rms_norm(q, self.q_norm, self.config))
            k.copy_(rms_norm(k, self.k_norm, self.config))
        rotate_(heads[:, : -self.heads[2]], cos, sin)
        return torch.split(heads, self.heads, dim=1)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU of the normed input.  [T, hidden_size] -> same"""
        normed = rms_norm(x, self.post_attention_layernorm, self.config)
        gate, up = self.gate_up_proj(normed).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))

    def add_attention_and_mlp(self, x: Tensor, attended: Tensor) -> Tensor:
        """The two residual additions.  [T, hidden_size], [T, H * D] -> like x"""
        x = x + self.o_proj(attended)
        for piece in torch.split(x, MLP_PIECE[x.device.type]):
            piece.add_(self.mlp(piece))
        return x

    def step(self, x: Tensor, rotation: tuple[Tensor, Tensor], caches: list[LayerCache]) -> Tensor:
        """One token of every row of some caches; rotation two of [B, 1, D / 2].  [B, hidden_size] -> same"""
        q, k, v = self.qkv(x, *rotation)
        counts = [len(cache.ends) for cache in caches]
        each = (torch.split(t, counts) for t in (q / math.sqrt(self.config.head_dim), k, v))  # q, k and v
        # Of each cache's rows.  [rows, H * D]
        attended = [cache.attend(*qkv) for cache, *qkv in zip(caches, *each, strict=True)]
        return self.add_attention_and_mlp(x, torch.cat(attended))


def attend_and_hold(
    span: Span, layer: int, parts: list[Tensor], *, held: int, passed_on: int
) -> tuple[Tensor, Tensor]:
    """One layer's attention for the new tokens of one sequence; then the policy chooses.

    The tokens look at all that the layer holds and computes, so what it puts out is exact. Then its cache
    holds `held` of the prompt, guesses that it has already among them: of the T tokens that many, or all if
    they are fewer. It passes `passed_on` of them on to the next layer.

    parts, of the T tokens: hidden states [T, hidden_size], positions [T], their cosines and sines, q, k and v
    ->  what attention found for those passed on [passed_on, H * D], and which they are [passed_on]
    """
    x, positions, cos, sin, q = parts[:5]  # [T, hidden_size], [T], two of [T, 1, D / 2], [T, H, D]
    k, v = (t.transpose(0, 1) for t in parts[5:])  # two of [K, T, D]
    T, row = len(q), span.row
    keys, values, of_keys = k, v, positions
    if row.lengths[layer]:
        keys, values = (torch.cat(pair, 1) for pair in zip(row.read(layer), (k, v), strict=True))  # [K, n, D]
        of_keys = torch.cat((row.kept[layer][0], positions))  # [n]
    # After the last layer only the newest token is wanted, so no other query is asked.
    newest_only = passed_on == 1 and layer == len(row.lengths) - 1
    asking = slice(T - 1 if newest_only else 0, T)
    out, logsumexp = attend(q[asking], keys, values, positions[asking], of_keys)
    of_all = None if newest_only and T > 1 else logsumexp  # of every query, or not at all
    looked_over = None
    if span.looked_over and layer < len(span.looked_over):
        looked_over = span.looked_over[layer][:, positions - row.position]  # [K, T]
    seed = span.seed * len(row.lengths) + layer
    seen = Seen(q, keys, values, of_all, (cos, sin), x, out, layer, span.count, seed, looked_over)
    everything = torch.arange(T, device=q.device)
    chosen = span.policy.hold(seen, held) if held < T else everything  # [min(held, T)] or [K, held]
    row.write(layer, *span.policy.entries(seen, chosen), positions[chosen])
    if newest_only or passed_on == T:
        return out, everything[-passed_on:]
    which = span.policy.pass_on(seen, passed_on)
    for deeper, keys, values, guessed in span.policy.guess(seen, which):
        row.write(deeper, keys, values, positions[guessed])
    return out[which], which


class Model(nn.Module):
    """The decoder. Parameters are created where the caller says (`torch.device("meta")` to load weights)."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = Linear(config.vocab_size, config.hidden_size)
        self.layer_step = Layer.step  # or what `minipyramid/compiled.py` makes of it
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def extend(self, ids: Tensor, spans: list[Span], *, all_positions: bool = False) -> Tensor:
        """Append tokens of some sequences to what their caches hold.

        They attend to what each layer holds and to themselves, causally. Prompt tokens are pruned between
        layers; a token that layer i does not pass on never reaches layer i + 1.

        ids [T] packed, span after span  ->  the last layer's hidden states, before the last norm, of each
        span's last token [B, hidden_size], or of all [T, hidden_size] if `all_positions` are asked for (and
        nothing is pruned)
        """
        L = self.config.num_hidden_layers
        # They follow what each sequence has computed so far.
        positions = torch.cat([s.row.position + torch.arange(s.count, device=ids.device) for s in spans])
        cos, sin = rotations(positions, self.inv_freq, self.embed_tokens.dtype)  # [T, 1, D / 2]
        held = [s.policy.held(s.count, L) for s in spans]
        # [span][layer], and what passes the last layer.
        computed = [[*s.policy.computed(s.count, L), s.count if all_positions else 1] for s in spans]
        x = F.embedding(ids, self.embed_tokens)  # [T, hidden_size]
        for i, layer in enumerate(cast("Iterable[Layer]", self.layers)):
            counts = [lengths[i] for lengths in computed]
            parts = (torch.split(t, counts) for t in (x, positions, cos, sin, *layer.qkv(x, cos, sin)))
            attended, remaining, start = [], [], 0
            for span, holds, lengths, *part in zip(spans, held, computed, *parts, strict=True):
                out, which = attend_and_hold(span, i, part, held=holds[i], passed_on=lengths[i + 1])
                attended.append(out)
                remaining.append(start + which)
                start += lengths[i]
            # Before the projection and feed-forward, which nobody would read of a dropped token.
            if sum(map(len, remaining)) < len(x):
                x, positions, cos, sin = (t[torch.cat(remaining)] for t in (x, positions, cos, sin))
            x = layer.add_attention_and_mlp(x, torch.cat(attended))
        for span in spans:
            span.row.position += span.count
        return x

    def step(self, ids: Tensor, caches: list[KVCache]) -> Tensor:
        """Run one more token of every row of every cache, and count its vote where it has one.

        Where the time goes, of 8 sequences with 540 tokens each (12 layers, hidden size 768, two cores with
        AVX512-BF16), in float32 and in bf16: linear layers 55 and 49 %, attention's two products 32 and 28 %,
        copies of q, k and v and into the cache 4 and 6 %, norms 2 and 4 %, the rest in small pieces.
        Attention's products read memory at its rate, and so do linear layers of 1 row. With 8 rows a linear
        layer takes 1.6 times as long as reading its weight.

        ids [B], the caches' rows one after the other  ->  the last layer's hidden states [B, hidden_size]
        """
        positions = torch.tensor([row.position for cache in caches for row in cache.rows], device=ids.device)
        rotation = rotations(positions, self.inv_freq, self.embed_tokens.dtype)  # two of [B, 1, D / 2]
        x = F.embedding(ids, self.embed_tokens)  # [B, hidden_size]
        by_cache = [cache.begin_step() for cache in caches]
        for i, layer in enumerate(cast("Iterable[Layer]", self.layers)):
            x = self.layer_step(layer, x, rotation, [layers[i] for layers in by_cache])
        for cache in caches:
            cache.end_step()
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next token.  [T, hidden_size] -> [T, vocab_size] float32"""
        return self.lm_head(rms_norm(x, self.norm, self.config)).float()
