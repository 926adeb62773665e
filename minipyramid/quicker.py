"""Which number format this CPU multiplies faster: timed, since its instructions do not tell."""

import time
from functools import cache

import torch
from torch import Tensor, nn

from minipyramid.linear import Linear, reorder


def bf16_is_quicker() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, which is timed in some milliseconds.

    To have the instructions is not enough: with AVX512-BF16 alone a product ran at 173 GFLOP/s, and at 354 in
    float32, on one kind of processor, and at 1,000 and 490 on another. With AMX single products ran at 2,100.
    Asked only where `device.has_bf16`: without the instructions (AVX2) float32 is 400 times faster.
    """
    return product_seconds(torch.bfloat16) < product_seconds(torch.float32)


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """The shortest of three products of a prompt's shape; timed once, so that all of a process agree."""
    x, layer = torch.ones(256, 2048, dtype=dtype), layer_of(torch.ones(2048, 2048, dtype=dtype))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def layer_of(weight: Tensor) -> Linear:
    """A layer as the model has them. torch's own product of float32 can be less than half as fast.

    On one machine it ran at 216 GFLOP/s, and this one at 490; in bf16 both at 1,000.
    """
    layer = Linear(*weight.shape)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    reorder(layer)
    return layer
