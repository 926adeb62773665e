"""Which of the sequences that start together share a cache.

If all are of one size, they are rows of one slab. Else they share a cache in pages (`minipyramid/pages.py`),
as far as there is room to round each up to whole pages. Those behind, for whom there is none, start in slabs
of their own. Where others wait as well, only as many of these start as there is room for; the rest wait for
pages that ended rows give back.
"""

from collections.abc import Callable, Hashable
from functools import partial
from itertools import accumulate

from minipyramid.cache import Allot, KVCache
from minipyramid.pages import PagedCache, Paging
from minipyramid.request import Sequence


def shared(
    fresh: list[Sequence], bytes_per_token: int, room: int, others_wait: bool
) -> list[tuple[list[Sequence], Allot]]:
    """Those that start, by cache, and how it is allotted; who waits after all is in none.

    `room` are the bytes that are left when each has what it needs, `bytes_per_token` those of one token in
    one layer.
    """
    caches: list[tuple[list[Sequence], Allot]] = []
    # Rows of a cache drop generated tokens in groups of one size, or no row drops any.
    for together in split(fresh, lambda sequence: sequence.need.group):
        paging = Paging.of([sequence.need for sequence in together])
        sizes = [s.need.bytes(bytes_per_token) for s in together]
        rounded = [paging.rounded(s.need).bytes(bytes_per_token) for s in together]
        added = [paged - exact for paged, exact in zip(rounded, sizes, strict=True)]
        missing, end = sum(added) - room, len(together)
        while missing > 0 and end:  # the last leave the pages until the others fit
            end -= 1
            missing -= added[end] + (sizes[end] if others_wait else 0)
        room = -missing
        in_slabs = together[end:]
        if others_wait:
            taken = [size for size in accumulate(sizes[end:]) if size <= room]
            in_slabs, room = in_slabs[: len(taken)], room - max(taken, default=0)
        in_pages = together[:end]
        if len({sequence.need for sequence in in_pages}) < 2:
            in_pages, in_slabs = [], in_pages + in_slabs
        if in_pages:
            caches.append((in_pages, partial(PagedCache.allot_pages, paging)))
        caches += [(alike, KVCache.allot) for alike in split(in_slabs, lambda sequence: sequence.need)]
    return caches


def split(sequences: list[Sequence], key: Callable[[Sequence], Hashable]) -> list[list[Sequence]]:
    """Those of one key together, in their order."""
    lists: dict[Hashable, list[Sequence]] = {}
    for sequence in sequences:
        lists.setdefault(key(sequence), []).append(sequence)
    return list(lists.values())
