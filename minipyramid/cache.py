"""The key/value cache: slabs per layer, allotted once, written in place, a length per layer and row.

The cache decides nothing of a prompt: the policy says what each layer holds (`minipyramid/policy.py`). Of
generated tokens it keeps those that the votes put first. Layers may hold different numbers of tokens, as
sequences do, and the heads of a layer different tokens. So a token's *slot* says nothing about its
*position*: keys are stored rotated, and the position of a sequence's next token is counted apart. The engine
owns the cache and passes it to the model. Generated tokens are *pending* until a compaction reaches them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minipyramid.attention import BY_ROWS, attend_each
from minipyramid.config import ModelConfig
from minipyramid.need import Need
from minipyramid.policy import FULL, PendingTokens, Policy, VotesToCast, top_scored, votes_to_cast

Slab = Any  # keys or values of a layer: a Tensor, or an `EightBits` or `PagedSlab` in its place
Positions = list[int] | list[list[int]]  # of a layer: of all its heads alike, or one list per key/value head


@dataclass(eq=False)
class Row:
    """What is held of one sequence: one row of a cache."""

    cache: "KVCache"
    index: int  # its number among the cache's rows
    need: Need  # what it may come to hold
    lengths: list[int]  # [layer] tokens held
    # [layer] positions of what was held of the prompt, of earlier turns, and by compactions: one list for all
    # heads, or one per head where heads hold different tokens. Generated tokens behind these are not listed.
    kept: list[Tensor]  # [1 or K, n] int32
    pending: PendingTokens | None = None  # None where generated tokens are never dropped
    position: int = 0  # of the next token

    def kept_positions(self) -> list[Positions]:
        """Positions of all that each layer holds, ascending.  [layer][slot], or [layer][head][slot]

        A slot that stands for dropped tokens (`policies/stand_ins.py`) has that of the token it replaces.
        """
        layers: list[Positions] = []
        for length, kept in zip(self.lengths, self.kept, strict=True):
            # Behind these come the pending tokens.
            pending = list(range(self.position - (length - kept.shape[1]), self.position))
            # What was guessed stands before the first tokens, which were computed after it.
            heads: list[list[int]] = [sorted(head) + pending for head in kept.tolist()]
            layers.append(heads if len(heads) > 1 else heads[0])
        return layers

    def stored(self, layer: int) -> tuple[Slab, Slab]:
        """Keys and values in the layer's slabs.  two of [K, n, D]"""
        n = self.lengths[layer]
        return self.cache.keys[layer][self.index, :, :n], self.cache.values[layer][self.index, :, :n]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same in the model's dtype.  two of [K, n, D]"""
        k, v = self.stored(layer)
        return k.to(self.cache.dtype), v.to(self.cache.dtype)

    def write(self, layer: int, k: Slab, v: Slab, positions: Tensor) -> None:
        """Append tokens; k and v [K, T, D], positions [T], or [K, T] where heads hold different ones."""
        start = self.lengths[layer]
        end = start + k.shape[1]
        self.cache.keys[layer][self.index, :, start:end] = k
        self.cache.values[layer][self.index, :, start:end] = v
        self.lengths[layer] = end
        both = [self.kept[layer], positions.int() if positions.dim() == 2 else positions.int()[None]]
        heads = max(map(len, both))
        self.kept[layer] = torch.cat([part.expand(heads, -1) for part in both], dim=1)

    def copy_out(self) -> "HeldTokens":
        """A copy of all that is held, outside the slabs."""
        layers = []
        for layer, kept in enumerate(self.kept_positions()):
            k, v = (slab.clone() for slab in self.stored(layer))
            layers.append((k, v, torch.tensor(kept, device=k.device)))
        return HeldTokens(self.cache.config, layers, self.position, list(self.lengths))

    def adopt(self, held: "HeldTokens | None") -> None:
        """Hold what an earlier turn left and nothing else; none of it is voted on again."""
        self.lengths = [0] * len(self.lengths)
        self.kept = [kept[:1, :0] for kept in self.kept]
        for layer, (k, v, positions) in enumerate(held.layers if held else ()):
            self.write(layer, k, v, positions)
        self.position = held.position if held else 0


@dataclass
class KVCache:
    """Shapes: `B` rows in use, the first of `capacity`, `K` key/value heads, `S` slots of a layer, `D` head
    size.

    A layer's keys are [B, K, S, D], in the order in memory in which a step reads them (`empty_slabs`).
    What lies beyond a row's length is masked, and holds zeros when the row begins.
    """

    keys: list[Slab]  # per layer [capacity, K, S, D]
    values: list[Slab]  # per layer [capacity, K, S, D]
    votes: list[Tensor]  # per layer [capacity, U] float32, running sums for the pending tokens
    config: ModelConfig
    need: Need  # what a row has room for
    dtype: torch.dtype  # that keys and values are read in
    bytes_per_token: int  # of one token in one layer
    capacity: int  # rows allotted
    rows: list[Row] = field(default_factory=list)  # in use

    @classmethod
    def allot(
        cls, config: ModelConfig, needs: list[Need], dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """Room for sequences of these needs, which are equal; nothing ever grows."""
        need, rows = needs[0], len(needs)
        k, v = empty_slabs(config, [(rows, S) for S in need.slots], dtype, device)
        votes = [torch.empty(rows, need.pending, device=device) for _ in need.slots]
        return cls(k, v, votes, config, need, dtype, config.kv_bytes_per_token(dtype.itemsize), rows)

    @property
    def bytes(self) -> int:
        """Of keys, values and votes, in use or not."""
        return self.capacity * self.need.bytes(self.bytes_per_token)

    def takes(self, need: Need) -> bool:
        """Whether a row is free and has the room."""
        fits = all(have >= asked for have, asked in zip(self.need.slots, need.slots, strict=True))
        # Either all rows of a cache vote, in groups of one size, or none does.
        votes_fit = need.group == self.need.group and need.pending <= self.need.pending
        return fits and votes_fit and len(self.rows) < self.capacity

    def add_row(self, need: Need | None = None, pending: PendingTokens | None = None) -> Row:
        """Take the next free row, for what the cache `takes`; without a need all of it."""
        index, layers = len(self.rows), len(self.keys)
        self.clear(index)
        nothing = torch.zeros(1, 0, dtype=torch.int32, device=self.keys[0].device)
        self.rows.append(Row(self, index, need or self.need, [0] * layers, [nothing] * layers, pending))
        return self.rows[-1]

    def clear(self, index: int) -> None:
        """Let a row begin with zeros: a masked slot has weight 0, but 0 times a NaN that was left is NaN."""
        for slab in (*self.keys, *self.values, *self.votes):
            slab[index] = 0

    def begin_step(self) -> "list[LayerCache]":
        """Count one more pending token of every row; returns every layer as the step finds it."""
        lengths = list(zip(*(row.lengths for row in self.rows), strict=True))  # [layer][B]
        # Of all layers in one copy to the device.
        ends = torch.tensor(lengths, device=self.keys[0].device)  # [L, B]
        # All rows drop generated tokens or none does, by `takes`.
        pending = [row.pending for row in self.rows if row.pending]
        to_cast = votes_to_cast(pending, ends, self.need.pending)
        return [self.layer(i, *found) for i, found in enumerate(zip(lengths, ends, to_cast, strict=True))]

    def layer(self, layer: int, lengths: tuple[int, ...], ends: Tensor, to_cast: VotesToCast) -> "LayerCache":
        """One layer, the rows in use."""
        k, v, votes = (slab[layer][: len(lengths)] for slab in (self.keys, self.values, self.votes))
        return LayerCache(k, v, votes, lengths, ends, to_cast)

    def end_step(self) -> None:
        """Count the token that was written in every layer, and compact the rows where a group is due."""
        for row in self.rows:
            row.lengths = [length + 1 for length in row.lengths]
            row.position += 1
            if row.pending and row.pending.take_due_group():
                self._compact(row, row.pending)

    def _compact(self, row: Row, pending: PendingTokens) -> None:
        """Of the oldest group of a row's pending tokens keep each layer's highest-voted, in place."""
        group = pending.generation.group
        count = group + pending.count  # `take_due_group` has already taken the group off
        oldest = row.position - count
        for layer, stay in enumerate(pending.generation.stay):
            votes, start = self.votes[layer][row.index], row.lengths[layer] - count
            best = top_scored(votes[:group], stay)
            left = torch.cat((best, torch.arange(group, count, device=best.device)))  # of the pending tokens
            end = row.lengths[layer] = start + len(left)
            for slab in (self.keys[layer], self.values[layer]):
                slab[row.index, :, start:end] = slab[row.index, :, start + left]
            votes.copy_(torch.cat((votes[group:], votes.new_zeros(group))))
            survivors = (oldest + best.int()).expand(len(row.kept[layer]), -1)
            row.kept[layer] = torch.cat((row.kept[layer], survivors), dim=1)

    def retire(self, row: Row) -> None:
        """Free a row; the last one moves into its place, so that those in use stay the first."""
        last = self.rows.pop()
        if last is not row:
            self.renumber(last.index, row.index)
            self.rows[row.index], last.index = last, row.index

    def renumber(self, old: int, new: int) -> None:
        """What is held in one row stands in another from now on."""
        for slab in (*self.keys, *self.values, *self.votes):
            slab[new] = slab[old]


Allot = Callable[[ModelConfig, list[Need], torch.dtype, torch.device], KVCache]  # as `KVCache.allot`


def empty_slabs(
    config: ModelConfig, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> list[list[Slab]]:
    """Memory for keys, and for values; shapes are each layer's rows and slots.  two of [L] of [rows, K, S, D]

    Of keys on a CPU the slots of a component lie side by side instead of the components of a slot, as
    `attention.sums_of_rows` reads them.
    """
    K, D = config.num_key_value_heads, config.head_dim
    if config.kv_dtype == "int8":
        from minipyramid.eight_bits import EightBits  # most do without

        return EightBits.slabs([(rows, K, S, D) for rows, S in shapes], device)
    values = [torch.empty(rows, K, S, D, dtype=dtype, device=device) for rows, S in shapes]
    if device.type in BY_ROWS:
        return [[torch.empty(rows, K, D, S, dtype=dtype).mT for rows, S in shapes], values]
    return [[torch.empty_like(slab) for slab in values], values]


@dataclass(frozen=True)
class HeldTokens:
    """The keys and values of one sequence, between two turns of a conversation."""

    config: ModelConfig
    layers: list[tuple[Slab, Slab, Tensor]]  # keys and values [K, n, D], positions [n] or [K, n]
    position: int  # of the next token
    lengths: list[int]  # [layer]

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(k.nbytes + v.nbytes for k, v, _ in self.layers)


@dataclass(frozen=True)
class LayerCache:
    """One layer of a cache as a decode step finds it: the rows in use, and where their new tokens go."""

    keys: Slab  # [B, K, S, D]
    values: Slab  # [B, K, S, D]
    votes: Tensor  # [B, U]
    lengths: tuple[int, ...]  # [B] tokens held
    ends: Tensor  # [B] the same on the device: the new token's slot
    to_cast: VotesToCast

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token of every row looks at what its row holds and at itself, and votes.

        q [B, H, D] as `attend_each` takes it, k and v [B, K, D]  ->  [B, H * D]
        """
        out, probs = attend_each(q, self.keys, self.values, *self.append(k, v))
        if self.to_cast is not None:
            weights, slots = self.to_cast
            # The heads' sum stands for their mean, for it gives the same order.
            self.votes.addcmul_(weights, probs.sum(1).gather(1, slots))
        return out

    def append(self, k: Tensor, v: Tensor) -> tuple[int, Tensor | None]:
        """Write one token of every row, k and v [B, K, D], after what the row holds.

        Returns how many slots to look at, and which of them are held [B, n], None if all are. The rows' own
        counts follow in `end_step`.
        """
        n = self.keys.shape[2]
        # A compiled graph must not depend on how many are held, or each token would need another. Other
        # devices read the slab whole too, since a product of matrices would first copy a part of it.
        if self.ends.device.type in BY_ROWS and not torch.compiler.is_compiling():
            n = max(self.lengths) + 1
            if n == min(self.lengths) + 1:
                self.keys[:, :, n - 1], self.values[:, :, n - 1] = k, v
                return n, None
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, :, self.ends], self.values[rows, :, self.ends] = k, v
        return n, torch.arange(n, device=k.device) <= self.ends[:, None]


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: where they go, how many, and by which policy they are pruned."""

    row: Row
    count: int
    policy: Policy = FULL
    seed: int = 0  # of the prompt, for policies that draw
    looked_over: list[Tensor] | None = None  # [layer] of [K, count], by `Policy.look_over`
