"""The Llama decoder: a packed list of tokens in, their last hidden states out, keys and values into the cache.

No padding is ever computed. The tokens of all sequences lie one after the other in one axis `T`, which is all that
norms, projections and feed-forward need to know; only attention takes them apart again. It does so in two ways:
`extend` runs many tokens of some sequences, prompts above all, and prunes between layers; `step` runs one token of
every sequence of some caches.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipyramid.attention import attend, attend_each
from minipyramid.cache import KVCache, LayerCache, Span
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError
from minipyramid.linear import Linear
from minipyramid.pyramid import keep
from minipyramid.rope import inverse_frequencies, rotate_, rotations

# Tokens that the feed-forward runs over at a time, by device, for its activation (2 * intermediate_size) is the widest
# and is quickest where it stays near the processor: 8 prompts of 512 tokens took 7.4 s in pieces of 4,096 tokens on two
# CPU cores, and 6.4 s in pieces of 512 (12 layers, hidden size 768, float32).
PIECES = {"cpu": 512, "cuda": 4096, "mps": 4096}


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
        self.o_proj = Linear(hidden, self.heads[0] * D)
        self.post_attention_layernorm = nn.Parameter(torch.empty(hidden))
        self.gate_up_proj = Linear(2 * ffn, hidden)
        self.down_proj = Linear(hidden, ffn)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries [T, H, D] and keys [T, K, D], rotated, and values [T, K, D], of the normed input."""
        qkv = self.qkv_proj(rms_norm(x, self.input_layernorm, self.config))
        heads = qkv.view(len(x), sum(self.heads), -1)
        rotate_(heads[:, : -self.heads[2]], cos, sin)
        return torch.split(heads, self.heads, dim=1)

    def residual(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add to the tokens what attention found, and SwiGLU of that.  [T, hidden_size], [T, H * D] -> like x"""
        x = x + self.o_proj(mixed)
        for piece in torch.split(x, PIECES[x.device.type]):
            normed = rms_norm(piece, self.post_attention_layernorm, self.config)
            gate, up = self.gate_up_proj(normed).chunk(2, dim=-1)
            piece.add_(self.down_proj(F.silu(gate).mul_(up)))
        return x

    def step(self, x: Tensor, rotation: tuple[Tensor, Tensor], caches: Sequence[LayerCache]) -> Tensor:
        """One token of every row of some caches.  x [B, hidden_size], rotation two of [B, 1, D / 2]  ->  like x"""
        q, k, v = self.qkv(x, *rotation)
        counts = [len(cache.ends) for cache in caches]
        by_cache = [torch.split(t, counts) for t in (q / math.sqrt(self.config.head_dim), k, v)]
        mixed = []
        for cache, query, key, value in zip(caches, *by_cache, strict=True):
            out, probs = attend_each(query, *cache.append(key, value))  # [rows of this cache, H * D]
            cache.vote(probs)
            mixed.append(out)
        return self.residual(x, torch.cat(mixed))


class Model(nn.Module):
    """Parameters are created where the caller says (`torch.device("meta")` to load a checkpoint)."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = Linear(config.vocab_size, config.hidden_size)
        self.layer_step = Layer.step  # or what that is compiled to
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def extend(self, ids: Tensor, spans: Sequence[Span], *, every: bool = False) -> Tensor:
        """Append tokens of some sequences to what their caches hold.

        They attend to what each layer holds and to themselves, causally. Those of a prompt are pruned: what is
        dropped after a layer is in no deeper one.

        ids [T] packed, span after span  ->  the last layer's hidden states, before the last norm, of each span's last
        token [B, hidden_size], or of all [T, hidden_size] if `every` is asked for (and nothing pruned)
        """
        layers = self.config.num_hidden_layers
        positions = torch.cat([span.positions() for span in spans]).to(ids.device)  # [T]
        cos, sin = rotations(positions, self.inv_freq, self.embed_tokens.dtype)  # [T, 1, D / 2]
        planned = [span.lengths(layers) for span in spans]
        x = F.embedding(ids, self.embed_tokens)  # [T, hidden_size]
        for i, layer in enumerate(cast("Iterable[Layer]", self.layers)):
            q, k, v = layer.qkv(x, cos, sin)
            mixed, kept, start = [], [], 0
            for span, lengths in zip(spans, planned, strict=True):
                end = start + lengths[i]
                keys, values = span.cache.append(i, span.row, k[start:end], v[start:end], positions[start:end])
                # Of the last layer all keys and values are wanted, but only what it makes of the last token.
                first = start if every or i < layers - 1 else end - 1
                out, logsumexp = attend(q[first:end], keys, values)
                mixed.append(out)
                kept.append(torch.arange(first, end, device=ids.device))
                if span.pyramid and i < layers - 1 and lengths[i + 1] < lengths[i]:
                    best = keep(span.pyramid, q[start:end], keys, logsumexp, lengths=lengths, layer=i)
                    mixed[-1], kept[-1] = out[best], start + best
                start = end
            # Before the projection and feed-forward, which nobody would read of a dropped token.
            if sum(map(len, kept)) < len(x):
                x, positions, cos, sin = (t[torch.cat(kept)] for t in (x, positions, cos, sin))
            x = layer.residual(x, torch.cat(mixed))
        for span in spans:
            span.cache.rows[span.row].position += span.count
        return x

    def step(self, ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Run one more token of every row of every cache, and count its vote where it has one.

        Where the time goes, of 8 sequences with 540 tokens each (12 layers, hidden size 768, float32, two CPU cores):
        linear layers 57 %, attention's two products 29 %, copies into the cache and out of q, k and v 4 %, norms 3 %,
        everything else less than 1 % each. 8 rows are too many for a product to run at the rate at which its weight is
        read (1 row: 20 GB/s, 8 rows: 13), and too few for it to run at the rate of a prompt's.

        ids [B], the caches' rows one after the other  ->  the last layer's hidden states [B, hidden_size]
        """
        positions = torch.tensor([row.position for cache in caches for row in cache.rows], device=ids.device)
        rotation = rotations(positions, self.inv_freq, self.embed_tokens.dtype)  # two of [B, 1, D / 2]
        x = F.embedding(ids, self.embed_tokens)  # [B, hidden_size]
        for layer, *parts in zip(self.layers, *(cache.begin_step() for cache in caches), strict=True):
            x = self.layer_step(layer, x, rotation, parts)
        for cache in caches:
            cache.end_step()
        return x

    def compile_step(self) -> None:
        """From now on steps run compiled, one graph per layer, the same for all layers.

        As one graph, all 12 layers took 54 s to compile instead of 8, and a step then 11 ms instead of 12.5 (uncompiled
        16; 8 sequences, hidden size 192, float32, two CPU cores). Raises `ConfigError` where it cannot be done.
        """
        try:
            torch.compile(torch.neg)(self.norm)
        except (RuntimeError, OSError) as error:
            inner = getattr(error, "inner_exception", error)  # what its first line would not say
            why = (str(inner).strip() or type(inner).__name__).splitlines()[0]
            raise ConfigError(f"compile cannot be used here; leave it out, or see to its compiler ({why})") from error
        # The sizes of slabs differ by layer and request; as symbols they share one graph.
        self.layer_step = torch.compile(Layer.step, dynamic=True)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token.  [T, hidden_size] -> [T, vocab_size] float32"""
        return self.lm_head(rms_norm(x, self.norm, self.config)).float()
