"""Further tokens onto a cache that may have been pruned: pieces of a prompt, a next turn, a continuation."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STEEP, prompts_of, say, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pyramid import SlowPyramid

from minipyramid import LLM, Conversation, Request, RequestError, SamplingParams
from minipyramid.cache import KVCache, Span
from minipyramid.need import Need

EIGHT = SamplingParams(max_new_tokens=8, ignore_eos=True)


def positions_of(conversation: Conversation) -> list[list[int]]:
    assert conversation.held
    return [positions.tolist() for _, _, positions in conversation.held.layers]


@given(pieces=st.lists(st.integers(1, 30), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(tiny: LLM, pieces: list[int]) -> None:
    (prompt,) = prompts_of([sum(pieces)])
    expected = tiny.prefill([prompt])[0].logits
    cache = KVCache.allot(tiny.config, [Need((len(prompt),) * 3)], tiny.dtype, tiny.device)
    row = cache.add_row()
    with torch.inference_mode():
        for n, ids in zip(pieces, torch.split(torch.tensor(prompt), pieces), strict=True):
            x = tiny.model.extend(ids, [Span(row, n)])
        logits = tiny.model.logits(x)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert row.kept_positions() == [list(range(len(prompt)))] * 3


def test_turns_onto_a_full_cache_are_one_long_text(tiny: LLM) -> None:
    llm, conversation = tiny, Conversation()
    first, second = prompts_of([20, 15])
    one = say(llm, first, EIGHT, conversation)
    two = say(llm, second, EIGHT, conversation)
    (whole,) = llm.generate([first + one.token_ids + second], EIGHT)
    assert two.token_ids == whole.token_ids
    assert two.kept_positions == whole.kept_positions
    assert conversation.token_ids == first + one.token_ids + second + two.token_ids


def test_a_turn_is_pruned_among_itself_and_sees_what_was_kept(tiny: LLM) -> None:
    """Section 5 of the method: N is the number of new tokens, positions go on, what is held stays."""
    llm, conversation = tiny.under(STEEP), Conversation()
    lengths, held, position = (60, 40, 1), [0, 0, 0], 0
    for n, prompt in zip(lengths, prompts_of(list(lengths)), strict=True):
        before = positions_of(conversation) if conversation.held else [[], [], []]
        turn = say(llm, prompt, SamplingParams(max_new_tokens=25, ignore_eos=True), conversation)
        held = [a + b for a, b in zip(held, STEEP.kv_lengths(n, 25, 3), strict=True)]
        assert turn.kv_lengths == held
        for old, new in zip(before, turn.kept_positions, strict=True):
            assert new[: len(old)] == old
            assert new == sorted(set(new))
            assert min(new[len(old) :]) >= position
        position += n + 25
        assert max(map(max, turn.kept_positions)) == position - 1
        assert turn.kv_bytes_full == position * 3 * llm.config.kv_bytes_per_token(4)


def test_a_pruned_turn_equals_the_slow_version(tmp_path: Path) -> None:
    """A second prompt onto a pruned cache, by the specification: logits and what every layer keeps of it."""
    write_checkpoint(tmp_path)
    first, second = prompts_of([50, 40])
    slow, llm, conversation = SlowPyramid(tmp_path, STEEP), LLM(tmp_path, policy=STEEP), Conversation()
    tokens, _ = slow.run(first, 30)
    turn = say(llm, first, SamplingParams(max_new_tokens=30, ignore_eos=True), conversation)
    assert turn.token_ids == tokens
    logits = slow.forward(second, len(first) + 30, is_prompt=True)
    after = say(llm, second, SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=True), conversation)
    assert after.token_ids == [int(logits.argmax())]
    assert after.logprobs == pytest.approx([float(logits.log_softmax(-1).max())], abs=1e-4)
    assert [kept[:-1] for kept in after.kept_positions] == [cache.positions for cache in slow.layers]


def test_a_later_turn_depends_on_the_earlier(tiny: LLM) -> None:
    llm = tiny.under(STEEP)
    first, other, second = prompts_of([50, 50, 10])
    replies = []
    for prompt in (first, other):
        conversation = Conversation()
        say(llm, prompt, EIGHT, conversation)
        replies.append(
            say(llm, second, SamplingParams(max_new_tokens=8, logprobs=True), conversation).logprobs
        )
    assert replies[0] != replies[1]


def test_a_turn_cut_short_is_undone(tiny: LLM) -> None:
    llm, conversation = tiny.under(STEEP), Conversation()
    first, second = prompts_of([30, 20])
    say(llm, first, EIGHT, conversation)
    kept = positions_of(conversation) if conversation.held else []
    pieces = llm.stream(second, EIGHT, conversation)
    next(pieces)
    pieces.close()
    assert conversation.held
    assert positions_of(conversation) == kept
    again, fresh = say(llm, second, EIGHT, conversation), Conversation()
    say(llm, first, EIGHT, fresh)
    assert again.token_ids == say(llm, second, EIGHT, fresh).token_ids


def test_a_conversation_ends_with_the_context(tiny: LLM) -> None:
    conversation = Conversation()
    (prompt,) = prompts_of([200])
    say(tiny, prompt, EIGHT, conversation)
    with pytest.raises(RequestError, match="context"):
        tiny.stream(prompt[:60], EIGHT, conversation)


def test_a_turn_of_text_begins_without_a_beginning(tiny_dir: Path) -> None:
    llm, conversation = LLM(tiny_dir), Conversation()
    say(llm, "the quick fox", SamplingParams(max_new_tokens=3, ignore_eos=True), conversation)
    turn = say(llm, " and then", SamplingParams(max_new_tokens=3, ignore_eos=True), conversation)
    assert llm.tokenizer
    assert llm.tokenizer.bos_id not in turn.prompt_token_ids


def test_streams_on_one_conversation_do_not_mix(tiny: LLM) -> None:
    """Each turn goes on from what stood when it was planned; the last to finish is the one that is kept."""
    llm, conversation = tiny.under(STEEP), Conversation()
    first, second, third = prompts_of([20, 30, 10])
    streams = [llm.stream(prompt, EIGHT, conversation) for prompt in (first, second)]
    for stream in streams:
        next(stream)
    for stream in streams:
        list(stream)
    assert conversation.held
    assert conversation.held.position == len(conversation.token_ids) == len(second) + 8
    assert conversation.token_ids[: len(second)] == second
    say(llm, third, EIGHT, conversation)
    assert conversation.held.position == len(conversation.token_ids) == len(second) + len(third) + 16


def test_a_conversation_stays_with_its_engine(tiny: LLM, tmp_path: Path) -> None:
    conversation = Conversation()
    (prompt,) = prompts_of([20])
    say(tiny, prompt, EIGHT, conversation)
    other = LLM(write_checkpoint(tmp_path, num_hidden_layers=2), policy="full")
    with pytest.raises(RequestError, match="another LLM"):
        other.stream(prompt, EIGHT, conversation)
    others: list[Any] = ["x", 5, [], Conversation]
    for wrong in others:
        with pytest.raises(TypeError):
            tiny.stream(prompt, EIGHT, wrong)


def test_a_completion_is_the_callers_own(tiny: LLM) -> None:
    conversation = Conversation()
    (prompt,) = prompts_of([20])
    say(tiny, prompt, EIGHT, conversation).kv_lengths[0] = 1
    assert conversation.held
    assert conversation.held.lengths == [28, 28, 28]


@pytest.mark.parametrize(
    "forged", [{"lengths": [-5] * 3}, {"lengths": []}, {"layers": [(None, None, None)] * 3}]
)
def test_a_forged_conversation_fails_alone(forged: dict[str, Any], tiny: LLM) -> None:
    """What it holds was copied outside of what may fail for one, and everybody who ran ended."""
    conversation = Conversation()
    prompt, other = prompts_of([20, 30])
    say(tiny, prompt, EIGHT, conversation)
    assert conversation.held
    conversation.held = replace(conversation.held, **forged)
    engine = tiny.under("full").engine
    innocent = engine.add(Request(other, SamplingParams(max_new_tokens=12, ignore_eos=True)))
    engine.step()
    with suppress(Exception):  # it may be refused at once
        engine.add(Request(prompt, EIGHT, conversation))
    while not innocent.ended:
        engine.step()
    assert innocent.error is None
    assert innocent.completion.token_ids == tiny.generate(other, innocent.request.params)[0].token_ids
