"""The engine is fed: requests come and go while others run, from one thread or several, within one bound of
memory.
"""

from __future__ import annotations

import gc
import random
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, STEEP, prompts_of, say, write_checkpoint
from safetensors.torch import load_file, save_file

from minipyramid import (
    LLM,
    CheckpointError,
    ConfigError,
    Conversation,
    Engine,
    Policy,
    Request,
    RequestError,
    SamplingParams,
)
from minipyramid.cache import KVCache
from minipyramid.policies.held_share import HeldShare
from minipyramid.policy import Generation, Seen
from minipyramid.request import Sequence

FEW = SamplingParams(max_new_tokens=6, ignore_eos=True)


def in_use(engine: Engine) -> int:
    """Bytes of the tensors themselves."""
    caches = engine.scheduler.caches
    tensors = [t for cache in caches for t in (*cache.keys, *cache.values, *cache.votes)]
    return sum(t.nbytes for t in tensors)


def is_idle(engine: Engine) -> bool:
    scheduler = engine.scheduler
    return not (scheduler.caches or scheduler.running or scheduler.waiting)


@pytest.mark.parametrize("policy", [STEEP, PROFILE], ids=["pyramid", "profile"])
def test_requests_come_and_go_while_others_run(policy: Policy, tiny: LLM) -> None:
    """200 of them in random order, some cancelled: texts as single runs, never above the bound, all given
    back.
    """
    rng = random.Random(0)
    lengths, new = [rng.randint(1, 90) for _ in range(200)], [rng.randint(1, 16) for _ in range(200)]
    prompts = prompts_of(lengths)
    params = [
        SamplingParams(max_new_tokens=n, ignore_eos=True, temperature=rng.choice([0.0, 1.0]), seed=i)
        for i, n in enumerate(new)
    ]
    one = tiny.under(policy).plan([90], 16).needs[0].bytes(tiny.config.kv_bytes_per_token(4))
    llm = tiny.under(policy, kv_memory=6 * one)
    engine, handles, cancelled = llm.engine, dict[int, Sequence](), set[int]()
    order, told = rng.sample(range(200), 200), dict[Sequence, list[str | None]]()
    while order or not is_idle(engine):
        for _ in range(rng.randint(0, 3)):
            if order:
                i = order.pop()
                handles[i] = engine.add(Request(prompts[i], params[i]))
        current = [i for i, handle in handles.items() if not handle.ended]
        if current and rng.random() < 0.1:
            i = rng.choice(current)
            engine.cancel(handles[i])
            cancelled.add(i)
            assert handles[i].ended
        for sequence, piece in engine.step():
            told.setdefault(sequence, []).append(piece)
        assert in_use(engine) <= 6 * one
    assert 5 < len(cancelled) < 100
    alone = tiny.under(policy)
    for i, handle in handles.items():
        assert handle.ended
        if i in cancelled:
            assert None not in told.get(handle, [])
        else:
            assert told[handle].pop() is None
            (single,) = alone.generate([prompts[i]], params[i])
            assert handle.completion.token_ids == single.token_ids
            assert handle.completion.kept_positions == single.kept_positions
            assert "".join(piece or "" for piece in told[handle]) == single.text


def test_step_tells_what_is_new_of_each(tiny: LLM) -> None:
    engine = tiny.under(STEEP).engine
    handles = [engine.add(Request(prompt, FEW)) for prompt in prompts_of([20, 30])]
    told: dict[Sequence, list[str | None]] = {handle: [] for handle in handles}
    while not is_idle(engine):
        for sequence, piece in engine.step():
            told[sequence].append(piece)
    for handle, pieces in told.items():
        assert pieces.pop() is None
        assert "".join(piece or "" for piece in pieces) == handle.completion.text
    assert engine.step() == []


def test_four_threads_share_one_llm(tiny: LLM) -> None:
    """Ten requests each, streamed and not: the texts of a single thread, whoever steps."""
    prompts = [prompts_of([n] * 10) for n in (5, 20, 40, 60)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=3)
    expected = [[c.text for c in tiny.under(STEEP).generate(some, params)] for some in prompts]
    llm, got, gate = tiny.under(STEEP), [[""] * 10 for _ in range(4)], threading.Barrier(4)

    def work(thread: int) -> None:
        gate.wait()
        for i in range(0, 10, 2):
            got[thread][i] = "".join(llm.stream(prompts[thread][i], params))
            (completion,) = llm.generate([prompts[thread][i + 1]], params)
            got[thread][i + 1] = completion.text

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert got == expected
    assert is_idle(llm.engine)


def test_a_stream_that_is_dropped_gives_its_row_back_at_once(tiny: LLM) -> None:
    llm = tiny.under(STEEP)
    (prompt,) = prompts_of([40])
    pieces = llm.stream(prompt, SamplingParams(max_new_tokens=50, ignore_eos=True))
    next(pieces)
    assert in_use(llm.engine) > 0
    pieces.close()
    assert is_idle(llm.engine)
    pieces = llm.stream(prompt, SamplingParams(max_new_tokens=50, ignore_eos=True))
    next(pieces)
    del pieces
    gc.collect()
    assert is_idle(llm.engine)
    llm.stream(prompt)  # never begun
    assert is_idle(llm.engine)


def test_a_dropped_call_takes_its_waiting_prompts_with_it(tiny: LLM) -> None:
    llm = tiny.under(STEEP, kv_memory=tiny.under(STEEP).plan([40], 6).needs[0].bytes(128))
    done = llm.completions(prompts_of([40] * 5), FEW)
    next(done)
    done.close()
    assert is_idle(llm.engine)


def test_a_row_of_several_is_free_for_the_next_when_one_is_cancelled(tiny: LLM) -> None:
    """Two fit; the third starts in the row of the one that is cancelled, while the other goes on."""
    need = tiny.under(STEEP).plan([20], 30).needs[0].bytes(tiny.config.kv_bytes_per_token(4))
    engine = tiny.under(STEEP, kv_memory=2 * need).engine
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    first, second, third = (engine.add(Request(prompt, params)) for prompt in prompts_of([20] * 3))
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.cancel(first)
    assert len(engine.scheduler.running) == 1
    engine.step()
    assert set(engine.scheduler.running.values()) == {second, third}
    while not is_idle(engine):
        engine.step()
    for handle in (second, third):
        (alone,) = tiny.under(STEEP).generate([handle.prompt], params)
        assert handle.completion.token_ids == alone.token_ids


def test_a_step_that_breaks_off_ends_what_ran_and_nothing_else(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are half written; the next call must not meet them."""
    llm = tiny.under(STEEP)
    prompt, other = prompts_of([20, 30])
    running = llm.engine.add(Request(prompt, FEW))
    llm.engine.step()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(type(llm.model), "step", interrupted)
        llm.engine.step()
    assert running.ended
    assert isinstance(running.error, RequestError)
    assert is_idle(llm.engine)
    assert llm.generate([other], FEW)[0].token_ids == tiny.under(STEEP).generate([other], FEW)[0].token_ids


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OverflowError, ValueError])
def test_what_cannot_be_allotted_fails_alone(
    tiny: LLM, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever says so: a request waited for ever where it was neither RuntimeError nor TypeError.

    Where there is no memory for the pages of both, each is tried by itself.
    """
    from minipyramid import cache, pages

    empty_slabs = cache.empty_slabs

    def short(config: Any, shapes: list[tuple[int, int]], *others: Any) -> Any:
        if any(rows * slots > 200 for rows, slots in shapes):
            raise error("out of memory")
        return empty_slabs(config, shapes, *others)

    for module in (cache, pages):
        monkeypatch.setattr(module, "empty_slabs", short)
    llm = tiny.under("full")
    small, large = prompts_of([20, 220])
    engine = llm.engine
    handles = [engine.add(Request(prompt, FEW)) for prompt in (large, small)]
    while not is_idle(engine):
        engine.step()
    assert isinstance(handles[0].error, RequestError)
    assert handles[1].error is None
    assert len(handles[1].completion.token_ids) == 6
    with pytest.raises(RequestError, match="do not fit into memory"):
        llm.generate([large, small], FEW)
    assert is_idle(engine)


def test_scores_are_read_beside_requests_that_generate(tiny: LLM) -> None:
    """`score` and `prefill` are requests like others: one bound of memory holds for all."""
    llm = tiny.under(STEEP)
    prompt, continuation, other = prompts_of([40, 10, 25])
    running = llm.engine.add(Request(other, SamplingParams(max_new_tokens=40, ignore_eos=True)))
    llm.engine.step()
    scores = llm.score(prompt, continuation)
    assert scores == pytest.approx(tiny.under(STEEP).score(prompt, continuation), abs=1e-4)
    assert not running.ended
    assert len(llm.engine.scheduler.running) == 1
    llm.engine.cancel(running)
    assert is_idle(llm.engine)


def test_news_reaches_whoever_steps_beside_other_threads(tiny: LLM) -> None:
    """`step` gave all news to the thread that had computed it, so a loop beside `generate` never ended."""
    llm = tiny.under(STEEP)
    prompts, params = prompts_of([30] * 6), SamplingParams(max_new_tokens=30, ignore_eos=True)
    beside = threading.Thread(target=lambda: [llm.generate(prompt, params) for prompt in prompts * 2])
    waited = {llm.engine.add(Request(prompt, params)) for prompt in prompts}
    beside.start()
    while waited:
        waited -= {sequence for sequence, piece in llm.engine.step() if piece is None}
    beside.join(timeout=60)
    assert is_idle(llm.engine)


def test_the_first_text_comes_with_the_prompt(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a decode step later."""
    done: list[str] = []
    for name in ("extend", "step"):
        method = getattr(type(tiny.model), name)

        def noted(*args: Any, name: str = name, method: Any = method, **others: Any) -> Any:
            done.append(name)
            return method(*args, **others)

        monkeypatch.setattr(type(tiny.model), name, noted)
    engine = tiny.under(STEEP).engine
    handle = engine.add(Request([5, 6, 7], FEW))
    engine.step()
    assert done == ["extend"]
    assert len(handle.completion.token_ids) == 1


def test_what_goes_wrong_in_one_prompt_touches_no_other(tiny: LLM) -> None:
    """A continuation of unknown ids, or a policy that miscounts, once ended everybody's requests."""

    @dataclass(frozen=True)
    class Miscounts(HeldShare):
        def hold(self, seen: Seen, count: int) -> torch.Tensor:
            return torch.arange(count + 1)

    with pytest.raises(RequestError, match="token id 1000000"):
        tiny.logits([5, 6], [10**6])
    llm = tiny.under(Miscounts())
    (prompt,) = prompts_of([40])
    running = llm.engine.add(Request([5], SamplingParams(max_new_tokens=40, ignore_eos=True)))
    llm.engine.step()
    with pytest.raises(ConfigError, match="Miscounts has chosen"):
        llm.generate([prompt], FEW)
    assert not running.ended
    while not running.ended:
        llm.engine.step()
    assert len(running.completion.token_ids) == 40
    assert is_idle(llm.engine)


def test_a_policy_that_raises_for_one_prompt_ends_no_other_of_its_piece(tiny: LLM) -> None:
    """Prompts that were computed in one piece with it all failed, also a conversation's turn."""

    @dataclass(frozen=True)
    class Picky(HeldShare):
        def hold(self, seen: Seen, count: int) -> torch.Tensor:
            if len(seen.q) == 33:
                raise ZeroDivisionError("33 tokens")
            return torch.arange(count)

    llm, conversation, expected = tiny.under(Picky()), Conversation(), Conversation()
    before, guilty, other, third = prompts_of([15, 33, 20, 20])
    say(llm, before, FEW, conversation)
    say(llm, before, FEW, expected)
    sequences = [llm.engine.add(Request(prompt, FEW)) for prompt in (guilty, other)]
    sequences.append(llm.engine.add(Request(third, FEW, conversation)))
    while not is_idle(llm.engine):
        llm.engine.step()
    assert [type(sequence.error) for sequence in sequences] == [ZeroDivisionError, type(None), type(None)]
    alone = [llm.generate([other], FEW)[0], say(llm, third, FEW, expected)]
    for sequence, single in zip(sequences[1:], alone, strict=True):
        assert sequence.completion.token_ids == single.token_ids
        assert sequence.completion.kept_positions == single.kept_positions


def test_what_fails_after_a_prompt_takes_no_token_twice(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that fails beside a text that has its first token: the text goes on where it is."""
    llm = tiny.under(STEEP)
    prompt, continuation = prompts_of([20, 10])
    (expected,) = llm.generate([prompt], FEW)
    extend = type(llm.model).extend

    def short(*args: Any, all_positions: bool = False) -> Any:
        if all_positions:
            raise RuntimeError("out of memory")
        return extend(*args)

    monkeypatch.setattr(type(llm.model), "extend", short)
    writing = llm.engine.add(Request(prompt, FEW))
    scoring = llm.engine.add(Request(prompt, continuation=continuation))
    while not is_idle(llm.engine):
        llm.engine.step()
    assert isinstance(scoring.error, RuntimeError)
    assert writing.error is None
    assert writing.completion.token_ids == expected.token_ids


def test_what_a_policy_makes_of_a_budget_is_checked(tiny: LLM) -> None:
    """A budget of a tenth held the whole prompt, and None was an AttributeError."""

    @dataclass(frozen=True)
    class Solved(Policy):
        solved: Any

        def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> Policy:
            return self.solved  # type: ignore[no-any-return]

    for solved, told in ((None, "expected a Policy"), (Policy(), "must hold no more")):
        with pytest.raises(ConfigError, match=told):
            tiny.under(Solved(solved), kv_budget=0.1).generate(prompts_of([30]), FEW)


def test_only_a_profile_guesses(tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Guesses(Policy):
        def guess(self, seen: Seen, passed_on: torch.Tensor) -> list[Any]:
            return []

    with pytest.raises(ConfigError, match="Guesses has a `guess`"):
        tiny.under(Guesses())


def test_a_policy_that_asks_its_own_llm_is_told_so(tiny: LLM) -> None:
    """It waited for the step that it was in, for ever."""
    inner: list[LLM] = []

    @dataclass(frozen=True)
    class Asks(HeldShare):
        def hold(self, seen: Seen, count: int) -> torch.Tensor:
            inner[0].generate([[5, 6]], FEW)
            return torch.arange(count)

    inner.append(tiny.under(Asks()))
    prompts = prompts_of([20, 25])
    with pytest.raises(RequestError, match="another LLM"):
        inner[0].generate(prompts, FEW)
    assert is_idle(inner[0].engine)
    asking, inner[0] = inner[0], tiny
    (completion,) = asking.generate(prompts[:1], FEW)
    assert len(completion.token_ids) == 6


@pytest.mark.parametrize("lists", [([40, 50, 50], [1] * 3), ([50] * 2, [1] * 3), ([50] * 3, [51] * 3)])
def test_lists_that_cannot_be_are_refused(tiny: LLM, lists: tuple[list[int], list[int]]) -> None:
    @dataclass(frozen=True)
    class Wrong(Policy):
        def computed(self, prompt_tokens: int, layers: int) -> list[int]:
            return lists[0]

        def held(self, prompt_tokens: int, layers: int) -> list[int]:
            return lists[1]

    with pytest.raises(ConfigError, match="Wrong computes"):
        tiny.under(Wrong()).generate([list(range(3, 53))], FEW)


def test_logits_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """Finite weights that overflow chose tokens by NaN, and wrote NaN where JSON has none."""
    write_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model.safetensors")
    llm = LLM(tmp_path, dtype="float32", policy="full")
    with pytest.raises(CheckpointError, match="not finite"):
        llm.generate([[5, 6, 7]])
    with pytest.raises(CheckpointError, match="not finite"):
        llm.prefill([5, 6, 7])
    assert llm.engine.scheduler.bytes_in_flight == 0


def test_logits_that_overflow_later_end_their_own_sequence(tiny_dir: Path) -> None:
    """They chose token 0 again and again, with log-probabilities that are no numbers."""
    llm = LLM(tiny_dir, dtype="float32", policy="full")
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
    prompts = [[5, 6, 7], [9, 8]]
    expected = llm.generate(prompts, params)
    logits, steps = llm.model.logits, []

    def overflow(x: torch.Tensor) -> torch.Tensor:
        steps.append(len(x))
        found = logits(x)
        if len(steps) > 3:
            found[0, 7] = torch.nan
        return found

    llm.model.logits = overflow  # type: ignore[method-assign]
    broken, whole = (llm.engine.add(Request(prompt, params)) for prompt in prompts)
    while not (broken.ended and whole.ended):
        llm.engine.step()
        if broken.error:
            llm.model.logits = logits  # type: ignore[method-assign]
    assert isinstance(broken.error, CheckpointError)
    assert broken.completion.token_ids == expected[0].token_ids[: len(broken.completion.token_ids)]
    assert whole.error is None
    assert whole.completion.token_ids == expected[1].token_ids
    llm.model.logits = lambda x: logits(x).fill_(torch.inf)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="not finite"):
        llm.score([5, 6], [7, 8])
    assert llm.engine.scheduler.bytes_in_flight == 0


def test_logits_are_tensors_like_any_other(tiny: LLM) -> None:
    """Made in inference mode, they could not be changed, nor used in training."""
    (prefill,) = tiny.prefill([[5, 6, 7]])
    prefill.logits[3] = -1e9
    logits = tiny.logits([5, 6], [7])
    logits /= 0.7
    assert torch.nn.Linear(320, 1)(logits).requires_grad


def test_a_layer_may_hold_nothing_of_a_prompt(tiny: LLM) -> None:
    @dataclass(frozen=True)
    class OneLayer(Policy):
        def held(self, prompt_tokens: int, layers: int) -> list[int]:
            return [0, prompt_tokens, 0]

        def hold(self, seen: Seen, count: int) -> torch.Tensor:
            return torch.arange(count)

    (completion,) = tiny.under(OneLayer()).generate(prompts_of([30]), FEW)
    assert completion.kv_lengths == [6, 36, 6]
    assert completion.kept_positions[0] == list(range(30, 36))


def test_a_policy_may_drop_generated_tokens_of_some_prompts_alone(tiny: LLM) -> None:
    """Rows that vote and rows that do not once met in one cache, whose step broke off for all that ran."""

    @dataclass(frozen=True)
    class Sometimes(Policy):
        def generation(self, prompt_tokens: int, layers: int) -> Generation | None:
            return Generation(prompt_tokens, 0.0, 1, (1,) * layers, 1.0) if prompt_tokens > 25 else None

    llm, prompts = tiny.under(Sometimes()), prompts_of([20, 30, 22, 40])
    for completion, prompt in zip(llm.generate(prompts, FEW), prompts, strict=True):
        assert completion.token_ids == llm.generate(prompt, FEW)[0].token_ids


def test_a_row_without_an_owner_is_forgotten(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ctrl-C between taking a row and noting whose it is made every later call fail."""
    llm, add_row = tiny.under(STEEP), KVCache.add_row
    (prompt,) = prompts_of([20])

    def interrupted(*args: Any) -> Any:
        add_row(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(KVCache, "add_row", interrupted)
        llm.generate([prompt], FEW)
    assert is_idle(llm.engine)
    assert llm.generate([prompt], FEW)[0].token_ids == tiny.under(STEEP).generate([prompt], FEW)[0].token_ids


@pytest.mark.parametrize("where", ["minipyramid.cache.Row.adopt", "minipyramid.cache.KVCache.allot"])
def test_a_failure_while_starting_leaves_the_engine_whole(
    tiny: LLM, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an owner, and requests that waited and ran at once, once hung every later call."""
    llm, conversation = tiny.under(STEEP), Conversation()
    prompt, other = prompts_of([20, 25])
    say(llm, prompt, FEW, conversation)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(where, fail)
        say(llm, other, FEW, conversation)
    assert is_idle(llm.engine)
    assert say(llm, other, FEW, conversation).token_ids
    assert is_idle(llm.engine)


def test_misuse_is_refused_and_hangs_nobody(tiny: LLM) -> None:
    engine, other = tiny.under(STEEP).engine, tiny.under("full").engine
    (prompt,) = prompts_of([10])
    for wrong in (None, "hello", 5):
        with pytest.raises(TypeError):
            engine.add(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.cancel(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.submit(wrong, deque())  # type: ignore[arg-type]
    theirs = other.add(Request(prompt, FEW))
    engine.cancel(theirs)
    assert not theirs.ended
    with pytest.raises(RequestError, match="taken before"):
        other.submit(theirs, deque())
    while not theirs.ended:
        other.step()
    assert len(engine.add(Request(prompt, FEW)).prompt) == 10
    while not is_idle(engine):
        engine.step()


def test_cancelling_what_has_ended_or_never_began_changes_nothing(tiny: LLM) -> None:
    engine = tiny.under(STEEP).engine
    (prompt,) = prompts_of([10])
    done = engine.add(Request(prompt, FEW))
    while not done.ended:
        engine.step()
    tokens = list(done.completion.token_ids)
    engine.cancel(done)
    engine.cancel(engine.prepare(Request(prompt, FEW)))
    assert done.completion.token_ids == tokens
    assert is_idle(engine)


def test_a_cancelled_sequence_leaves_no_news_behind(tiny: LLM) -> None:
    """Where others stepped, every cancelled request left its texts and its end in the engine for ever."""
    engine = tiny.under(STEEP).engine
    prompts = prompts_of([20] * 6)
    handles = [engine.add(Request(prompt, FEW)) for prompt in prompts[:5]]
    beside = engine.run([engine.prepare(Request(prompts[5], FEW))])
    next(beside)
    next(beside)
    for handle in handles[:4]:
        engine.cancel(handle)
        assert handle.ended
    told: dict[Sequence, list[str | None]] = {}
    while not is_idle(engine):
        for sequence, piece in engine.step():
            told.setdefault(sequence, []).append(piece)
    assert set(told) == {handles[4]}
    assert told[handles[4]][-1] is None
    assert [piece for _, piece in beside][-1] is None


def test_a_sequence_is_its_own_engine_s_and_is_taken_once(tiny: LLM, tmp_path: Path) -> None:
    """In an engine of another shape it ran in a cache of the wrong size, and in two at once it hung."""
    engine, other = tiny.under(STEEP).engine, tiny.under("full").engine
    shaped = LLM(write_checkpoint(tmp_path, num_hidden_layers=2), policy="full").engine
    (prompt,) = prompts_of([20])
    sequence = engine.prepare(Request(prompt, FEW))
    for stranger in (other, shaped):
        with pytest.raises(RequestError, match="another engine's"):
            stranger.submit(sequence, deque())
        with pytest.raises(RequestError, match="another engine's"):
            next(stranger.run([sequence]))
        assert is_idle(stranger)
    with pytest.raises(RequestError, match="taken before"):
        list(engine.run([sequence, sequence]))
    assert sequence.ended
    assert is_idle(engine)


def test_running_what_was_added_is_refused_and_cancels_nothing(tiny: LLM) -> None:
    engine = tiny.under(STEEP).engine
    (prompt,) = prompts_of([20])
    added = engine.add(Request(prompt, FEW))
    with pytest.raises(RequestError, match="taken before"):
        next(engine.run([added]))
    assert not added.ended
    while not added.ended:
        engine.step()
    assert len(added.completion.token_ids) == 6
    with pytest.raises(RequestError, match="taken before"):
        engine.submit(added, deque())


def test_an_engine_stands_by_itself(tmp_path: Path) -> None:
    """Weights and a policy are all that it needs."""
    llm = LLM(write_checkpoint(tmp_path), policy="full")
    engine = Engine(llm.model)
    handle = engine.add(Request([5, 6, 7], FEW))
    while not handle.ended:
        engine.step()
    assert handle.completion.token_ids == llm.generate([[5, 6, 7]], FEW)[0].token_ids
    assert torch.equal(llm.logits([5, 6], [7])[0], llm.prefill([[5, 6]])[0].logits)
