"""A step's attention beside the equation, in every number format that has a form of product of its own."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import attention
from minipyramid.attention import attend, attend_each, mixed, scores_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_a_step_is_the_softmax_over_what_each_row_holds(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], seed: int
) -> None:
    """Query head h reads key/value head h // G; a row's slots behind its end have no weight."""
    (B, K, G, S), exact = sizes, TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, K * G, 8, generator=generator).to(dtype)
    keys, values = (torch.randn(B, K, S, 8, generator=generator).to(dtype) for _ in range(2))
    ends = torch.randint(0, S, (B,), generator=generator)
    out, probs = attend_each(q, keys, values, S, torch.arange(S) <= ends[:, None])
    for b in range(B):
        n = int(ends[b]) + 1
        for h in range(K * G):
            k, v = keys[b, h // G, :n].double(), values[b, h // G, :n].double()
            expected = (k @ q[b, h].double()).softmax(-1)
            torch.testing.assert_close(probs[b, h, :n].double(), expected, atol=exact, rtol=exact)
            torch.testing.assert_close(
                out.view(B, K * G, 8)[b, h].double(), expected @ v, atol=exact, rtol=exact
            )
    beyond = torch.arange(S) > ends[:, None, None]
    assert not probs.masked_select(beyond).any()


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("by_component", [True, False])
def test_any_order_in_memory_gives_the_same(
    by_component: bool, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU adds up rows, with keys by component and values by slot, other devices multiply matrices.

    A query may be a part of a wider matrix.
    """
    if not by_rows:
        monkeypatch.setattr(attention, "BY_ROWS", ())
    for dtype, slots in product(TOLERANCE, (9, 11, 30)):  # of which 9 are used
        q = torch.randn(3, 12, 16).to(dtype)[:, 2:8]
        keys = torch.randn(3, 2, slots, 16).to(dtype)
        stored = keys.mT.contiguous().mT if by_component else keys
        scores = scores_of(q.contiguous(), stored, 9)
        assert scores.shape == (3, 6, 9)
        expected = torch.einsum("bkgd,bksd->bkgs", q.float().reshape(3, 2, 3, 16), keys[:, :, :9].float())
        torch.testing.assert_close(scores.float(), expected.flatten(1, 2), atol=0.05, rtol=0.02)
        weights = scores.softmax(-1)
        back = torch.einsum("bkgs,bksd->bkgd", weights.float().view(3, 2, 3, 9), keys[:, :, :9].float())
        found = mixed(weights, stored).float()
        torch.testing.assert_close(found, back.flatten(1, 2), atol=0.05, rtol=0.02)


def test_a_long_slab_that_is_mostly_unused_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's first product took 14 times as long with room for 4,000 more tokens, none of them held."""
    widths = []

    def told(_: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        widths.append(matrices.shape[3])
        return matrices

    monkeypatch.setattr(attention, "sums_of_rows", told)
    keys = torch.randn(1, 2, 16, 100).mT
    for n in (40, 49, 50, 90):
        scores_of(torch.randn(1, 4, 16), keys, n)
    assert widths == [40, 49, 100, 100]


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_a_token_looks_at_none_of_a_later_position(tokens: int) -> None:
    """Keys that stand before a prompt's own may be of later tokens (guesses), which the first must not see.

    300 tokens are more than one block.
    """
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, 4, 8, generator=generator)
    keys, values = (torch.randn(2, 20 + tokens, 8, generator=generator) for _ in range(2))
    positions = torch.cat((torch.arange(3), torch.arange(40, 400)))[:tokens]
    if tokens == 1:  # the newest of all
        positions += 40
    of_keys = torch.cat((torch.randperm(40, generator=generator)[:20], positions))
    out, _ = attend(q, keys, values, positions, of_keys)
    visible = of_keys <= positions[:, None]
    for head in range(4):
        scores = q[:, head] @ keys[head // 2].T / 8**0.5
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values[head // 2]
        torch.testing.assert_close(out.view(tokens, 4, 8)[:, head], expected)
