"""Causal attention with grouped key/value heads.

Prompts and single steps are fastest with different code. A prompt's queries go through torch's fused kernel,
which on a CPU never holds the matrix of probabilities, and which handles query heads that share a key/value
head. One query per sequence is two small products, which a CPU does best in a form of its own: see
`sums_of_rows`. In neither is a key repeated.

Letters, here and in every file: `B` sequences, `T` tokens (of one sequence, or of several one after the
other), `H` query heads, `K` key/value heads, `G = H / K`, `D` head size, `S` slots of a cache's layer, `n`
keys of one sequence, `N` tokens of a prompt, `P` slots of a page, `L` layers, `V` voters, `U` places for
pending tokens.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# The fused kernel of the CPU by its own name, for it also tells how large the sum under each softmax was,
# which makes the votes twice as fast. The name is private, so it may be missing.
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
# Queries at a time of tokens that follow held ones, so that their mask [BLOCK, n] stays small.
BLOCK = 256
# Devices where a step's two products are sums of rows, for which keys lie by component. Elsewhere, and for
# keys whose slab is mostly unused, they are products of matrices.
BY_ROWS = ("cpu",)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, of_keys: Tensor
) -> tuple[Tensor, Tensor | None]:
    """T tokens of one sequence look at all keys up to their own positions.

    q [T, H, D], keys and values [K, n, D] with the T tokens last, their positions [T] and those of all keys
    [n]  ->  [T, H * D], and where the kernel tells it log(sum(exp(scores))) of every query, in float32 [H, T]
    """
    (T, H, _), (K, n, _) = q.shape, keys.shape
    heads = q.transpose(0, 1)[None], keys[None], values[None]  # [1, H, T, D], [1, K, n, D]
    if n == T and q.device.type == "cpu" and hasattr(torch.ops.aten, FUSED):
        out, logsumexp = getattr(torch.ops.aten, FUSED)(*heads, 0.0, True)
        return out[0].transpose(0, 1).flatten(1), logsumexp[0]
    if BLOCK < T < n:
        # A mask is needed below, so the queries come in blocks, each of which sees the keys up to its own
        # end.
        parts = []
        for start in range(0, T, BLOCK):
            some, seen = slice(start, start + BLOCK), slice(n - T + min(start + BLOCK, T))
            parts.append(attend(q[some], keys[:, seen], values[:, seen], positions[some], of_keys[seen])[0])
        return torch.cat(parts), None
    # `is_causal` aligns the triangle with the first key; tokens that follow held ones need it at the last
    # key, and the first of them see nothing that was guessed of later ones.
    mask = None if T in (1, n) else of_keys <= positions[:, None]  # [T, n]
    out = F.scaled_dot_product_attention(*heads, mask, is_causal=n == T > 1, enable_gqa=K < H)
    return out[0].transpose(0, 1).flatten(1), None  # [T, H * D]


def attend_each(q: Tensor, keys: Any, values: Any, n: int, is_held: Tensor | None) -> tuple[Tensor, Tensor]:
    """The newest token of every sequence looks at those of its row's first n slots that are held.

    q [B, H, D] dense and divided by sqrt(D) (once for all caches), keys and values [B, K, S, D], is_held [B,
    n] bool, None where all are  ->  [B, H * D], and the probabilities [B, H, n]
    """
    scores = scores_of(q, keys, n)
    if is_held is not None:
        scores.masked_fill_(~is_held[:, None], float("-inf"))
    # The sum over many slots loses digits in bf16.
    probs = scores.softmax(-1, dtype=torch.float32)
    return mixed(probs.to(q.dtype), values).flatten(1), probs


def scores_of(q: Tensor, keys: Any, n: int) -> Tensor:
    """Each query's product with the first n keys of its row, or page.

    [B, H, D], [B, K, S, D] -> [B, H, n]
    """
    if not isinstance(keys, Tensor):
        return cast(Tensor, keys.scores_of(q, n))
    # A sum reads rows whole: with 552 of 4,600 slots used it took 3.3 ms, and the product of those 0.6 (8
    # sequences, 12 heads, float32, one thread).
    used = keys[:, :, :n] if 2 * n < keys.shape[2] else keys
    return sums_of_rows(q, used.mT)[..., :n]


def mixed(weights: Tensor, values: Any) -> Tensor:
    """The first n values of each row, or page, added up by weight.  [B, H, n], [B, K, S, D] -> [B, H, D]"""
    if not isinstance(values, Tensor):
        return cast(Tensor, values.mixed_by(weights))
    return sums_of_rows(weights, values)


def sums_of_rows(weights: Tensor, matrices: Tensor) -> Tensor:
    """The first r rows of each head's matrix, added up by weight.  [B, H, r], [B, K, R, w] -> [B, H, w]

    Both products of a step are such sums: of values by their probabilities, and of keys' components by those
    of the query, where the slots of a component lie side by side. To torch they are bags of an embedding,
    which a CPU adds up at the rate at which it reads memory. For keys and values of 8 sequences of 552 slots
    with 12 heads they took 0.12 and 0.15 ms in bf16, 0.19 and 0.22 in float32, 0.16 and 0.18 in float16. The
    best products of matrices took 0.33 and 0.34, 0.25 and 0.22, 0.69 and 0.46, in an order in memory that
    differs by number format, and the fused kernel 2.4 in bf16 (two cores with AVX512-BF16, one layer's again
    and again; in a step they are not near the processor yet). A step of 8 sequences took 12.4 ms in place of
    18.5 so in bf16, and 18.6 in place of 22.6 in float32.
    """
    (B, H, r), (_, K, R, _) = weights.shape, matrices.shape
    # Rows that are cut out of longer ones are no table of an embedding.
    if weights.device.type not in BY_ROWS or matrices.stride(2) > matrices.shape[3]:
        return torch.bmm(weights.view(B * K, -1, r), matrices[:, :, :r].flatten(0, 1)).view(B, H, -1)
    first = torch.arange(0, B * K * R, R, dtype=torch.int32).view(-1, 1, 1).expand(-1, H // K, -1)
    rows, by_weight = (first + torch.arange(r, dtype=torch.int32)).flatten(0, 1), weights.flatten(0, 1)
    summed = F.embedding_bag(rows, matrices.flatten(0, 2), mode="sum", per_sample_weights=by_weight)
    return summed.view(B, H, -1)
