"""Other ways to hold less of a prompt, at equal bytes: what PyramidInfer is compared with.

All of these compute every layer over the whole prompt, and prune a layer's keys and values once it is computed; only
the pyramid drops hidden states as well (it prunes within `Model.extend`, so it stands here as settings and not as a
policy). A policy is one function: from what a layer has computed to the positions that each of its key/value heads
keeps. The votes of query heads that share a key/value head are added up. What follows the prompt is kept by all of
these policies: the window of StreamingLLM does not roll on here, and H2O does not evict while it generates.

    full        everything
    streaming   Xiao et al., 2023 (StreamingLLM): the first four tokens and the newest; positions stay as they are
    h2o         Zhang et al., 2023: half of the newest, half of what all queries together looked at most
    snapkv      Li et al., 2024: the newest, and what they look at, its votes averaged over neighbours
    pyramidkv   Cai et al., 2024: snapkv, but the deeper a layer, the fewer tokens beside the newest
    random      the first four and any others

How many tokens each layer holds and which ones are two questions. All of these but pyramidkv hold equally many in every
layer; with `-split` behind their names they hold as many in each as the pyramid does, so that only the choice differs.

To add a policy, write a function from (Seen, count >= 1) to positions [K, count], if its layers shall differ also a
split that adds up to the total with no layer above the prompt, and give it a line in BASELINES: it has a row in
`python -m minipyramid.eval` then. What drops hidden states cannot be a policy here; its place is `pyramid.keep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minipyramid import LLM, PyramidConfig
from minipyramid.attention import attend
from minipyramid.cache import KVCache, Span
from minipyramid.model import Layer
from minipyramid.plan import Need, need
from minipyramid.pyramid import Gathering
from minipyramid.rope import rotations

SINKS = 4  # as in StreamingLLM
WINDOW, POOL = 32, 5  # SnapKV's observation window, and over how many tokens a vote is averaged, as in its public code
STEEPNESS = 20  # PyramidKV's beta: the deepest layer has a 20th of the mean
BLOCK = 256  # queries whose probabilities are held at a time


@dataclass(frozen=True)
class Seen:
    """What one layer computed of a prompt of n tokens."""

    q: Tensor  # [n, H, D] rotated
    keys: Tensor  # [K, n, D] rotated
    values: Tensor  # [K, n, D]
    seed: int = 0  # of each layer and prompt its own

    def probs(self, start: int, end: int | None = None) -> Tensor:
        """Attention probabilities of the queries from `start` on, the heads of a group together.  [K, G, q, n]"""
        (n, H, D), K = self.q.shape, len(self.keys)
        some = self.q[start:end]
        q = some.transpose(0, 1).reshape(K, H // K, len(some), D)
        scores = (q @ self.keys[:, None].transpose(-1, -2)).float() / math.sqrt(D)
        unseen = torch.ones(len(some), n, dtype=torch.bool, device=q.device).triu(start + 1)
        return scores.masked_fill_(unseen, -math.inf).softmax(-1)


Choose = Callable[[Seen, int], Tensor]  # how many to keep -> positions, ascending, of every head  [K, count]


def everything(seen: Seen, count: int) -> Tensor:
    return best_of(torch.zeros(seen.keys.shape[:2]), count)


def streaming(seen: Seen, count: int) -> Tensor:
    """The first four and the newest."""
    return best_of(torch.arange(seen.keys.shape[1]).expand(len(seen.keys), -1).float(), count, first=SINKS)


def random(seen: Seen, count: int) -> Tensor:
    """The first four and any others, of every layer and head its own."""
    drawn = torch.Generator().manual_seed(seen.seed)
    return best_of(torch.rand(seen.keys.shape[:2], generator=drawn), count, first=SINKS)


def h2o(seen: Seen, count: int) -> Tensor:
    """Half of the room for the newest, half for those that all queries together looked at most."""
    n = seen.keys.shape[1]
    # A block of queries at a time, for a whole matrix of probabilities would not fit for a long prompt.
    looked = sum(seen.probs(start, start + BLOCK).sum((1, 2)) for start in range(0, n, BLOCK))
    return best_of(cast("Tensor", looked), count, last=count // 2)


def snapkv(seen: Seen, count: int) -> Tensor:
    """The newest 32, or all but a 20th of a smaller count, and what they look at most."""
    n = seen.keys.shape[1]
    window = min(WINDOW, count - count // 20)
    vote = seen.probs(n - window).sum((1, 2))  # [K, n]
    if window < n:
        before = vote[:, : n - window]
        vote[:, : n - window] = F.avg_pool1d(before, POOL, 1, POOL // 2, count_include_pad=False)
    return best_of(vote, count, last=window)


def best_of(vote: Tensor, count: int, first: int = 0, last: int = 0) -> Tensor:
    """Positions of the highest votes, vote [K, n]; the first and last so many win, or the earlier.  [K, count]"""
    vote = vote.clone()
    vote[:, :first] = math.inf
    vote[:, vote.shape[1] - last :] = math.inf
    return vote.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def evenly(total: int, layers: int, _tokens: int) -> list[int]:
    """The same for every layer."""
    return [total // layers + (i < total % layers) for i in range(layers)]


def falling(total: int, layers: int, tokens: int) -> list[int]:
    """Every layer has the newest, and beside them the more the shallower it is, along a line.

    The deepest layer has a 20th of the mean beside them, or more where the first would get more than there is.
    """
    newest = min(WINDOW, total // (2 * layers))
    mean = total / layers - newest
    slope = min(mean - mean / STEEPNESS, tokens - newest - mean)
    # Sums up to each layer are rounded, and not each layer's share, so that they come to the total.
    ends = [mean * (i + 1) + slope * (i + 1) * (1 - i / max(1, layers - 1)) for i in range(layers)]
    ends[-1] = float(total - layers * newest)
    return [newest + round(b) - round(a) for a, b in zip([0.0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True)
class Baseline:
    """Which tokens a layer keeps, and how many each layer may keep."""

    choose: Choose
    # (total, layers, tokens of the prompt) -> each layer's; None for as many as the pyramid has there
    split: Callable[[int, int, int], list[int]] | None = evenly


BASELINES = {
    "full": Baseline(everything),
    "streaming": Baseline(streaming),
    "h2o": Baseline(h2o),
    "snapkv": Baseline(snapkv),
    "pyramidkv": Baseline(snapkv, falling),
    "random": Baseline(random),
    "streaming-split": Baseline(streaming, None),
    "snapkv-split": Baseline(snapkv, None),
    "random-split": Baseline(random, None),
}


def kv_bytes(cache: KVCache) -> int:
    """Keys and values of the first row, as they stand in the cache."""
    return cache.bytes_per_token * sum(cache.rows[0].lengths)


@torch.inference_mode()
def observe(llm: LLM, ids: list[int], seed: int = 0) -> list[Seen]:
    """Compute a whole prompt, nothing dropped; what each layer saw."""
    model, seen = llm.model, []
    positions = torch.arange(len(ids), device=llm.device)
    cos, sin = rotations(positions, model.inv_freq, llm.dtype)
    x = F.embedding(torch.tensor(ids, device=llm.device), model.embed_tokens)  # [n, hidden_size]
    for i, layer in enumerate(cast("Iterable[Layer]", model.layers)):
        q, k, v = layer.qkv(x, cos, sin)
        seen.append(Seen(q, k.transpose(0, 1), v.transpose(0, 1), seed * len(model.layers) + i))
        x = layer.residual(x, attend(q, seen[-1].keys, seen[-1].values)[0])
    return seen


@torch.inference_mode()
def hold(llm: LLM, seen: list[Seen], baseline: Baseline, held: list[int], room: int) -> KVCache:
    """Put what a policy keeps of an observed prompt into a cache of one row.

    Args:
        held: tokens that the pyramid holds in each layer; the policy has as many over all layers.
        room: tokens that may follow.
    """
    n = len(seen[0].q)
    counts = baseline.split(sum(held), len(seen), n) if baseline.split else held
    cache = KVCache.allot(llm.config, Need(tuple(c + room for c in counts)), 1, llm.dtype, llm.device)
    cache.add_row()
    for i, (layer, count) in enumerate(zip(seen, counts, strict=True)):
        kept = baseline.choose(layer, count).to(llm.device)  # [K, count]
        k, v = (t.gather(1, kept[..., None].expand(-1, -1, t.shape[2])) for t in (layer.keys, layer.values))
        # A cache counts positions by layer, not by head: those of the first head stand for all.
        cache.append(i, 0, k.transpose(0, 1), v.transpose(0, 1), kept[0])
    cache.rows[0].position = n
    return cache


@torch.inference_mode()
def hold_pyramid(llm: LLM, ids: list[int], settings: PyramidConfig, room: int, new_tokens: int = 0) -> KVCache:
    """The same by PyramidInfer, whose deep layers never compute what shallow ones have dropped.

    Args:
        new_tokens: tokens that will be generated, and judged; 0 where all that follows is kept.
    """
    layers = llm.config.num_hidden_layers
    needed = need(settings, len(ids), new_tokens, layers).beside([room] * layers)
    cache = KVCache.allot(llm.config, needed, 1, llm.dtype, llm.device)
    cache.add_row(Gathering(settings, len(ids), new_tokens) if new_tokens else None)
    llm.model.extend(torch.tensor(ids, device=llm.device), [Span(cache, 0, len(ids), settings)])
    return cache
