"""Keys and values in 8 bits: whole numbers from -127 to 127, and a scale for each token and key/value head.

A key or value x of D components is held as round(x / scale) with scale = max |x| / 127, so no component is
off by more than half a scale. (Where max |x| is below 0.008, float16 rounds the scale, too.) The scale takes
two bytes: with D = 64 that is (64 + 2) / 128 = 51.6 % of bf16's bytes. A prompt's tokens attend to each
other's exact keys, and policies choose from these; only what is held is rounded, and that once: from turn to
turn of a conversation it stays in 8 bits.

A decode step has no product of 8-bit numbers with others to call, so it turns them into the model's dtype
first: see `_in_turn`. With 540 tokens a sequence a whole step took 1.11 times as long as with float32's
keys and values (1 sequence), 1.12 times (8) and 1.16 times (32; 12 layers of 12 heads, hidden size 768,
float32, two cores). Compiled, it took 1.05, 0.70 and 0.55 times as long as compiled with float32's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, expect_type

LARGEST = 127
SMALLEST = 2**-24  # above 0 in float16
# Numbers that a CPU turns into the model's dtype at a time, always in the same place, so that they are still
# near the processor when they are multiplied: 8 heads of 576 slots, or 24. Of 8 rows of 576 slots and 12
# heads attention took 3.4 ms with four rows at a time and a new place for each, and 1.8 so; plain float32
# took 1.3 (two cores). In bf16 each call takes longer, so that more heads go into one.
AT_ONCE = {torch.float32: 8 * 576 * 64, torch.bfloat16: 24 * 576 * 64, torch.float16: 24 * 576 * 64}


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

    def clone(self) -> "EightBits":
        """The same numbers and scales, apart from these."""
        return EightBits(self.numbers.clone(), self.scales.clone())

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers times their scales.  [..., D]"""
        return self.numbers.to(dtype) * self.scales.to(dtype)[..., None]

    def scores_of(self, q: Tensor) -> Tensor:
        """`attention.scores_of` of these keys; a key's scale multiplies its score, after the product."""
        grouped = q.view(len(q), self.shape[1], -1, q.shape[2])  # [B, K, G, D]
        scores = _product(grouped, self.numbers.mT) * self.scales.to(q.dtype)[:, :, None]
        return scores.flatten(1, 2)

    def mixed_by(self, weights: Tensor) -> Tensor:
        """`attention.mixed` of these values; a value's scale is multiplied with its weights."""
        grouped = weights.view(len(weights), self.shape[1], -1, weights.shape[2])  # [B, K, G, S]
        scaled = grouped * self.scales.to(weights.dtype)[:, :, None]
        return _product(scaled, self.numbers).flatten(1, 2)


def rounded(x: Tensor) -> EightBits:
    """To the nearest multiple of each vector's scale.  [..., D]"""
    exact = x.float()
    scales = (exact.abs().amax(-1) / LARGEST).half()
    # A vector too small for a scale above 0 is held as zeros: whatever its numbers are, 0 times them is 0.
    steps = exact / scales.float().clamp_min_(SMALLEST)[..., None]
    return EightBits(steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales)


def _product(left: Tensor, numbers: Tensor) -> Tensor:
    """[B, K, G, n] times [B, K, n, m]  ->  [B, K, G, m]"""
    return (_fused if torch.compiler.is_compiling() else _in_turn)(left, numbers)


def _in_turn(left: Tensor, numbers: Tensor) -> Tensor:
    """`_product`, some heads at a time."""
    heads = len(left) * left.shape[1]
    if left.device.type == "cpu":
        heads = max(1, AT_ONCE[left.dtype] // numbers[0, 0].numel())
    parts = torch.split(numbers.flatten(0, 1), heads)  # each [heads, n, m]
    lefts = torch.split(left.flatten(0, 1), heads)  # each [heads, G, n]
    # The numbers of the next part are put into the same place.
    place = torch.empty_like(parts[0], dtype=left.dtype)
    products = [torch.bmm(a, place[: len(b)].copy_(b)) for a, b in zip(lefts, parts, strict=True)]
    return torch.cat(products).view(*left.shape[:-1], -1)


def _fused(left: Tensor, numbers: Tensor) -> Tensor:
    """The same as a compiler can make one loop of, in which no number is ever stored as a float.

    Of 8 rows of 576 slots and 12 heads attention took 1.5 ms so, 3.1 with the products in turn, compiled as
    well, and float32's 2.2 (one thread); with 4 query heads to a key/value head 6.5, 7.4 and 4.5.
    """
    return (left[..., None].float() * numbers[:, :, None]).sum(-2).to(left.dtype)
