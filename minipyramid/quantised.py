"""Weights in 8 and 4 bits: what they mean, the forms that torch multiplies as they are, the products.

torch's operators for a CPU are private, and quick in bfloat16 alone: one row times 2,048 x 5,632 in 8 bits
took 1.4 ms with AVX-512, and 17 ms in float32 and in float16. So a product by an operator rounds what it
reads and what it gives to bfloat16, and so does that of more rows, which goes without it: else a row's result
would depend on the others. (Where there is no operator `by_pieces` computes in the model's dtype.)

With that rounding from float32 and back the row took 1.5 ms in 8 bits and 1.0 in 4; with plain weights 4.8 in
float32 and 3.2 in bfloat16 (2.3 in oneDNN's packed form). One thread each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipyramid.linear import Linear

aten = torch.ops.aten
HAS_INT8 = hasattr(aten, "_weight_int8pack_mm")
HAS_INT4 = hasattr(aten, "_weight_int4pack_mm_for_cpu") and hasattr(
    aten, "_convert_weight_to_int4pack_for_cpu"
)
# From more rows on it is quicker to undo the quantisation and multiply as usual. The weight above, with two
# threads: 128 rows in 8 bits 34 ms packed and 39 undone, in 4 bits 28 and 49; 256 rows 72 and 44, 59 and 47.
MOST_ROWS = 128
PIECE = 1024  # rows of the weight that are undone at a time
INT8_STEP = 32  # the operator reads its columns in steps, and past the end where they do not fit
INT4_GROUPS = (256, 128, 64, 32)  # columns of a group that the operator takes
# Rows that lie interleaved in its packed form, by what torch's kernels are for. Without such vectors they are
# slower than a plain product.
INT4_ROWS = {"AVX512": 64, "AVX2": 32}


@dataclass(frozen=True)
class Quantised:
    """A weight as files hold it, whatever their format: (values - zeros) * scales.

    The columns of a row are in G groups, each with a scale and a zero of its own.
    """

    values: Tensor  # [out, in] int8 or float8
    scales: Tensor  # [out, G] float32
    zeros: Tensor  # [out, G] int16
    group: int  # columns of each, except that the last group may have fewer
    bits: int

    def plain(self) -> Tensor:
        """The weight itself.  [out, in] float32"""
        scales, zeros = (self._of_columns(t) for t in (self.scales, self.zeros))
        return (self.values.float() - zeros) * scales

    def _of_columns(self, t: Tensor) -> Tensor:
        """What groups have, for each column; a single group stays one.  [out, G] -> [out, in or 1]"""
        return t if t.shape[1] == 1 else t.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]


class Int8(NamedTuple):
    """A weight in 8 bits with a scale for each row."""

    values: Tensor  # [out, in] int8
    scales: Tensor  # [out] bfloat16

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight itself, `PIECE` rows at a time.  each [in, rows]"""
        for values, scales in zip(*(torch.split(t, PIECE) for t in self), strict=True):
            yield values.to(dtype).mul_(scales.to(dtype)[:, None]).T

    def times(self, x: Tensor) -> Tensor:
        """[T, in] bfloat16 -> [T, out]"""
        y: Tensor = aten._weight_int8pack_mm(x, self.values, self.scales)
        return y


class Int4(NamedTuple):
    """A weight in 4 bits: (value - 8) * scale + zero, with a scale and a zero for each group of columns."""

    values: Tensor  # [out, in / 2] uint8, in torch's order
    scales: Tensor  # [G, out, 2] bfloat16, scales and zeros
    group: int
    interleaved: int  # rows, as in `INT4_ROWS`

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight itself, `PIECE` rows at a time.  each [in, rows]"""
        of_rows = torch.split(self.values, PIECE), torch.split(self.scales, PIECE, dim=1)
        for packed, scales in zip(*of_rows, strict=True):
            scale, zero = scales.to(dtype).unbind(-1)  # [G, rows]
            values = unpack_int4(packed, self.interleaved).to(dtype)
            values = values.view(len(scales), self.group, -1)  # [G, group, rows]
            yield values.mul_(scale[:, None]).add_((zero - 8 * scale)[:, None]).flatten(0, 1)

    def times(self, x: Tensor) -> Tensor:
        """[T, in] bfloat16 -> [T, out]"""
        y: Tensor = aten._weight_int4pack_mm_for_cpu(x, self.values, self.group, self.scales)
        return y


def unpack_int4(packed: Tensor, rows: int) -> Tensor:
    """The values 0 to 15 of rows in torch's order.  [out, in / 2] -> [in, out]

    Of so many rows, those of the first half lie in the lower four bits and those of the second in the upper.
    """
    blocks = packed.view(len(packed) // rows, -1, rows // 2).transpose(0, 1)  # [in, blocks, rows / 2]
    return torch.stack([blocks & 15, blocks >> 4], 2).flatten(1)


Packed = Int8 | Int4


def by_pieces(x: Tensor, weight: Packed) -> Tensor:
    """The product with a weight that is undone piece by piece.  [T, in] -> [T, out]"""
    return torch.cat([x @ piece for piece in weight.pieces(x.dtype)], -1)


def packed_product(x: Tensor, weight: Packed) -> Tensor:
    """The product by torch's operator where the rows are few.  [T, in] -> [T, out]"""
    rounded = x.bfloat16()
    if x.shape[0] > MOST_ROWS:
        # In float32 even of a model in bfloat16, for the operator rounds neither weights nor sums.
        return by_pieces(rounded.float(), weight).bfloat16().to(x.dtype)
    return weight.times(rounded).to(x.dtype)


def product_of(weight: Packed) -> Callable[[Tensor, Packed], Tensor]:
    """The product for a weight where it lies."""
    on_cpu, columns = weight.values.device.type == "cpu", weight.values.shape[1]
    if isinstance(weight, Int8) and not (on_cpu and HAS_INT8 and columns % INT8_STEP == 0):
        return by_pieces
    return packed_product


def quantise(weight: Tensor) -> Quantised:
    """A plain weight in 8 bits, with a scale for each output.  [out, in]"""
    weight = weight.float()
    # Rounded to bfloat16 now, so that the product reads the very scales that the values were divided by.
    scales = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30).bfloat16().float()
    values = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
    return Quantised(values, scales, torch.zeros_like(scales, dtype=torch.int16), values.shape[1], 8)


def joined_form(
    parts: list[Tensor | Quantised], dtype: torch.dtype, device: torch.device, in_int8: bool
) -> Tensor | Packed:
    """Weights that read the same input as one, in the form for products.

    That is a plain tensor where torch has no product for it. `in_int8` is for plain weights.
    """
    if in_int8:
        parts = [quantise(part) if isinstance(part, Tensor) else part for part in parts]
    quantised = [part for part in parts if isinstance(part, Quantised)]
    alike = len({(part.group, part.bits, part.values.dtype, part.scales.shape[1]) for part in quantised}) == 1
    if alike and len(quantised) == len(parts):
        names = ("values", "scales", "zeros")
        values, scales, zeros = (torch.cat([getattr(part, name) for part in quantised]) for name in names)
        form = packed(Quantised(values, scales, zeros, quantised[0].group, quantised[0].bits), device)
        if form is not None:
            return form
    plain = [part if isinstance(part, Tensor) else part.plain().to(dtype) for part in parts]
    return (plain[0] if len(plain) == 1 else torch.cat(plain)).to(device)


def packed(weight: Quantised, device: torch.device) -> Packed | None:
    """The form in which torch multiplies it on this device; None where it has none."""
    if weight.values.dtype != torch.int8:
        return None
    if weight.bits == 8 and weight.scales.shape[1] == 1 and not weight.zeros.any():
        return Int8(weight.values.to(device), weight.scales[:, 0].bfloat16().to(device))
    rows, columns = weight.values.shape
    interleaved = INT4_ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)
    if weight.bits == 4 and device.type == "cpu" and HAS_INT4 and interleaved and rows % interleaved == 0:
        weight = in_groups(weight)
        if weight.group in INT4_GROUPS and columns % weight.group == 0:
            return packed_int4(weight, interleaved)
    return None


def in_groups(weight: Quantised) -> Quantised:
    """A single group of columns as several with the same scale, of a size that torch takes."""
    columns = weight.values.shape[1]
    group = next((group for group in INT4_GROUPS if columns % group == 0), columns)
    if weight.scales.shape[1] > 1 or group == columns:
        return weight
    scales, zeros = (t.expand(-1, columns // group) for t in (weight.scales, weight.zeros))
    return replace(weight, scales=scales, zeros=zeros, group=group)


def packed_int4(weight: Quantised, interleaved: int) -> Int4 | None:
    """Its form for torch's operator; None where that turns out to pack in an order of its own."""
    values = aten._convert_weight_to_int4pack_for_cpu(weight.values.int() + 8, 1)
    if not torch.equal(unpack_int4(values, interleaved).T, (weight.values + 8).view(torch.uint8)):
        return None
    scales = torch.stack([weight.scales, -weight.zeros * weight.scales], -1)  # [out, G, 2]
    return Int4(values, scales.transpose(0, 1).bfloat16().contiguous(), weight.group, interleaved)


def take_packed(model: nn.Module, state: dict[str, Tensor | Packed]) -> None:
    """Give linear layers those weights of a state that are no plain tensors, which leave it."""
    for name, weight in list(state.items()):
        layer = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if isinstance(layer, Linear) and not isinstance(weight, Tensor):
            del state[name], layer.weight
            layer.weight, layer.product = weight, product_of(weight)
