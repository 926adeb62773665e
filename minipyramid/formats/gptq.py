"""GPTQ's layout: numbers packed along the inputs, eight of 4 bits or four of 8 to an int32.

The weight is (value - zero) * scale. Groups are of successive inputs; those of act-order are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.errors import ConfigError
from minipyramid.formats.layout import (
    FLOATS,
    INT32,
    Layout,
    Part,
    Settings,
    expect,
    group_size,
    size_of,
    unpack_ints,
)
from minipyramid.quantised import Quantised


@dataclass(frozen=True)
class Gptq:
    """Of so many bits, in groups of so many inputs (-1: all)."""

    bits: int
    group: int
    zeros_less_one: bool  # the first version of the format stores zeros so
    method: str = "gptq"
    mark: str = "qweight"
    ignored: tuple[str, ...] = ()

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """See `Layout`."""
        per_int, groups = 32 // self.bits, -(-columns // size_of(self.group, columns))
        return {
            "qweight": Part([[-(-columns // per_int), rows]], INT32),
            "qzeros": Part([[groups, -(-rows // per_int)]], INT32),
            "scales": Part([[groups, rows]], FLOATS),
            "g_idx": Part([[columns]], INT32, optional=True),
            "bias": Part([[rows]], FLOATS, optional=True),
        }

    def read(self, parts: dict[str, Tensor], rows: int, columns: int) -> Quantised:
        """See `Layout`."""
        group, half = size_of(self.group, columns), 1 << self.bits - 1
        index, bias = parts.get("g_idx"), parts.get("bias")
        if index is not None and not torch.equal(index, (torch.arange(columns) // group).int()):
            raise ValueError("has groups in act-order, which is not implemented")
        if bias is not None and bias.any():  # some files have one of zeros for every layer
            raise ValueError("has a bias, which is not implemented")
        values = unpack_ints(parts["qweight"], self.bits, 0)[:columns] - half
        zeros = unpack_ints(parts["qzeros"], self.bits, 1)[:, :rows] - half + self.zeros_less_one
        scales = parts["scales"].float()
        return Quantised(
            values.to(torch.int8).T.contiguous(), scales.T, zeros.to(torch.int16).T, group, self.bits
        )


def layout_of(settings: Settings) -> Layout:
    """What `quantization_config` says. Raises `ConfigError` for what is not implemented."""
    if settings.get("desc_act"):
        raise ConfigError("desc_act (act-order) is not implemented; take a checkpoint without it")
    bits = expect(settings, "bits", (4, 8))
    version = expect(
        {"checkpoint_format": settings.get("format"), **settings}, "checkpoint_format", ("gptq", "gptq_v2")
    )
    return Gptq(bits, group_size(settings, -1), version == "gptq")
