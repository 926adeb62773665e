"""AWQ's layout (version gemm): eight numbers of 4 bits to an int32, packed along the outputs.

The eight lie in an order of their own. The weight is (value - zero) * scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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

BITS = 4
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the eight outputs lie


@dataclass(frozen=True)
class Awq:
    """In groups of so many inputs (-1: all)."""

    group: int
    bits: int = BITS
    method: str = "awq"
    mark: str = "qweight"
    ignored: tuple[str, ...] = ()

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """See `Layout`."""
        groups = -(-columns // size_of(self.group, columns))
        return {
            "qweight": Part([[columns, -(-rows // 8)]], INT32),
            "qzeros": Part([[groups, -(-rows // 8)]], INT32),
            "scales": Part([[groups, rows]], FLOATS),
        }

    def read(self, parts: dict[str, Tensor], rows: int, columns: int) -> Quantised:
        """See `Layout`."""
        values, zeros = (_unpack(parts[name])[:, :rows] - 8 for name in ("qweight", "qzeros"))
        scales = parts["scales"].float()
        values = values.to(torch.int8).T.contiguous()
        return Quantised(values, scales.T, zeros.to(torch.int16).T, size_of(self.group, columns), BITS)


def _unpack(packed: Tensor) -> Tensor:
    in_order = unpack_ints(packed, BITS, 1).view(len(packed), -1, 8)[..., ORDER]
    return in_order.flatten(1)


def layout_of(settings: Settings) -> Layout:
    """What `quantization_config` says. Raises `ConfigError` for what is not implemented."""
    expect(settings, "version", ("gemm",))
    expect(settings, "bits", (BITS,))
    expect(settings, "zero_point", (True,))
    return Awq(group_size(settings, 128))
