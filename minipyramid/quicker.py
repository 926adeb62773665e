"""Which number format this CPU multiplies faster: timed, since its instructions do not tell."""

import time
from functools import cache

import torch
import torch.nn.functional as F


def bf16_is_quicker() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, which is timed in some milliseconds.

    To have the instructions is not enough: with AVX512-BF16 alone a product ran at 173 GFLOP/s, and at 354 in
    float32; with AMX at 2,100. Where it has none (AVX2), nothing is timed, for float32 is 400 times faster.
    """
    return product_seconds(torch.bfloat16) < product_seconds(torch.float32)


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """The shortest of three products of a prompt's shape; timed once, so that all of a process agree."""
    x, weight = torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
