"""A share of memory becomes settings: never more than the share, hardly less, or the smallest that can be."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, prompts_of, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from minipyramid import LLM, BudgetError, ConfigError, PyramidConfig, SamplingParams
from minipyramid.cache import KVCache
from minipyramid.generate import main

BUDGETS = (0.9, 0.75, 0.6, 0.454, 0.3)


def share_of(config: PyramidConfig, prompt: int, new: int, layers: int) -> float:
    return sum(config.kv_lengths(prompt, new, layers)) / (layers * (prompt + new))


@pytest.mark.parametrize("layers", [12, 22, 32, 40, 80])
@pytest.mark.parametrize(("prompt", "new"), [(512, 256), (2048, 256), (64, 1024)])
def test_budgets_are_met_within_two_per_cent(prompt: int, new: int, layers: int) -> None:
    for budget in BUDGETS:
        config = PyramidConfig.for_budget(budget, prompt_tokens=prompt, new_tokens=new, layers=layers)
        assert 0.98 * budget <= share_of(config, prompt, new, layers) <= budget


@given(
    share=st.floats(0.01, 1.0), prompt=st.integers(1, 300), new=st.integers(0, 300), layers=st.integers(1, 40)
)
@settings(max_examples=80, deadline=None)
def test_a_budget_is_held_or_refused_with_one_that_can_be(
    share: float, prompt: int, new: int, layers: int
) -> None:
    lengths: dict[str, Any] = {"prompt_tokens": prompt, "new_tokens": new, "layers": layers}
    try:
        config = PyramidConfig.for_budget(share, **lengths)
    except BudgetError as error:
        assert share < error.smallest <= 1
        assert f"{error.smallest:.4f}" in str(error)
        config, share = PyramidConfig.for_budget(error.smallest, **lengths), error.smallest
    assert share_of(config, prompt, new, layers) <= share + 1e-12


def test_layers_that_are_to_be_full_stay_full_as_long_as_the_budget_allows() -> None:
    base = PyramidConfig(
        prefill_full_layers=4, prefill_decay_strategy="constant", recent_ratio=0.02, min_context_length=4
    )
    for budget in (0.75, 0.5, 0.36, 0.3, 0.15):
        config = base.within(budget, 1024, 0, 12)
        lengths = config.computed(1024, 12)
        assert 0.98 * budget <= sum(lengths) / (12 * 1024) <= budget
        assert lengths.count(1024) == config.prefill_full_layers  # and where it does not, they are fewer
        assert (config.prefill_full_layers == 4) == (budget > 4 / 12)
        assert config.prefill_full_layers >= min(4, int(12 * budget) - 1)


@pytest.mark.parametrize(
    ("prompt", "new", "layers"), [(29, 1, 12), (56, 4, 12), (40, 0, 10), (23, 2, 2), (100, 0, 8)]
)
def test_the_smallest_share_that_is_named_is_taken(prompt: int, new: int, layers: int) -> None:
    """0.175 of 720 tokens came to a little less than 126, so the share that was named was refused as well."""
    base = PyramidConfig(prefill_full_layers=4, recent_ratio=0.02)
    with pytest.raises(BudgetError) as refusal:
        base.within(1e-6, prompt, new, layers)
    config = base.within(refusal.value.smallest, prompt, new, layers)
    assert share_of(config, prompt, new, layers) == pytest.approx(refusal.value.smallest, abs=1e-4)


@pytest.mark.parametrize("layers", [40, 80])
def test_generated_tokens_are_given_up_behind_the_prompt_s_context(layers: int) -> None:
    """Layers that an interval skips were counted among those that drop: the slope was never steep enough."""
    config = PyramidConfig.for_budget(0.454, prompt_tokens=2048, new_tokens=512, layers=layers)
    published = PyramidConfig.for_layers(layers)
    assert config.layerwise_downsample_interval == published.layerwise_downsample_interval > 1
    assert (config.gen_decay_ratio, config.gen_compress_ratio) == (
        published.gen_decay_ratio,
        published.gen_compress_ratio,
    )
    assert config.recent_ratio > 0.05


def test_a_share_is_no_truth_value_even_if_it_was_solved_before() -> None:
    """The cache of solutions took True for 1.0."""
    lengths = {"prompt_tokens": 50, "new_tokens": 20, "layers": 12}
    PyramidConfig.for_budget(1.0, **lengths)
    with pytest.raises(TypeError, match="kv_budget"):
        PyramidConfig.for_budget(True, **lengths)


@pytest.mark.parametrize(("prompt", "budget"), [(60, 0.3), (60, 0.25), (80, 0.28), (128, 0.22), (300, 0.15)])
def test_short_prompts_keep_more_in_full_layers_than_behind_them(prompt: int, budget: float) -> None:
    """A layer that would keep none drops none: all layers held alike."""
    base = PyramidConfig(prefill_full_layers=4, prefill_decay_strategy="constant", recent_ratio=0.02)
    config = base.within(budget, prompt, 0, 12)
    lengths = config.computed(prompt, 12)
    full = config.prefill_full_layers
    assert lengths[full - 1] > 1.5 * lengths[full]
    assert sum(lengths) >= 0.9 * budget * prompt * 12


def test_full_layers_raise_no_smallest_share() -> None:
    smallest = []
    for full in (1, 4):
        with pytest.raises(BudgetError) as refusal:
            PyramidConfig(prefill_full_layers=full).within(1e-6, 1024, 16, 12)
        smallest.append(refusal.value.smallest)
    assert smallest[0] == smallest[1]


@given(config=CONFIGS, prompt=st.integers(2, 60), new=st.integers(0, 60), layers=st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_no_other_settings_hold_less_than_the_smallest(
    config: PyramidConfig, prompt: int, new: int, layers: int
) -> None:
    """Of all that judge as many generated tokens at a time as published, which a budget leaves as it is."""
    published = replace(config, exceed_length_to_compress=16)
    with pytest.raises(BudgetError) as refusal:
        PyramidConfig.for_budget(1e-6, prompt_tokens=prompt, new_tokens=new, layers=layers)
    assert refusal.value.smallest <= share_of(published, prompt, new, layers) + 1e-4


def test_a_whole_cache_is_a_budget_too() -> None:
    config = PyramidConfig.for_budget(1.0, prompt_tokens=100, new_tokens=50, layers=4)
    assert config.kv_lengths(100, 50, 4) == [150] * 4


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_what_is_no_share_is_refused(share: float, tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match="budget is"):
        PyramidConfig.for_budget(share, prompt_tokens=100, new_tokens=10, layers=4)
    with pytest.raises(ConfigError, match="kv_budget is"):
        LLM(tiny_dir, kv_budget=share)


def test_a_budget_of_the_wrong_type_or_without_a_pyramid_is_refused(tiny_dir: Path) -> None:
    for wrong in ("0.5", True):
        with pytest.raises(TypeError, match="kv_budget"):
            LLM(tiny_dir, kv_budget=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="policy full holds everything"):
        LLM(tiny_dir, policy="full", kv_budget=0.5)


def test_every_request_of_a_batch_keeps_to_the_budget(tiny: LLM) -> None:
    llm = tiny.under("llama2-7b", kv_budget=0.7)
    lengths = [120, 40, 90, 120]
    prompts = prompts_of(lengths)
    completions = llm.generate(prompts, SamplingParams(max_new_tokens=30, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.kv_bytes <= 0.7 * completion.kv_bytes_full
        (alone,) = llm.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))
        assert (alone.token_ids, alone.kept_positions) == (completion.token_ids, completion.kept_positions)
    plan = llm.plan(lengths, 30)
    assert plan.kv_lengths == [completion.kv_lengths for completion in completions]
    assert sum(map(sum, plan.at(0))) == sum(sum(p.kv_lengths) for p in _prefilled(llm, prompts, plan.at(0)))


def _prefilled(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> list[Any]:
    """Prefill each prompt by the settings that generation solved for."""
    done = []
    for prompt, lengths in zip(prompts, expected, strict=True):
        done += llm.under(llm.engine.planner.policy_for(len(prompt), 30)).prefill([prompt])
        assert done[-1].kv_lengths == lengths
    return done


def test_a_budget_that_cannot_be_is_one_line(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["once upon", "--model", str(tiny_dir), "--kv-budget", "0.01"]
    assert main(arguments) == 2
    assert "the smallest that can is" in capsys.readouterr().err


def test_a_plan_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    arguments = ["--plan", "--model", str(tmp_path), "--prompt-tokens", "100", "--max-new-tokens", "20"]
    assert main([*arguments, "--kv-budget", "0.6", "--kv-memory", "1MiB"]) == 0
    shown = capsys.readouterr().out.splitlines()
    lengths = PyramidConfig.for_budget(0.6, prompt_tokens=100, new_tokens=20, layers=3).kv_lengths(100, 20, 3)
    assert [int(line.split()[2]) for line in shown[1:4]] == lengths
    assert "fit into 1MiB" in shown[-1]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_full"] == 120 * 3 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan"], "--prompt-tokens"),
        (["--plan", "--model", "shape:llama2-7"], "'llama2-7b'"),
        (["--plan", "text", "--model", "shape:llama2-7b"], "no tokenizer"),
        (["--plan", "--prompt-tokens", "0"], "at least 1"),
        (["--plan", "--prompt-tokens", "9", "--kv-memory", "2 gigs", "--model", "shape:llama2-7b"], "2 gigs"),
        (["text", "--prompt-tokens", "9"], "--plan"),
        (["--plan", ""], "empty"),
        (["--plan", "\udcff"], "Unicode"),
        (["text", "--kv-memory", "9" * 400], "2GiB"),
    ],
)
def test_a_plan_of_nonsense_is_refused(
    arguments: list[str], words: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny_dir)]
    assert main([*arguments, *model]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_plan_counts_what_is_allotted(tiny: LLM) -> None:
    """Keys, values, votes and slack are the tensors of the cache, to the byte."""
    llm = tiny.under(PyramidConfig(recent_ratio=0.1, min_context_length=4, exceed_length_to_compress=8))
    plan = llm.plan([70], 50)
    (need,) = plan.needs
    cache = KVCache.allot(llm.config, [need], llm.dtype, llm.device)
    slabs = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    votes = sum(t.numel() * t.element_size() for t in cache.votes)
    assert slabs == plan.kv_bytes + plan.slack_bytes
    assert votes == plan.votes_bytes
    assert need.bytes(plan.bytes_per_token) == slabs + votes
    assert plan.max_batch(10 * (slabs + votes)) == 10
    assert plan.max_batch(slabs) == 0
    with pytest.raises(TypeError):
        plan.max_batch(2e9)  # type: ignore[arg-type]
    assert torch.tensor(plan.at(50)).sum() * plan.bytes_per_token == plan.kv_bytes


def test_the_error_travels_between_processes() -> None:
    with pytest.raises(BudgetError) as refusal:
        PyramidConfig.for_budget(0.01, prompt_tokens=10, new_tokens=10, layers=4)
    copied = pickle.loads(pickle.dumps(refusal.value))
    assert (str(copied), copied.smallest) == (str(refusal.value), refusal.value.smallest)
