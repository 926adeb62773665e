"""The key/value cache: slabs per layer, allotted once from a plan, written in place, a length per layer and row.

Layers may hold different numbers of tokens, as sequences do, so a token's *slot* says nothing
about its *position*: keys are stored rotated, and the position of a sequence's next token is counted apart.
The engine owns the cache and passes it to the model. Generated tokens are *unjudged* until the newest have voted on
them (`minipyramid/pyramid.py`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.plan import Need
from minipyramid.pyramid import Gathering, PyramidConfig, pivotal, voting


@dataclass(eq=False)
class Row:
    """What is held of one sequence."""

    lengths: list[int]  # [layer] tokens held
    kept: list[Tensor]  # [layer] positions of the prompt's, and of generated ones that outlived a judgement  [n] int32
    gathering: Gathering | None = None  # the generated tokens that are not judged yet
    position: int = 0  # of the next token

    def kept_positions(self) -> list[list[int]]:
        """Positions of all that each layer holds, ascending."""
        end, held = self.position, zip(self.lengths, self.kept, strict=True)
        # Behind these come the generated tokens that no judgement has reached.
        return [kept.tolist() + list(range(end - (length - len(kept)), end)) for length, kept in held]


@dataclass
class KVCache:
    """Shapes: `B` rows in use, the first of `capacity`, `K` key/value heads, `S` slots of a layer, `D` head size.

    A layer's keys stand as [B, K, S, D], so a decode step reads them in one batched product, without a copy. In float32
    on a CPU the slots of a component lie side by side instead of the components of a slot: a step's attention over
    768 slots of 32 sequences with 12 heads took 6.6 ms in place of 9.4. What lies beyond a row's length is stale but
    finite, and masked.
    """

    keys: list[Tensor]  # per layer [capacity, K, S, D]
    values: list[Tensor]  # per layer [capacity, K, S, D]
    votes: list[Tensor]  # per layer [capacity, U] float32, for the generated tokens that are not judged yet
    config: ModelConfig
    need: Need  # what a row has room for
    bytes_per_token: int  # of one token in one layer
    capacity: int  # rows allotted
    rows: list[Row] = field(default_factory=list)  # in use

    @classmethod
    def allot(cls, config: ModelConfig, need: Need, rows: int, dtype: torch.dtype, device: torch.device) -> "KVCache":
        """Room for `rows` sequences; nothing ever grows."""
        K, D = config.num_key_value_heads, config.head_dim

        def slabs() -> list[Tensor]:
            # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would still be NaN.
            if device.type == "cpu" and dtype == torch.float32:
                return [torch.zeros(rows, K, D, S).mT for S in need.slots]
            return [torch.zeros(rows, K, S, D, dtype=dtype, device=device) for S in need.slots]

        votes = [torch.zeros(rows, need.unjudged, device=device) for _ in need.slots]
        return cls(slabs(), slabs(), votes, config, need, config.kv_bytes_per_token(dtype.itemsize), rows)

    def takes(self, need: Need) -> bool:
        """Whether a row is free and has the room."""
        fits = all(have >= asked for have, asked in zip(self.need.slots, need.slots, strict=True))
        return fits and len(self.rows) < self.capacity and self.need.unjudged >= need.unjudged

    def add_row(self, gathering: Gathering | None = None) -> int:
        """Take the next free row; returns its index."""
        for votes in self.votes:
            votes[len(self.rows)] = 0
        nothing = torch.zeros(0, dtype=torch.int32, device=self.keys[0].device)
        self.rows.append(Row([0] * len(self.keys), [nothing] * len(self.keys), gathering))
        return len(self.rows) - 1

    def append(self, layer: int, row: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tokens of one row, k and v [T, K, D], positions [T]; returns all that it holds.  two of [K, n, D]"""
        held = self.rows[row]
        held.kept[layer] = torch.cat((held.kept[layer], positions.int()))
        start = held.lengths[layer]
        end = start + k.shape[0]
        self.keys[layer][row, :, start:end] = k.transpose(0, 1)
        self.values[layer][row, :, start:end] = v.transpose(0, 1)
        held.lengths[layer] = end
        if start == 0:
            return k.transpose(0, 1), v.transpose(0, 1)
        return self.keys[layer][row, :, :end], self.values[layer][row, :, :end]

    def begin_step(self) -> "list[LayerCache]":
        """Count one more generated token of every row, and give each layer as the step finds it; `end_step` follows."""
        lengths = list(zip(*(row.lengths for row in self.rows), strict=True))  # [layer][B]
        ends = torch.tensor(lengths, device=self.keys[0].device)  # [L, B], of all layers in one copy to the device
        # All rows gather or none does, for settings are an engine's.
        votings = voting([row.gathering for row in self.rows if row.gathering], ends, self.need.unjudged)
        slabs = ([t[: len(self.rows)] for t in by_layer] for by_layer in (self.keys, self.values, self.votes))
        return [LayerCache(*of_layer) for of_layer in zip(*slabs, lengths, ends, votings, strict=True)]

    def end_step(self) -> None:
        """Count the token that was written in every layer of every row; those whose time has come are judged."""
        for i, row in enumerate(self.rows):
            row.lengths = [length + 1 for length in row.lengths]
            row.position += 1
            if row.gathering and row.gathering.judge_if_due():
                self._compact(i, row, row.gathering)

    def _compact(self, index: int, row: Row, gathering: Gathering) -> None:
        """Of the oldest of a row's unjudged tokens, `gathered` many, keep each layer's highest-voted, in place."""
        gathered = gathering.config.exceed_length_to_compress
        unjudged = gathered + gathering.unjudged  # from which `judge_if_due` has taken the gathered
        oldest = row.position - unjudged
        for layer, count in enumerate(gathering.config.survivors(len(row.lengths))):
            votes, end = self.votes[layer][index], row.lengths[layer]
            best = pivotal(votes[:gathered], count, sinks=0)
            start = end - unjudged
            end -= gathered - count
            stay = torch.cat((best, torch.arange(gathered, unjudged, device=best.device)))
            for slab in (self.keys[layer], self.values[layer]):
                slab[index, :, start:end] = slab[index, :, start + stay]
            votes.copy_(torch.cat((votes[gathered:], votes.new_zeros(gathered))))
            row.lengths[layer] = end
            row.kept[layer] = torch.cat((row.kept[layer], oldest + best.int()))

    def retire(self, row: Row) -> None:
        """Free a row; the last one moves into its place, so that those in use stay the first."""
        index, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            for slab in (*self.keys, *self.values, *self.votes):
                slab[index] = slab[len(self.rows)]
            self.rows[index] = last

    def adopt(self, row: int, source: "KVCache", held: Row) -> None:
        """Copy into a new row all that `held`, row 0 of `source`, has; none of it is judged again."""
        for layer, (n, kept) in enumerate(zip(held.lengths, held.kept_positions(), strict=True)):
            k, v = (slabs[layer][0, :, :n].transpose(0, 1) for slabs in (source.keys, source.values))
            self.append(layer, row, k, v, torch.tensor(kept, device=k.device))
        self.rows[row].position = held.position


@dataclass(frozen=True)
class LayerCache:
    """One layer of a cache as a step finds it: the rows in use, and where the new token of each goes."""

    keys: Tensor  # [B, K, S, D]
    values: Tensor  # [B, K, S, D]
    votes: Tensor  # [B, U]
    lengths: tuple[int, ...]  # [B] tokens held
    ends: Tensor  # [B] the same on the device: the new token's slot
    voting: tuple[Tensor, Tensor] | None  # weights of the new tokens' votes, and the slots they are for, two of [B, U]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write one token of every row, k and v [B, K, D], behind what the row holds.

        Returns the slabs [B, K, S, D] and which slots are held [B, S]; where all rows hold equally many in float32 on a
        CPU only those slots, and no mask. (In bf16 the products would copy such a slice.) The rows' own counts follow
        in `end_step`.
        """
        # A stride above 1 is float32's on a CPU. A compiled graph must not depend on how many are held, or each token
        # would need another.
        if not torch.compiler.is_compiling() and self.keys.stride(-1) > 1 and len(set(self.lengths)) == 1:
            end = self.lengths[0]
            self.keys[:, :, end], self.values[:, :, end] = k, v
            return self.keys[:, :, : end + 1], self.values[:, :, : end + 1], None
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, :, self.ends] = k
        self.values[rows, :, self.ends] = v
        return self.keys, self.values, torch.arange(self.keys.shape[2], device=k.device) <= self.ends[:, None]

    def vote(self, probs: Tensor) -> None:
        """Add the newest token's vote to every row's sums; probs [B, H, S].

        The heads' sum stands for their mean, since only the order of votes counts.
        """
        if self.voting is not None:
            weights, slots = self.voting
            self.votes.addcmul_(weights, probs.sum(1).gather(1, slots))


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: where they go, how many, and, of a prompt, by which settings it is pruned."""

    cache: KVCache
    row: int
    count: int
    pyramid: PyramidConfig | None = None

    def positions(self) -> Tensor:
        """They follow what the sequence has computed.  [count]"""
        return self.cache.rows[self.row].position + torch.arange(self.count)

    def lengths(self, layers: int) -> list[int]:
        """How many of them each layer receives."""
        return self.pyramid.prompt_lengths(self.count, layers) if self.pyramid else [self.count] * layers
