"""Which requests run: as many as their planned bytes leave room for, in their order.

Nothing is guessed: what a request will need at its longest is known before it starts, so none that runs is
ever swapped out or started over, and the memory is never exceeded. Requests of nearly one size that start
together are rows of one cache and attend in one product; those of other sizes, or while somebody waits for
the bytes that the smaller would leave unused, have their own. The next starts when a row is free that is
large enough for it, or when a cache whose rows have all ended has given back its bytes.
"""

from collections import deque
from operator import sub

import torch

from minipyramid.cache import KVCache, Row
from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError
from minipyramid.need import Need
from minipyramid.request import Sequence

# Slots of a layer that a row may leave unused, so that it shares a cache. A cache of its own costs a step as
# much as 130 more slots (12 key/value heads of 64, float32, one core): 12 rows of 20 to 120 tokens took 26 ms
# in 12 caches and 16 in one (the embedded checkpoint).
UNUSED = 128


class Scheduler:
    """Sequences that wait, in their order, and the caches of those that run.

    Args:
        config: the model's shape.
        dtype: of keys and values.
        device: where the caches are.
        memory: bytes for the keys, values and votes of everything in flight, a number or as in "2GiB"; None
            for half of what is free.

    Raises:
        RequestError: the memory is no such size.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, memory: int | str | None
    ) -> None:
        from minipyramid.sizes import memory_bound

        self.config, self.dtype, self.device = config, dtype, device
        self.per_token = config.kv_bytes_per_token(dtype.itemsize)
        self._bound = memory_bound(memory, device)
        self._memory = 0  # the bound when last nothing was in flight
        self.waiting: deque[Sequence] = deque()
        self.caches: list[KVCache] = []
        self.running: dict[Row, Sequence] = {}  # who has which row of which cache
        self.finished = self.generated = 0  # sequences that have ended, and tokens of all

    @property
    def memory(self) -> int:
        """The bound on what is in flight, in bytes."""
        if not self.caches:
            self._memory = self._bound()
        return self._memory

    @property
    def bytes_in_flight(self) -> int:
        """Of all caches, and of what earlier turns of the conversations that run have left."""
        earlier = sum(s.earlier.bytes for s in self.running.values() if s.earlier)
        return earlier + sum(cache.capacity * cache.need.bytes(self.per_token) for cache in self.caches)

    def bytes_of(self, sequence: Sequence) -> int:
        """What it needs at its longest, with what earlier turns have left until it ends."""
        earlier = sequence.earlier.bytes if sequence.earlier else 0
        return sequence.need.bytes(self.per_token) + earlier

    def check(self, sequence: Sequence) -> None:
        """Refuse what could never run: `RequestError` where it needs more than the memory by itself."""
        needed = self.bytes_of(sequence)
        if needed > self.memory:
            problem = f"{sequence.request.name} needs {needed} bytes of cache, but kv_memory is {self.memory}"
            raise RequestError(f"{problem}; give it more, ask for fewer tokens, or lower kv_budget")

    def admit(self) -> list[Sequence]:
        """Start waiting sequences in their order, up to the first that has no room.

        Returns those taken; one whose cache could not be allotted has `error` set.
        """
        admitted: list[Sequence] = []
        fresh: dict[Need, list[Sequence]] = {}  # caches to be allotted: a row's need, and who shares it
        room, passed = self.memory - self.bytes_in_flight, 0  # `passed` of those that wait get a fresh cache
        while passed < len(self.waiting):
            sequence = self.waiting[passed]
            needed = self.bytes_of(sequence)
            earlier = needed - sequence.need.bytes(self.per_token)
            free = [cache for cache in self.caches if cache.takes(sequence.need)]
            if free and earlier <= room:
                room -= earlier
                self._begin(sequence, min(free, key=lambda cache: cache.need.bytes(self.per_token)))
            # With nothing else in flight there is never more room than now, and it would wait for ever.
            elif needed <= room or not (self.caches or fresh):
                fresh.setdefault(sequence.need, []).append(sequence)
                room -= needed
                passed += 1
            else:
                break
            admitted.append(sequence)
        for need, together in self._merged(fresh, 0 if passed < len(self.waiting) else room):
            try:
                cache = KVCache.allot(self.config, need, len(together), self.dtype, self.device)
            except Exception as error:
                problem = f"the keys and values do not fit into memory ({error!r:.80})"
                for sequence in together:
                    sequence.error = RequestError(f"{problem}; give a smaller kv_memory")
                continue
            self.caches.append(cache)
            for sequence in together:
                self._begin(sequence, cache)
        return admitted

    def _merged(self, fresh: dict[Need, list[Sequence]], room: int) -> list[tuple[Need, list[Sequence]]]:
        """The caches to allot: of needs that differ little one, as far as there is room for what it adds."""
        merged: list[tuple[Need, list[Sequence]]] = []
        for need, alike in sorted(fresh.items(), key=lambda item: -sum(item[0].slots)):
            larger, others = merged[-1] if merged else (need, [])
            both, together = larger.covering(need), others + alike
            sizes = [n.bytes(self.per_token) for n in (both, larger, need)]
            added = sizes[0] * len(together) - sizes[1] * len(others) - sizes[2] * len(alike)
            unused = max(map(sub, both.slots, need.slots))
            if others and larger.group == need.group and unused <= UNUSED and added <= room:
                room -= added
                merged[-1] = both, together
            else:
                merged.append((need, alike))
        return merged

    def _begin(self, sequence: Sequence, cache: KVCache) -> None:
        """Move a sequence from those that wait to those that run, so that no interruption loses it."""
        row = sequence.take_row(cache)
        self.running[row] = sequence
        self.waiting.remove(sequence)
        row.adopt(sequence.earlier)

    def in_order(self) -> list[Sequence]:
        """Those that run, in the order of the caches' rows, which is that of a step."""
        return [self.running[row] for cache in self.caches for row in cache.rows]

    def retire(self, sequence: Sequence) -> bool:
        """Take out one that runs or waits; a cache whose rows have all ended is given back.

        Returns whether it was here.
        """
        if sequence.row and self.running.pop(sequence.row, None):
            sequence.row.cache.retire(sequence.row)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return False
        sequence.row = sequence.earlier = None
        sequence.ended = True
        self.caches = [cache for cache in self.caches if cache.rows]
        self.finished += 1
        return True

    def drop_all(self) -> list[Sequence]:
        """End those that run and forget every cache, also one that an interruption left without an owner."""
        dropped = list(self.running.values())
        self.caches, self.running = [], {}
        for sequence in dropped:
            sequence.row = sequence.earlier = None
            sequence.ended = True
        self.finished += len(dropped)
        return dropped
