"""Many requests under a bound of memory: the same texts, never more bytes, and no one waits longer than
needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import STEEP, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import LLM, Conversation, Request, RequestError, SamplingParams
from minipyramid.generate import main
from minipyramid.pages import Paging
from minipyramid.scheduler import Scheduler
from minipyramid.sizes import CONTROL_GROUPS, free_in_container, parse_bytes


def limited(llm: LLM, memory: int | None) -> LLM:
    return llm.under(STEEP, kv_memory=memory)


def in_use(scheduler: Scheduler) -> int:
    """Bytes of the tensors themselves."""
    tensors = [t for cache in scheduler.caches for t in (*cache.keys, *cache.values, *cache.votes)]
    return sum(t.nbytes for t in tensors)


REQUESTS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=12)


@given(requests=REQUESTS, factor=st.floats(1.0, 4.0))
@settings(max_examples=10, deadline=None)
def test_a_bound_changes_neither_texts_nor_order(
    tiny: LLM, requests: list[tuple[int, int]], factor: float
) -> None:
    prompts = prompts_of([length for length, _ in requests])
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for _, new in requests]
    needs = [limited(tiny, None).plan([length], new).needs[0] for length, new in requests]
    memory = int(factor * max(need.bytes(tiny.config.kv_bytes_per_token(4)) for need in needs))
    llm, most = limited(tiny, memory), 0
    done = {}

    def watch(scheduler: Scheduler) -> None:
        nonlocal most
        most = max(most, in_use(scheduler))
        assert len(scheduler.waiting) + len(scheduler.running) + scheduler.finished == len(requests)

    for i, completion in llm.completions(prompts, params, watch):
        done[i] = completion
    assert most <= memory
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        (alone,) = limited(tiny, None).generate([prompt], p)
        assert (done[i].token_ids, done[i].kept_positions) == (alone.token_ids, alone.kept_positions)


def test_the_next_starts_as_soon_as_one_has_ended(tiny: LLM) -> None:
    """Two fit at a time; while a long one runs, three short ones follow each other in the row beside it."""
    prompts = prompts_of([20] * 5)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (12, 4, 4, 4, 12)]
    need = limited(tiny, None).plan([20], 12).needs[0]
    llm = limited(tiny, 2 * need.bytes(tiny.config.kv_bytes_per_token(4)))
    running = []
    order = [i for i, _ in llm.completions(prompts, params, lambda s: running.append(len(s.running)))]
    assert (order[:2], sorted(order[2:4]), order[4]) == ([1, 2], [0, 3], 4)
    assert max(running) <= 2
    assert len(running) == 24  # 12 steps of the first beside the three short ones, then 12 of the last


def test_requests_of_one_size_share_a_cache(tiny: LLM) -> None:
    caches = []
    llm = limited(tiny, None)
    list(
        llm.completions(
            prompts_of([20] * 6), SamplingParams(max_new_tokens=3), lambda s: caches.append(len(s.caches))
        )
    )
    assert max(caches) == 1


def test_a_request_that_can_never_fit_is_refused_with_its_need(tiny: LLM) -> None:
    prompts = prompts_of([10, 80])
    need = limited(tiny, None).plan([80], 20).needs[0].bytes(tiny.config.kv_bytes_per_token(4))
    with pytest.raises(RequestError, match=f"prompt 1 needs {need} bytes .* kv_memory is {need - 1}"):
        limited(tiny, need - 1).generate(prompts, SamplingParams(max_new_tokens=20))
    assert len(limited(tiny, need).generate(prompts, SamplingParams(max_new_tokens=20))) == 2


def test_prefill_and_score_keep_to_the_bound_too(tiny: LLM) -> None:
    prompt, continuation = prompts_of([80, 30])
    llm = limited(tiny, 100)
    for call in (lambda: llm.prefill([prompt]), lambda: llm.score(prompt, continuation)):
        with pytest.raises(RequestError, match="kv_memory is 100"):
            call()


def test_what_a_conversation_holds_is_in_flight_during_its_turn(tiny: LLM) -> None:
    first, second = prompts_of([60, 20])
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    bytes_per_token = tiny.config.kv_bytes_per_token(4)
    needs = [limited(tiny, None).plan([n], 10).needs[0].bytes(bytes_per_token) for n in (60, 20)]
    llm, conversation = limited(tiny, needs[0]), Conversation()
    list(llm.stream(first, params, conversation))
    with pytest.raises(RequestError, match="kv_memory"):
        list(llm.stream(second, params, conversation))
    llm = limited(tiny, 2 * needs[0] + needs[1])
    list(llm.stream(second, params, conversation))
    assert len(conversation.token_ids) == 100


def test_sizes_are_read_and_nonsense_is_refused(tiny_dir: Path) -> None:
    sizes = {"1": 1, "2KiB": 2048, "1.5 MB": 3 << 19, "3g": 3 << 30, "1TiB": 1 << 40}
    assert [parse_bytes(size) for size in sizes] == list(sizes.values())
    assert parse_bytes(77) == 77
    for nonsense in ("", "GiB", "-1", "2 gigs", "1e9", "0", 0, "0.2", "2\u212aiB"):
        with pytest.raises(RequestError, match=r"kv_memory is .*2GiB"):
            parse_bytes(nonsense)
    others: list[Any] = [1.5, True, None, [1]]
    for other in others:
        with pytest.raises(TypeError):
            parse_bytes(other)
    assert LLM(tiny_dir, kv_memory="1MiB").engine.scheduler.memory == 1 << 20


def test_too_little_memory_is_one_line(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["once", "--model", str(tiny_dir), "--kv-memory", "10"]) == 2
    out, err = capsys.readouterr()
    assert "kv_memory is 10" in err
    assert not out


def test_requests_of_different_sizes_share_a_cache(tiny: LLM) -> None:
    """A step over many caches of one sequence each was many small products."""
    prompts = prompts_of([20, 25, 90, 31, 230])
    few = SamplingParams(max_new_tokens=3, ignore_eos=True)
    llm = tiny.under("full")
    sequences = [llm.engine.add(Request(prompt, few)) for prompt in prompts]
    llm.engine.step()
    (cache,) = llm.engine.scheduler.caches
    assert len(cache.rows) == 5
    while not all(sequence.ended for sequence in sequences):
        llm.engine.step()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        (alone,) = tiny.under("full").generate(prompt, few)
        assert sequence.completion.token_ids == alone.token_ids


@pytest.mark.parametrize("spare", [0, 1])
def test_whole_pages_take_no_bytes_that_are_not_there(tiny: LLM, spare: int) -> None:
    """What was planned for all of them is enough for all, to the byte; one without its pages has a slab."""
    prompts, few = prompts_of([20, 25, 30]), SamplingParams(max_new_tokens=5, ignore_eos=True)
    plan = tiny.under("full").plan(map(len, prompts), 5)
    exact = sum(need.bytes(plan.bytes_per_token) for need in plan.needs)
    paging = Paging.of(plan.needs)
    in_pages = sum(paging.rounded(need).bytes(plan.bytes_per_token) for need in plan.needs)
    llm = tiny.under("full", kv_memory=in_pages if spare else in_pages - 1)
    assert exact < in_pages - 1
    sequences = [llm.engine.add(Request(prompt, few)) for prompt in prompts]
    llm.engine.step()
    scheduler = llm.engine.scheduler
    assert (len(scheduler.running), len(scheduler.caches)) == (3, 1 if spare else 2)
    assert in_use(scheduler) == scheduler.bytes_in_flight <= scheduler.memory
    for sequence in sequences:
        llm.engine.cancel(sequence)


@pytest.mark.parametrize("version", [0, 1])
def test_a_container_has_what_its_own_limit_leaves(version: int, tmp_path: Path) -> None:
    """Half of the whole machine's free memory was taken, and a container that has less was ended for it."""
    *files, given_up = CONTROL_GROUPS[version]
    assert free_in_container(tmp_path) == math.inf
    counts = f"anon 900\n{given_up} 700\nshmem 1"
    for limit, used, told, expected in [
        ("5000", "3000", counts, 5000 - 3000 + 700),
        ("5000", "500", counts, 5000),
        ("2000", "3000", counts, 0),
        ("max", "3000", counts, math.inf),
        ("", "3000", counts, math.inf),
        ("5000", "\x00", counts, math.inf),
        ("5000", "3000", "", 2000),
        ("5000", "3000", f"{given_up}", 2000),
        ("5000", "3000", f"{given_up} many", 2000),
    ]:
        for name, text in zip(files, (limit, used, told), strict=True):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        assert free_in_container(tmp_path) == expected
    (tmp_path / files[2]).unlink()
    (tmp_path / files[0]).write_text("5000\n")
    assert free_in_container(tmp_path) == 2000


def test_the_last_that_would_start_waits_for_whole_pages_where_others_wait_too(tiny: LLM) -> None:
    """So that a step is one product. It starts later, and in order."""
    prompts, few = prompts_of([60, 70, 80, 90, 100]), SamplingParams(max_new_tokens=5, ignore_eos=True)
    plan = tiny.under("full").plan(map(len, prompts), 5)
    memory = sum(need.bytes(plan.bytes_per_token) for need in plan.needs[:3])
    llm = tiny.under("full", kv_memory=memory)
    sequences = [llm.engine.add(Request(prompt, few)) for prompt in prompts]
    llm.engine.step()
    scheduler = llm.engine.scheduler
    assert [len(cache.rows) for cache in scheduler.caches] == [2]
    assert list(scheduler.waiting) == sequences[2:]
    while not all(sequence.ended for sequence in sequences):
        assert in_use(scheduler) == scheduler.bytes_in_flight <= memory
        llm.engine.step()


def test_one_that_starts_later_takes_the_pages_of_one_that_has_ended(tiny: LLM) -> None:
    """And it may be larger than any that started first: pages are nobody's by size."""
    prompts = prompts_of([40, 60, 50, 90])
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (3, 3, 20, 5)]
    needs = [tiny.under("full").plan([n], new).needs[0] for n, new in ((40, 3), (60, 3), (50, 20))]
    rounded, bytes_per_token = Paging.of(needs).rounded, tiny.config.kv_bytes_per_token(4)
    llm = tiny.under("full", kv_memory=sum(rounded(need).bytes(bytes_per_token) for need in needs))
    sequences = [llm.engine.add(Request(*both)) for both in zip(prompts, params, strict=True)]
    llm.engine.step()
    (cache,) = llm.engine.scheduler.caches
    assert sequences[3] in llm.engine.scheduler.waiting
    while not sequences[3].row:
        llm.engine.step()
    assert sequences[3].row.cache is cache
    assert not sequences[2].ended
    while not sequences[3].ended:
        llm.engine.step()
    (alone,) = tiny.under("full").generate(prompts[3], params[3])
    assert sequences[3].completion.token_ids == alone.token_ids
    llm.engine.cancel(sequences[2])
