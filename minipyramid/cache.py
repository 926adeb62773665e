"""The key/value cache: a slab per layer, allotted once from a plan, written in place, a length per layer and row.

Layers may hold different numbers of tokens, as sequences do, so a token's *slot* says nothing
about its *position*: keys are stored rotated, and the position of a sequence's next token is counted apart in
`positions`. The engine owns the cache and passes it to the model; a row is one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.config import ModelConfig


@dataclass
class KVCache:
    """Shapes: `B` rows, `K` key/value heads, `S` slots of a layer, `D` head size.

    A layer's keys stand as [B, K, S, D], so one head's keys are contiguous and a decode step reads them in one
    batched product, without a copy. What lies beyond a row's length is stale but finite, and masked.
    """

    keys: list[Tensor]  # per layer [B, K, S, D]
    values: list[Tensor]  # per layer [B, K, S, D]
    lengths: list[list[int]]  # [layer][row] tokens held
    positions: list[int]  # [row] position of the next token
    bytes_per_token: int  # of one token in one layer

    @classmethod
    def allot(
        cls, config: ModelConfig, slots: list[int], rows: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """`slots` per layer for each of `rows` sequences; the slabs never grow."""
        K, D = config.num_key_value_heads, config.head_dim

        def slabs() -> list[Tensor]:
            # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would still be NaN.
            return [torch.zeros(rows, K, S, D, dtype=dtype, device=device) for S in slots]

        per_token = config.kv_bytes_per_token(dtype.itemsize)
        return cls(slabs(), slabs(), [[0] * rows for _ in slots], [0] * rows, per_token)

    def append(self, layer: int, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tokens of one row, k and v [T, K, D]; returns all that the row holds.  two of [K, n, D]"""
        start = self.lengths[layer][row]
        end = start + k.shape[0]
        self.keys[layer][row, :, start:end] = k.transpose(0, 1)
        self.values[layer][row, :, start:end] = v.transpose(0, 1)
        self.lengths[layer][row] = end
        return self.keys[layer][row, :, :end], self.values[layer][row, :, :end]

    def append_one_each(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write one token of every row, k and v [B, K, D], at `lengths` [B], the layer's lengths on the device.

        Returns the whole slabs [B, K, S, D], since a slice of the live slots would not be contiguous and the
        products would copy it, and which slots are held [B, S].
        """
        rows = torch.arange(len(lengths), device=k.device)
        self.keys[layer][rows, :, lengths] = k
        self.values[layer][rows, :, lengths] = v
        self.lengths[layer] = [n + 1 for n in self.lengths[layer]]
        held = torch.arange(self.keys[layer].shape[2], device=k.device) <= lengths[:, None]  # [B, S]
        return self.keys[layer], self.values[layer], held

    def retire(self, finished: list[int]) -> list[int]:
        """Drop rows; the last rows move into their places, so that the rows left stay contiguous.

        Returns the former row of each row that is left.
        """
        order = list(range(len(self.positions)))
        for row in sorted(finished, reverse=True):
            last = len(order) - 1
            for slab in (*self.keys, *self.values):
                if row != last:
                    slab[row] = slab[last]
            for per_row in (order, self.positions, *self.lengths):
                per_row[row] = per_row[last]
                per_row.pop()
        self.keys = [slab[: len(order)] for slab in self.keys]
        self.values = [slab[: len(order)] for slab in self.values]
        return order

    def row_lengths(self, row: int) -> list[int]:
        """Tokens that each layer holds of one sequence."""
        return [lengths[row] for lengths in self.lengths]

    def row_bytes(self, row: int) -> int:
        """Bytes of the keys and values that are held of one sequence."""
        return self.bytes_per_token * sum(self.row_lengths(row))
