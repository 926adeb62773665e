"""The pyramid against golden results, against a slow version of its definition, and against its own plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import CONFIGS, STEEP, prompts_of, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_pyramid import SlowPyramid
from torch.utils._python_dispatch import TorchDispatchMode

from minipyramid import LLM, CheckpointError, ConfigError, PyramidConfig, SamplingParams
from minipyramid.policy import FULL, top_scored
from minipyramid.scheduler import Scheduler

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    (name, case) for name in ("mha", "gqa") for case in json.loads((GOLDEN / name / "cases.json").read_text())
]


@pytest.fixture(scope="module")
def golden() -> dict[str, LLM]:
    return {name: LLM(GOLDEN / name, dtype="float32") for name in ("mha", "gqa")}


@pytest.mark.parametrize(("model", "case"), CASES, ids=[f"{name}-{case['name']}" for name, case in CASES])
def test_golden_results(model: str, case: dict[str, Any], golden: dict[str, LLM], tmp_path: Path) -> None:
    """What the published code kept, from its configuration file as it is."""
    (tmp_path / "published.json").write_text(json.dumps(case["config"]))
    llm = golden[model].under(PyramidConfig.load(tmp_path / "published.json"))
    (prefill,) = llm.prefill([case["prompt"]])
    assert prefill.kept_positions == case["kept_positions"]
    assert prefill.kv_lengths == case["kv_lengths"]
    torch.testing.assert_close(prefill.logits, torch.tensor(case["last_logits"]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("own", [{"prefill_full_layers": 3}, {"prefill_full_layers": 4}], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_settings_of_our_own_equal_the_slow_version(
    own: dict[str, Any], kv_heads: int, tmp_path: Path
) -> None:
    """Where dropping begins changes what is kept."""
    write_checkpoint(tmp_path, num_key_value_heads=kv_heads, num_hidden_layers=5)
    kept = []
    for pyramid in (STEEP, replace(STEEP, **own)):
        slow = SlowPyramid(tmp_path, pyramid)
        (prompt,) = prompts_of([120])
        logits = slow.forward(prompt, 0, is_prompt=True)
        (prefill,) = LLM(tmp_path, policy=pyramid).prefill([prompt])
        assert prefill.kept_positions == [cache.positions for cache in slow.layers]
        torch.testing.assert_close(prefill.logits, logits, atol=2e-4, rtol=2e-4)
        kept.append(prefill.kept_positions)
    assert kept[0] != kept[1]


@pytest.mark.parametrize(("length", "kv_heads"), [(30, 2), (9, 4), (1, 1)])
def test_generation_equals_the_slow_version_over_two_hundred_steps(
    length: int, kv_heads: int, tmp_path: Path
) -> None:
    """The tokens that survive are those with the highest votes, in every layer, through many compactions."""
    write_checkpoint(tmp_path, num_key_value_heads=kv_heads)
    (prompt,) = prompts_of([length])
    slow = SlowPyramid(tmp_path, STEEP)
    tokens, _ = slow.run(prompt, 205)
    llm = LLM(tmp_path, policy=STEEP)
    (completion,) = llm.generate([prompt], SamplingParams(max_new_tokens=205, ignore_eos=True))
    assert completion.token_ids == tokens
    assert completion.kept_positions == [cache.positions for cache in slow.layers]
    assert completion.kv_lengths == [len(cache.positions) for cache in slow.layers]


def test_sequences_of_a_batch_are_judged_each_by_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    prompts, new = prompts_of([40, 3, 20]), [210, 205, 200]
    llm = LLM(tmp_path, policy=STEEP)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in new]
    for prompt, n, completion in zip(prompts, new, llm.generate(prompts, params), strict=True):
        slow = SlowPyramid(tmp_path, STEEP)
        assert completion.token_ids == slow.run(prompt, n)[0]
        assert completion.kept_positions == [cache.positions for cache in slow.layers]


@given(pyramid=CONFIGS, lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), new=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_what_was_planned_is_what_is_held(
    tiny: LLM, pyramid: PyramidConfig, lengths: list[int], new: int
) -> None:
    """Lengths, bytes, order and tail; and each sequence keeps in a batch what it keeps alone."""
    llm, prompts = tiny.under(pyramid), prompts_of(lengths)
    plan = llm.plan(lengths, new)
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    completions = llm.generate(prompts, params)
    assert [c.kv_lengths for c in completions] == plan.kv_lengths
    assert sum(c.kv_bytes for c in completions) == plan.kv_bytes <= plan.kv_bytes_full
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.kv_lengths == pyramid.kv_lengths(len(prompt), new, 3)
        (prefill,) = llm.prefill([prompt])
        assert prefill.kv_lengths == pyramid.computed(len(prompt), 3)
        tail = min(pyramid.recent_tokens(len(prompt)), len(prompt))
        for kept, at_prefill in zip(completion.kept_positions, prefill.kept_positions, strict=True):
            assert kept == sorted(set(cast("list[int]", kept)))  # of all heads alike
            assert kept[: len(at_prefill)] == at_prefill  # prompt keys never shrink in generation
            assert at_prefill[-tail:] == list(range(len(prompt) - tail, len(prompt)))
            sinks = min(pyramid.streamingllm_sink_len, len(at_prefill) - tail)
            assert at_prefill[:sinks] == list(range(sinks))
    (alone,) = llm.generate([prompts[-1]], params)
    assert (alone.token_ids, alone.kept_positions) == (
        completions[-1].token_ids,
        completions[-1].kept_positions,
    )


@given(pyramid=CONFIGS, lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3), new=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_every_step_and_layer_is_as_planned(
    tiny: LLM, pyramid: PyramidConfig, lengths: list[int], new: int
) -> None:
    """Not only at the end: after each token every layer of every sequence holds what the plan says, tail and
    all.
    """
    llm, prompts, steps = tiny.under(pyramid), prompts_of(lengths), 0
    plan, before = llm.plan(lengths, new), [p.kept_positions for p in llm.prefill(prompts)]

    def watch(scheduler: Scheduler) -> None:
        nonlocal steps
        steps += 1
        for row, sequence in scheduler.running.items():
            index = 0 if len(prompts) == 1 else int(sequence.request.name.removeprefix("prompt "))
            assert row.lengths == plan.at(steps)[index]
            protected = pyramid.recent_tokens(row.position)
            generated = range(max(row.position - protected, len(sequence.prompt)), row.position)
            for kept, prompt in zip(row.kept_positions(), before[index], strict=True):
                assert kept == sorted(set(cast("list[int]", kept)))  # of all heads alike
                assert kept[: len(prompt)] == prompt
                assert kept[len(kept) - len(generated) :] == list(generated)

    for _ in llm.completions(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True), watch):
        pass
    assert steps == new


def test_of_equal_votes_the_earlier_token_stays() -> None:
    """Five sinks and room for three once kept tokens 0, 2 and 3: topk promises no order among equals."""
    for count in range(1, 6):
        assert top_scored(torch.zeros(5), count, 5).tolist() == list(range(count))
        assert top_scored(torch.zeros(40), count, 0).tolist() == list(range(count))


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=4), new=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_ratio_one_is_bit_for_bit_the_full_cache(tiny: LLM, lengths: list[int], new: int) -> None:
    nothing = PyramidConfig(
        prefill_decay_ratio=1.0,
        gen_decay_ratio=1.0,
        gen_compress_ratio=1.0,
        min_context_length=0,
        recent_ratio=0.1,
        exceed_length_to_compress=4,
    )
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, logprobs=True)
    for full, kept in zip(
        *(tiny.under(pyramid).generate(prompts_of(lengths), params) for pyramid in (FULL, nothing)),
        strict=True,
    ):
        assert (full.token_ids, full.logprobs, full.kv_lengths) == (
            kept.token_ids,
            kept.logprobs,
            kept.kv_lengths,
        )


def test_a_prompt_never_needs_a_matrix_of_all_its_tokens(tmp_path: Path) -> None:
    """Defect 6, the other half: neither a prompt, nor its votes, nor what is appended to it holds an n x n
    matrix.
    """
    n, largest = 3000, 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                    largest = max(largest, tensor.numel())
            return made

    llm = LLM(write_checkpoint(tmp_path, max_position_embeddings=2 * n), policy=STEEP)
    prompt, continuation = prompts_of([n, n])
    with Watch():  # type: ignore[no-untyped-call]
        llm.score(prompt, continuation)
    assert 0 < largest < n * n / 4


def test_votes_take_at_most_a_twentieth_of_the_keys_and_values(tmp_path: Path) -> None:
    """Defect 6 of the published code: on a grouped-query model its votes outweigh the cache they shrink."""
    llm = LLM(write_checkpoint(tmp_path, num_key_value_heads=1, head_dim=32), policy="auto", dtype="bfloat16")
    for prompt, new in ((100, 100), (20, 200), (150, 20)):
        plan = llm.plan([prompt], new)
        assert plan.votes_bytes <= 0.05 * plan.kv_bytes


def test_score_sees_the_pruned_prompt(tmp_path: Path) -> None:
    """A continuation attends to what each layer kept and to itself, at true positions, and drops nothing."""
    write_checkpoint(tmp_path)
    llm = LLM(tmp_path, policy=STEEP)
    (prompt,) = prompts_of([80])
    params = SamplingParams(max_new_tokens=7, ignore_eos=True, logprobs=True)  # too few to be judged
    (completion,) = llm.generate([prompt], params)
    assert llm.score(prompt, completion.token_ids) == pytest.approx(completion.logprobs, abs=1e-4)
    full = LLM(tmp_path, policy="full").score(prompt, completion.token_ids)
    assert full != pytest.approx(completion.logprobs, abs=1e-4)


def test_a_long_continuation_is_scored_and_not_judged(tmp_path: Path) -> None:
    """More tokens than generation would ever hold at once: nothing of them leaves, and the cache has room for
    all.
    """
    write_checkpoint(tmp_path)
    (prompt,) = prompts_of([60])
    slow = SlowPyramid(tmp_path, replace(STEEP, exceed_length_to_compress=1000))
    tokens, logits = slow.run(prompt, 150)
    expected = torch.stack(logits).log_softmax(-1)[torch.arange(150), tokens].tolist()
    assert LLM(tmp_path, policy=STEEP).score(prompt, tokens) == pytest.approx(expected, abs=1e-4)


def test_settings_that_hardly_ever_judge_cost_no_more(tiny: LLM) -> None:
    """Looking for a judgement that never comes must end, and waiting for it must cost by what waits."""
    never = PyramidConfig(exceed_length_to_compress=10**9)
    (completion,) = tiny.under(never).generate([[5, 6]], SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert completion.kv_lengths == [22] * 3
    pyramid = PyramidConfig(recent_ratio=0.9999, exceed_length_to_compress=10**9)
    assert pyramid.kv_lengths(100, 50, 4) == [n + 50 for n in pyramid.computed(100, 4)]


# --- Section by section: what the published code gets wrong ---


def test_defect_1_prompt_and_sinks_stay_in_generation(tiny: LLM) -> None:
    """Pruned lengths compared with the count of all tokens: after 64 steps nothing but the tail was left."""
    llm = tiny.under(STEEP)
    (prompt,) = prompts_of([100])
    (completion,) = llm.generate([prompt], SamplingParams(max_new_tokens=150, ignore_eos=True))
    (prefill,) = llm.prefill([prompt])
    for kept, at_prefill in zip(completion.kept_positions, prefill.kept_positions, strict=True):
        assert kept[: len(at_prefill)] == at_prefill
        assert kept[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("preset", ["llama2-13b", "llama2-70b"])
def test_defect_2_an_interval_above_one_generates(tiny_dir: Path, preset: str) -> None:
    """The shipped 13B and 70B settings crashed at the first generated token."""
    (prompt,) = prompts_of([150])
    (completion,) = LLM(tiny_dir, policy=preset).generate(
        [prompt], SamplingParams(max_new_tokens=80, ignore_eos=True)
    )
    assert len(completion.token_ids) == 80


def test_defect_3_strategies_differ_and_misspelt_ones_are_refused() -> None:
    """`linear`, or any misspelt strategy, ran as constant."""
    lengths = {
        s: PyramidConfig(prefill_decay_strategy=s).computed(600, 12) for s in ("linear", "constant", "cosine")
    }
    assert len({tuple(n) for n in lengths.values()}) == 3
    assert lengths["linear"][1] == 600  # ratio 1 at layer 0, falling with depth
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        PyramidConfig(prefill_decay_strategy="cosin")


def test_defect_4_a_batch_neighbour_changes_nothing(tiny: LLM) -> None:
    """Left padding became the sink, and the causal mask was cut."""
    llm, prompts = tiny.under(STEEP), prompts_of([7, 120, 40])
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, logprobs=True)
    for prompt, together in zip(prompts, llm.generate(prompts, params), strict=True):
        (alone,) = llm.generate([prompt], params)
        assert together.token_ids == alone.token_ids
        assert together.kept_positions == alone.kept_positions
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_defect_5_one_token_prompts_and_many_more_tokens(tiny: LLM) -> None:
    """A prompt of one token and a further turn of two or more crashed."""
    llm = tiny.under(STEEP)
    assert len(llm.generate([[5]], SamplingParams(max_new_tokens=60, ignore_eos=True))[0].token_ids) == 60
    assert len(llm.score([5] * 100, [6, 7, 8])) == 3


def test_defect_7_each_vote_counts_its_weight_once(tmp_path: Path) -> None:
    """Weights were multiplied into stored probabilities again at every compaction; a strong weight would show
    it.
    """
    write_checkpoint(tmp_path)
    pyramid = PyramidConfig(
        recent_ratio=0.3, exceed_length_to_compress=4, min_context_length=4, distance_weight=50.0
    )
    slow = SlowPyramid(tmp_path, pyramid)
    (prompt,) = prompts_of([10])
    tokens, _ = slow.run(prompt, 90)
    (completion,) = LLM(tmp_path, policy=pyramid).generate(
        [prompt], SamplingParams(max_new_tokens=90, ignore_eos=True)
    )
    assert completion.token_ids == tokens
    assert completion.kept_positions == [cache.positions for cache in slow.layers]


def test_the_shipped_settings_keep_what_the_paper_s_code_keeps() -> None:
    """Mean share of the prompt's keys and values over the layers, as measured on the published code."""
    for name, layers, prompt, share in (
        ("llama2-7b", 32, 512, 0.757),
        ("llama3-8b", 32, 2048, 0.765),
        ("llama2-13b", 40, 2048, 0.72),
        ("llama2-70b", 80, 2048, 0.78),
    ):
        lengths = PyramidConfig.preset(name).computed(prompt, layers)
        assert sum(lengths) / (layers * prompt) == pytest.approx(share, abs=0.006)


# --- Settings ---


def test_presets_are_the_published_files() -> None:
    for _, case in CASES:
        if case["name"].startswith("llama"):
            stages = case["config"]["prefill_stage"] | case["config"]["generation_stage"]
            name = case["name"].rsplit("-", 1)[0].replace("_", "-")
            assert PyramidConfig.preset(name) == PyramidConfig(**stages)


def test_auto_is_the_file_beside_the_checkpoint_or_the_preset_for_its_layers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    assert LLM(directory, policy="auto").engine.planner.policy == PyramidConfig.preset("llama2-7b")
    assert LLM(directory, policy="full").engine.planner.policy == FULL
    assert LLM(directory).engine.planner.policy == LLM(directory, policy="auto").engine.planner.policy
    (directory / "pyramid.json").write_text('{"recent_ratio": 0.4}')
    for pyramid in ("auto", str(directory / "pyramid.json"), directory / "pyramid.json"):
        assert LLM(directory, policy=pyramid).engine.planner.policy == PyramidConfig(recent_ratio=0.4)
    (directory / "pyramid.json").unlink()
    (directory / "pyramid.json").symlink_to(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="is missing"):
        LLM(directory)
    assert PyramidConfig.for_layers(40) == PyramidConfig.preset("llama2-13b")
    assert PyramidConfig.for_layers(126) == PyramidConfig.preset("llama2-70b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"recent_ration": 0.2}, ["'recent_ration' is no setting", "'recent_ratio'"]),
        ({"prefill_stage": {"gen_decay": 1.0}}, ["'gen_decay' is no setting"]),
        ({"recent_ratio": 0.1, "prefill_stage": {"recent_ratio": 0.3}}, ["'recent_ratio' is given twice"]),
        ({"prefill_stage": 3}, ["prefill_stage is 3"]),
        ({"gen_decay_strategy": "Linear"}, ["gen_decay_strategy", "'linear'"]),
        ({"prefill_decay_ratio": 1.5}, ["prefill_decay_ratio is 1.5", "0 to 1"]),
        ({"exceed_length_to_compress": 0}, ["exceed_length_to_compress is 0", "at least 1"]),
        ({"recent_ratio": float("nan")}, ["recent_ratio is nan"]),
        ({"recent_ratio": "0.2"}, ["recent_ratio is '0.2'"]),
        ({"min_context_length": 64.0}, ["min_context_length is 64.0"]),
        ({"gen_decay_strategy": None}, ["gen_decay_strategy is None"]),
        ({"prefil_stage": {}}, ["'prefil_stage' is no setting", "'prefill_stage'"]),
        ({"prefill_stage": {"model": "x"}}, ["'model' is no setting"]),
        (
            {"prefill_stage": {"generation_stage": {"gen_decay_ratio": 0.5}}},
            ["'generation_stage' is no setting"],
        ),
        ({"min_context_length": -(10**400)}, ["min_context_length is -1000"]),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, content: Any, words: list[str]
) -> None:
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        PyramidConfig.load(tmp_path / "p.json")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 600


def test_names_and_types_that_are_no_settings(tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama2-7b'"):
        LLM(tiny_dir, policy="llama-7b")
    with pytest.raises(CheckpointError, match="is missing"):
        LLM(tiny_dir, policy="nothing.json")
    with pytest.raises(TypeError, match="policy"):
        LLM(tiny_dir, policy=0.5)  # type: ignore[arg-type]
    for wrong in ({"recent_ratio": "0.2"}, {"min_context_length": 1.5}, {"streamingllm_sink_len": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            PyramidConfig(**wrong)


def test_settings_that_name_their_policy_are_read_and_another_policy_s_are_not(tmp_path: Path) -> None:
    """The same file was taken by `--policy` and refused by `load`."""
    path = tmp_path / "settings.json"
    path.write_text('{"policy": "pyramid", "recent_ratio": 0.3}')
    assert PyramidConfig.load(path) == PyramidConfig(recent_ratio=0.3)
    path.write_text('{"policy": "snapkv", "share": 0.3}')
    with pytest.raises(ConfigError, match="settings of another policy; expected PyramidInfer's"):
        PyramidConfig.load(path)
    wrong: Any = 3
    with pytest.raises(TypeError, match="name is 3, expected a preset's name"):
        PyramidConfig.preset(wrong)
