"""Profiles: two lists per layer, against a slow version, in the engine, and under budgets."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, PROFILES, heads_of, lines_of, prompts_of, say, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from slow_profile import SlowProfile

from minipyramid import (
    LLM,
    BudgetError,
    CheckpointError,
    ConfigError,
    Conversation,
    RequestError,
    SamplingParams,
)
from minipyramid.eval.__main__ import what_to_compare
from minipyramid.formats.huggingface import read_config
from minipyramid.policies import load_policy
from minipyramid.policies.generated import FEWEST_RECENT, PARTS, split_between
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile

LEVEL = {"computed": [1, 0.5, 0.5], "held": [0.2, 0.3, 0.1]}


# --- the two lists ---


@given(profile=PROFILES, prompt=st.integers(1, 300))
def test_a_layer_holds_what_it_computes_or_guesses_and_computes_no_more_than_the_one_before(
    profile: Profile, prompt: int
) -> None:
    computed, held = profile.computed(prompt, 3), profile.held(prompt, 3)
    assert computed[0] == prompt
    assert computed == sorted(computed, reverse=True)
    for layer, (h, c) in enumerate(zip(held, computed, strict=True)):
        assert 1 <= h <= (c if profile.depth is None or layer < profile.depth else prompt)


@given(profile=PROFILES, prompt=st.integers(20, 300), share=st.floats(0.05, 1.0))
def test_the_share_that_is_asked_for_is_held(profile: Profile, prompt: int, share: float) -> None:
    """To the token, but where a layer's share is less than the one token that every layer holds."""
    asked = replace(profile, share=share, fewest=0)
    held = asked.held(prompt, 3)
    assert abs(sum(held) - 3 * share * prompt) <= 1 + held.count(1)


def test_levels_are_interpolated_and_scaled_down_and_go_up_to_the_whole() -> None:
    low, high = PROFILE.levels
    assert PROFILE.level(low.share) == low
    assert PROFILE.level(high.share) == high
    middle = PROFILE.level((low.share + high.share) / 2)
    assert middle.held == pytest.approx([(a + b) / 2 for a, b in zip(low.held, high.held, strict=True)])
    assert middle.computed == pytest.approx((1, 0.9, 0.6))
    assert middle.scores == low.scores
    assert PROFILE.level(low.share / 2).held == pytest.approx([share / 2 for share in low.held])
    assert PROFILE.level(low.share / 2).computed == low.computed
    assert PROFILE.level(1.0).held == PROFILE.level(1.0).computed == (1.0, 1.0, 1.0)


@given(
    profile=PROFILES,
    prompt=st.integers(2, 200),
    new=st.integers(0, 100),
    share=st.sampled_from([0.03, 0.1, 0.3, 0.5, 0.9, 1.0]),
)
def test_a_budget_is_met_or_refused_with_the_smallest(
    profile: Profile, prompt: int, new: int, share: float
) -> None:
    def held(budget: float) -> float:
        return sum(profile.within(budget, prompt, new, 3).kv_lengths(prompt, new, 3)) / (3 * (prompt + new))

    try:
        assert held(share) <= share
    except BudgetError as refusal:
        assert share < refusal.smallest
        assert held(refusal.smallest) <= refusal.smallest


def test_a_prompt_has_what_its_generated_tokens_leave() -> None:
    """A budget is used up: a token more would exceed it, where nothing but the prompt's share gives way."""
    for prompt, new, share in ((1000, 0, 0.05), (1000, 100, 0.1), (400, 300, 0.25), (100, 20, 0.8)):
        lengths = PROFILE.within(share, prompt, new, 3).kv_lengths(prompt, new, 3)
        assert 0 <= share * 3 * (prompt + new) - sum(lengths) < 4


@settings(deadline=None)
@given(profile=PROFILES, prompt=st.integers(1, 200), new=st.integers(0, 600), part=st.integers(1, 95))
def test_a_larger_budget_holds_no_less(profile: Profile, prompt: int, new: int, part: int) -> None:
    """The first settings that left a prompt enough were taken, whatever it could use of that, and 5 + 81
    tokens held 0.250 at a budget of 0.250, and 0.070 at 0.255.
    """

    def held(budget: float) -> int:
        return sum(profile.within(budget, prompt, new, 3).kv_lengths(prompt, new, 3))

    try:
        smaller = held(part / 100)
    except BudgetError:
        return
    assert all(smaller <= held(percent / 100) for percent in range(part + 1, min(part + 6, 101)))


@settings(deadline=None)
@given(profile=PROFILES, prompt=st.integers(1, 12), new=st.integers(100, 3000), share=st.floats(0.01, 1))
def test_no_other_split_of_a_budget_wastes_less(
    profile: Profile, prompt: int, new: int, share: float
) -> None:
    """Of all that protect as many of the newest and keep any share of generated tokens in 256ths."""
    most, whole = int(share * 3 * (prompt + new) * (1 + 1e-9)), 3 * prompt
    enough = max(3, int(share * whole) // 2)

    def room_left(recent: int, part: float) -> int:
        return most - 3 * new + sum(profile.generation_by(part, recent, prompt).dropped(new))

    def worth(left: int) -> tuple[int, int]:
        return min(left, enough), -max(0, left - whole)

    recents = {profile.fewest_recent, *(n for n in FEWEST_RECENT if n < profile.fewest_recent)}
    parts = [share, *(part / PARTS for part in range(PARTS))]
    best = max(worth(room_left(recent, part)) for recent in recents for part in parts)
    left, recent, part = split_between(room_left, profile.fewest_recent, share, whole, 3)
    assert worth(left) == best
    assert left == room_left(recent, part)
    assert recent in recents


def test_a_short_prompt_is_held_whole_before_generated_tokens_get_more_than_their_share() -> None:
    """Of 90 tokens 10 + 100 share in one layer: at 0.5 the prompt is left 40, which it does not have."""
    left, recent, part = split_between(lambda recent, part: 90 - max(recent, int(100 * part)), 0, 0.5, 10, 1)
    assert (left, recent) == (10, 0)
    assert part == pytest.approx(0.8, abs=1 / PARTS)


def test_short_prompts_with_many_new_tokens_use_their_budget() -> None:
    """Generated tokens went from their share straight to half of it, and a third of the room was unused."""
    cases = ((12, 256, 0.9), (12, 256, 0.75), (64, 256, 0.75), (100, 2000, 0.9), (2, 80, 0.91), (8, 512, 0.8))
    for prompt, new, share in cases:
        lengths = PROFILE.within(share, prompt, new, 3).kv_lengths(prompt, new, 3)
        assert sum(lengths) > 0.95 * share * 3 * (prompt + new)


def test_generated_tokens_give_way_no_further_than_to_half_of_the_share_of_their_prompt() -> None:
    """They gave way until the prompt had its whole share: of 512 + 256 tokens no old generated one stayed."""
    for prompt, new, share in ((512, 256, 0.25), (512, 128, 0.25), (1024, 256, 0.15), (512, 512, 0.5)):
        within = PROFILE.within(share, prompt, new, 3)
        assert within.generated_share is not None
        assert within.generated_share > 0.6 * share
        assert sum(within.held(prompt, 3)) >= int(share * prompt * 3) // 2


def test_of_generated_tokens_all_layers_together_keep_their_share() -> None:
    """Each layer's part of a group was rounded: alike layers kept a sixteenth where they had to keep 0.04,
    and of a budget with a short prompt two thirds could not be used.
    """
    level = Level((1.0,) * 12, (0.04,) * 12, ("keydiff",) * 12, (0.5,) * 12)
    assert sum(Profile((level,), 0.04).generation(100, 12).stay) == round(0.04 * 12 * 16)
    for share in (0.03, 0.076, 0.3, 0.9):
        lengths = Profile((level,), 0.04).within(share, 30, 5000, 12).kv_lengths(30, 5000, 12)
        assert sum(lengths) > 0.95 * share * 12 * 5030


def test_a_budget_of_a_model_with_other_layers_is_no_matter_of_bytes() -> None:
    with pytest.raises(ConfigError, match="of 3 layers, and the model has 4"):
        PROFILE.within(0.01, 5, 81, 4)


# --- in the engine ---


def test_a_layer_with_room_for_five_tokens_holds_one_sink_and_the_newest_four(tiny: LLM) -> None:
    """Four sinks took the room of its neighbours from such a layer, and a short prompt lost by it."""
    level = Level((1.0, 1.0, 0.5), (1.0, 0.05, 0.05), ("newest",) * 3, (0.4,) * 3)
    (prefill,) = tiny.under(Profile((level,), level.share, fewest=0)).prefill(prompts_of([100]))
    assert prefill.kept_positions[1:] == [[0, *range(96, 100)]] * 2


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("tokens", [70, 90])
def test_what_is_held_and_said_is_the_slow_version_s(
    share: float, tokens: int, tiny: LLM, tiny_dir: Path
) -> None:
    """Every score, mixed or not; 70 tokens have hardly more than the voters, 90 have more."""
    said_again = tuple(replace(x, scores=("repeat", "votes+repeat", "repeat")) for x in PROFILE.levels)
    for turn in range(3):  # every layer chooses by every pair of scores once
        levels = tuple(
            replace(x, scores=x.scores[turn:] + x.scores[:turn], newest=x.newest[turn:] + x.newest[:turn])
            for x in (said_again if turn == 2 else PROFILE.levels)
        )
        profile = replace(PROFILE, levels=levels, share=share)
        (prompt,), continuation = prompts_of([tokens]), [5, 9, 200, 31]
        slow = SlowProfile(tiny_dir, profile)
        expected = slow.logits_after(prompt, continuation)
        llm = tiny.under(profile)
        (prefill,) = llm.prefill([prompt])
        assert [heads_of(kept) for kept in prefill.kept_positions] == slow.held
        torch.testing.assert_close(llm.logits(prompt, continuation), expected, rtol=2e-4, atol=2e-4)


@given(profile=PROFILES, lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), new=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_what_was_planned_is_what_is_held(tiny: LLM, profile: Profile, lengths: list[int], new: int) -> None:
    """Lengths, bytes and order; and each sequence keeps in a batch what it keeps alone."""
    llm, prompts = tiny.under(profile), prompts_of(lengths)
    plan = llm.plan(lengths, new)
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    completions = llm.generate(prompts, params)
    assert [c.kv_lengths for c in completions] == plan.kv_lengths
    assert sum(c.kv_bytes for c in completions) == plan.kv_bytes <= plan.kv_bytes_full
    for prompt, completion in zip(prompts, completions, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert (alone.token_ids, alone.kept_positions) == (completion.token_ids, completion.kept_positions)
        (prefill,) = llm.prefill([prompt])
        assert prefill.kv_lengths == profile.held(len(prompt), 3)
        for kept, before in zip(completion.kept_positions, prefill.kept_positions, strict=True):
            for head, former in zip(heads_of(kept), heads_of(before), strict=True):
                assert head == sorted(set(head))
                assert head[: len(former)] == former  # a prompt's keys never shrink in generation


@given(profile=PROFILES, lengths=st.lists(st.integers(20, 60), min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_a_budget_holds_in_a_batch_too(tiny: LLM, profile: Profile, lengths: list[int]) -> None:
    llm = tiny.under(profile, kv_budget=0.5)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    for completion in llm.generate(prompts_of(lengths), params):
        assert completion.kv_bytes <= 0.5 * completion.kv_bytes_full


def test_a_turn_that_is_looked_over_hears_the_turns_before(tiny: LLM) -> None:
    """The second turn is said again behind the first, and the row is left as if nothing had been said."""
    level = Level((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), ("repeat",) * 3, (0.2,) * 3)
    llm, conversation = tiny.under(Profile((level,), share=0.5, fewest=0)), Conversation()
    first, second = prompts_of([40, 30])
    say(llm, first, SamplingParams(max_new_tokens=5, ignore_eos=True), conversation)
    assert conversation.held
    before = conversation.held.lengths
    (prefill,) = llm.prefill(second, conversation)
    assert prefill.kv_lengths == [n + 15 for n in before]


def test_what_says_a_prompt_again_is_refused_beyond_the_model_s_positions(tiny: LLM) -> None:
    """The advice was to shorten a prompt of 200 by 144, where 72 do."""
    level = Level((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), ("repeat",) * 3, (0.2,) * 3)
    with pytest.raises(RequestError, match="looked over, which takes 400 tokens of a context of 256"):
        tiny.under(Profile((level,), share=0.5)).prefill(prompts_of([200]))


# --- settings ---


def write_settings(directory: Path, **changes: Any) -> Path:
    path = directory / "pyramid.json"
    path.write_text(json.dumps({"policy": "profile", "levels": [LEVEL]} | changes))
    return path


def test_a_checkpoint_s_own_profile_is_its_policy(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    save_file({"lines": lines_of(3)}, directory / "lines.safetensors")
    write_settings(directory, fitted="lines.safetensors", levels=[LEVEL | {"scores": "fitted"}])
    for name in ("auto", "profile"):
        policy = LLM(directory, policy=name).engine.planner.policy
        assert isinstance(policy, Profile)
        assert policy.levels[0].scores == ("fitted",) * 3
        assert policy.lines is not None
        assert torch.equal(policy.lines, lines_of(3))
    assert LLM(directory, policy="auto").prefill([prompts_of([200])[0]])[0].kv_lengths == [64, 69, 64]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": 3}, "expected levels, a list"),
        ({"levels": []}, "one or more"),
        ({"levels": [LEVEL, LEVEL]}, "ascending"),
        ({"levels": [LEVEL | {"deeper": 1}]}, "a level is"),
        ({"levels": [{"computed": [1, 1, 1]}]}, "a level is"),
        ({"levels": [LEVEL | {"computed": [1, 0.5]}]}, "2 computed"),
        ({"levels": [LEVEL | {"computed": [0.9, 0.5, 0.5]}]}, "1.0 first"),
        ({"levels": [LEVEL | {"computed": [1, 0.4, 0.5]}]}, "never a rise"),
        ({"levels": [LEVEL | {"held": [0.2, 0.6, 0.1]}]}, "layer 1 holds 0.6"),
        ({"levels": [LEVEL | {"held": [0.2, "x", 0.1]}]}, "held is 'x'"),
        ({"levels": [LEVEL | {"scores": "vote"}]}, "did you mean 'votes'"),
        ({"levels": [LEVEL | {"scores": "votes+keydiff+newest"}]}, "joins more than two"),
        ({"levels": [LEVEL | {"scores": [1, 2, 3]}]}, "no score '1'"),
        ({"share": 1.5}, "share is 1.5"),
        ({"lines": [1]}, "no setting"),
        ({"fitted": 3}, "expected levels, a list, and fitted"),
        ({"recent_ratio": 0.2}, "'recent_ratio' is no setting"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_settings(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        load_policy(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_levels_of_a_program_are_checked_as_those_of_a_file() -> None:
    """A text was an AttributeError, and a score that does not exist was found out in mid-prompt."""
    wrong: Any = ("x",)
    with pytest.raises(TypeError, match="a level is 'x'"):
        Profile(wrong)
    with pytest.raises(ConfigError, match="no score 'best'"):
        Profile((Level((1.0,), (0.5,), ("best",), (0.5,)),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held": (-0.5, 0.5)}, "held is -0.5, expected 0.0 to 1.0"),
        ({"held": (0.5,)}, r"held is \(0.5,\), and computed has 2 layers"),
        ({"held": (float("nan"), 0.5)}, "held is nan, expected 0.0 to 1.0"),
        ({"newest": (5.0, 0.5)}, "newest is 5.0, expected 0.0 to 1.0"),
        ({"scores": ("keydiff",)}, "give a tuple with something for each"),
        ({"scores": "keydiff"}, "give a tuple with something for each"),
        ({"computed": (1.0, "x")}, "computed is 'x', expected float"),
    ],
)
def test_shares_of_a_program_are_checked_as_those_of_a_file(changes: dict[str, Any], words: str) -> None:
    """Half a layer less than nothing was held, and a NaN was a ValueError in mid-prompt."""
    level = Level((1.0, 0.5), (0.5, 0.5), ("keydiff", "keydiff"), (0.5, 0.5))
    with pytest.raises(ConfigError, match=words):
        Profile((replace(level, **changes),))


def test_a_profile_is_nothing_to_split(tiny_dir: Path) -> None:
    """The answer was Python's own, about an argument that is missing."""
    with pytest.raises(ConfigError, match="no policy 'profile' for 'profile-split'"):
        LLM(tiny_dir, policy="profile-split")


def test_lines_that_are_missing_or_of_another_model_are_told(tmp_path: Path, tiny: LLM) -> None:
    path = write_settings(tmp_path, fitted="lines.safetensors", levels=[LEVEL | {"scores": "fitted"}])
    with pytest.raises(CheckpointError, match="calibrate again"):
        load_policy(path)
    save_file({"lines": torch.zeros(3, 7)}, tmp_path / "lines.safetensors")
    with pytest.raises(CheckpointError, match=r"lines are \[3, 7\] of torch.float32, expected 3 axes"):
        load_policy(path)
    save_file({"lines": torch.zeros(3, 2, 99)}, tmp_path / "lines.safetensors")
    told = r"\.json: lines are \[3, 2, 99\], and of this model \[3, 2, 20\]"
    with pytest.raises(ConfigError, match=told):
        tiny.under(path)
    with pytest.raises(ConfigError, match=r"\.json: a layer chooses by the score fitted, and no lines were"):
        tiny.under(write_settings(tmp_path, levels=[LEVEL | {"scores": "votes+fitted"}]))


def test_a_profile_of_other_layers_is_refused(tmp_path: Path, tiny: LLM) -> None:
    path = write_settings(tmp_path, levels=[{"computed": [1, 1], "held": [1, 0.5]}])
    with pytest.raises(ConfigError, match="2 layers, and the model has 3"):
        tiny.under(path).generate(prompts_of([100]))


def test_a_checkpoint_without_a_profile_says_how_to_get_one(tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"minipyramid\.calibrate"):
        LLM(tiny_dir, policy="profile")


@pytest.mark.parametrize(
    "file", ["", "..", "/lines.safetensors", "../lines.safetensors", "lines", "a/b.safetensors"]
)
def test_lines_lie_beside_their_settings(file: str, tmp_path: Path) -> None:
    """An absolute name, or one that led out of the directory, was read: such files do not move together."""
    (tmp_path / "inner").mkdir()
    save_file({"lines": lines_of(3)}, tmp_path / "lines.safetensors")
    path = write_settings(tmp_path / "inner", fitted=f"{tmp_path}{file}" if file.startswith("/") else file)
    with pytest.raises(ConfigError, match=r"a \.safetensors file beside it"):
        load_policy(path)


def test_a_name_that_no_file_can_have_is_told(tmp_path: Path) -> None:
    """A lone surrogate was a UnicodeEncodeError."""
    with pytest.raises(CheckpointError, match="calibrate again"):
        load_policy(write_settings(tmp_path, fitted="\ud800.safetensors"))


@pytest.mark.parametrize("layers", [0, 1, 5])
def test_lines_of_other_layers_are_refused(layers: int, tmp_path: Path, tiny: LLM) -> None:
    """Too few were an IndexError in the middle of a prompt; too many were taken for this model's."""
    save_file({"lines": lines_of(5)[:layers]}, tmp_path / "lines.safetensors")
    with pytest.raises(ConfigError, match=rf"lines are \[{layers}, 2, 20\], and of this model \[3, 2, 20\]"):
        tiny.under(write_settings(tmp_path, fitted="lines.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_only_floating_point_numbers_were_fitted(
    dtype: torch.dtype, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The error spoke of finite numbers on three axes, which these have; a complex tensor warned first."""
    save_file({"lines": lines_of(3).to(dtype)}, tmp_path / "lines.safetensors")
    with pytest.raises(CheckpointError, match=f"of {dtype}, expected 3 axes of floating-point numbers"):
        load_policy(write_settings(tmp_path, fitted="lines.safetensors"))
    assert not recwarn.list


def test_what_was_fitted_for_another_model_is_told_before_weights_are_read(
    tmp_path: Path, tiny_dir: Path
) -> None:
    """It was told at the first long prompt; a split has the profile of `auto`, and knew nothing."""
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    (model / "model.safetensors").unlink()
    save_file({"lines": torch.zeros(3, 2, 99)}, model / "lines.safetensors")
    write_settings(model, fitted="lines.safetensors").rename(model / "pyramid.json")
    for policy in ("auto", "keydiff-split"):
        with pytest.raises(ConfigError, match="calibrate this one"):
            LLM(model, policy=policy)
    compared = argparse.Namespace(context=[64], budgets=[0.5], policies=["full", "profile"], recall=[])
    compared.kv_dtype, compared.continuation, compared.generate = "auto", 8, 0
    with pytest.raises(ConfigError, match="calibrate this one"):
        what_to_compare(compared, model, read_config(model))


def test_lines_of_any_float_are_read_as_float32(tmp_path: Path) -> None:
    """float8 was a NotImplementedError, and finite float64 became infinite where it was used."""
    path = write_settings(tmp_path, fitted="lines.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        save_file({"lines": lines_of(3).to(dtype)}, tmp_path / "lines.safetensors")
        policy = load_policy(path)
        assert isinstance(policy, Profile)
        assert policy.lines is not None
        assert torch.equal(policy.lines, lines_of(3).to(dtype).float())
    save_file({"lines": lines_of(3).double() * 1e300}, tmp_path / "lines.safetensors")
    with pytest.raises(CheckpointError, match="numbers that are finite in float16; calibrate again"):
        load_policy(path)


@pytest.mark.parametrize("stage", ["prefill_stage", "generation_stage"])
def test_a_profile_has_no_stages(stage: str, tmp_path: Path) -> None:
    """PyramidInfer's nested objects went around the checks of `levels` and `lines`, to an AttributeError."""
    for nested in ({"levels": [1]}, {"lines": [1]}):
        with pytest.raises(ConfigError, match=f"'{stage}' is no setting of a profile"):
            load_policy(write_settings(tmp_path, **{stage: nested}))


def test_a_message_does_not_list_a_thousand_levels(tmp_path: Path) -> None:
    """It had 60,000 characters."""
    with pytest.raises(ConfigError, match="ascending") as error:
        load_policy(write_settings(tmp_path, levels=[LEVEL] * 1000))
    assert len(str(error.value)) < 200 + len(str(tmp_path))


def test_a_layer_with_room_for_few_holds_the_newest_four(tiny: LLM) -> None:
    """It held two of ten, and what a question ends with was not there for the first token of its answer."""
    level = Level((1.0, 1.0, 0.5), (1.0, 0.1, 0.03), ("keydiff",) * 3, (0.25,) * 3)
    (prefill,) = tiny.under(Profile((level,), level.share, fewest=0)).prefill(prompts_of([100]))
    for of_layer in prefill.kept_positions[1:]:
        for positions in heads_of(of_layer):
            assert positions[-min(4, len(positions)) :] == list(range(100 - min(4, len(positions)), 100))


def test_no_layer_computes_a_token_more_than_the_prompt_has() -> None:
    """Rounding gave a layer that holds all 6 of 5 tokens, and the engine refused the prompt for it."""
    for prompt in range(1, 200):
        for before in (0.0, 0.25, 0.5, 0.75):
            level = Level((1.0,) * 3, (before, 1.0, before), ("newest",) * 3, (1.0,) * 3)
            profile = Profile((level,), share=level.share, fewest=0)
            assert max(profile.computed(prompt, 3)) == prompt


@pytest.mark.parametrize("fewest", [0, 5, 64, 90])
def test_a_budget_protects_no_more_of_the_newest_than_the_settings_do(fewest: int) -> None:
    """A `fewest_recent` of 0 became 64 under a budget, and one of 90 fell to 64 where there was room."""
    within = replace(PROFILE, fewest_recent=fewest).within(0.9, 400, 100, 3)
    assert within.fewest_recent == fewest
    tight = replace(PROFILE, fewest_recent=fewest).within(0.1, 20, 200, 3)
    assert tight.fewest_recent <= fewest


def test_a_larger_budget_is_not_refused_where_a_smaller_one_is_met() -> None:
    """A prompt of one token was refused 0.98 with 30 new tokens, and 1 called the smallest; 0.5 was met."""
    met = []
    for percent in range(1, 101):
        try:
            PROFILE.within(percent / 100, 1, 30, 3)
            met.append(percent)
        except BudgetError:
            pass
    assert met == list(range(met[0], 101))
