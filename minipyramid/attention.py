"""Causal attention with grouped key/value heads, for many tokens of one sequence and for one token of many.

The two differ in what is fast. A prompt's queries go through torch's fused kernel, which on a CPU never holds the
matrix of probabilities. One query per sequence is two small products: on two CPU cores the fused kernel took
3.25 ms where product, softmax, product took 0.37 ms (8 sequences, 12 heads, 576 keys, bf16). Query heads that
share a key/value head are left to the kernel in the first, and folded into an axis in the second; no key is repeated.

Letters, here and in every file: `B` sequences, `T` tokens (of one sequence or packed), `H` query heads, `K`
key/value heads, `G = H / K`, `D` head size, `S` slots of a cache's layer, `n` keys of one sequence, `L` layers, `V`
voters, `U` places for generated tokens that are not judged yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The fused kernel of the CPU by its own name, for it also tells how large the sum under each softmax was, which
# makes the votes twice as fast. Private, so it may be missing.
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
# Queries at a time of tokens that are appended to a cache, so that their mask [BLOCK, n] stays small.
BLOCK = 256


def attend(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The newest T tokens of one sequence look at all that its layer holds, and at themselves causally.

    q [T, H, D], keys and values [K, n, D] with the T tokens last  ->  [T, H * D], and where the kernel tells it
    log(sum(exp(scores))) of every query, in float32 [H, T]
    """
    T, n = q.shape[0], keys.shape[1]
    heads = q.transpose(0, 1)[None], keys[None], values[None]  # [1, H, T, D], [1, K, n, D]
    if n == T and q.device.type == "cpu" and hasattr(torch.ops.aten, FUSED):
        out, logsumexp = getattr(torch.ops.aten, FUSED)(*heads, 0.0, True)
        return out[0].transpose(0, 1).flatten(1), logsumexp[0]
    if BLOCK < T < n:
        # A mask is needed below, so the queries come some at a time, each block seeing the keys up to its end.
        ends = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
        seen = [(keys[:, : n - T + end], values[:, : n - T + end]) for end in ends]
        return torch.cat([attend(part, *kv)[0] for part, kv in zip(torch.split(q, BLOCK), seen, strict=True)]), None
    # `is_causal` aligns the triangle with the first key; tokens appended to a cache need it at the last one.
    mask = None if T in (1, n) else torch.ones(T, n, dtype=torch.bool, device=q.device).tril(n - T)
    out = F.scaled_dot_product_attention(*heads, mask, is_causal=n == T > 1, enable_gqa=q.shape[1] != len(keys))
    return out[0].transpose(0, 1).flatten(1), None  # [T, H * D]


def attend_each(q: Tensor, keys: Tensor, values: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor]:
    """The newest token of every sequence looks at the slots that its row holds.

    q [B, H, D] dense and divided by sqrt(D) (once for all caches), keys and values [B, K, S, D], held [B, S] bool,
    None where all are  ->  [B, H * D], and the probabilities [B, H, S]
    """
    (B, H, D), K = q.shape, keys.shape[1]
    # `@` on four axes reshapes by itself, which took 5 % of a step (12 caches of one sequence, float32).
    scores = torch.bmm(q.view(B * K, H // K, D), keys.flatten(0, 1).mT).view(B, H, -1)  # [B, H, S]
    if held is not None:
        scores.masked_fill_(~held[:, None], float("-inf"))
    # The sum over many slots loses digits in bf16.
    probs = scores.softmax(-1, dtype=torch.float32)
    mixed = torch.bmm(probs.to(q.dtype).view(B * K, H // K, -1), values.flatten(0, 1))  # [B * K, G, D]
    return mixed.view(B, H * D), probs
