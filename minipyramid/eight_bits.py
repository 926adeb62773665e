"""Keys and values in 8 bits: whole numbers from -127 to 127, and a scale for each token and key/value head.

A key or value x of D components is held as round(x / scale) with scale = max |x| / 127, so no component is
off by more than half a scale. (The scale is a float16, which is too coarse for that where max |x| is below
0.002: there the largest components may be off by more.) The scale takes two bytes: with D = 64 that is (64 +
2) / 128 = 51.6 % of bf16's bytes. A prompt's tokens attend to each other's exact keys, and policies choose
from these; only what is held is rounded (guesses too, which a layer holds before it computes anything), and
that once: from turn to turn of a conversation it stays in 8 bits.

A decode step has no product of 8-bit numbers with others to call, so it turns them into floats first, some
at a time: see `_product`. With 540 tokens a sequence a whole step took 1.1 times as long as with float32's
keys and values (1 sequence), 1.04 to 1.2 (8), 0.98 to 1.15 (32), and 1.1 with 4 query heads to a key/value
head (8). In bf16 it took 1.2 to 1.4, 1.3 to 1.5, 1.5 to 1.8 and 1.3 times as long as with bf16's (12 layers
of 12 heads, hidden size 768, two cores with AVX512-BF16, two runs). Compiled, 8 sequences took 1.0 to 1.3
times as long as compiled with float32's.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minipyramid.attention import BY_ROWS, mixed
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, expect_type

LARGEST = 127
SMALLEST = 2**-24  # above 0 in float16
# Numbers that a CPU turns into float32 at a time, so that they are still near the processor when they are
# multiplied: 48 heads of 576 slots. A step of 8 rows of 12 heads in bf16 took 18.2 ms so, 20.1 with 24 heads
# at a time, 19.5 with all, and 21.7 turned into bf16 (two cores with AVX512-BF16).
AT_ONCE = 48 * 576 * 64


def with_kv_dtype(config: ModelConfig, kv_dtype: str) -> ModelConfig:
    """The configuration with keys and values in "int8", or "auto". Raises `ConfigError` for anything else."""
    expect_type("kv_dtype", kv_dtype, str, "a name")
    if kv_dtype not in ("auto", "int8"):
        raise ConfigError(f"kv_dtype is {kv_dtype!r:.60}, expected auto or int8")
    return replace(config, kv_dtype=kv_dtype)


@dataclass(frozen=True)
class EightBits:
    """What `KVCache` holds in place of a tensor [capacity, K, S, D]: it is read and written like one."""

    numbers: Tensor  # [..., D] int8
    scales: Tensor  # [...] float16
    # Where some numbers at a time are turned into float32: one buffer for all layers of a cache. Where it is
    # empty all are turned at once, into the model's dtype, in new memory. A compiled step does without it.
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def slabs(cls, shapes: list[tuple[int, ...]], device: torch.device) -> "list[list[EightBits]]":
        """Memory for keys, and for values, of these shapes."""
        # A head at least, and no more than there is.
        most = max(min(math.prod(shape), max(AT_ONCE, math.prod(shape[2:]))) for shape in shapes)
        buffer, slabs = torch.empty(most if device.type == "cpu" else 0, device=device), []
        for i, (*others, S, D) in enumerate(2 * shapes):
            # In memory in the order in which `empty_slabs` has them.
            by_component = device.type in BY_ROWS and i < len(shapes)
            order = (D, S) if by_component else (S, D)
            numbers = torch.empty(*others, *order, dtype=torch.int8, device=device)
            scales = torch.empty(*others, S, dtype=torch.float16, device=device)
            slabs.append(cls(numbers.mT if by_component else numbers, scales, buffer))
        return [slabs[: len(shapes)], slabs[len(shapes) :]]

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
        return EightBits(self.numbers[where], self.scales[where], self.buffer)

    def __setitem__(self, where: Any, x: "Tensor | EightBits | int") -> None:
        """Write a part: a tensor is rounded, what is in 8 bits already is copied as it stands; or a 0."""
        held = rounded(x) if isinstance(x, Tensor) else x
        if isinstance(held, EightBits):
            self.numbers[where], self.scales[where] = held.numbers, held.scales
        else:
            self.numbers[where], self.scales[where] = held, held

    def clone(self) -> "EightBits":
        """A copy of the numbers and scales."""
        return EightBits(self.numbers.clone(), self.scales.clone())

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers times their scales.  [..., D]"""
        return self.numbers.to(dtype) * self.scales.to(dtype)[..., None]

    def scores_of(self, q: Tensor, n: int) -> Tensor:
        """`attention.scores_of` of these keys; a key's scale multiplies its score, after the product."""
        scores = _product(q, self.numbers[:, :, :n].mT, self.buffer)
        scores.view(*self.shape[:2], -1, n).mul_(self.scales[:, :, None, :n])  # [B, K, G, n]
        return scores

    def mixed_by(self, weights: Tensor) -> Tensor:
        """`attention.mixed` of these values; a value's scale is multiplied with its weights."""
        (B, K, _, D), n = self.shape, weights.shape[2]
        numbers, scales = self.numbers[:, :, :n], self.scales[:, :, None, :n]  # [B, K, n, D], [B, K, 1, n]
        grouped = weights.view(B, K, -1, n)  # [B, K, G, n]
        if weights.dtype != torch.float16:
            return _product((grouped * scales).to(weights.dtype).flatten(1, 2), numbers, self.buffer)
        # There a weight times a small scale would vanish, so the largest scale waits until after the product.
        largest = scales.amax(-1, keepdim=True).clamp_min(SMALLEST)  # [B, K, 1, 1]
        found = _product((grouped * (scales / largest)).flatten(1, 2), numbers, self.buffer)
        found.view(B, K, -1, D).mul_(largest)
        return found


def rounded(x: Tensor) -> EightBits:
    """To the nearest multiple of each vector's scale.  [..., D]"""
    highest = x.abs().amax(-1).float()
    # A scale above 0, so that there is something to divide by.
    scales = (highest / LARGEST).half().clamp_min_(SMALLEST)
    steps = x / scales[..., None].float()
    return EightBits(steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales)


def _product(left: Tensor, numbers: Tensor, buffer: Tensor) -> Tensor:
    """`mixed` with the numbers alone.  [B, H, n], [B, K, n, m] -> [B, H, m]"""
    if torch.compiler.is_compiling():
        return _fused(left, numbers)
    if not len(buffer):
        return mixed(left, numbers.to(left.dtype))
    # Some heads at a time, which are taken for rows.
    heads = numbers.flatten(0, 1)[:, None]  # [B * K, 1, n, m]
    at_once = len(buffer) // heads[0].numel()
    lefts = left.float().reshape(len(heads), -1, left.shape[2])  # [B * K, G, n]
    found = []
    for some, part in zip(torch.split(lefts, at_once), torch.split(heads, at_once), strict=True):
        turned = buffer[: part.numel()].view(part.shape).copy_(part)
        found.append(mixed(some, turned))
    return torch.cat(found).view(*left.shape[:2], -1).to(left.dtype)


def _fused(left: Tensor, numbers: Tensor) -> Tensor:
    """[B, H, n] times [B, K, n, m] as one loop that a compiler can make, which stores no number as a float.

    Of 8 rows of 576 slots and 12 heads attention took 1.5 ms so, 3.1 with the products in turn, compiled as
    well, and float32's 2.2 (one thread); with 4 query heads to a key/value head 6.5, 7.4 and 4.5.
    """
    grouped = left.view(*numbers.shape[:2], -1, left.shape[2])  # [B, K, G, n]
    found: Tensor = (grouped[..., None].float() * numbers[:, :, None]).sum(-2)
    return found.to(left.dtype).flatten(1, 2)
