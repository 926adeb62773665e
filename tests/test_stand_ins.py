"""Stand-ins: the fit against what queries really find, the slot in the cache, and the file."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PROFILE,
    PROFILES,
    WEIGHTS,
    book_windows,
    heads_of,
    lines_of,
    prompts_of,
    say,
    stand_ins_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from slow_profile import SlowProfile
from torch import Tensor

from minipyramid import LLM, CheckpointError, ConfigError, Conversation, SamplingParams
from minipyramid.calibrate.contexts import Contexts, Window, divergence, profile_of, recorded
from minipyramid.calibrate.find import Search
from minipyramid.calibrate.search import cut_level
from minipyramid.calibrate.settings import write_profile
from minipyramid.calibrate.stand_ins import Targets, fit_heads, fit_stand_ins, held_of, targets_of
from minipyramid.policies import load_policy
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile, replaced_positions
from minipyramid.policy import FULL
from minipyramid.rope import rotate_, rotations

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "model.safetensors").exists(), reason="needs the embedded checkpoint"
)


def outputs(attended: Targets, stand_in: Tensor | None) -> Tensor:
    """What every query gets of what is held, with a stand-in beside it or without.  [K, Q, D]"""
    if stand_in is None:
        return attended.held_mean
    key, value = stand_in[:, 0], stand_in[:, 1]  # two of [K, D]
    weight = ((attended.q @ key[..., None])[..., 0] - attended.held_logsumexp).sigmoid()[..., None]
    return weight * value[:, None] + (1 - weight) * attended.held_mean


def exact_outputs(attended: Targets) -> Tensor:
    """What it gets of all tokens.  [K, Q, D]"""
    weight = (attended.dropped_logsumexp - attended.held_logsumexp).sigmoid()[..., None]
    return weight * attended.dropped_mean + (1 - weight) * attended.held_mean


def missing(attended: Targets, stand_in: Tensor | None) -> Tensor:
    """Squared error of what the queries get.  [K]"""
    return (exact_outputs(attended) - outputs(attended, stand_in)).square().sum((1, 2))


def random_attended(queries: int) -> Targets:
    """Queries with a mean, as those of a model have, and what they find."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, queries, 8, generator=generator) + torch.tensor([2.0, -1, 0, 0, 1, 0, 0, 0])
    means = torch.randn(2, 2, queries, 8, generator=generator)
    sums = torch.randn(2, 2, queries, generator=generator)
    return Targets(q, sums[0] + q[..., 0], means[0], sums[1] + 1, means[1])


# --- the fit ---


def test_what_one_token_would_do_is_found_again() -> None:
    """Where a single token is dropped the stand-in is that token."""
    attended, stand_ins = random_attended(4000), stand_ins_of(1)[0] / 3  # [K, 2, D]
    key, value = stand_ins.unbind(1)
    alone = replace(
        attended,
        dropped_logsumexp=(attended.q @ key[..., None])[..., 0],
        dropped_mean=value[:, None].expand_as(attended.q),
    )
    torch.testing.assert_close(fit_heads(alone), stand_ins, rtol=0, atol=0.1)


def test_no_value_near_it_leaves_less_of_the_output_missing() -> None:
    attended = random_attended(500)
    stand_in = fit_heads(attended)
    least = missing(attended, stand_in)
    assert (least < missing(attended, None)).all()
    for component in range(8):
        for step in (-0.05, 0.05):
            other = stand_in.clone()
            other[:, 1, component] += step
            assert (least < missing(attended, other)).all()


def test_less_weight_is_taken_where_it_leaves_less_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By head: in the first, what is dropped says what is held, so weight for one value costs."""
    attended = random_attended(500)
    attended.dropped_mean[0] = attended.held_mean[0]
    attended.dropped_mean[1] = torch.ones(8)
    least = missing(attended, fit_heads(attended))
    monkeypatch.setattr("minipyramid.calibrate.stand_ins.SHIFTS", (0.0,))
    with_all_weight = missing(attended, fit_heads(attended))
    assert least[0] < 0.999 * with_all_weight[0]
    assert least[1] <= with_all_weight[1]


def test_a_head_that_never_looks_at_what_is_dropped_gets_a_finite_stand_in() -> None:
    """Weights below e^-50 have squares of 0, and the value was 0 / 0."""
    attended = random_attended(50)
    attended.held_logsumexp[0] += 100
    assert fit_heads(attended).isfinite().all()


LEVELS = [
    Level((1.0, 0.6, 0.4), (0.3, 0.2, 0.2), ("votes", "newest", "keydiff"), (0.3, 1.0, 0.0)),
    Level((1.0, 1.0, 0.4), (0.5, 0.1, 0.4), ("newest", "votes+keydiff", "repeat"), (0.3, 0.0, 0.5)),
]


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_fitted_to_is_what_the_engine_drops_and_what_a_softmax_over_all_tokens_gives(
    level: Level, tiny: LLM
) -> None:
    """Dropped and held together are the layer's own attention; a query rotated back meets a key as the
    query itself meets the rotated key.
    """
    (ids,), tokens = prompts_of([70]), 58
    window = Window(ids[:tokens], ids[tokens:], ids[:12])
    contexts = Contexts(tiny, [window], profile_of(level), repeats=True)
    filled = profile_of(replace(level, stand_ins=stand_ins_of(3)))
    (prefill,) = tiny.under(filled).prefill([ids[:tokens]])
    rotation = rotations(torch.tensor([tokens - 1]), tiny.model.inv_freq, torch.float32)
    fitted = []
    for seen, of_level in zip(
        recorded(tiny, profile_of(cut_level(3, 3, 1.0)), ids), contexts.seen[0], strict=True
    ):
        layer = seen.layer
        if level.held[layer] >= 0.5:  # such a layer gets none
            fitted.append(torch.zeros(2, 2, 8))
            continue
        held = held_of(of_level, profile_of(level))
        kept = heads_of(prefill.kept_positions[layer])
        # The first token behind the sink, of those that the layer computes.
        replaced = 1 + tokens - round(level.computed[layer] * tokens)
        assert [[*row.nonzero()[:, 0].tolist(), replaced] for row in held] == [
            [*(p for p in head if p != replaced), replaced] for head in kept
        ]
        attended = targets_of(seen, held, rotation)
        for h in range(4):
            g = h // 2
            for t in range(tokens, 70):
                row = (t - tokens) * 2 + h % 2
                probs = (seen.keys[g, : t + 1] @ seen.q[t, h] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(exact_outputs(attended)[g, row], probs @ seen.values[g, : t + 1])
                torch.testing.assert_close(
                    (attended.dropped_logsumexp - attended.held_logsumexp)[g, row].sigmoid(),
                    probs[(~held[g]).nonzero()[:, 0]].sum(),
                )
                key = stand_ins_of(3)[layer, g, 0]
                rotated = key.clone()
                rotate_(rotated[None, None], *rotation)
                torch.testing.assert_close(attended.q[g, row] @ key, seen.q[t, h] @ rotated / math.sqrt(8))
        fitted.append(fit_heads(attended))
    torch.testing.assert_close(fit_stand_ins(contexts, level), torch.stack(fitted))


def test_a_search_ends_with_stand_ins_of_the_level_that_it_has_found(tiny: LLM) -> None:
    """With --repeat it ended in an error, after all that had been measured."""
    rng = random.Random(5)
    windows = [Window(rng.choices(range(3, 320), k=100), [7, 8, 9] * 3, [5] * 9) for _ in range(2)]
    for repeats in (False, True):
        search = Search(tiny, windows, lines_of(3), repeats, notice=lambda what: None)
        search.choices = (("repeat", 0.25),) if repeats else (("keydiff", 0.25),)
        (level,) = search.find([(0.2, 0.7)]).levels
        assert level.stand_ins is not None
        assert torch.equal(level.stand_ins, fit_stand_ins(search.contexts_of(level), level))
        assert any("repeat" in score for score in level.scores) is repeats


@needs_weights
def test_text_that_nothing_was_fitted_to_is_predicted_better_with_stand_ins() -> None:
    llm = LLM(WEIGHTS, policy="full", dtype="float32")
    windows = book_windows(llm, 12)
    to_fit, others = windows[:8], windows[8:]
    held = (0.05, 0.05, 0.05, 0.5, *(0.05,) * 8)
    level = Level((*(1.0,) * 4, *(0.2,) * 8), held, ("newest",) * 12, (0.5,) * 12)
    filled = replace(level, stand_ins=fit_stand_ins(Contexts(llm, to_fit, profile_of(level)), level))
    whole = cut_level(12, 12, 1.0)
    expected = Contexts(llm, others, profile_of(whole)).logprobs(whole)
    contexts = Contexts(llm, others, profile_of(level))
    # One after the other on the same contexts: what stood in the rows before leaves nothing behind.
    without, with_them, again = (
        divergence(expected, contexts.logprobs(tried), others).following for tried in (level, filled, level)
    )
    assert with_them < 0.85 * without
    assert again == without


# --- the slot ---


@given(profile=PROFILES, tokens=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_every_profile_holds_and_says_what_the_slow_version_does(
    profile: Profile, tokens: int, tiny: LLM, tiny_dir: Path
) -> None:
    """With 4 sinks and 3 to 5 tokens, or as many sinks as tokens, no slot was left for the stand-in."""
    (prompt,) = prompts_of([tokens])
    slow, llm = SlowProfile(tiny_dir, profile), tiny.under(profile)
    expected = slow.logits_after(prompt, [5, 9])
    (prefill,) = llm.prefill([prompt])
    assert [heads_of(kept) for kept in prefill.kept_positions] == slow.held
    assert replaced_positions(profile, tokens, 3) == slow.stands_in
    assert replaced_positions(FULL, tokens, 3) == [None] * 3
    torch.testing.assert_close(llm.logits(prompt, [5, 9]), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("sinks", [0, 3, 28, 29, 10**9])
def test_the_newest_token_never_gives_way_to_a_stand_in(sinks: int, tiny: LLM) -> None:
    level = Level((1.0,) * 3, (0.5, 0.3, 0.1), ("keydiff",) * 3, (0.0,) * 3)
    profile = Profile((replace(level, stand_ins=stand_ins_of(3)),), level.share, sinks=sinks, fewest=0)
    for tokens in (2, 3, 4, 5, 6, 30):
        (prefill,) = tiny.under(profile).prefill(prompts_of([tokens]))
        assert all(tokens - 1 in head for kept in prefill.kept_positions for head in heads_of(kept))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8")]
)
def test_every_turn_leaves_a_stand_in_rotated_by_its_own_newest_position(
    dtype: str, kv_dtype: str, tiny_dir: Path
) -> None:
    level = Level((1.0, 1.0, 0.6), (0.3, 1.0, 0.2), ("keydiff", "newest", "votes"), (0.3, 1.0, 0.3))
    profile = Profile(
        (replace(level, stand_ins=stand_ins_of(3)),), level.share, fewest=0, generated_share=1.0
    )
    llm, conversation = LLM(tiny_dir, policy=profile, dtype=dtype, kv_dtype=kv_dtype), Conversation()
    for ids in prompts_of([40, 30]):
        say(llm, ids, SamplingParams(max_new_tokens=2, ignore_eos=True), conversation)
    assert conversation.held
    for layer, (k, v, positions) in enumerate(conversation.held.layers):
        if layer == 1:
            continue  # it drops nothing
        # Of turns of 40 + 2 and 30 + 2 tokens; the third layer computes the newest 24 and 18 of each, a
        # sink among them.
        for place, newest in ((1, 39), (43, 71)) if layer == 0 else ((17, 39), (55, 71)):
            for head in range(2):
                line = positions[head] if positions.dim() == 2 else positions
                slot = line.tolist().index(place)
                key = stand_ins_of(3)[layer, head, 0].clone()
                rotation = rotations(torch.tensor([newest]), llm.model.inv_freq, torch.float32)
                rotate_(key[None, None], *rotation)
                for held, expected in ((k, key), (v, stand_ins_of(3)[layer, head, 1])):
                    torch.testing.assert_close(
                        held[head, slot].to(torch.float32), expected, rtol=0, atol=0.06
                    )


def test_a_layer_that_drops_nothing_or_holds_one_token_has_none(tiny: LLM) -> None:
    """The one token is the newest, without which nothing could go on; and a layer of no more than `fewest`
    may drop far less than its stand-in was fitted to.
    """
    level = replace(
        Level((1.0,) * 3, (1.0, 0.5, 0.02), ("newest",) * 3, (1.0,) * 3), stand_ins=1e3 * stand_ins_of(3)
    )
    (prompt,) = prompts_of([50])
    for fewest, differs in ((0, True), (30, False)):
        profile = Profile((level,), share=level.share, fewest=fewest)
        without = replace(profile, levels=(replace(level, stand_ins=None),))
        one, other = (tiny.under(p).logits(prompt, [7, 8]) for p in (profile, without))
        assert torch.equal(one[0], other[0])  # the prompt itself is computed before anything is dropped
        assert torch.equal(one, other) is not differs
    (kept,) = tiny.under(Profile((level,), share=level.share, fewest=0)).prefill([prompt])
    assert kept.kept_positions == [list(range(50)), [1, *range(26, 50)], [49]]


def test_between_two_levels_the_nearer_one_s_stand_ins_are_taken() -> None:
    low, high = PROFILE.levels
    for share, expected in (
        (low.share / 9, low),
        (0.55 * low.share + 0.45 * high.share, low),
        (0.45 * low.share + 0.55 * high.share, high),
        (high.share + 0.05, high),
    ):
        found = PROFILE.level(share).stand_ins
        assert found is not None
        assert expected.stand_ins is not None
        assert torch.equal(found, expected.stand_ins)
    assert PROFILE.level(0.95).stand_ins is None  # next to nothing is dropped


@pytest.mark.parametrize("wrong", [5, "abc", [1, 2, 3], torch.zeros(()), torch.zeros(3, 2, 8)])
def test_stand_ins_of_a_program_are_checked_as_those_of_a_file(wrong: Any) -> None:
    """A number was Python's own TypeError, and a list an AttributeError in the middle of a prompt."""
    level = Level((1.0,) * 3, (0.5,) * 3, ("newest",) * 3, (0.5,) * 3, stand_ins=wrong)
    with pytest.raises(ConfigError, match="expected a tensor by layer and head, or None"):
        Profile((level,))


# --- files ---


def test_levels_of_which_some_have_stand_ins_are_not_written(tmp_path: Path) -> None:
    """The file could not be read again."""
    low, high = PROFILE.levels
    with pytest.raises(ValueError, match="some levels have stand-ins and others none"):
        write_profile(tmp_path / "found.json", [low, replace(high, stand_ins=None)], lines_of(3), {})
    assert not list(tmp_path.iterdir())


def test_stand_ins_are_read_as_they_were_written(tmp_path: Path) -> None:
    for with_lines in (True, False):
        scores = ("fitted" if with_lines else "votes",) * 3
        levels = [replace(level, scores=scores) for level in PROFILE.levels]
        write_profile(tmp_path / "found.json", levels, lines_of(3), {})
        profile = load_policy(tmp_path / "found.json")
        assert isinstance(profile, Profile)
        assert (profile.lines is not None) is with_lines
        for level, expected in zip(profile.levels, PROFILE.levels, strict=True):
            assert level.stand_ins is not None
            assert expected.stand_ins is not None
            assert torch.equal(level.stand_ins, expected.stand_ins)


@pytest.mark.parametrize(
    ("tensors", "kind", "told"),
    [
        ({"others": torch.zeros(3)}, CheckpointError, "expected lines, stand_ins, guesses"),
        ({"stand_ins": torch.zeros(3, 2, 2, 8)}, CheckpointError, "stand_ins are [3, 2, 2, 8]"),
        (
            {"stand_ins": torch.full((1, 3, 2, 2, 8), math.nan)},
            CheckpointError,
            "5 axes of floating-point numbers that are finite",
        ),
        (
            {"stand_ins": torch.full((1, 3, 2, 2, 8), 1e6)},
            CheckpointError,
            "5 axes of floating-point numbers that are finite",
        ),
        ({"stand_ins": torch.zeros(1, 3, 2, 2, 0)}, ConfigError, "another model"),
        ({"stand_ins": torch.zeros(2, 3, 2, 2, 8)}, ConfigError, "of 2 levels, expected 1"),
        ({"stand_ins": torch.zeros(1, 4, 2, 2, 8)}, ConfigError, "of this model [3, 2, 2, 8]"),
        ({"stand_ins": torch.ones(1, 3, 1, 2, 8)}, ConfigError, "another model"),
        ({"stand_ins": torch.ones(1, 3, 2, 3, 8)}, ConfigError, "another model"),
        ({"stand_ins": torch.ones(1, 3, 2, 2, 9)}, ConfigError, "another model"),
    ],
)
def test_stand_ins_that_cannot_be_are_told(
    tensors: dict[str, Tensor], kind: type[Exception], told: str, tiny: LLM, tmp_path: Path
) -> None:
    level: dict[str, Any] = {"computed": [1, 0.5, 0.5], "held": [0.2, 0.3, 0.1]}
    given = {"policy": "profile", "fewest": 0, "fitted": "found.safetensors", "levels": [level]}
    (tmp_path / "found.json").write_text(json.dumps(given))
    save_file(tensors, tmp_path / "found.safetensors")
    with pytest.raises(kind) as error:
        tiny.under(tmp_path / "found.json")
    assert told in str(error.value)


def test_a_level_in_a_file_has_no_stand_ins_of_its_own(tmp_path: Path) -> None:
    level = {"computed": [1, 0.5], "held": [0.2, 0.3], "stand_ins": [1]}
    (tmp_path / "found.json").write_text(json.dumps({"policy": "profile", "levels": [level]}))
    with pytest.raises(ConfigError, match="a level is"):
        load_policy(tmp_path / "found.json")
