"""Which requests run: as many as their planned bytes leave room for, the next as soon as one has ended.

Nothing is guessed: what a request will need at its longest is known before it starts, so none that runs is ever
swapped out or started over, and the memory is never exceeded. Requests of about one size share the slabs of one cache
and are computed in one product; requests of other sizes have their own, so that short ones do not pay for long ones.
"""

import os
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import torch

from minipyramid.cache import KVCache
from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError
from minipyramid.plan import Need
from minipyramid.request import Sequence

# Of the memory that is free, what keys and values take if nothing is said; the rest is for activations and others.
FREE_SHARE = 0.5
# How much more than they need the rows of one cache may be allotted together.
SLACK = 1.1

Place = tuple[KVCache, int]  # a row of a cache


@dataclass(frozen=True)
class Progress:
    """How far a call is."""

    waiting: int
    running: int
    finished: int
    generated: int  # tokens, of all


class Scheduler:
    """Requests that wait, in the order of their prompts, and the caches of those that run.

    Args:
        memory: bytes for the keys, values and votes of everything in flight; None for a share of what is free.

    Raises:
        RequestError: a request needs more than that alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        memory: int | None,
        waiting: Items[Sequence],
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.memory = int(free_memory(device) * FREE_SHARE) if memory is None else memory
        self.waiting = deque(waiting)
        self.caches: list[KVCache] = []
        self.running: list[list[Sequence]] = []  # running[i][row] has that row of caches[i]
        for sequence in waiting:
            needed = self._bytes(sequence.need)
            if needed > self.memory:
                raise RequestError(
                    f"{sequence.name} needs {needed} bytes of keys and values, but kv_memory is {self.memory}; "
                    "give it more, ask for fewer tokens, or lower kv_budget"
                )

    def admit(self) -> list[tuple[Sequence, Place]]:
        """Start those that wait until the next has no room; returns them with their places."""
        admitted = []
        room = self.memory - sum(cache.allotted_bytes for cache in self.caches)
        fresh: list[tuple[Need, list[Sequence]]] = []  # caches to be allotted: a row's need, and who shares it
        while self.waiting:
            need = self.waiting[0].need
            free = [i for i, c in enumerate(self.caches) if c.free_rows and c.need.join(need) == c.need]
            if free:
                tightest = min(free, key=lambda i: self._bytes(self.caches[i].need))
                admitted.append(self._start(self.waiting[0], tightest))
            elif not self._join(fresh, self.waiting[0], room):
                break
            self.waiting.popleft()
        for need, together in fresh:
            self.caches.append(KVCache.allot(self.config, need, len(together), dtype=self.dtype, device=self.device))
            self.running.append([])
            admitted += [self._start(sequence, len(self.caches) - 1) for sequence in together]
        return admitted

    def retire(self) -> list[Sequence]:
        """Take out those that have ended; a cache of which all have is given back."""
        ended = []
        for i, (cache, running) in enumerate(zip(self.caches, self.running, strict=True)):
            rows = [row for row, sequence in enumerate(running) if sequence.completion.finish_reason]
            for row in rows:
                running[row].finish(cache, row)
                ended.append(running[row])
            self.running[i] = [running[row] for row in cache.retire(rows)]
        self.caches = [cache for cache in self.caches if cache.rows]
        self.running = [running for running in self.running if running]
        return ended

    def _start(self, sequence: Sequence, i: int) -> tuple[Sequence, Place]:
        self.running[i].append(sequence)
        return sequence, (self.caches[i], sequence.start(self.caches[i]))

    def _join(self, fresh: list[tuple[Need, list[Sequence]]], sequence: Sequence, room: int) -> bool:
        """Let a sequence share a cache to be allotted, or have one of its own, if there is room."""
        planned = [len(together) * self._bytes(need) for need, together in fresh]
        for i, (need, together) in enumerate(fresh):
            joined, each = need.join(sequence.need), [*together, sequence]
            size = len(each) * self._bytes(joined)
            wasteful = size > SLACK * sum(self._bytes(s.need) for s in each)
            if not wasteful and sum(planned) - planned[i] + size <= room:
                fresh[i] = (joined, each)
                return True
        fits = sum(planned) + self._bytes(sequence.need) <= room
        if fits:
            fresh.append((sequence.need, [sequence]))
        return fits

    def _bytes(self, need: Need) -> int:
        return need.bytes(self.config.kv_bytes_per_token(self.dtype.itemsize))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the cache will be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the kernel would give up for the asking, its cache of files, counts as free
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
