"""Guesses: the fit, what they are worth, the search that makes room for them, and the files."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import PROFILES, WEIGHTS, book_windows, guesses_of, lines_of, prompts_of, say, stand_ins_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minipyramid import LLM, CheckpointError, ConfigError, Conversation, RequestError, SamplingParams
from minipyramid.calibrate.contexts import Contexts, Window, divergence, profile_of, recorded
from minipyramid.calibrate.find import Found, Search
from minipyramid.calibrate.guesses import (
    FAR,
    FIRST,
    LEAST,
    RIDGE,
    fit_guesses,
    looked_at_from_afar,
    pieces_of,
)
from minipyramid.calibrate.search import Point, allot_beside_guesses, cut_level, whole_level
from minipyramid.calibrate.search import with_guesses as guessing
from minipyramid.calibrate.settings import write_profile
from minipyramid.policies import load_policy
from minipyramid.policies.guesses import left_with
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.rope import rotate_

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "model.safetensors").exists(), reason="needs the embedded checkpoint"
)
CUT = Level((1.0, 0.25, 0.25), (0.5, 0.75, 0.5), ("votes",) * 3, (0.5,) * 3)
PROFILE = Profile((CUT,), CUT.share, fewest=0, generated_share=1.0, guesses=guesses_of(1))


# --- the fit ---


def test_the_weights_are_those_of_weighted_least_squares(tiny: LLM) -> None:
    """Of unrotated keys, and values: no other weights leave less of the squares, and of their ridge."""
    pieces = prompts_of([90, 70, 200])
    fitted = fit_guesses(tiny, pieces, 1).double()
    assert fitted.shape == (2, 65, 32)
    seen = [recorded(tiny, profile_of(whole_level(3)), ids) for ids in pieces]
    x = torch.cat([left_with(of_piece[0])[FIRST:] for of_piece in seen]).double()
    for layer in (1, 2):
        targets, counts = [], []
        for of_layer in (of_piece[layer] for of_piece in seen):
            keys = of_layer.keys.transpose(0, 1).clone()
            rotate_(keys, of_layer.rotation[0], -of_layer.rotation[1])
            both = torch.cat((keys.flatten(1), of_layer.values.transpose(0, 1).flatten(1)), 1)
            targets.append(both[FIRST:].double())
            counts.append(looked_at_from_afar(of_layer)[FIRST:].double() + LEAST)
        y, weights = torch.cat(targets), torch.cat(counts)[:, None]
        ridge = RIDGE * (weights * x.square()).sum() / x.shape[1]
        ours = fitted[layer - 1]
        slope = x.T @ (weights * (x @ ours - y)) + ridge * ours  # of what least squares make small
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-2)


def test_a_token_weighs_what_later_ones_look_at_it_from_afar(tiny: LLM) -> None:
    """Against the whole matrix of probabilities, whose rows come in blocks of 64."""
    (*_, seen) = recorded(tiny, profile_of(whole_level(3)), prompts_of([230])[0])
    (T, H, D), K = seen.q.shape, len(seen.keys)
    q = seen.q.view(T, K, H // K, D).permute(1, 2, 0, 3) / math.sqrt(D)  # [K, G, T, D]
    scores = q @ seen.keys[:, None].mT  # [K, G, T, T]
    probs = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    far = torch.tensor([[j < i // FAR * FAR - FAR for j in range(T)] for i in range(T)])
    expected = (probs * far).sum((0, 1, 2)) / far.sum(0).clamp(min=1)
    torch.testing.assert_close(looked_at_from_afar(seen), expected / expected.mean())


def test_short_pieces_have_no_far_tokens_and_weigh_alike(tiny: LLM) -> None:
    (seen, *_) = recorded(tiny, profile_of(whole_level(3)), prompts_of([2 * FAR])[0])
    assert torch.equal(looked_at_from_afar(seen), torch.ones(2 * FAR))


@given(
    count=st.integers(5, 300), begin=st.integers(0, 2), length=st.integers(3, 40), most=st.integers(40, 200)
)
@settings(deadline=None)
def test_pieces_come_from_all_over_a_text(count: int, begin: int, length: int, most: int) -> None:
    """From its first token to its last, where there is more than one; no more tokens than there may be."""
    tokens, first, step = list(range(1, count + 1)), [0] * begin, length - begin
    assume(step <= count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipyramid.calibrate.guesses.MOST", most)
        pieces = pieces_of(tokens, first, length)
    assert all(piece[:begin] == first for piece in pieces)
    parts = [piece[begin:] for piece in pieces]
    assert all(part == tokens[part[0] - 1 :][:step] for part in parts)
    assert all(len(part) == step for part in parts)
    assert len(parts) == max(1, min(count, most) // step)
    assert all(b[0] > a[-1] for a, b in pairwise(parts))
    assert parts[0][0] == 1
    assert len(parts) == 1 or parts[-1][-1] == count


@needs_weights
def test_text_that_nothing_was_fitted_to_is_predicted_better_with_guesses() -> None:
    llm = LLM(WEIGHTS, policy="full", dtype="float32")
    windows = book_windows(llm, 40)
    to_fit, others = windows[:32], windows[32:]
    cut, whole = cut_level(12, 4, 0.2), whole_level(12)
    guesses = fit_guesses(llm, [window.context for window in to_fit], 4)
    expected = Contexts(llm, others, profile_of(whole)).logprobs(whole)
    losses = []
    for level in (cut, guessing(cut, 0.2), guessing(cut, 1.0)):
        got = Contexts(llm, others, profile_of(level, None, guesses)).logprobs(level)
        losses.append(divergence(expected, got, others).following)
    none, some, everything = losses
    assert some < 0.85 * none
    assert everything < 0.6 * none


# --- room for them ---


def test_what_is_allotted_beside_guesses_holds_the_share() -> None:
    """Layers in front of the cut give what they need least; where they have too little there is no level."""
    curves = [[Point(size, 1 - size, ("newest", 1.0)) for size in (0.1, 0.5, 1.0)] for _ in range(4)]
    cut = guessing(cut_level(4, 2, 0.3), 0.2)
    assert cut.held == (1.0, 1.0, 0.5, 0.5)
    level = allot_beside_guesses(cut, curves, 0.5)
    assert level is not None
    assert level.held[2:] == (0.5, 0.5)
    assert level.share == pytest.approx(0.5)
    assert level.computed == cut.computed
    assert allot_beside_guesses(cut, curves, 0.2) is None
    assert guessing(cut_level(4, 2, 0.3), 0.9).held[2:] == (1.0, 1.0)


def test_guesses_are_taken_where_they_lower_the_loss_and_at_one_depth(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [Window(ids[:80], ids[80:88], ids[8:16]) for ids in prompts_of([88, 90])]
    search = Search(tiny, windows, lines_of(3), repeats=False, notice=lambda what: None)
    found = Found(curves=[[Point(x, 1 - x, ("newest", 1.0)) for x in (0.1, 1.0)] for _ in range(3)])
    cut = cut_level(3, 1, 0.4)
    for sign in (1, -1):  # the more is guessed the better, and the worse
        monkeypatch.setattr(search, "loss", lambda contexts, level, sign=sign: sign * level.held[0])
        best = search.best_behind([cut], 0.6, found)
        assert best is not None
        loss, level, contexts = best
        assert loss == sign * level.held[0]
        assert level.is_guessing is (sign == 1)
        assert level.share == pytest.approx(0.6)
        assert (contexts.profile.guesses is not None) is (sign == 1)
    monkeypatch.setattr(search, "loss", lambda contexts, level: level.held[0])
    found.levels = [guessing(cut_level(3, 2, 0.4), 0.2)]
    best = search.best_behind([cut], 0.6, found)
    assert best is not None
    assert not best[1].is_guessing
    assert search.best_behind([], 0.6, found) is None


# --- in the engine ---


@given(
    profile=PROFILES.filter(lambda profile: profile.guesses is not None),
    lengths=st.lists(st.integers(1, 38), min_size=1, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_every_turn_holds_what_was_planned_and_no_position_twice(
    profile: Profile, lengths: list[int], tiny: LLM
) -> None:
    llm, conversation = tiny.under(profile), Conversation()
    for ids in prompts_of(lengths):
        earlier = conversation.held.lengths if conversation.held else [0, 0, 0]
        completion = say(llm, ids, SamplingParams(max_new_tokens=2, ignore_eos=True), conversation)
        planned = profile.kv_lengths(len(ids), 2, 3)
        assert completion.kv_lengths == [a + b for a, b in zip(earlier, planned, strict=True)]
        for layer in completion.kept_positions:
            for head in layer if isinstance(layer[0], list) else [layer]:
                assert head == sorted(set(head))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_batch_says_what_single_runs_say(kv_dtype: str, tiny_dir: Path) -> None:
    """In pages, too, and with keys and values in 8 bits."""
    llm = LLM(tiny_dir, policy=PROFILE, dtype="float32", kv_dtype=kv_dtype)
    prompts, params = prompts_of([90, 33, 57, 4]), SamplingParams(max_new_tokens=9, ignore_eos=True)
    together = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert completion.token_ids == alone.token_ids
        assert completion.kept_positions == alone.kept_positions
        assert completion.kv_lengths == llm.plan([len(prompt)], 9).kv_lengths[0]


@pytest.mark.parametrize(
    ("computed", "held"),
    [
        ((1.0, 1.0, 0.5), (1.0, 1.0, 0.5)),
        ((1.0, 0.9, 0.5), (0.9, 0.9, 0.5)),
        ((1.0, 1.0, 1.0), (1.0, 0.8, 0.6)),
    ],
)
def test_a_larger_share_holds_more_and_levels_that_would_not_are_refused(
    computed: tuple[float, ...], held: tuple[float, ...]
) -> None:
    """Between levels that were not cut alike nothing was guessed: a budget held less than a smaller one."""
    high = Level(computed, held, ("votes",) * 3, (0.5,) * 3)
    if min(computed) < 1:
        with pytest.raises(
            ConfigError, match=r"does not compute all in 1 layers and then less.*cut all alike"
        ):
            Profile((CUT, high), guesses=guesses_of(1), fewest=0)
        return
    profile = Profile((CUT, high), guesses=guesses_of(1), fewest=0)
    assert profile.level(CUT.share) == CUT
    shares = [n / 50 for n in range(51)]
    assert [profile.level(share).share for share in shares] == pytest.approx(shares)


def test_stand_ins_stand_beside_guesses(tiny: LLM) -> None:
    """A layer that guesses all it does not compute drops nothing, and needs none."""
    filled = replace(CUT, stand_ins=stand_ins_of(3))
    profile = replace(PROFILE, levels=(filled,))
    assert [profile.stand_ins_for(layer, 100) is not None for layer in range(3)] == [True, True, True]
    whole = replace(filled, held=(0.5, 1.0, 0.5))
    profile = Profile((whole,), whole.share, fewest=0, guesses=guesses_of(1))
    assert [profile.stand_ins_for(layer, 100) is not None for layer in range(3)] == [True, False, True]
    (prefill,) = tiny.under(profile).prefill(prompts_of([100]))
    assert prefill.kept_positions[1] == list(range(100))


# --- files ---


def test_guesses_are_read_as_they_were_written(tmp_path: Path) -> None:
    """In float16, for they are the larger part of the file; where no level guesses they are left out."""
    write_profile(
        tmp_path / "found.json", [CUT], lines_of(3), {}, guess_weights={1: guesses_of(1), 2: guesses_of(2)}
    )
    profile = load_policy(tmp_path / "found.json")
    assert isinstance(profile, Profile)
    assert profile.levels == (CUT,)
    assert profile.guesses is not None
    assert torch.equal(profile.guesses, guesses_of(1).half().float())
    plain = replace(CUT, held=(0.5, 0.2, 0.2), stand_ins=stand_ins_of(3))
    write_profile(tmp_path / "found.json", [plain], lines_of(3), {}, guess_weights={1: guesses_of(1)})
    assert list(load_file(tmp_path / "found.safetensors")) == ["stand_ins"]


@pytest.mark.parametrize("name", ["guesses", "stand-ins"])
def test_what_could_not_be_read_is_not_written(name: str, tmp_path: Path) -> None:
    """Weights beyond float16 were written as inf, and the next run refused to write over its own file."""
    level = replace(CUT, stand_ins=stand_ins_of(3) * (1e6 if name == "stand-ins" else 1))
    guesses = {1: guesses_of(1) * (1e6 if name == "guesses" else 1)}
    with pytest.raises(RequestError, match=f"{name} that were fitted exceed float16"):
        write_profile(tmp_path / "found.json", [level], lines_of(3), {}, guess_weights=guesses)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("guesses", "kind", "told"),
    [
        (None, ConfigError, "layer 1 holds 0.75 and computes 0.25, and guesses of the rest were not fitted"),
        (guesses_of(2), ConfigError, "not fitted behind layer 0"),
        (torch.zeros(3, 65, 32), ConfigError, "expected three axes, and 1 to 2 layers"),
        (torch.zeros(2, 65, 32, 1), CheckpointError, "[2, 65, 32, 1] of torch.float32, expected 3 axes"),
        (torch.zeros(2, 65, 16), ConfigError, "guesses are [2, 65, 16], and of this model [2, 65, 32]"),
        (torch.zeros(2, 33, 32), ConfigError, "guesses are [2, 33, 32], and of this model [2, 65, 32]"),
    ],
)
def test_guesses_that_cannot_be_are_told(
    guesses: torch.Tensor | None, kind: type[Exception], told: str, tiny: LLM, tmp_path: Path
) -> None:
    write_profile(tmp_path / "found.json", [CUT], lines_of(3), {}, guess_weights={1: guesses_of(1)})
    save_file(
        {"lines": lines_of(3)} if guesses is None else {"guesses": guesses}, tmp_path / "found.safetensors"
    )
    with pytest.raises(kind) as error:
        tiny.under(tmp_path / "found.json", kv_budget=0.55)
    assert told in str(error.value)


@pytest.mark.parametrize("wrong", [1, "x", [guesses_of(1)]])
def test_guesses_of_a_program_are_checked_as_those_of_a_file(wrong: object) -> None:
    with pytest.raises(TypeError, match="guesses is"):
        Profile((CUT,), guesses=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected three axes"):
        Profile((CUT,), guesses=torch.zeros(2))
    with pytest.raises(ConfigError, match="not fitted behind layer 0"):
        Profile((CUT,), guesses=guesses_of(2))


def test_levels_that_guess_without_guesses_are_told_by_their_layer() -> None:
    """The level before it was compared with a cut that nobody had made, behind "None layers"."""
    other = replace(CUT, computed=(1.0, 1.0, 0.25), held=(0.1, 0.1, 0.1))
    with pytest.raises(ConfigError, match=r"layer 1 holds 0\.75 and computes 0\.25"):
        Profile((other, CUT))
