"""The calibration: its measurements against the engine, its search against brute force, and the command."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    PROFILE,
    PROFILES,
    WEIGHTS,
    ids_of_text,
    lines_of,
    prompts_of,
    train_pieces,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_through import insert_layers
from safetensors.torch import load

from minipyramid import LLM, RequestError, SamplingParams
from minipyramid.calibrate.__main__ import build_parser, check, computed_at, main, out_file
from minipyramid.calibrate.contexts import Contexts, Window, cut_windows, divergence
from minipyramid.calibrate.find import Found, Search
from minipyramid.calibrate.fit import LineFit
from minipyramid.calibrate.search import ONLY_NEWEST, Point, allot, cut_level, cuts, hull_below, lower_hull
from minipyramid.calibrate.settings import check_replaced, in_safetensors, write_profile
from minipyramid.policies import load_policy
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policies.scores import features
from minipyramid.policy import Seen

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "model.safetensors").exists(), reason="needs the embedded checkpoint"
)
FIT = WEIGHTS.parent / "books-fit.txt"


def windows_of(lengths: list[int], following: int = 7) -> list[Window]:
    """Contexts of random tokens, and random tokens after them."""
    rng = random.Random(str(lengths))
    return [
        Window(prompt, rng.choices(range(3, 320), k=following), prompt[4 : 4 + following])
        for prompt in prompts_of(lengths)
    ]


# --- what is measured ---


@given(profile=PROFILES)
@settings(max_examples=25, deadline=None)
def test_what_a_level_costs_is_what_the_engine_does_under_it(tiny: LLM, profile: Profile) -> None:
    """Recorded contexts, of which one level after another holds a part, answer as the engine itself does."""
    windows, level = windows_of([60, 41]), profile.levels[-1]
    held = Profile((level,), share=level.share, fewest=0, lines=lines_of(3), guesses=profile.guesses)
    contexts = Contexts(tiny, windows, held, repeats=True)
    others = tuple(share / 2 for share in level.computed)
    contexts.logprobs(replace(level, held=others))  # what stood in the rows before leaves nothing behind
    got = contexts.logprobs(level).view(2, 2, 7, -1)
    for window, rows in zip(windows, got, strict=True):
        for continuation, logprobs in zip((window.following, window.again), rows, strict=True):
            expected = tiny.under(held).logits(window.context, continuation).log_softmax(-1)
            torch.testing.assert_close(logprobs, expected[1:], rtol=1e-3, atol=1e-4)


def test_the_full_cache_loses_nothing(tiny: LLM) -> None:
    windows, whole = windows_of([50, 30]), cut_level(3, 3, 1.0)
    contexts = Contexts(tiny, windows, Profile((whole,), share=1.0, fewest=0))
    full = contexts.logprobs(whole)
    measured = divergence(full, contexts.logprobs(whole), windows)
    assert (measured.following, measured.again) == (0, 0)
    half = divergence(full, contexts.logprobs(replace(whole, held=(0.5, 0.2, 0.5))), windows)
    assert min(half.following, half.again) > 0.01


def test_windows_are_stretches_of_the_text_and_what_is_said_again_is_of_the_context() -> None:
    tokens = list(range(1000, 2000))
    for window in cut_windows(tokens, [1], (100, 20), 30, random.Random(0)):
        both = window.context[1:] + window.following
        assert window.context[0] == 1
        assert both == list(range(both[0], both[0] + 119))
        start = window.context.index(window.again[0])
        assert window.context[start : start + 20] == window.again
        assert start + 20 <= 80  # nothing that the newest tokens hold anyway


# --- the score `fitted` ---


def test_the_lines_are_those_that_foretell_a_score_that_lies_on_one(tiny: LLM) -> None:
    recorded = []
    for window in windows_of([120, 110, 125]):
        whole = cut_level(3, 3, 1.0)
        (seen,) = Contexts(tiny, [window], Profile((whole,), share=1.0, fewest=0), repeats=True).seen
        known = [features(x.keys, x.values) for x in seen]
        of_lines = [
            (f @ line[..., None])[..., 0].exp() for f, line in zip(known, 0.1 * lines_of(3), strict=True)
        ]
        recorded.append([replace(x, looked_over=y) for x, y in zip(seen, of_lines, strict=True)])
    fit = LineFit()
    for seen in recorded:
        fit.add(seen)
    lines = fit.lines()
    for seen in recorded:
        for x, line in zip(seen, lines, strict=True):
            foretold = (features(x.keys, x.values) @ line[..., None])[..., 0]
            assert x.looked_over is not None
            torch.testing.assert_close(foretold, x.looked_over.log(), rtol=0, atol=0.05)


def test_a_line_is_fitted_to_scores_only() -> None:
    q, keys, values = torch.zeros(90, 4, 8), torch.zeros(2, 90, 8), torch.zeros(2, 90, 8)
    rotation = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    seen = Seen(q, keys, values, None, rotation, q, q, layer=0, prompt_tokens=90)
    with pytest.raises(ValueError, match="without its repeated scores"):
        LineFit().add([seen])


# --- the search ---


@given(losses=st.lists(st.floats(0, 10), min_size=2, max_size=8))
def test_a_lower_hull_is_convex_and_below_every_point(losses: list[float]) -> None:
    points = [Point(i / 10, loss, ONLY_NEWEST) for i, loss in enumerate(losses)]
    hull = lower_hull(points)
    slopes = [(b.loss - a.loss) / (b.share - a.share) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    for point in points:
        a, b = next((a, b) for a, b in itertools.pairwise(hull) if a.share <= point.share <= b.share)
        line = a.loss + (b.loss - a.loss) * (point.share - a.share) / (b.share - a.share)
        assert line <= point.loss + 1e-9


@given(
    steps=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=3, max_size=3),
    tokens=st.integers(3, 12),
)
def test_an_allotment_is_the_cheapest_of_all(steps: list[list[int]], tokens: int) -> None:
    """Against every other way to spread so many quarters over three layers, where curves are convex."""
    curves = []
    for falls in steps:
        losses = [sum(sorted(falls)[: 3 - i]) for i in range(4)]  # the steepest piece first
        curves.append([Point((i + 1) / 4, float(loss), ONLY_NEWEST) for i, loss in enumerate(losses)])
    whole = cut_level(3, 3, 1.0)
    level = allot(whole, curves, tokens / 12)

    def loss(quarters: tuple[int, ...]) -> float:
        return sum(points[n - 1].loss for points, n in zip(curves, quarters, strict=True))

    ways = [way for way in itertools.product(range(1, 5), repeat=3) if sum(way) == tokens]
    given_out = tuple(round(4 * share) for share in level.held)
    assert sum(level.held) == pytest.approx(tokens / 4)
    assert loss(given_out) == min(map(loss, ways))


def test_an_allotment_below_the_smallest_sizes_scales_them_down() -> None:
    curves = [[Point(0.1, 3.0, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]] * 2 + [
        [Point(0.2, 1.0, ONLY_NEWEST)]
    ]
    level = allot(cut_level(3, 3, 1.0), curves, 0.05)
    assert level.held == pytest.approx((0.0375, 0.0375, 0.075))


def test_a_cut_computes_the_share_that_is_asked_for() -> None:
    for computed in (0.4, 0.55, 0.9):
        for level in cuts(12, computed):
            assert sum(level.computed) / 12 == pytest.approx(computed)
            assert level.computed == tuple(sorted(level.computed, reverse=True))
    assert [level.computed.count(1.0) for level in cuts(12, 0.4)] == [1, 2, 3, 4]


def test_nothing_is_left_to_hold_where_a_layer_computes_little() -> None:
    curve = [Point(0.1, 5.0, ONLY_NEWEST), Point(0.5, 2.0, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]
    assert hull_below(curve, 0.3) == [Point(0.1, 5.0, ONLY_NEWEST), Point(0.3, 0.0, ONLY_NEWEST)]


@needs_weights
@pytest.mark.parametrize("after", [[0], [1, 2, 5, 11], [3, 3, 8]])
def test_the_depth_at_which_a_model_looks_back_is_found(
    after: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 3 of the embedded checkpoint looks back; layers that change nothing move it, and have no need.

    The search is coarser than the command's, by sizes and exchanges; it tries every depth.
    """
    for name, coarse in {"SIZES": (0.02, 0.08, 0.32), "MOVES": (0.4,), "ROUNDS": 1}.items():
        monkeypatch.setattr(f"minipyramid.calibrate.search.{name}", coarse)
    llm = LLM(insert_layers(WEIGHTS, after, tmp_path), policy="full", dtype="float32")
    layers, looks_back = 12 + len(after), 3 + sum(layer < 3 for layer in after)
    tokens = ids_of_text(llm, FIT)[:20000]
    windows = cut_windows(tokens, [1], (300, 24), 2, random.Random(0))
    search = Search(llm, windows, torch.zeros(layers, 1, 132), repeats=False, notice=lambda what: None)
    search.choices = (("keydiff", 0.25),)
    found = search.find([(0.15, 0.5)])
    (level,) = found.levels
    # Behind the layer that looks back, and behind as many of those after it that change nothing.
    assert looks_back + 1 <= level.computed.count(1.0) <= looks_back + 1 + after.count(3)
    assert max(level.held) == level.held[looks_back]
    assert level.held[looks_back] > 3 * level.share
    passing = [place for place, passes in enumerate(_places(after)) if passes]
    assert all(level.held[place] <= 0.05 for place in passing)
    assert level.share == pytest.approx(0.15, abs=0.001)


def _places(after: list[int]) -> list[bool]:
    """Whether the layer at each place of a variant changes nothing."""
    return [passes for layer in range(12) for passes in [False, *[True] * after.count(layer)]]


@needs_weights
def test_layers_that_change_nothing_change_nothing(tmp_path: Path) -> None:
    prompt = ids_of_text(LLM(WEIGHTS), FIT)[:50]
    one, other = (
        LLM(model, policy="full", dtype="float32").logits(prompt, [])
        for model in (WEIGHTS, insert_layers(WEIGHTS, [0, 3, 3], tmp_path))
    )
    assert torch.equal(one, other)


# --- the command ---


QUICK = "--samples 2 --context 160 --following 12 --budget 0.5,0.2 --seed 3 --quiet".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = "the fox said who is there and went home again little upon a time once was".split()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=3000)))
    return path


def test_the_command_writes_a_profile_that_the_engine_runs(
    tiny_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    command = ["--model", str(tiny_dir), "--text", str(text), "--out", str(out), *QUICK]
    length = command[command.index("--context") + 1]
    once_more = ["--context", f"{length},{length}", "--plot", str(tmp_path / "found.png"), "--json"]
    assert main([*command, *once_more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["context"] == [int(length)]  # the same length twice is one
    assert [len(points) for points in told["curves"]] == [8, 8, 8]
    assert {row["layers"] for row in told["depths"]} <= {1, 2}
    profile = load_policy(out)
    assert isinstance(profile, Profile)
    kept = [row for row in told["levels"] if row["better"]]
    assert [level.share for level in profile.levels] == pytest.approx([row["held"] for row in kept], abs=1e-3)
    assert all(level.stand_ins is not None for level in profile.levels)
    assert (profile.measured["model"], profile.measured["dtype"]) == (tiny_dir.name, "float32")
    assert profile.measured["asked"]["budget"] == told["asked"]["budget"]
    assert (profile.measured["quantize"], profile.measured["repeat"]) == (None, False)
    assert (tmp_path / "found.png").stat().st_size > 1000
    llm = LLM(tiny_dir, policy=out, kv_budget=0.5)
    # A budget is of all the tokens that may be generated, which an end of text before them is not.
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    (completion,) = llm.generate("the fox said who is there and went home again " * 4, params)
    assert completion.kv_bytes <= 0.5 * completion.kv_bytes_full
    files = [out, out.with_suffix(".safetensors")]
    first = [file.read_bytes() for file in files]
    assert main(command) == 0
    assert [file.read_bytes() for file in files] == first  # the same seed finds the same
    table = capsys.readouterr().out
    assert "written to" in table
    for row in told["levels"]:  # `better` is by these
        assert f"{row['kl']:.4f}" in table
        assert f"{row['even_kl']:.4f}" in table
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--budget", "0"], "--budget is 0.0"),
        (["--budget", "1"], "--budget has 1.0, where no layer holds less"),
        (["--budget", "0.99995"], "give shares of 0.9998 or less"),
        (["--budget", "0.5,0.50001"], "0.0002 apart"),
        (["--context", "160,200", "--repeat"], "--context is 160, expected 128 or less"),
        (["--computed", "nan"], "--computed is nan"),
        (["--budget", "0.5,0.004"], "less than a token"),
        (["--computed", "0.5"], "1 shares for 2 budgets"),
        (["--budget", "0.5,0.5", "--computed", "0.7,0.8"], "more than one share of --computed"),
        (["--context", "60"], "--context is 60"),
        (["--following", "1"], "--following"),
        (["--following", "90"], "less than half"),
        (["--context", "250"], "context of 256"),
        (["--samples", "0"], "--samples"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--out", "found.txt"], ".json"),
        (["--out", "nowhere/found.json"], "--out"),
        (["--out", "model.json"], "over the weights"),
        (["--out", "found.json/"], "--out is found.json/"),
        (["--out", "x" * 240 + ".json"], "--out"),  # what is not whole yet has a longer name
        (["--out", "~no_such_user/found.json"], "--out ~no_such_user/found.json cannot be written"),
        (["--plot", "found.txt"], ".png"),
    ],
)
def test_nonsense_is_one_line(
    changes: list[str], told: str, tiny_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_out = str(text.with_suffix(".json"))
    command = ["--model", str(tiny_dir), "--text", str(text), "--out", given_out, *QUICK, *changes]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--out", "nowhere/found.json"], "nowhere/found.json"),
        (["--context", "250"], "context of 256"),
        (["--text", "short.txt"], "short.txt has 20 tokens, expected 688 or more"),
        ([], "no weights"),
    ],
)
def test_what_cannot_be_is_told_before_weights_are_read(
    changes: list[str], told: str, tiny_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gigabytes were fetched first, and then --text was not there, or too short."""
    short = text.with_name("short.txt")
    short.write_text("the fox said who is there and went home again")
    changes = [str(short) if value == short.name else value for value in changes]
    without = text.parent / "without_weights"
    without.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (without / name).write_bytes((tiny_dir / name).read_bytes())
    assert main(["--model", str(without), "--text", str(text), *QUICK, *changes]) == 2
    assert told in capsys.readouterr().err


def test_a_budget_given_twice_is_one(text: Path) -> None:
    """It was refused: --computed had two shares for one budget."""
    args = build_parser().parse_args(
        ["--text", str(text), "--budget", "0.5,0.25,0.5", "--computed", "0.7,0.6,0.7"]
    )
    assert check(args) == [(0.5, 0.7), (0.25, 0.6)]


def test_a_profile_is_not_written_through_a_link(tmp_path: Path) -> None:
    """The link was replaced; and what it led to would have named a file that is not beside the link."""
    (tmp_path / "found.json").symlink_to(tmp_path / "elsewhere.json")
    args = argparse.Namespace(model=str(tmp_path), out=str(tmp_path / "found.json"))
    with pytest.raises(RequestError, match="is no plain file"):
        out_file(args, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_name_that_is_not_utf8_is_refused_before_it_could_not_be_read_again(tmp_path: Path) -> None:
    args = argparse.Namespace(model=str(tmp_path), out=str(tmp_path / "\udcff.json"))
    with pytest.raises(RequestError, match="cannot be written"):
        out_file(args, tmp_path)


def test_a_profile_is_not_written_over_a_pipe(tmp_path: Path) -> None:
    """It became a plain file."""
    os.mkfifo(tmp_path / "found.safetensors")
    args = argparse.Namespace(model=str(tmp_path), out=str(tmp_path / "found.json"))
    with pytest.raises(RequestError, match=r"found\.safetensors is no plain file"):
        out_file(args, tmp_path)


def test_a_place_at_home_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory called ~ was looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = argparse.Namespace(model=str(tmp_path), out="~/found.json")
    assert out_file(args, tmp_path) == tmp_path / "found.json"


def test_a_model_at_home_is_a_directory_of_its_user(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was loaded, and then refused as no directory to write to."""
    monkeypatch.setenv("HOME", str(tiny_dir.parent))
    args = argparse.Namespace(model=f"~/{tiny_dir.name}", out=None)
    assert out_file(args, tiny_dir) == tiny_dir / "pyramid.json"


def test_a_short_text_is_refused(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("the fox")
    out = str(tmp_path / "found.json")
    assert main(["--model", str(tiny_dir), "--text", str(tmp_path / "short.txt"), "--out", out, *QUICK]) == 2
    assert "expected 688 or more" in capsys.readouterr().err
    assert not Path(out).exists()


def test_what_is_computed_lies_on_a_line_between_the_shares_that_were_chosen() -> None:
    assert [computed_at(share) for share in (0.05, 0.15, 0.2, 0.5, 1.0)] == pytest.approx(
        [0.4, 0.45, 0.475, 0.75, 1.0]
    )


def test_a_text_whose_last_quarter_has_no_window_is_refused_with_the_length_that_does(
    tiny_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of 500 tokens was told that it had 125 and needed 171."""
    tokens = ids_of_text(LLM(tiny_dir), text)
    text.write_text(LLM(tiny_dir).engine.need_tokenizer().decode(tokens[:500]))
    out = str(text.with_suffix(".json"))
    assert main(["--model", str(tiny_dir), "--text", str(text), "--out", out, *QUICK]) == 2
    assert "expected 688 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "computed"), [(1, "0.4"), (3, "0.05")])
def test_so_little_that_no_layer_computes_all_becomes_more(
    layers: int, computed: str, text: Path, tmp_path: Path
) -> None:
    """There was no depth to choose from, a ValueError: always in a model of one layer."""
    model = write_checkpoint(tmp_path / "model", num_hidden_layers=layers)
    train_pieces(model)
    llm = LLM(model, policy="full")
    search = Search(llm, windows_of([160]), lines_of(layers), repeats=False, notice=lambda what: None)
    search.choices = (("keydiff", 0.25),)
    (level,) = search.find([(0.05, float(computed))]).levels
    assert level.share == pytest.approx(0.05)
    assert level.computed[0] == 1


@pytest.mark.parametrize(("holding", "computed"), [(0.05, 0.4), (0.03, 0.45)])
def test_more_is_computed_where_a_cut_costs_more_than_holding_less(
    holding: float, computed: float, tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut before the layer that looks back was taken at up to four times that, and lost most answers."""
    search = Search(tiny, windows_of([160]), lines_of(3), repeats=False, notice=lambda what: None)
    losses = {0.4: 0.09, 0.45: 0.05}  # of a level, by the share of token-layers that is computed

    def told(contexts: Contexts, level: Level) -> float:
        return losses[round(sum(level.computed) / 3, 4)]

    monkeypatch.setattr(search, "loss", told)
    curve = [Point(0.1, holding / 3, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]
    level, contexts = search.first_level(Found([curve] * 3), 0.1, 0.4)
    assert sum(level.computed) / 3 == pytest.approx(computed)
    assert contexts.profile.levels[0].computed == level.computed


def test_guesses_make_a_cut_cheap_enough(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost was asked for without them, and more was computed than they need; a file has one depth."""
    search = Search(tiny, windows_of([160]), lines_of(3), repeats=False, notice=lambda what: None)

    def told(contexts: Contexts, level: Level) -> float:  # by what stands behind the cut
        return 0.001 if contexts.profile.levels[0].held[2] >= 0.14 else 0.03

    monkeypatch.setattr(search, "loss", told)
    curve = [Point(0.01, 0.0, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]
    for share, computed in [(0.43, 0.4), (0.09, 0.45)]:  # with room for such guesses, and without it
        level, _ = search.first_level(Found([curve] * 3), share, 0.4)
        assert sum(level.computed) / 3 == pytest.approx(computed)
        assert level.is_guessing is (share == 0.43)
        assert level.share == pytest.approx(share)
    elsewhere = cut_level(3, 2, 0.1)
    taken = Found([curve] * 3, levels=[replace(elsewhere, held=(1.0, 1.0, 0.2))])
    assert search.first_level(taken, 0.5, 0.4)[0].depth == 2


def test_more_may_be_held_than_is_computed_and_never_less_than_was_asked(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of 0.9 computed 90 % whatever was asked, for without guesses nothing more can be held."""
    search = Search(tiny, windows_of([160]), lines_of(3), repeats=False, notice=lambda what: None)
    monkeypatch.setattr(search, "loss", lambda contexts, level: 0.001)
    curve = [Point(0.01, 0.0, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]
    level, _ = search.first_level(Found([curve] * 3), 0.9, 0.75)
    assert level.share == pytest.approx(0.9)
    assert sum(level.computed) / 3 == pytest.approx(0.75)
    elsewhere = Level((1.0, 0.2, 0.1), (1.0, 0.2, 0.1), ("newest",) * 3, (1.0,) * 3)
    without = Found([curve] * 3, levels=[elsewhere, cut_level(3, 2, 0.1)])
    level, _ = search.first_level(without, 0.9, 0.75)
    assert not level.is_guessing
    assert level.share == pytest.approx(0.9)


def test_a_cut_that_is_best_with_guesses_alone_is_found(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best depth was looked for without them: a layer in front of the one that looks back."""
    search = Search(tiny, windows_of([160]), lines_of(3), repeats=False, notice=lambda what: None)
    losses = {(1, False): 0.012, (2, False): 0.02, (1, True): 0.012, (2, True): 0.01}  # (depth, with guesses)

    def told(contexts: Contexts, level: Level) -> float:
        return losses[level.depth, level.is_guessing]

    monkeypatch.setattr(search, "loss", told)
    curve = [Point(0.01, 0.0, ONLY_NEWEST), Point(1.0, 0.0, ONLY_NEWEST)]
    level, contexts = search.first_level(Found([curve] * 3), 0.5, 0.7)
    assert level.depth == 2
    assert level.is_guessing
    assert contexts.profile.depth == 2
    losses[2, False] = 0.03  # so much more is not tried
    assert search.first_level(Found([curve] * 3), 0.5, 0.7)[0].depth == 1


def test_a_disk_that_is_full_leaves_the_former_files_and_no_others(tmp_path: Path) -> None:
    """Lines that could not be written were a SafetensorError; new lines stood beside former levels; parts
    stayed.
    """
    out = tmp_path / "found.json"
    write_profile(out, list(PROFILE.levels), lines_of(3), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, len(before["found.safetensors"]) + 1):  # not even the lines; the lines only
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(RequestError, match="cannot be written"):
                write_profile(out, list(PROFILE.levels), lines_of(3) + 1, {"note": "x" * most})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@given(
    shapes=st.dictionaries(
        st.text(max_size=5), st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4
    ),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None)
def test_the_library_reads_what_is_written(shapes: dict[str, list[int]], dtype: torch.dtype) -> None:
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    read = load(in_safetensors(tensors, {"format": "pt"}))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert all(read[name].dtype == dtype for name in tensors)


def test_a_profile_is_written_without_numpy(tmp_path: Path) -> None:
    """safetensors' own `save` needs it, so a calibration failed after its whole search."""
    code = """
import sys
sys.modules["numpy"] = None
from pathlib import Path
import torch
from minipyramid.calibrate.settings import write_profile
from minipyramid.policies.levels import Level
level = Level((1.0, 0.5), (0.5, 0.2), ("fitted",) * 2, (0.5,) * 2)
write_profile(Path(sys.argv[1]), [level], torch.ones(2, 1, 8), {})
"""
    out = tmp_path / "found.json"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, out], check=True)
    assert isinstance(load_policy(out), Profile)


def test_whoever_may_read_the_settings_may_read_their_lines(tmp_path: Path) -> None:
    """The lines were for their owner only, so that a shared checkpoint failed for everybody else."""
    write_profile(tmp_path / "found.json", list(PROFILE.levels), lines_of(3), {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_only_a_profile_is_written_over(tmp_path: Path) -> None:
    """`--out config.json` in a checkpoint's directory wrote over the model's configuration."""
    model = write_checkpoint(tmp_path / "model")
    (model / "other.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    for name in ("config.json", "other.json"):
        with pytest.raises(RequestError, match="no part of a profile"):
            check_replaced(model / name)
    out = tmp_path / "found.json"
    for former in ("", "{}", '{"recent_ratio": 0.2}', '{"policy": "profile", "levels": "lost"}'):
        out.write_text(former)
        check_replaced(out)
    write_profile(out, list(PROFILE.levels), lines_of(3), {})
    check_replaced(out)
