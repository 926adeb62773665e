"""Stand-ins: the fit against what queries really find, the slot in the cache, and files that hold none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, WEIGHTS, ids_of_text, lines_of, prompts_of, stand_ins_of
from safetensors.torch import save_file
from torch import Tensor

from minipyramid import LLM, CheckpointError, ConfigError
from minipyramid.calibrate.contexts import Contexts, Window, loss, profile_of, recorded
from minipyramid.calibrate.search import cut_level
from minipyramid.calibrate.settings import write_profile
from minipyramid.calibrate.stand_ins import Found, fit_stand_ins, fitted, held_of, looked_at
from minipyramid.policies import load_policy
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.rope import rotate_, rotations

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "model.safetensors").exists(), reason="needs the embedded checkpoint"
)


def outputs(found: Found, stand_in: Tensor | None) -> Tensor:
    """What every query gets of what is held, with a stand-in beside it or without.  [K, Q, D]"""
    if stand_in is None:
        return found.held_mean
    key, value = stand_in[:, 0], stand_in[:, 1]  # two of [K, D]
    part = ((found.q @ key[..., None])[..., 0] - found.held_logsumexp).sigmoid()[..., None]
    return part * value[:, None] + (1 - part) * found.held_mean


def exact_outputs(found: Found) -> Tensor:
    """What it gets of all tokens.  [K, Q, D]"""
    part = (found.dropped_logsumexp - found.held_logsumexp).sigmoid()[..., None]
    return part * found.dropped_mean + (1 - part) * found.held_mean


def random_found(queries: int) -> Found:
    """Queries with a mean, as those of a model have, and what they find."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, queries, 8, generator=generator) + torch.tensor([2.0, -1, 0, 0, 1, 0, 0, 0])
    means = torch.randn(2, 2, queries, 8, generator=generator)
    sums = torch.randn(2, 2, queries, generator=generator)
    return Found(q, sums[0] + q[..., 0], means[0], sums[1] + 1, means[1])


# --- the fit ---


def test_what_one_token_would_do_is_found_again() -> None:
    """Where a single token is dropped the stand-in is that token."""
    found = random_found(4000)
    key, value = torch.randn(2, 8), torch.randn(2, 8)
    alone = replace(
        found,
        dropped_logsumexp=(found.q @ key[..., None])[..., 0],
        dropped_mean=value[:, None].expand_as(found.q),
    )
    stand_in = fitted(alone)
    torch.testing.assert_close(stand_in[:, 0], key, rtol=0, atol=0.1)
    torch.testing.assert_close(stand_in[:, 1], value, rtol=0, atol=0.05)


def test_no_value_near_it_leaves_less_of_the_output_missing() -> None:
    found = random_found(500)
    stand_in = fitted(found)

    def missing(tried: Tensor | None) -> Tensor:
        return (exact_outputs(found) - outputs(found, tried)).square().sum((1, 2))  # [K]

    best = missing(stand_in)
    assert (best < missing(None)).all()
    for component in range(8):
        for step in (-0.05, 0.05):
            other = stand_in.clone()
            other[:, 1, component] += step
            assert (best < missing(other)).all()


def test_what_queries_find_is_what_a_softmax_over_all_tokens_gives(tiny: LLM) -> None:
    """Dropped and held together are the layer's own attention, and a turned query meets a key as it lies."""
    ids, tokens = prompts_of([70])[0], 58
    level = Level((1.0, 0.6, 0.4), (0.3, 0.2, 0.2), ("votes", "newest", "keydiff"), (0.3,) * 3)
    rotation = rotations(torch.tensor([tokens - 1]), tiny.model.inv_freq, torch.float32)
    for seen in recorded(tiny, profile_of(cut_level(3, 3, 1.0)), ids):
        held = held_of(seen, tokens, profile_of(level))
        counts = profile_of(level).held(tokens, 3)
        assert held.sum(1).tolist() == [counts[seen.layer] - 1] * 2
        found = looked_at(seen, held, rotation)
        for h in range(4):
            g = h // 2
            for t in range(tokens, 70):
                row = (t - tokens) * 2 + h % 2
                probs = (seen.keys[g, : t + 1] @ seen.q[t, h] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(exact_outputs(found)[g, row], probs @ seen.values[g, : t + 1])
                dropped = (~held[g]).nonzero()[:, 0]
                torch.testing.assert_close(
                    (found.dropped_logsumexp - found.held_logsumexp)[g, row].sigmoid(), probs[dropped].sum()
                )
                key = torch.randn(8)
                turned = key.clone()
                rotate_(turned[None, None], *rotation)
                torch.testing.assert_close(found.q[g, row] @ key, seen.q[t, h] @ turned / math.sqrt(8))


@needs_weights
def test_text_that_nothing_was_fitted_to_is_foretold_better_with_stand_ins() -> None:
    llm = LLM(WEIGHTS, policy="full", dtype="float32")
    tokens = ids_of_text(llm, WEIGHTS.parent / "books-fit.txt")
    windows = [
        Window(part[:300], part[300:340], part[50:90])
        for part in (tokens[start : start + 340] for start in range(0, 4080, 340))
    ]
    to_fit, others = windows[:8], windows[8:]
    held = (0.05, 0.05, 0.05, 0.5, *(0.05,) * 8)
    level = Level((*(1.0,) * 4, *(0.2,) * 8), held, ("newest",) * 12, (0.5,) * 12)
    filled = replace(level, stand_ins=fit_stand_ins(llm, to_fit, level, None))
    whole = cut_level(12, 12, 1.0)
    expected = Contexts(llm, others, profile_of(whole)).logprobs(whole)
    contexts = Contexts(llm, others, profile_of(level))
    # One after the other on the same contexts: what stood in the rows before leaves nothing behind.
    without, with_them, again = (
        loss(expected, contexts.logprobs(tried), others).following for tried in (level, filled, level)
    )
    assert with_them < 0.85 * without
    assert again == without


# --- the slot ---


def test_a_layer_that_drops_nothing_or_holds_one_token_has_none(tiny: LLM) -> None:
    """The one token is the newest, without which nothing could go on; and where `fewest` lifts a layer it
    drops less than the stand-in was fitted to.
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
    assert kept.kept_positions == [list(range(50)), [4, *range(26, 50)], [49]]


def test_between_two_levels_the_nearer_one_s_stand_ins_are_taken() -> None:
    low, high = PROFILE.levels
    for share, expected in (
        (low.share / 9, low),
        (0.7 * low.share + 0.3 * high.share, low),
        (0.3 * low.share + 0.7 * high.share, high),
        (high.share + 0.05, high),
    ):
        found = PROFILE.level(share).stand_ins
        assert found is not None
        assert expected.stand_ins is not None
        assert torch.equal(found, expected.stand_ins)
    assert PROFILE.level(0.95).stand_ins is None  # next to nothing is dropped


# --- files ---


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
        ({"others": torch.zeros(3)}, CheckpointError, "no fitted lines"),
        ({"stand_ins": torch.zeros(3, 2, 2, 8)}, CheckpointError, "stand_ins are [3, 2, 2, 8]"),
        ({"stand_ins": torch.full((1, 3, 2, 2, 8), math.nan)}, CheckpointError, "finite numbers"),
        ({"stand_ins": torch.zeros(2, 3, 2, 2, 8)}, ConfigError, "of 2 levels, expected 1"),
        (
            {"stand_ins": torch.zeros(1, 4, 2, 2, 8)},
            ConfigError,
            "stand-ins are of 4 layers, the levels of 3",
        ),
        ({"stand_ins": torch.zeros(1, 3, 1, 2, 8)}, ConfigError, "another model"),
        ({"stand_ins": torch.zeros(1, 3, 2, 3, 8)}, ConfigError, "another model"),
        ({"stand_ins": torch.zeros(1, 3, 2, 2, 9)}, ConfigError, "another model"),
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
        tiny.under(tmp_path / "found.json").prefill(prompts_of([100]))
    assert told in str(error.value)


def test_a_level_in_a_file_has_no_stand_ins_of_its_own(tmp_path: Path) -> None:
    level = {"computed": [1, 0.5], "held": [0.2, 0.3], "stand_ins": [1]}
    (tmp_path / "found.json").write_text(json.dumps({"policy": "profile", "levels": [level]}))
    with pytest.raises(ConfigError, match="a level is"):
        load_policy(tmp_path / "found.json")
