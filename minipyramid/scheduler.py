"""Which requests run: as many as their planned bytes leave room for, in their order.

Nothing is guessed: what a request will need at its longest is known before it starts, so none that runs is
ever swapped out or started over, and a `kv_memory` that was given is never exceeded. Requests that start
together share caches where they can, and each cache attends in one product (`minipyramid/sharing.py`).
The next starts when a cache has room for it, or when a cache whose rows have all ended has given back its
bytes.
"""

from collections import deque

import torch

from minipyramid.cache import Allot, KVCache, Row
from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError
from minipyramid.request import Sequence


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
        self.bytes_per_token = config.kv_bytes_per_token(dtype.itemsize)
        self._bound = memory_bound(memory, device)
        self._memory = 0  # the bound when last nothing was in flight
        self.waiting: deque[Sequence] = deque()
        self.caches: list[KVCache] = []
        self.running: dict[Row, Sequence] = {}  # who has which row of which cache
        self.finished = self.generated = 0  # sequences that have ended, and tokens computed in steps

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
        return earlier + sum(cache.bytes for cache in self.caches)

    def bytes_of(self, sequence: Sequence) -> int:
        """What it needs at its longest, with what earlier turns have left until it ends."""
        earlier = sequence.earlier.bytes if sequence.earlier else 0
        return sequence.need.bytes(self.bytes_per_token) + earlier

    def check(self, sequence: Sequence) -> None:
        """Refuse what could never run: `RequestError` where it needs more than the memory by itself."""
        needed = self.bytes_of(sequence)
        if needed > self.memory:
            problem = f"{sequence.request.name} needs {needed} bytes of cache, but kv_memory is {self.memory}"
            raise RequestError(f"{problem}; give it more, ask for fewer tokens, or lower kv_budget")

    def admit(self) -> list[Sequence]:
        """Start waiting sequences in their order, up to the first that has no room.

        Those at the end of what gets a new cache may wait after all: in whole pages all take more.

        Returns those taken; one whose cache could not be allotted has `error` set.
        """
        begun: list[Sequence] = []
        fresh: list[Sequence] = []  # the first of those that wait, who get a new cache
        room = self.memory - self.bytes_in_flight
        while len(fresh) < len(self.waiting):
            sequence = self.waiting[len(fresh)]
            needed = self.bytes_of(sequence)
            earlier = needed - sequence.need.bytes(self.bytes_per_token)
            free = [cache for cache in self.caches if cache.takes(sequence.need)]
            if free and earlier <= room:
                room -= earlier
                self._begin(sequence, min(free, key=lambda cache: cache.need.bytes(self.bytes_per_token)))
                begun.append(sequence)
            # It starts also if nothing is in flight, or it would wait for ever: what is free may have become
            # less since `check`.
            elif needed <= room or not (self.caches or fresh):
                room -= needed
                fresh.append(sequence)
            else:
                break
        for together, allot in self._by_cache(fresh, room):
            begun += together
            self._begin_together(together, allot)
        return begun

    def _by_cache(self, fresh: list[Sequence], room: int) -> list[tuple[list[Sequence], Allot]]:
        """Those that start, by cache, and how it is allotted."""
        if len({sequence.need for sequence in fresh}) < 2:
            return [(fresh, KVCache.allot)] if fresh else []
        from minipyramid.sharing import shared  # sequences of one size do without

        return shared(fresh, self.bytes_per_token, room, others_wait=len(fresh) < len(self.waiting))

    def _begin_together(self, sequences: list[Sequence], allot: Allot) -> None:
        """Allot a cache and start them in it."""
        try:
            cache = allot(self.config, [sequence.need for sequence in sequences], self.dtype, self.device)
        except Exception as error:
            if len(sequences) > 1:  # there may be memory for some of them
                for sequence in sequences:
                    self._begin_together([sequence], KVCache.allot)
                return
            problem = f"the keys and values do not fit into memory ({error!r:.80})"
            sequences[0].error = RequestError(f"{problem}; give a smaller kv_memory")
            return
        self.caches.append(cache)
        for sequence in sequences:
            self._begin(sequence, cache)

    def _begin(self, sequence: Sequence, cache: KVCache) -> None:
        """Move a sequence from those that wait to those that run, so that no interruption loses it."""
        self.running[sequence.take_row(cache)] = sequence
        self.waiting.remove(sequence)

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
