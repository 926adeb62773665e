"""The key/value cache: a slab per layer, allotted once from a plan, written in place, a length per layer and row.

Layers may hold different numbers of tokens, as sequences do, so a token's *slot* says nothing
about its *position*: keys are stored rotated, and the position of a sequence's next token is counted apart in
`positions`. The engine owns the cache and passes it to the model; a row is one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.pyramid import Voting, pivotal


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
    kept: list[list[Tensor]]  # [layer][row] positions of a prompt's tokens  [n] int32
    judged: list[list[list[int]]]  # [layer][row] positions of the generated tokens that were voted to stay
    votes: list[Tensor]  # per layer [B, U] float32, for the generated tokens that are not judged yet

    @classmethod
    def allot(
        cls,
        config: ModelConfig,
        slots: list[int],
        unjudged: int,
        rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """`slots` per layer for each of `rows` sequences, and votes for `unjudged` tokens; nothing ever grows."""
        K, D = config.num_key_value_heads, config.head_dim

        def slabs() -> list[Tensor]:
            # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would still be NaN.
            return [torch.zeros(rows, K, S, D, dtype=dtype, device=device) for S in slots]

        per_token = config.kv_bytes_per_token(dtype.itemsize)
        nothing = torch.zeros(0, dtype=torch.int32, device=device)
        return cls(
            slabs(),
            slabs(),
            [[0] * rows for _ in slots],
            [0] * rows,
            per_token,
            [[nothing] * rows for _ in slots],
            [[[] for _ in range(rows)] for _ in slots],
            [torch.zeros(rows, unjudged, device=device) for _ in slots],
        )

    def append(self, layer: int, row: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tokens of one row, k and v [T, K, D], positions [T]; returns all that it holds.  two of [K, n, D]"""
        self.kept[layer][row] = torch.cat((self.kept[layer][row], positions.int()))
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

    def vote(self, layer: int, probs: Tensor, voting: Voting, lengths: Tensor) -> None:
        """Count the newest token's vote for every row's unjudged tokens, the last of its slots.

        probs [B, S], the heads' mean; lengths [B], the layer's before this token
        """
        first = lengths + 1 - voting.unjudged
        slots = first[:, None] + torch.arange(voting.weights.shape[1], device=probs.device)  # [B, U]
        seen = probs.gather(1, slots.clamp(max=probs.shape[1] - 1))
        self.votes[layer][:, : voting.weights.shape[1]] += voting.weights * seen

    def compact(self, row: int, unjudged: int, gathered: int, survivors: list[int]) -> None:
        """Of the `gathered` oldest of a row's unjudged tokens, keep the `survivors[layer]` highest-voted, in place."""
        for layer, count in enumerate(survivors):
            votes, end = self.votes[layer][row], self.lengths[layer][row]
            best = pivotal(votes[:gathered], count, sinks=0)
            start, oldest = end - unjudged, self.positions[row] - unjudged
            end -= gathered - count
            for slab in (self.keys[layer], self.values[layer]):
                waiting = slab[row, :, start : start + unjudged]
                slab[row, :, start:end] = torch.cat((waiting[:, best], waiting[:, gathered:]), dim=1)
            votes.copy_(torch.cat((votes[gathered:], votes.new_zeros(gathered))))
            self.lengths[layer][row] = end
            self.judged[layer][row] += [oldest + i for i in best.tolist()]

    def kept_positions(self, row: int) -> list[list[int]]:
        """Positions of all that each layer holds of one sequence, ascending."""
        held = []
        for layer, lengths in enumerate(self.lengths):
            known = self.kept[layer][row].tolist() + self.judged[layer][row]
            end = self.positions[row]
            held.append(known + list(range(end - (lengths[row] - len(known)), end)))
        return held

    def retire(self, finished: list[int]) -> list[int]:
        """Drop rows; the last rows move into their places, so that the rows left stay contiguous.

        Returns the former row of each row that is left.
        """
        order = list(range(len(self.positions)))
        for row in sorted(finished, reverse=True):
            last = len(order) - 1
            for slab in (*self.keys, *self.values, *self.votes):
                if row != last:
                    slab[row] = slab[last]
            per_rows: list[list[Any]] = [order, self.positions, *self.lengths, *self.kept, *self.judged]
            for per_row in per_rows:
                per_row[row] = per_row[-1]
                per_row.pop()
        for slabs in (self.keys, self.values, self.votes):
            slabs[:] = [slab[: len(order)] for slab in slabs]
        return order

    def row_lengths(self, row: int) -> list[int]:
        """Tokens that each layer holds of one sequence."""
        return [lengths[row] for lengths in self.lengths]

    def row_bytes(self, row: int) -> int:
        """Bytes of the keys and values that are held of one sequence."""
        return self.bytes_per_token * sum(self.row_lengths(row))
