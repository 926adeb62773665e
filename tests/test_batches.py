"""Batches of mixed lengths against a path without any cache, and against each sequence alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle

from minipyramid import LLM, SamplingParams, attention, cache
from minipyramid.cache import KVCache
from minipyramid.formats.huggingface import config_of
from minipyramid.model import Model
from minipyramid.need import Need


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("by_rows", [True, False], ids=["a CPU's products", "those of other devices"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_greedy_text_equals_that_of_a_path_without_a_cache(
    kv_heads: int, by_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_rows:
        for module in (attention, cache):
            monkeypatch.setattr(module, "BY_ROWS", ())
    write_checkpoint(tmp_path, num_key_value_heads=kv_heads)
    llm, oracle = LLM(tmp_path, policy="full"), Oracle(tmp_path)
    prompts = prompts_of([1, 40, 7, 2, 100])
    new = [20, 5, 33, 1, 12]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in new]
    for prompt, n, completion in zip(prompts, new, llm.generate(prompts, params), strict=True):
        assert completion.token_ids == oracle.greedy(prompt, n)
        assert completion.finish_reason == "length"


def test_logits_equal_those_of_a_path_without_a_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    prompts = prompts_of([1, 30, 90])
    for prompt, prefill in zip(prompts, LLM(tmp_path, policy="full").prefill(prompts), strict=True):
        torch.testing.assert_close(prefill.logits, Oracle(tmp_path).logits(prompt)[-1], atol=2e-4, rtol=0)
        assert prefill.kv_lengths == [len(prompt)] * 3
        assert prefill.kept_positions == [list(range(len(prompt)))] * 3


SAMPLED = SamplingParams(
    max_new_tokens=24, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=7, repetition_penalty=1.2
)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=24), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_eight_equals_eight_single_runs(params: SamplingParams, tiny: LLM) -> None:
    prompts = prompts_of([1, 5, 17, 33, 64, 90, 128, 200])
    together = tiny.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        (alone,) = tiny.generate([prompt], params)
        assert (completion.token_ids, completion.text) == (alone.token_ids, alone.text)
        assert completion.kv_lengths == alone.kv_lengths == [len(prompt) + len(alone.token_ids)] * 3


def test_each_prompt_has_its_own_parameters(tiny: LLM) -> None:
    prompts = prompts_of([9, 9, 9])
    params = [
        SamplingParams(max_new_tokens=6),
        SAMPLED,
        SamplingParams(max_new_tokens=40, temperature=2.0, seed=3),
    ]
    for prompt, p, completion in zip(prompts, params, tiny.generate(prompts, params), strict=True):
        assert completion.token_ids == tiny.generate([prompt], p)[0].token_ids


def test_more_prompts_than_one_prefill_takes(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of a batch are computed in groups; the groups must not show."""
    prompts = prompts_of([30, 3, 50, 20, 20, 1])
    expected = [c.token_ids for c in tiny.generate(prompts)]
    monkeypatch.setattr("minipyramid.engine.PROMPT_TOKENS_AT_ONCE", {"cpu": 40})
    assert [c.token_ids for c in tiny.generate(prompts)] == expected


def test_a_finished_sequence_leaves_its_row(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended must not be computed any further."""
    rows, step = [], Model.step

    def noted(model: Model, ids: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        rows.append(len(ids))
        return step(model, ids, caches)

    monkeypatch.setattr(Model, "step", noted)
    tiny.generate(
        prompts_of([4, 4, 4]), [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 5, 3)]
    )
    assert rows == [3, 3, 2, 1, 1]


def test_score_is_the_log_probability_without_a_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    prompt, continuation = prompts_of([20, 9])
    for ids in (continuation, continuation[:1]):
        logprobs = Oracle(tmp_path).logits(prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs[torch.arange(len(ids)), ids]
        torch.testing.assert_close(
            torch.tensor(LLM(tmp_path, policy="full").score(prompt, ids)), expected, atol=1e-4, rtol=0
        )


def test_logprobs_of_generated_tokens_are_their_scores(tiny: LLM) -> None:
    (prompt,) = prompts_of([12])
    (completion,) = tiny.generate(
        [prompt], SamplingParams(max_new_tokens=10, temperature=1.5, seed=1, logprobs=True, ignore_eos=True)
    )
    assert completion.logprobs == pytest.approx(tiny.score(prompt, completion.token_ids), abs=1e-4)
    assert tiny.generate([prompt])[0].logprobs is None


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), steps=st.lists(st.integers(0, 5), max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_retired_rows_leave_the_others_whole(lengths: list[int], steps: list[int]) -> None:
    """Keys, values, lengths and positions of the rows that stay are what they were, under new numbers."""
    config = config_of(TINY)
    device = torch.device("cpu")
    cache = KVCache.allot(config, [Need((8, 8, 8), 2)] * len(lengths), torch.float32, device)
    for row, n in enumerate(lengths):
        assert cache.add_row().index == row
        cache.rows[row].position = n
        for layer in range(3):
            k, v = torch.full((n, 2, 8), 10.0 * row + layer), torch.full((n, 2, 8), -10.0 * row)
            cache.rows[row].write(layer, k.transpose(0, 1), v.transpose(0, 1), torch.arange(n))
    alive = list(range(len(lengths)))
    for step in steps:
        if step >= len(alive):
            continue
        cache.retire(cache.rows[step])
        alive[step] = alive[-1]
        del alive[-1]
        assert (cache.capacity, len(cache.rows)) == (len(lengths), len(alive))
        assert [row.position for row in cache.rows] == [lengths[name] for name in alive]
        for row, name in enumerate(alive):
            assert cache.rows[row].lengths == [lengths[name]] * 3
            assert cache.rows[row].kept_positions() == [list(range(lengths[name]))] * 3
            for layer in range(3):
                assert (cache.keys[layer][row, :, : lengths[name]] == 10.0 * name + layer).all()
                assert (cache.values[layer][row, :, : lengths[name]] == -10.0 * name).all()
