"""A beginning that several prompts share is computed once, and nobody's text changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, STEEP, prompts_of, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import LLM, Conversation, SamplingParams
from minipyramid.model import Model
from minipyramid.request import Request

FEW = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of `Model.extend` was given."""
    counts: list[int] = []
    extend = Model.extend

    def counted(self: Model, ids: torch.Tensor, *rest: object, **named: bool) -> torch.Tensor:
        counts.append(len(ids))
        return extend(self, ids, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "extend", counted)
    yield counts


def alone(llm: LLM, prompts: list[list[int]], params: SamplingParams = FEW) -> list[list[int]]:
    return [llm.under("full").generate(prompt, params)[0].token_ids for prompt in prompts]


def test_a_thousand_tokens_of_sixteen_prompts_are_computed_once(tmp_path: Path, computed: list[int]) -> None:
    llm = LLM(write_checkpoint(tmp_path, max_position_embeddings=2048), policy="full")
    beginning, *rest = prompts_of([1000] + [20] * 16)
    prompts = [beginning + own for own in rest]
    done = llm.generate(prompts, FEW)
    assert sum(computed) == 1000 + 16 * 20
    assert [completion.shared_tokens for completion in done] == [0] + [1000] * 15
    assert [completion.prompt_token_ids for completion in done] == prompts
    assert [completion.token_ids for completion in done] == alone(llm, prompts)
    assert done[3].kept_positions == [list(range(1026))] * 3


BEGINNINGS = prompts_of([10, 20, 60, 120])


@given(
    asked=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 9)), min_size=2, max_size=9
    ),
    rows=st.integers(1, 6),
    steps=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_texts_are_those_of_single_runs(
    tiny: LLM, asked: list[tuple[int, int, int]], rows: int, steps: int
) -> None:
    """Whatever begins alike, also with what others have generated, in any order and under any bound."""
    prompts = [BEGINNINGS[which] + prompts_of([own])[0] for which, own, _ in asked]
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for _, _, new in asked]
    longest = max(plan.bytes(tiny.config.kv_bytes_per_token(4)) for plan in tiny.plan([160], 9).needs)
    llm = tiny.under("full", kv_memory=rows * longest)
    sequences = []
    for prompt, p in zip(prompts, params, strict=True):
        sequences.append(llm.engine.add(Request(prompt, p)))
        for _ in range(steps):
            llm.engine.step()
    while not all(sequence.ended for sequence in sequences):
        llm.engine.step()
    for sequence, prompt, p in zip(sequences, prompts, params, strict=True):
        done = sequence.completion
        assert done.shared_tokens == 0 or 16 <= done.shared_tokens < len(prompt)
        assert [done.token_ids] == alone(tiny, [prompt], p)
        assert done.kept_positions == [list(range(len(prompt) + p.max_new_tokens))] * 3


def test_what_another_has_generated_is_taken_too(tiny: LLM) -> None:
    """As a turn of a chat whose client sends all that was said, while the one before still runs."""
    llm = tiny.under("full")
    (prompt,) = prompts_of([40])
    first = llm.engine.add(Request(prompt, SamplingParams(max_new_tokens=20, ignore_eos=True)))
    for _ in range(11):
        llm.engine.step()
    so_far = list(first.completion.token_ids)
    (second,) = llm.generate(prompt + so_far + [7, 8, 9], FEW)
    assert second.shared_tokens == 40 + len(so_far)
    assert [second.token_ids] == alone(tiny, [prompt + so_far + [7, 8, 9]])


@pytest.mark.parametrize("how", [{"policy": STEEP}, {"policy": PROFILE}, {"kv_dtype": "int8"}])
def test_where_a_beginning_depends_on_what_follows_nothing_is_taken(
    tiny_dir: Path, how: dict[str, Any], computed: list[int]
) -> None:
    """And texts are bit for bit those of single runs, as ever."""
    llm = LLM(tiny_dir, **{"policy": "full", **how})
    beginning, *rest = prompts_of([100, 20, 30, 40])
    prompts = [beginning + own for own in rest]
    done = llm.generate(prompts, FEW)
    assert [completion.shared_tokens for completion in done] == [0, 0, 0]
    assert computed[0] == 3 * 100 + 20 + 30 + 40
    for prompt, together in zip(prompts, done, strict=True):
        (single,) = llm.generate(prompt, FEW)
        assert (together.token_ids, together.kept_positions) == (single.token_ids, single.kept_positions)


def test_nothing_is_taken_from_a_row_that_has_dropped_something(tiny: LLM) -> None:
    """A conversation that was pruned may go on with the full cache; its slots are no positions."""
    beginning, own, other = prompts_of([100, 30, 20])
    talk = Conversation()
    tiny.under(STEEP).prefill(beginning, talk)
    llm = tiny.under("full")
    next_turn = llm.engine.add(Request(own, SamplingParams(max_new_tokens=30, ignore_eos=True), talk))
    llm.engine.step()
    (done,) = llm.generate(beginning + other, FEW)
    assert not next_turn.ended
    assert done.shared_tokens == 0
    assert [done.token_ids] == alone(tiny, [beginning + other])


def test_a_turn_of_a_conversation_takes_nothing_and_gives_what_it_holds(tiny: LLM) -> None:
    llm = tiny.under("full")
    beginning, own, other = prompts_of([100, 30, 20])
    talk = Conversation()
    llm.prefill(beginning, talk)
    turn = llm.engine.add(Request(own, SamplingParams(max_new_tokens=30, ignore_eos=True), talk))
    llm.engine.step()
    (done,) = llm.generate(beginning + own + other, FEW)
    assert (turn.completion.shared_tokens, done.shared_tokens) == (0, 130)
    assert [done.token_ids] == alone(tiny, [beginning + own + other])


def test_scored_prompts_are_computed_together(tiny: LLM, computed: list[int]) -> None:
    """They end at once, so to wait for one would gain nothing and cost the others their common product."""
    llm = tiny.under("full")
    beginning, *rest = prompts_of([120, 5, 6, 7])
    sequences = [llm.engine.prepare(Request(beginning + own, continuation=[])) for own in rest]
    list(llm.engine.run(sequences))
    assert computed == [3 * 120 + 5 + 6 + 7]


def test_nobody_waits_for_a_beginning_that_another_s_earlier_turns_hide(
    tiny: LLM, computed: list[int]
) -> None:
    """A turn's own tokens were compared without what stands before them, and a batch was torn apart."""
    llm = tiny.under("full")
    before, own = prompts_of([40, 120])
    talk = Conversation()
    llm.prefill(before, talk)
    computed.clear()
    sequences = [llm.engine.prepare(Request(own, FEW, conversation)) for conversation in (talk, None)]
    list(llm.engine.run(sequences))
    assert computed[0] == 2 * 120
    assert [sequences[1].completion.token_ids] == alone(tiny, [own])
