"""Keys and values in 8 bits: how much they are rounded, what they take, and that all else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STEEP, WEIGHTS, prompts_of

from minipyramid import LLM, ConfigError, Conversation, SamplingParams, eight_bits
from minipyramid.attention import attend_each
from minipyramid.cache import KVCache
from minipyramid.eight_bits import LARGEST, EightBits, rounded, with_kv_dtype
from minipyramid.generate import main
from minipyramid.need import Need

POLICIES: list[Any] = ["full", "streaming", "h2o", "snapkv", "pyramidkv", "keydiff", "random", STEEP]


@pytest.fixture(scope="module")
def eight(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, policy="full", kv_dtype="int8")


# --- numbers ---


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 300.0])
def test_no_component_is_off_by_more_than_half_a_scale(size: float) -> None:
    x = size * torch.randn(5, 3, 40, 16, generator=torch.Generator().manual_seed(0))
    x[2, 1] = 0  # nothing to divide by
    held = rounded(x)
    off = (held.to(torch.float32) - x).abs()
    scales = x.abs().amax(-1, keepdim=True) / LARGEST
    # The scale itself is rounded to float16: to a part in 2,048, or to whole multiples of 2 ** -24.
    assert (off <= 0.5 * scales + LARGEST * (scales / 2048 + 2**-25)).all()
    assert (held.to(torch.float32)[2, 1] == 0).all()


def test_what_is_copied_is_not_rounded_again() -> None:
    """A row that moves, and a token that survives a compaction, would lose a little each time."""
    ((held,), _) = EightBits.slabs([(4, 2, 10, 8)], torch.device("cpu"))
    held[1] = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    held[3] = held[1]
    held[3, :, 2:5] = held[1, :, torch.tensor([4, 7, 9])]
    assert torch.equal(held.numbers[3, :, 2:5], held.numbers[1][:, [4, 7, 9]])
    assert torch.equal(held.scales[3, :, 2:5], held.scales[1][:, [4, 7, 9]])
    assert torch.equal(held.numbers[3, :, 5:], held.numbers[1, :, 5:])


@pytest.mark.parametrize("at_once", [1, 2 * 21 * 8, 5 * 21 * 8, 10**6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("B", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_over_what_the_numbers_stand_for(
    dtype: torch.dtype, B: int, heads: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many heads are turned into the model's dtype at a time, the last of them fewer."""
    H, K = heads
    monkeypatch.setattr(eight_bits, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(B)
    q = torch.randn(B, H, 8, generator=generator).to(dtype)
    (keys,), (values,) = EightBits.slabs([(B, K, 21, 8)], torch.device("cpu"))
    for slab in (keys, values):
        slab[:] = torch.randn(B, K, 21, 8, generator=generator)
    ends = torch.randint(1, 21, (B,), generator=generator)
    exact = 1e-5 if dtype == torch.float32 else 0.03
    for is_held in (None, torch.arange(21) <= ends[:, None]):
        out, probs = attend_each(q, keys, values, 21, is_held)
        plain = [slab.to(torch.float32) for slab in (keys, values)]
        expected = attend_each(q.float(), plain[0], plain[1], 21, is_held)
        torch.testing.assert_close(out.float(), expected[0], atol=exact, rtol=exact)
        torch.testing.assert_close(probs, expected[1], atol=exact, rtol=exact)
        # Without a place, as on other devices, all are turned at once.
        out, _ = attend_each(q, keys.clone(), values.clone(), 21, is_held)
        torch.testing.assert_close(out.float(), expected[0], atol=exact, rtol=exact)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 100.0])
def test_small_values_do_not_vanish_in_float16(size: float) -> None:
    """A weight of 1/1,000 times a scale of 8e-5 is as good as 0 there, and attention was 4 to 20 % off."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 16, generator=generator)
    (keys,), (values,) = EightBits.slabs([(2, 2, 800, 16)], torch.device("cpu"))
    keys[:] = torch.randn(2, 2, 800, 16, generator=generator)
    values[:] = size * torch.randn(2, 2, 800, 16, generator=generator)
    out, _ = attend_each(q.half(), keys, values, 800, None)
    expected, _ = attend_each(q, keys.to(torch.float32), values.to(torch.float32), 800, None)
    assert (out.float() - expected).norm() < 0.003 * expected.norm()


def test_what_leaves_a_cache_keeps_nothing_of_its_place() -> None:
    """A conversation between two turns held the room in which a step turns numbers, too."""
    ((held,), _) = EightBits.slabs([(4, 2, 10, 8)], torch.device("cpu"))
    assert len(held.buffer) == 4 * 2 * 10 * 8
    assert held[1].buffer is held.buffer
    assert len(held[1].clone().buffer) == 0


# --- in the engine ---


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_batch_gives_the_single_runs_texts_and_holds_what_was_planned(eight: LLM, policy: Any) -> None:
    llm = eight.under(policy, kv_budget=None if policy in ("full", STEEP) else 0.6)
    prompts = prompts_of([90, 31, 57, 90])
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    together = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.token_ids == llm.generate(prompt, params)[0].token_ids
        plan = llm.plan([len(prompt)], 40)
        assert completion.kv_lengths == plan.kv_lengths[0]
        assert completion.kv_bytes == plan.kv_bytes


def test_its_bytes_are_counted_with_their_scales(eight: LLM) -> None:
    """With head size 64 they are 51.6 % of bf16's; a plan that left the scales out would promise too much."""
    config = LLM(WEIGHTS, policy="full", kv_dtype="int8").config
    of_bf16 = with_kv_dtype(config, "auto").kv_bytes_per_token(2)
    assert config.kv_bytes_per_token(4) == config.kv_bytes_per_token(2) < 0.53 * of_bf16
    cache = KVCache.allot(eight.config, [Need((7, 5, 3))] * 2, torch.float32, torch.device("cpu"))
    slabs = [part for slab in cache.keys + cache.values for part in (slab.numbers, slab.scales)]
    assert sum(part.nbytes for part in slabs) == 2 * cache.need.bytes(eight.config.kv_bytes_per_token(4))


def test_a_conversation_carries_them_on(eight: LLM) -> None:
    """What earlier turns have left stays in 8 bits: it was rounded once more at every turn."""
    first, second = prompts_of([40, 12])
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    conversation = Conversation()
    for _ in eight.stream(first, params, conversation):
        pass
    assert conversation.held is not None
    before = [(k.clone(), v.clone()) for k, v, _ in conversation.held.layers]
    for _ in eight.stream(second, params, conversation):
        pass
    for (k, v, _), (old_k, old_v) in zip(conversation.held.layers, before, strict=True):
        for new, old in ((k, old_k), (v, old_v)):
            assert torch.equal(new.numbers[:, : old.shape[1]], old.numbers)
            assert torch.equal(new.scales[:, : old.shape[1]], old.scales)
    assert conversation.held.bytes == eight.config.kv_bytes_per_token(4) * sum(conversation.held.lengths)


def test_the_embedded_checkpoint_hardly_notices() -> None:
    """The text's next tokens are scored through the rounded cache of a prompt."""
    plain, rounding = (LLM(WEIGHTS, policy="full", dtype="float32", kv_dtype=d) for d in ("auto", "int8"))
    tokens = plain.engine.encode((WEIGHTS.parent / "books-sample.txt").read_text()[:2000], "the book")
    scores = [torch.tensor(llm.score(tokens[:300], tokens[300:400])) for llm in (plain, rounding)]
    assert not torch.equal(*scores)
    assert (scores[0].mean() - scores[1].mean()).abs() < 0.005


@pytest.mark.parametrize(("value", "error"), [("int4", ConfigError), ("", ConfigError), (8, TypeError)])
def test_other_formats_are_refused(tiny_dir: Path, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="kv_dtype is "):
        LLM(tiny_dir, kv_dtype=value)


def test_the_command_plans_them(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = f"--model {tiny_dir} --policy full --plan --prompt-tokens 50 --max-new-tokens 10 --json".split()
    plans = []
    for kv_dtype in ("auto", "int8"):
        assert main([*asked, "--kv-dtype", kv_dtype]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[1]["kv_lengths"] == plans[0]["kv_lengths"]
    assert plans[1]["kv_bytes"] * 4 * 8 == plans[0]["kv_bytes"] * (8 + 2)  # head size 8, in float32
    assert main([*asked, "--kv-dtype", "int4"]) == 2
    assert "kv_dtype is 'int4', expected auto or int8" in capsys.readouterr().err
