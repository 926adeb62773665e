"""A cache in pages holds and finds what one row by itself would."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import LLM
from minipyramid.cache import KVCache, Row
from minipyramid.eight_bits import with_kv_dtype
from minipyramid.formats.huggingface import config_of
from minipyramid.need import Need
from minipyramid.pages import PagedCache, Paging
from minipyramid.policy import Generation, PendingTokens

CPU = torch.device("cpu")
LAYERS = 3


def cache_in_pages(
    needs: list[Need], kv_dtype: str = "auto", dtype: torch.dtype = torch.float32
) -> PagedCache:
    config = with_kv_dtype(config_of(TINY), kv_dtype)
    return PagedCache.allot_pages(Paging.of(needs), config, needs, dtype, CPU)


def write(row: Row, count: int, generator: torch.Generator) -> None:
    """Random tokens behind what the row holds: `count` in every layer, or as many as there is room for."""
    for layer, slots in enumerate(row.need.slots):
        n = min(count, slots - row.lengths[layer])
        k, v = torch.randn(2, 2, n, 8, generator=generator)
        row.write(layer, k, v, torch.arange(n))


@given(
    needs=st.lists(st.tuples(*[st.integers(1, 90)] * LAYERS), min_size=2, max_size=6),
    steps=st.lists(st.tuples(st.sampled_from(["write", "retire", "start"]), st.integers(0, 5)), max_size=30),
    kv_dtype=st.sampled_from(["auto", "int8"]),
)
@settings(max_examples=100, deadline=None)
def test_rows_hold_what_was_written_into_them(
    needs: list[tuple[int, ...]], steps: list[tuple[str, int]], kv_dtype: str
) -> None:
    """Whoever comes, writes and goes, each row has what it would have in a slab of its own."""
    cache = cache_in_pages([Need(slots) for slots in needs], kv_dtype)
    allotted, apart = cache.bytes, {}
    for number, (step, which) in enumerate([("start", i) for i in range(len(needs))] + steps):
        if step == "start":
            need = Need(needs[which % len(needs)])
            if number < len(needs):
                assert cache.takes(need)  # those that it was allotted for, whatever their order
            if cache.takes(need):
                own = KVCache.allot(cache.config, [need], torch.float32, CPU)
                apart[cache.add_row(need)] = own.add_row()
        elif cache.rows:
            row = cache.rows[which % len(cache.rows)]
            if step == "write":
                for one in (row, apart[row]):
                    write(one, which * 17 + 1, torch.Generator().manual_seed(number))
            else:
                cache.retire(row)
                del apart[row]
        assert cache.bytes == allotted == sum(slab.nbytes for slab in (*cache.keys, *cache.values))
        for row in cache.rows:
            for layer in range(LAYERS):
                for found, expected in zip(row.read(layer), apart[row].read(layer), strict=True):
                    assert torch.equal(found, expected)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=2, max_size=7),
    kv_dtype=st.sampled_from(["auto", "int8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.sampled_from([2, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_step_finds_in_pages_what_each_row_finds_by_itself(
    lengths: list[int], kv_dtype: str, dtype: torch.dtype, heads: int, seed: int
) -> None:
    """Out, and votes for the pending tokens; stale slots and free pages are never looked at."""
    generator = torch.Generator().manual_seed(seed)
    needs = [Need((n + 3,) * LAYERS, pending=4, group=4) for n in lengths]
    cache = cache_in_pages(needs, kv_dtype, dtype)
    pairs = []
    for need, n in zip(needs, lengths, strict=True):
        own = KVCache.allot(cache.config, [need], dtype, CPU)
        generation = Generation(n, 0.2, 4, (2,) * LAYERS, 2.0)
        # What a row leaves behind is no other's.
        gone = cache.add_row(need)
        write(gone, 200, torch.Generator().manual_seed(seed + 1))
        cache.retire(gone)
        pairs.append([one.add_row(need, PendingTokens(generation, 40)) for one in (cache, own)])
        for row in pairs[-1]:
            write(row, n, torch.Generator().manual_seed(seed + n))
    exact = 1e-5 if dtype == torch.float32 else 3e-2
    for _ in range(3):
        q = torch.randn(len(pairs), heads, 8, generator=generator).to(dtype)
        k, v = torch.randn(2, len(pairs), 2, 8, generator=generator).to(dtype)
        together = cache.begin_step()
        by_itself = [alone.cache.begin_step() for _, alone in pairs]
        for layer in range(LAYERS):
            found = together[layer].attend(q, k, v)
            for i, (row, alone) in enumerate(pairs):
                expected = by_itself[i][layer].attend(q[i : i + 1], k[i : i + 1], v[i : i + 1])
                torch.testing.assert_close(found[row.index][None], expected, atol=exact, rtol=exact)
                votes = cache.votes[layer][row.index], alone.cache.votes[layer][0]
                torch.testing.assert_close(*votes, atol=exact, rtol=exact)
        cache.end_step()
        for _, alone in pairs:
            alone.cache.end_step()


def test_what_is_not_finite_stays_with_its_own_row() -> None:
    """A product with zeros and ones, which once added up the pages of a row, gave its NaN to all others."""
    cache = cache_in_pages([Need((20,) * LAYERS), Need((30,) * LAYERS)])
    rows = [cache.add_row(need) for need in (Need((20,) * LAYERS), Need((30,) * LAYERS))]
    for row in rows:
        write(row, 18, torch.Generator().manual_seed(0))
    k, v = torch.ones(2, 2, 2, 8)
    v[0] = float("nan")
    out = cache.begin_step()[0].attend(torch.ones(2, 4, 8), k, v)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("in_pages", [True, False])
def test_what_was_not_finite_in_a_row_is_not_found_in_the_next(in_pages: bool, kv_dtype: str) -> None:
    """The next in a row looked at what it had left there, with weight 0, and 0 times NaN is NaN."""
    needs = [Need((40,) * LAYERS), Need((40 + in_pages,) * LAYERS)]
    if in_pages:
        cache: KVCache = cache_in_pages(needs, kv_dtype)
    else:
        cache = KVCache.allot(with_kv_dtype(config_of(TINY), kv_dtype), needs, torch.float32, CPU)
    stays, gone = (cache.add_row(need) for need in needs)
    write(stays, 35, torch.Generator().manual_seed(0))
    nan = torch.full((2, 38, 8), float("nan"))
    for layer in range(LAYERS):
        gone.write(layer, nan, nan, torch.arange(38))
    cache.retire(gone)
    write(cache.add_row(needs[1]), 18, torch.Generator().manual_seed(1))
    k, v = torch.ones(2, 2, 2, 8)
    for found in cache.begin_step():
        assert found.attend(torch.ones(2, 4, 8), k, v).isfinite().all()


def test_a_compaction_frees_pages() -> None:
    """A row's last page stays the one where its next token goes."""
    cache = cache_in_pages([Need((40,) * LAYERS), Need((8,) * LAYERS)])
    row = cache.add_row(Need((40,) * LAYERS))
    write(row, 40, torch.Generator().manual_seed(0))
    assert [len(pages.owners) for pages in cache.pages] == [3] * LAYERS
    row.lengths = [15] * LAYERS
    cache.begin_step()
    assert [len(pages.owners) for pages in cache.pages] == [1] * LAYERS


@pytest.mark.parametrize(("slots", "size"), [(36, 16), (300, 32), (760, 128), (5000, 128), (1, 16)])
def test_pages_suit_what_is_held(slots: int, size: int) -> None:
    assert Paging.of([Need((slots,))]).sizes == (size,)


@pytest.mark.skipif(not (WEIGHTS / "model.safetensors").exists(), reason="needs the embedded checkpoint")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_votes_take_at_most_a_twentieth_of_the_pages_bytes(kv_dtype: str) -> None:
    """With four rows of votes for each sequence they took 7.5 % beside keys and values in 8 bits."""
    llm = LLM(WEIGHTS, kv_budget=0.5, kv_dtype=kv_dtype, dtype="bfloat16")
    needs = llm.plan([100, 150, 200, 250], 200).needs
    cache = PagedCache.allot_pages(Paging.of(needs), llm.config, needs, llm.dtype, llm.device)
    votes = sum(votes.nbytes for votes in cache.votes)
    assert 0 < votes <= 0.05 * (cache.bytes - votes)
