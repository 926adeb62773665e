"""Which requests run: as many as their planned bytes leave room for, in their order.

Nothing is guessed: what a request will need at its longest is known before it starts, so none that runs is ever
swapped out or started over, and the memory is never exceeded. Requests of one size that start together are rows
of one cache and attend in one product; those of other sizes have their own. The next starts when a row is free that is
large enough for it, or when a cache whose rows have all ended has given back its bytes.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from minipyramid.cache import KVCache, Row
from minipyramid.errors import RequestError
from minipyramid.plan import Need
from minipyramid.request import Sequence


class Scheduler:
    """Requests that wait, in the order of their prompts, and the caches of those that run.

    Args:
        allot: makes a cache with so many rows of such a size.
        per_token: bytes of one token in one layer.
        memory: bytes for the keys, values and votes of everything in flight.

    Raises:
        RequestError: a request needs more than that alone.
    """

    def __init__(
        self, allot: Callable[[Need, int], KVCache], per_token: int, memory: int, waiting: list[Sequence]
    ) -> None:
        self.allot, self.per_token, self.memory, self.waiting = allot, per_token, memory, deque(waiting)
        self.caches: list[KVCache] = []
        self.running: dict[Row, Sequence] = {}  # who has which row of which cache
        self.finished = self.generated = 0  # requests, and tokens of all
        for sequence in waiting:
            held = sequence.before.held  # in flight until it is copied
            needed = sequence.need.bytes(per_token) + (held[0].need.bytes(per_token) if held else 0)
            if needed > memory:
                short = f"{sequence.name} needs {needed} bytes of keys and values, but kv_memory is {memory}"
                raise RequestError(f"{short}; give it more, ask for fewer tokens, or lower kv_budget")

    def admit(self) -> list[Sequence]:
        """Start those that wait until the next has no room."""
        admitted = []
        room = self.memory - sum(cache.capacity * cache.need.bytes(self.per_token) for cache in self.caches)
        fresh: dict[Need, list[Sequence]] = {}  # caches to be allotted: a row's need, and who shares it
        while self.waiting:
            sequence = self.waiting[0]
            free = [cache for cache in self.caches if cache.takes(sequence.need)]
            if free:
                tightest = min(free, key=lambda cache: cache.need.bytes(self.per_token))
                self.running[sequence.start(tightest)] = sequence
            elif sequence.need.bytes(self.per_token) <= room:
                fresh.setdefault(sequence.need, []).append(sequence)
                room -= sequence.need.bytes(self.per_token)
            else:
                break
            admitted.append(self.waiting.popleft())
        for need, together in fresh.items():
            self.caches.append(self.allot(need, len(together)))
            self.running |= {sequence.start(self.caches[-1]): sequence for sequence in together}
        return admitted

    def in_order(self) -> list[Sequence]:
        """Those that run, in the order of the caches' rows, which is that of a step."""
        return [self.running[row] for cache in self.caches for row in cache.rows]

    def retire(self) -> list[Sequence]:
        """Take out those that have ended, in their order; a cache whose rows have all ended is given back."""
        ended, self.generated = [], self.generated + len(self.running)
        for cache in self.caches:
            for row in cache.rows[::-1]:  # from the last, so that none moves that ends as well
                if self.running[row].completion.finish_reason:
                    self.running[row].finish(cache, row)
                    cache.retire(row)
                    ended.append(self.running.pop(row))
        self.caches = [cache for cache in self.caches if cache.rows]
        self.finished += len(ended)
        return sorted(ended, key=lambda sequence: sequence.index)


def default_memory(device: torch.device) -> int:
    """Half of the bytes that are free where the cache will be (activations need some); 4 GiB where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30
    # What the kernel would give up for the asking, its cache of files, counts as free.
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0]) // 2
