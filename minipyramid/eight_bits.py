"""Keys and values in 8 bits: whole numbers from -127 to 127, and a scale for each token and key/value head.

A key or value x of D components is held as round(x / scale) with scale = max |x| / 127, so no component is
off by more than half a scale. The scale takes two bytes: with D = 64 that is (64 + 2) / 128 = 51.6 % of
bf16's bytes. A prompt's tokens attend to each other's exact keys, and policies choose from these; only what
is held is rounded.

A decode step has no product of 8-bit numbers with others to call, so it turns them into the model's dtype,
which costs more than the bytes that it saves: see `attend_each`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, expect_type

LARGEST = 127
# Rows whose numbers are turned into the model's dtype at a time, so that they are still near the processor
# when they are multiplied: 32 rows of 576 slots and 12 heads took 115 ms together and 70 in fours.
ROWS = 4


def holding(config: ModelConfig, kv_dtype: str) -> ModelConfig:
    """The model with keys and values held in "int8", or "auto". Raises `ConfigError` for anything else."""
    expect_type("kv_dtype", kv_dtype, str, "a name")
    if kv_dtype not in ("auto", "int8"):
        raise ConfigError(f"kv_dtype is {kv_dtype!r:.60}, expected auto or int8")
    return replace(config, kv_dtype=kv_dtype)


@dataclass(frozen=True)
class EightBits:
    """What `KVCache` holds in place of a tensor [capacity, K, S, D]: it is read and written like one."""

    numbers: Tensor  # [..., D] int8
    scales: Tensor  # [...] float16

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> "EightBits":
        """Room for keys or values of this shape."""
        numbers = torch.zeros(shape, dtype=torch.int8, device=device)
        return cls(numbers, torch.zeros(shape[:-1], dtype=torch.float16, device=device))

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        return self.numbers.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.numbers.device

    def __getitem__(self, where: Any) -> "EightBits":
        """A part of it; any index that leaves the last axis alone."""
        return EightBits(self.numbers[where], self.scales[where])

    def __setitem__(self, where: Any, x: "Tensor | EightBits") -> None:
        """Write a part: a tensor is rounded, and what is in 8 bits already is copied as it stands."""
        held = rounded(x) if isinstance(x, Tensor) else x
        self.numbers[where], self.scales[where] = held.numbers, held.scales

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers times their scales.  [..., D]"""
        return self.numbers.to(dtype) * self.scales.to(dtype)[..., None]


def rounded(x: Tensor) -> EightBits:
    """To the nearest multiple of each vector's scale.  [..., D]"""
    exact = x.float()
    scales = (exact.abs().amax(-1) / LARGEST).half()
    # What is too small for a scale becomes zeros.
    steps = exact / scales.float().masked_fill(scales == 0, math.inf)[..., None]
    return EightBits(steps.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales)


def attend_each(
    q: Tensor, keys: EightBits, values: EightBits, is_held: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attention.attend_each` where keys and values are in 8 bits; shapes are as there.

    Scales are left out of the products: a key's multiplies its score, and a value's its probability.
    """
    parts = []
    for start in range(0, len(q), ROWS):
        rows = slice(start, start + ROWS)
        (B, H, D), K = q[rows].shape, keys.shape[1]
        of_keys, of_values = (
            held[rows].scales.to(q.dtype)[:, :, None] for held in (keys, values)
        )  # [B, K, 1, S]
        numbers = keys[rows].numbers.to(q.dtype).flatten(0, 1)  # [B * K, S, D]
        scores = torch.bmm(q[rows].reshape(B * K, H // K, D), numbers.mT).view(B, K, H // K, -1) * of_keys
        if is_held is not None:
            scores.masked_fill_(~is_held[rows, None, None], float("-inf"))
        probs = scores.softmax(-1, dtype=torch.float32)  # [B, K, G, S]
        weights = (probs.to(q.dtype) * of_values).view(B * K, H // K, -1)
        mixed = torch.bmm(weights, values[rows].numbers.to(q.dtype).flatten(0, 1))  # [B * K, G, D]
        parts.append((mixed.view(B, H * D), probs.view(B, H, -1)))
    out, probs = (torch.cat(each) for each in zip(*parts, strict=True))
    return out, probs
