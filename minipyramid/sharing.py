"""Which of the sequences that start together share a cache.

Those of one size are rows of one slab. Those of different sizes share a cache in pages
(`minipyramid/pages.py`), for whose last, partly used pages there must be room. If somebody waits for bytes
anyway, the last of those that would have started waits with them. If all could start, all do, if need be in a
cache for each size.
"""

from collections.abc import Callable, Hashable
from functools import partial

from minipyramid.cache import KVCache
from minipyramid.pages import PagedCache, Paging
from minipyramid.request import Sequence
from minipyramid.scheduler import Allot


def shared(
    fresh: list[Sequence], per_token: int, room: int, others_wait: bool
) -> list[tuple[list[Sequence], Allot]]:
    """Those that start, by cache, and how it is allotted; who waits after all is in none.

    `room` are the bytes that are left when each has what it needs, `per_token` those of a token in a layer.
    """
    caches: list[tuple[list[Sequence], Allot]] = []
    # Rows of a cache drop generated tokens in groups of one size.
    for together in split(fresh, lambda sequence: sequence.need.group):
        paging = Paging.of([sequence.need for sequence in together])
        sizes = [s.need.bytes(per_token) for s in together]
        added = [paging.rounded(s.need).bytes(per_token) - n for s, n in zip(together, sizes, strict=True)]
        missing = sum(added) - room
        while others_wait and missing > 0 and len(together) > 1:
            together.pop()
            missing -= sizes.pop() + added.pop()
        if missing <= 0:
            room = -missing
            caches.append((together, partial(PagedCache.allot_pages, paging)))
        else:
            caches += [(alike, KVCache.allot) for alike in split(together, lambda sequence: sequence.need)]
    return caches


def split(sequences: list[Sequence], key: Callable[[Sequence], Hashable]) -> list[list[Sequence]]:
    """Those of one key together, in their order."""
    lists: dict[Hashable, list[Sequence]] = {}
    for sequence in sequences:
        lists.setdefault(key(sequence), []).append(sequence)
    return list(lists.values())
