"""Sequences of different sizes in one cache: layers in pages, so that a step is one product for all of them.

A slab [B, K, S, D] has as many slots for every row. With sequences of 20 and of 1,500 tokens most of it would
stay unused, and with a slab for each a step is as many small products. So here a row holds its tokens in
*pages* of P slots, anywhere among the layer's pages, as PagedAttention does (Kwon et al. 2023). A step
multiplies every page with the query of the row that owns it, and the pages of a row are added up under one
softmax. A row takes a page when a token needs it. It starts only if the pages that it and the rows in use may
fill at their longest are there.

400 prompts of 20 to 1,500 tokens under a memory for 12 of the longest: 957 tokens a second, and 681 in fixed
batches of 12, in pages as well. With 80 of them, on a slower processor: 265 in pages, and 184 with a slab for
each size (the embedded checkpoint, up to 256 new tokens, float32, two cores; on one core a step takes as long
either way), by `python -m minipyramid.bench --ragged --batch-size 400 --prompt-tokens 1500 --max-new-tokens
256 --policy full --kv-memory 129466368 --fixed 12 --runs 1 --dtype float32`.
"""

import math
from dataclasses import dataclass, replace
from operator import le

import torch
from torch import Tensor

from minipyramid.attention import mixed, scores_of
from minipyramid.cache import KVCache, LayerCache, Row, Slab, empty_slabs
from minipyramid.config import ModelConfig
from minipyramid.need import VOTE_BYTES, Need
from minipyramid.policy import VotesToCast

# Pages that a row of average size fills: with more of them less is unused, with fewer a step is quicker.
PAGES = 8
SMALLEST, LARGEST = 16, 128  # slots of a page
# Rows allotted for each sequence that starts, for shorter ones may follow it in its pages. A row costs only
# its votes; without votes there may be as many rows as pages.
ROWS = 2


@dataclass(frozen=True)
class Paging:
    """How a cache is divided."""

    sizes: tuple[int, ...]  # [layer] slots of a page
    pending: int  # tokens of a row that wait for a compaction, at most

    @classmethod
    def of(cls, needs: list[Need]) -> "Paging":
        """What suits some needs."""
        means = [sum(slots) / len(slots) for slots in zip(*(need.slots for need in needs), strict=True)]
        powers = [2 ** round(math.log2(max(1.0, mean / PAGES))) for mean in means]
        sizes = tuple(min(max(power, SMALLEST), LARGEST) for power in powers)
        return cls(sizes, max(need.pending for need in needs))

    def page_counts(self, need: Need) -> list[int]:
        """How many pages of each layer a row may fill."""
        return [-(-slots // size) for slots, size in zip(need.slots, self.sizes, strict=True)]

    def rounded(self, need: Need) -> Need:
        """A need of the bytes that a row adds to a paged cache: whole pages, and the votes of `ROWS` rows."""
        slots = tuple(count * size for count, size in zip(self.page_counts(need), self.sizes, strict=True))
        return replace(need, slots=slots, pending=ROWS * self.pending)


@dataclass(eq=False)
class Pages:
    """One layer's pages, those in use first, and which row owns which."""

    keys: Slab  # [pages, K, P, D]
    values: Slab  # [pages, K, P, D]
    of_row: list[list[int]]  # [row] its pages, in the order of its tokens
    owners: list[int]  # [page in use] its row
    found: tuple[Tensor, Tensor] | None = None  # by `index`, until pages change

    @property
    def size(self) -> int:
        """Slots of a page."""
        size: int = self.keys.shape[2]
        return size

    def take(self, row: int, slots: int) -> None:
        """Let a row have the pages for so many slots, at least; they hold zeros."""
        first = len(self.owners)
        while len(self.of_row[row]) * self.size < slots:
            self.of_row[row].append(len(self.owners))
            self.owners.append(row)
            self.found = None
        if first < len(self.owners):
            self.keys[first : len(self.owners)] = self.values[first : len(self.owners)] = 0

    def give_back(self, row: int, slots: int) -> None:
        """Free the pages of a row behind so many slots; the last in use moves into the place of each."""
        while (len(self.of_row[row]) - 1) * self.size >= slots:
            page, last = self.of_row[row].pop(), len(self.owners) - 1
            owner, self.found = self.owners.pop(), None
            if page != last:
                self.keys[page], self.values[page] = self.keys[last], self.values[last]
                self.owners[page] = owner
                theirs = self.of_row[owner]
                theirs[theirs.index(last)] = page

    def renumber(self, old: int, new: int) -> None:
        """The row has another number."""
        self.of_row[new], self.of_row[old], self.found = self.of_row[old], [], None
        for page in self.of_row[new]:
            self.owners[page] = new

    def index(self, rows: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Who owns each page in use [pages], and the last pages of each row, `count` of them [B, count].

        Where a row has fewer, page 0 stands in their place; no vote on what it holds has a weight.

        Copied to the device only where pages have changed, which a row's do once in P steps.
        """
        if self.found is None:
            last = [([0] * count + pages)[-count:] for pages in self.of_row[:rows]]
            self.found = torch.tensor(self.owners, device=device), torch.tensor(last, device=device)
        return self.found


@dataclass(frozen=True)
class PagedSlab:
    """What `KVCache` holds in place of a tensor [capacity, K, S, D]: its rows are read and written alike."""

    pages: Pages
    slab: Slab  # [pages, K, P, D], the pages' keys or values

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self.slab.device
        return device

    @property
    def nbytes(self) -> int:
        """Of all pages."""
        size: int = self.slab.nbytes
        return size

    def __getitem__(self, where: tuple[int, slice, slice | Tensor]) -> Slab:
        """A row's slots, a slice or numbers [n]; a copy.  [K, n, D]"""
        row, _, slots = where
        if isinstance(slots, slice):
            slots = torch.arange(slots.start or 0, slots.stop, device=self.device)
        pages = torch.tensor(self.pages.of_row[row], dtype=torch.long, device=self.device)
        heads = torch.arange(self.slab.shape[1], device=self.device)[:, None]
        return self.slab[pages[slots // self.pages.size], heads, slots % self.pages.size]

    def __setitem__(self, where: tuple[int, slice, slice], x: Slab) -> None:
        """Write a slice of a row's slots; x [K, n, D]."""
        row, _, slots = where
        size = self.pages.size
        self.pages.take(row, slots.stop)
        for i in range(slots.start // size, -(-slots.stop // size)):
            start, end = max(slots.start, i * size), min(slots.stop, (i + 1) * size)
            page = self.pages.of_row[row][i]
            part = x[:, start - slots.start : end - slots.start]
            self.slab[page, :, start - i * size : end - i * size] = part


@dataclass(kw_only=True)
class PagedCache(KVCache):
    """A cache whose rows share the pages of each layer: `capacity` rows at most, as pages are free."""

    pages: list[Pages]  # [layer]
    paging: Paging

    @classmethod
    def allot_pages(
        cls, paging: Paging, config: ModelConfig, needs: list[Need], dtype: torch.dtype, device: torch.device
    ) -> "PagedCache":
        """Room for sequences of these needs, all at once."""
        counts = [sum(pages) for pages in zip(*map(paging.page_counts, needs), strict=True)]
        rows, layers = ROWS * len(needs) if paging.pending else min(counts), []
        shapes = list(zip(counts, paging.sizes, strict=True))
        for k, v in zip(*empty_slabs(config, shapes, dtype, device), strict=True):
            layers.append(Pages(k, v, [[] for _ in range(rows)], []))
        slots = tuple(count * size for count, size in zip(counts, paging.sizes, strict=True))
        return cls(
            [PagedSlab(pages, pages.keys) for pages in layers],
            [PagedSlab(pages, pages.values) for pages in layers],
            [torch.empty(rows, paging.pending, device=device) for _ in layers],
            config,
            Need(slots, paging.pending, needs[0].group),  # one row may have all pages
            dtype,
            config.kv_bytes_per_token(dtype.itemsize),
            rows,
            pages=layers,
            paging=paging,
        )

    @property
    def bytes(self) -> int:
        """Of all pages, and of the votes."""
        votes = VOTE_BYTES * self.capacity * self.need.pending * len(self.pages)
        return self.bytes_per_token * sum(self.need.slots) + votes

    def takes(self, need: Need) -> bool:
        """Whether a row is free, and as many pages as it may need."""
        reserved = [self.paging.page_counts(one) for one in (need, *(row.need for row in self.rows))]
        counts = map(sum, zip(*reserved, strict=True))
        return super().takes(need) and all(map(le, counts, self.paging.page_counts(self.need)))

    def clear(self, index: int) -> None:
        """Let a row's votes begin with zeros; its pages do when they are taken."""
        for votes in self.votes:
            votes[index] = 0

    def layer(self, layer: int, lengths: tuple[int, ...], ends: Tensor, to_cast: VotesToCast) -> LayerCache:
        """One layer, in which every row has the page that its next token needs.

        No row has one behind that, since `attend` takes a row's last page for the one that is partly used.
        """
        pages, rows = self.pages[layer], len(self.rows)
        for row, length in enumerate(lengths):
            pages.take(row, length + 1)
            pages.give_back(row, length + 1)
        # Pending tokens may begin and end within a page.
        owners, last = pages.index(rows, self.need.pending // pages.size + 2, ends.device)
        k, v, votes = pages.keys[: len(owners)], pages.values[: len(owners)], self.votes[layer][:rows]
        return PagedLayer(k, v, votes, lengths, ends, to_cast, owners=owners, last=last)

    def retire(self, row: Row) -> None:
        """Free a row and its pages."""
        for pages in self.pages:
            pages.give_back(row.index, 0)
        super().retire(row)

    def renumber(self, old: int, new: int) -> None:
        """What row `old` holds is row `new`'s from now on."""
        for pages, votes in zip(self.pages, self.votes, strict=True):
            pages.renumber(old, new)
            votes[new] = votes[old]


@dataclass(frozen=True, kw_only=True)
class PagedLayer(LayerCache):
    """One layer as a decode step finds it; keys and values are those of its pages [pages, K, P, D] in use.

    A row's new token goes into its last page; all others are full. Pending tokens are in the last few.
    """

    owners: Tensor  # [pages] each page's row
    last: Tensor  # [B, count] each row's last pages, in the order of its tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`LayerCache.attend`, by pages.  q [B, H, D], k and v [B, K, D] -> [B, H * D]

        With m the highest score of a row: out = sum(exp(s - m) v) / sum(exp(s - m)), each sum over the row's
        pages of what each page finds by itself.
        """
        (B, H, D), size = q.shape, self.keys.shape[2]
        offset, newest = self.ends % size, self.last[:, -1]  # [B]
        self.keys[newest, :, offset], self.values[newest, :, offset] = k, v
        scores = scores_of(q[self.owners], self.keys, size).float()  # [pages, H, P]
        unused = torch.arange(size, device=q.device) > offset[:, None]  # [B, P]
        scores[newest] = scores[newest].masked_fill(unused[:, None], float("-inf"))
        owners = self.owners[:, None].expand(-1, H)  # [pages, H]
        highest = scores.new_full((B, H), float("-inf")).scatter_reduce(0, owners, scores.amax(-1), "amax")
        probs = scores.sub_(highest[self.owners][..., None]).exp_()
        total = probs.new_zeros(B, H).index_add_(0, self.owners, probs.sum(-1))
        probs = probs.div_(total[self.owners][..., None])
        found = mixed(probs.to(q.dtype), self.values).float()  # [pages, H, D]
        if self.to_cast is not None:
            weights, slots = self.to_cast  # two of [B, U]
            place = slots // size - self.ends[:, None] // size - 1  # counted from the last page, which is -1
            pages = self.last.gather(1, place + self.last.shape[1])
            self.votes.addcmul_(weights, probs.sum(1)[pages, slots % size])
        out = found.new_zeros(B, H, D).index_add_(0, self.owners, found)
        return out.to(q.dtype).flatten(1)
