"""Sampling against slow versions written from the definitions, and every field's range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import LLM, MiniPyramidError, RequestError, SamplingParams
from minipyramid.filters import keep_likely
from minipyramid.sampling import choose


def choose_one(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    return int(choose(logits[None], [(params, generator, None)]))


def slow_choice(
    logits: torch.Tensor, params: SamplingParams, generator: torch.Generator, seen: torch.Tensor | None
) -> int:
    """One sequence by itself, each step as `SamplingParams` says it, with the whole vocabulary sorted."""
    if seen is not None:
        divided, multiplied = logits / params.repetition_penalty, logits * params.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, divided, multiplied), logits)
    if params.temperature == 0:
        return int(logits.argmax())
    probs = ((logits - logits.max()) / params.temperature).softmax(-1)
    if 0 < params.top_k < len(probs):
        probs = torch.where(probs < probs.sort(descending=True).values[params.top_k - 1], 0.0, probs)
        probs = probs / probs.sum()
    if params.top_p < 1:
        ordered, ids = probs.sort(descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < params.top_p
        kept[0] = True
        probs = torch.zeros_like(probs).scatter(0, ids, torch.where(kept, ordered, 0.0))
    probs = torch.where(probs < params.min_p * probs.max(), 0.0, probs)
    return int((probs / torch.empty_like(probs).exponential_(generator=generator)).argmax())


VALUES: dict[str, list[Any]] = {
    "temperature": [0.0, 0.7, 1.5],
    "top_k": [0, 1, 7, 40],
    "top_p": [0.05, 0.9, 0.999, 1.0],
    "min_p": [0.0, 0.1, 1.0],
    "repetition_penalty": [1.0, 1.3],
}
CHANGES: list[dict[str, Any]] = [{name: value} for name, values in VALUES.items() for value in values]


@given(
    base=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}),
    changes=st.lists(st.sampled_from([{}, *CHANGES]), min_size=1, max_size=9),
    size=st.sampled_from([5, 60, 3000]),
    spread=st.sampled_from([0.5, 3.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
def test_rows_chosen_in_groups_are_those_chosen_one_by_one(
    base: dict[str, Any], changes: list[dict[str, Any]], size: int, spread: float, seed: int
) -> None:
    """Three tokens of each row, bit for bit, among many that tie, as those of bf16 do."""
    params = [SamplingParams(**{**base, **change}) for change in changes]
    draw = torch.Generator().manual_seed(seed)
    grouped, single = ([torch.Generator().manual_seed(seed + i) for i in range(9)] for _ in range(2))
    for _ in range(3):
        logits = (spread * torch.randn(len(params), size, generator=draw)).bfloat16().float()
        marks = torch.rand(len(params), size, generator=draw) < 0.3
        seen = [row if p.repetition_penalty != 1 else None for row, p in zip(marks, params, strict=True)]
        before = logits.clone()
        chosen = choose(logits, list(zip(params, grouped, seen, strict=False)))
        rows = zip(logits, params, single, seen, strict=False)
        assert chosen.tolist() == [slow_choice(*row) for row in rows]
        assert torch.equal(logits, before)  # log-probabilities are still taken from them


def test_a_sum_of_many_probabilities_is_that_of_one_row() -> None:
    """A large vocabulary's row by itself is added up by several threads, and among others by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0))
        params = SamplingParams(temperature=1.0, top_k=60_000)
        together = keep_likely(logits.softmax(-1), params)
        alone = [keep_likely(row[None].softmax(-1), params)[0] for row in logits]
        assert torch.equal(together, torch.stack(alone))
    finally:
        torch.set_num_threads(threads)


def allowed(probs: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which ids may be drawn, by the words of `SamplingParams`, on plain lists."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k:
        order = order[:top_k]
    total = sum(probs[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if top_p < 1 and reached >= top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    return {i for i in kept if probs[i] >= min_p * probs[order[0]]}


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 25),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(deadline=None)
def test_filters_filter_what_their_definitions_say(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs = logits.softmax(-1)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    (kept,) = keep_likely(probs[None], params)
    assert set(kept.nonzero()[:, 0].tolist()) == allowed(probs.tolist(), top_k, top_p, min_p)


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of five tokens at temperature 0.7, each share within four standard deviations."""
    logits, params = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0]), SamplingParams(temperature=0.7)
    generator, n = torch.Generator().manual_seed(0), 20_000
    tokens = torch.tensor([choose_one(logits, params, generator) for _ in range(n)])
    drawn = torch.bincount(tokens, minlength=5) / n
    expected = (logits / 0.7).softmax(-1)
    assert (drawn - expected).abs().max() < 4 * math.sqrt(0.25 / n)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_scores() -> None:
    params, generator = SamplingParams(repetition_penalty=2.0), torch.Generator()
    seen = torch.tensor([True, False, True])
    logits = torch.tensor([[3.0, 1.6, -1.0], [-1.0, -1.5, -1.0]])  # 3 / 2 < 1.6, and -1 * 2 < -1.5
    assert choose(logits, [(params, generator, seen)] * 2).tolist() == [1, 1]


@pytest.mark.parametrize("top_p", [1e-46, 5e-324])
def test_a_tiny_top_p_leaves_the_likeliest(top_p: float) -> None:
    logits = torch.tensor([1.0, 4.0, 2.0])
    assert choose_one(logits, SamplingParams(temperature=1, top_p=top_p), torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [10**30, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits = torch.tensor([1.0, 4.0, 2.0])
    drawn = choose_one(logits, SamplingParams(temperature=temperature), torch.Generator())
    assert drawn == 1 or temperature > 1


def test_a_seed_repeats_and_none_does_not(tiny: LLM) -> None:
    params = SamplingParams(max_new_tokens=32, temperature=1.5, seed=5, ignore_eos=True)
    first, second = (tiny.generate([[5, 6]], params)[0].token_ids for _ in range(2))
    free = SamplingParams(max_new_tokens=32, temperature=1.5, ignore_eos=True)
    other, another = (tiny.generate([[5, 6]], free)[0].token_ids for _ in range(2))
    assert first == second
    assert other != another


def test_end_of_text_ends_and_can_be_ignored(tiny: LLM) -> None:
    free = tiny.generate(
        [[5, 6, 7]], SamplingParams(max_new_tokens=30, temperature=3.0, seed=1, ignore_eos=True)
    )[0]
    eos = tiny.config.eos_token_ids[0]
    seeds = (s for s in range(200) if eos in _sample(tiny, s, ignore_eos=True)[:-1])
    seed = next(seeds)
    whole, ended = _sample(tiny, seed, ignore_eos=True), _sample(tiny, seed, ignore_eos=False)
    assert len(free.token_ids) == len(whole) == 30
    assert ended == whole[: whole.index(eos) + 1]


def _sample(llm: LLM, seed: int, ignore_eos: bool) -> list[int]:
    params = SamplingParams(max_new_tokens=30, temperature=3.0, seed=seed, ignore_eos=ignore_eos)
    completion = llm.generate([[5, 6, 7]], params)[0]
    assert completion.finish_reason == ("length" if ignore_eos or len(completion.token_ids) == 30 else "stop")
    return completion.token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ["a", ""]),
        ("stop", ""),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", "hot"),
        ("top_k", None),
        ("seed", 1.0),
        ("stop", 3),
        ("stop", ["a", 3]),
        ("ignore_eos", 1),
        ("logprobs", "yes"),
    ],
)
def test_values_of_a_wrong_type_raise_type_error(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_errors_have_one_base() -> None:
    assert issubclass(RequestError, MiniPyramidError)
