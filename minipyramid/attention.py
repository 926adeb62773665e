"""Causal attention with grouped key/value heads, and how much the newest tokens look at the others.

Prompts and single steps are fastest with different code. A prompt's queries go through torch's fused kernel,
which on a CPU never holds the matrix of probabilities, and which handles query heads that share a key/value
head. One query per sequence is two small products, in which such heads become an axis of a matrix: on two CPU
cores the fused kernel took 3.25 ms where product, softmax, product took 0.37 ms (8 sequences, 12 heads, 576
keys, bf16). In neither is a key repeated.

Letters, here and in every file: `B` sequences, `T` tokens (of one sequence, or of several one after the
other), `H` query heads, `K` key/value heads, `G = H / K`, `D` head size, `S` slots of a cache's layer, `n`
keys of one sequence, `N` tokens of a prompt, `P` slots of a page, `L` layers, `V` voters, `U` places for
pending tokens.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The fused kernel of the CPU by its own name, for it also tells how large the sum under each softmax was,
# which makes the votes twice as fast. The name is private, so it may be missing.
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
# Queries at a time of tokens that follow held ones, so that their mask [BLOCK, n] stays small.
BLOCK = 256
# Where keys times queries is quicker than queries times keys: 1.34 ms against 2.43 (32 sequences of 544
# slots, 12 heads, a processor with AMX; others were not measured), and a whole step 61.8 against 80.9. In
# float32 it took 4.9 against 2.8.
KEYS_FIRST = ("cpu", torch.bfloat16)
# Voters whose probabilities are held at a time.  [K, G, VOTERS_AT_ONCE, n] float32
VOTERS_AT_ONCE = 64


def attend(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The newest T tokens of one sequence look at all keys before them, and at their own causally.

    q [T, H, D], keys and values [K, n, D] with the T tokens last  ->  [T, H * D], and where the kernel tells
    it log(sum(exp(scores))) of every query, in float32 [H, T]
    """
    T, n = q.shape[0], keys.shape[1]
    heads = q.transpose(0, 1)[None], keys[None], values[None]  # [1, H, T, D], [1, K, n, D]
    if n == T and q.device.type == "cpu" and hasattr(torch.ops.aten, FUSED):
        out, logsumexp = getattr(torch.ops.aten, FUSED)(*heads, 0.0, True)
        return out[0].transpose(0, 1).flatten(1), logsumexp[0]
    if BLOCK < T < n:
        # A mask is needed below, so the queries come in blocks, each of which sees the keys up to its own
        # end.
        parts = []
        for start in range(0, T, BLOCK):
            end = n - T + min(start + BLOCK, T)
            out, _ = attend(q[start : start + BLOCK], keys[:, :end], values[:, :end])
            parts.append(out)
        return torch.cat(parts), None
    # `is_causal` aligns the triangle with the first key; tokens that follow held ones need it at the last
    # key.
    mask = None
    if T not in (1, n):
        mask = torch.ones(T, n, dtype=torch.bool, device=q.device).tril(n - T)
    grouped = q.shape[1] != len(keys)
    out = F.scaled_dot_product_attention(*heads, mask, is_causal=n == T > 1, enable_gqa=grouped)
    return out[0].transpose(0, 1).flatten(1), None  # [T, H * D]


def attend_each(q: Tensor, keys: Any, values: Any, is_held: Tensor | None) -> tuple[Tensor, Tensor]:
    """The newest token of every sequence looks at the slots that its row holds.

    q [B, H, D] dense and divided by sqrt(D) (once for all caches), keys and values [B, K, S, D], is_held [B,
    S] bool, None where all are  ->  [B, H * D], and the probabilities [B, H, S]
    """
    scores = scores_of(q, keys)
    if is_held is not None:
        scores.masked_fill_(~is_held[:, None], float("-inf"))
    # The sum over many slots loses digits in bf16.
    probs = scores.softmax(-1, dtype=torch.float32)
    return mixed(probs.to(q.dtype), values).flatten(1), probs


def scores_of(q: Tensor, keys: Any) -> Tensor:
    """Each query's product with the keys of its row, or page.  [B, H, D], [B, K, S, D] -> [B, H, S]"""
    if not isinstance(keys, Tensor):
        of_other: Tensor = keys.scores_of(q)
        return of_other
    (B, H, D), K = q.shape, keys.shape[1]
    # `@` on four axes reshapes by itself, which took 5 % of a step (12 caches of one sequence, float32).
    grouped, of_head = q.view(B * K, H // K, D), keys.flatten(0, 1)
    if (q.device.type, q.dtype) == KEYS_FIRST:
        return torch.bmm(of_head, grouped.mT).mT.reshape(B, H, -1)
    return torch.bmm(grouped, of_head.mT).view(B, H, -1)


def mixed(weights: Tensor, values: Any) -> Tensor:
    """The values of each row, or page, added up by weight.  [B, H, S], [B, K, S, D] -> [B, H, D]"""
    if not isinstance(values, Tensor):
        by_other: Tensor = values.mixed_by(weights)
        return by_other
    (B, H, S), K = weights.shape, values.shape[1]
    return torch.bmm(weights.view(B * K, H // K, S), values.flatten(0, 1)).view(B, H, -1)


def looks(q: Tensor, keys: Tensor, logsumexp: Tensor | None, context: int) -> Iterator[tuple[slice, Tensor]]:
    """How much each of the newest V tokens looks at each of the first `context` keys, a block at a time.

    q [V, H, D] are their queries, keys [K, n, D] all that the layer attended to, theirs last, logsumexp [H,
    V] the log of what a softmax divides by, where attention returned it  ->  which of the V tokens a block is
    of, and their probabilities [K, G, block, context] float32

    So no n x n matrix is ever held. With the published settings it takes 3 % of the time of a prompt of 512
    tokens, 6 % of 2,048 (12 layers, hidden size 768, float32, two cores).
    """
    (V, H, D), (K, n, _) = q.shape, keys.shape
    # Without the log of the sum a softmax needs all keys.
    visible = n if logsumexp is None else context
    for start in range(0, V, VOTERS_AT_ONCE):
        block = slice(start, start + VOTERS_AT_ONCE)
        # Divided here, where they are few, and not after the product.
        queries = (q[block] / math.sqrt(D)).view(-1, K, H // K, D)
        grouped = queries.permute(1, 2, 0, 3).flatten(1, 2)  # [K, G * block, D]
        scores = (grouped @ keys[:, :visible].transpose(1, 2)).float().view(K, H // K, -1, visible)
        first = n - V + start  # the place of the block's first token among the keys
        if visible > first + 1:
            unseen = torch.ones(*scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
            scores.masked_fill_(unseen, -math.inf)
        if logsumexp is None:
            probs = scores.softmax(-1)[..., :context]
        else:
            probs = scores.sub_(logsumexp[:, block].view(K, H // K, -1, 1)).exp_()
        yield block, probs


def votes(
    q: Tensor, keys: Tensor, logsumexp: Tensor | None, context: int, weights: Tensor | None = None
) -> Tensor:
    """The probabilities of `looks`, weighted with weights [V] and added up.  [K, G, context] float32"""
    (V, H, _), K = q.shape, len(keys)
    weights = torch.ones(V, device=q.device) if weights is None else weights
    total = torch.zeros(K, H // K, context, device=q.device)
    for block, probs in looks(q, keys, logsumexp, context):
        total += weights[block] @ probs
    return total
