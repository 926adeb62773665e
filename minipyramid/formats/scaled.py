"""Weights stored as numbers of 8 bits in their own shape, int8 or float8, beside their scales.

So does compressed-tensors ("int-quantized", "float-quantized"), and so do the methods `fp8` and `fbgemm_fp8`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.errors import ConfigError
from minipyramid.formats.layout import FLOATS, Layout, Part, Settings, expect, size_of
from minipyramid.quantised import Quantised

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Blocks:
    """What shares a scale: so many outputs and inputs of the weight (-1: all)."""

    rows: int
    columns: int

    def of(self, rows: int, columns: int) -> list[int]:
        """How many blocks a weight has.  [down, across]"""
        return [-(-n // size_of(size, n)) for n, size in ((rows, self.rows), (columns, self.columns))]

    def spread(self, scales: Tensor, rows: int) -> Tensor:
        """What blocks have, for each row.  -> [out, G]"""
        if scales.dim() < 2:  # one for the whole weight
            scales = scales.view(1, 1)
        return scales.repeat_interleave(size_of(self.rows, rows), 0)[:rows]


@dataclass(frozen=True)
class Scaled:
    """`weight`, its scales under the name of the mark, and zeros where they are not in the middle."""

    method: str
    mark: str
    dtype: torch.dtype  # of the weight
    bits: int
    blocks: Blocks
    symmetric: bool = True
    ignored: tuple[str, ...] = ("input_scale", "input_zero_point", "output_scale", "activation_scale")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """See `Layout`."""
        shapes = [self.blocks.of(rows, columns)]
        if shapes == [[1, 1]]:
            shapes += [[1], []]
        return {
            "weight": Part([[rows, columns]], (self.dtype,)),
            self.mark: Part(shapes, FLOATS),
            "weight_zero_point": Part(shapes, (torch.int8, self.dtype), optional=self.symmetric),
        }

    def read(self, parts: dict[str, Tensor], rows: int, columns: int) -> Quantised:
        """See `Layout`."""
        scales = self.blocks.spread(parts[self.mark].float(), rows)
        zeros = torch.zeros_like(scales, dtype=torch.int16)
        if "weight_zero_point" in parts:
            zeros = self.blocks.spread(parts["weight_zero_point"].to(torch.int16), rows)
        return Quantised(parts["weight"], scales, zeros, size_of(self.blocks.columns, columns), self.bits)


def fp8_layout(settings: Settings) -> Layout:
    """Of the method `fp8`: blocks of the weight have a scale each, else all of it one."""
    expect(settings, "fmt", ("e4m3", "float8_e4m3fn"))
    blocks = block_of(settings, "weight_block_size")
    return Scaled("fp8", "weight_scale_inv", FLOAT8, 8, blocks)


def fbgemm_layout(_: Settings) -> Layout:
    """Of the method `fbgemm_fp8`: a scale for each output."""
    return Scaled("fbgemm_fp8", "weight_scale", FLOAT8, 8, Blocks(1, -1))


def block_of(settings: Settings, name: str) -> Blocks:
    """A field that has the two sizes of a block; all of the weight if it is absent."""
    given = settings.get(name)
    if given is None:
        return Blocks(-1, -1)
    if isinstance(given, list) and len(given) == 2 and all(type(n) is int and n > 0 for n in given):
        return Blocks(*given)
    raise ConfigError(f"{name} is {given!r:.60}, expected two whole numbers")
