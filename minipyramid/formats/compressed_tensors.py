"""compressed-tensors: int8 and float8 in the weight's own shape, or 4 and 8 bits packed along rows.

What activations are to be quantised by is left aside: it makes products quicker on other machines, and
results worse everywhere. Here activations stay as they are.
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
from minipyramid.formats.scaled import FLOAT8, Blocks, Scaled, block_of
from minipyramid.quantised import Quantised

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("channel", "tensor", "group", "block")
# These would change results. Files also hold them empty, and then they are ignored.
MUST_BE_EMPTY = ("kv_cache_scheme", "sparsity_config", "transform_config")


@dataclass(frozen=True)
class PackedRows:
    """Each row packed into int32, with half of the range added to what were signed numbers."""

    bits: int
    blocks: Blocks
    symmetric: bool
    method: str = f"{METHOD} {PACKED}"
    mark: str = "weight_packed"
    ignored: tuple[str, ...] = ("input_scale", "input_zero_point", "output_scale")

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """See `Layout`."""
        down, across = self.blocks.of(rows, columns)
        per_int = 32 // self.bits
        zeros = [[-(-down // per_int), across], [down, across]]  # packed, or by older versions as they are
        return {
            "weight_packed": Part([[rows, -(-columns // per_int)]], INT32),
            "weight_scale": Part([[down, across], *([[1]] if down * across == 1 else [])], FLOATS),
            "weight_shape": Part([[2]], (torch.int32, torch.int64)),
            "weight_zero_point": Part(zeros, (torch.int32, torch.int8), optional=self.symmetric),
        }

    def read(self, parts: dict[str, Tensor], rows: int, columns: int) -> Quantised:
        """See `Layout`."""
        if parts["weight_shape"].tolist() != [rows, columns]:
            raise ValueError(f"has weight_shape {parts['weight_shape'].tolist()}, expected {[rows, columns]}")
        values = unpack_ints(parts["weight_packed"], self.bits, 1)[:, :columns] - (1 << self.bits - 1)
        scales = self.blocks.spread(parts["weight_scale"].float(), rows)
        zeros = torch.zeros_like(scales, dtype=torch.int16)
        if (given := parts.get("weight_zero_point")) is not None:
            if given.dtype == torch.int32:
                given = unpack_ints(given, self.bits, 0) - (1 << self.bits - 1)
            zeros = self.blocks.spread(given[:rows].to(torch.int16), rows)
        group = size_of(self.blocks.columns, columns)
        return Quantised(values.to(torch.int8), scales, zeros, group, self.bits)


def layout_of(settings: Settings) -> Layout:
    """What `quantization_config` says. Raises `ConfigError` for what is not implemented."""
    for name in MUST_BE_EMPTY:
        _refuse_unless_empty(settings, name)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        count = len(groups) if isinstance(groups, dict) else "none"
        raise ConfigError(f"config_groups has {count}, expected one for all quantised layers")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError("config_groups says nothing of weights, expected how they are quantised")
    form = expect({"format": group.get("format") or settings.get("format")}, "format", FORMATS)
    expect(weights, "actorder", (None, False, "weight", "static"))
    symmetric = expect(weights, "symmetric", (True, False))
    strategy, blocks = expect(weights, "strategy", STRATEGIES), Blocks(1, -1)
    if strategy == "tensor":
        blocks = Blocks(-1, -1)
    elif strategy == "group":
        blocks = Blocks(1, group_size(weights, -1))
    elif strategy == "block":
        blocks = block_of(weights, "block_structure")
    if expect(weights, "type", ("int", "float")) == "float":
        expect({"format": form}, "format", FORMATS[2:])
        expect(weights, "num_bits", (8,))
        return Scaled(f"{METHOD} float8", "weight_scale", FLOAT8, 8, blocks, symmetric)
    bits = expect(weights, "num_bits", (8, 4))
    if form == PACKED:
        return PackedRows(bits, blocks, symmetric)
    return Scaled(f"{METHOD} int{bits}", "weight_scale", torch.int8, bits, blocks, symmetric)


def _refuse_unless_empty(settings: Settings, name: str) -> None:
    value = settings.get(name)
    dense = (
        isinstance(value, dict) and value.get("format", "dense") == "dense" and not value.get("config_groups")
    )
    if value and not (dense and name != "kv_cache_scheme"):
        raise ConfigError(f"{name} is not implemented; take a checkpoint without it")
