"""The model against transformers, on random configurations of every supported kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minipyramid import LLM, SamplingParams

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "one key/value head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "explicit head_dim": {"head_dim": 32, "num_key_value_heads": 2},
    "small head_dim, tied": {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}},
    "llama3 rope, grouped": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
}


def make(directory: Path, kind: str, spread: float = 0.2) -> LlamaForCausalLM:
    """Random weights; a wide `spread` makes attention far from uniform, so that an error would show."""
    torch.manual_seed(len(kind))
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **KINDS[kind], "initializer_range": spread})).eval()
    model.save_pretrained(directory)
    return model


def respell(directory: Path) -> None:
    """Rewrite config.json from transformers 5's spelling to transformers 4's, or the other way round."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if "rope_parameters" in config:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        # transformers 4 wrote `type` first and `rope_type` later.
        config["rope_scaling"] = (
            None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
        )
        config["torch_dtype"] = config.pop("dtype")
        del config["head_dim"]
        if config["num_key_value_heads"] == config["num_attention_heads"]:
            del config["num_key_value_heads"]
    else:
        rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **rope}
        config["dtype"] = config.pop("torch_dtype")
    path.write_text(json.dumps(config))


def reference_greedy(model: LlamaForCausalLM, prompt: list[int], new: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_and_64_greedy_tokens(kind: str, tmp_path: Path) -> None:
    reference = make(tmp_path, kind)
    prompt = torch.randint(3, 211, (300,)).tolist()
    llm = LLM(tmp_path, policy="full", dtype="float32")
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(llm.prefill([prompt])[0].logits, expected, atol=2e-4, rtol=0)
    (ours,) = llm.generate([prompt], SamplingParams(max_new_tokens=64, ignore_eos=True))
    assert ours.token_ids == reference_greedy(reference, prompt, 64)


def test_every_position_and_not_only_the_last(tmp_path: Path) -> None:
    """`score` goes through the cache, many tokens at once behind a prompt."""
    reference = make(tmp_path, "llama3 rope, grouped")
    ids = torch.randint(3, 211, (300,)).tolist()
    with torch.no_grad():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    llm = LLM(tmp_path, policy="full", dtype="float32")
    for split in (1, 150, 299):
        expected = logprobs[torch.arange(split - 1, 299), ids[split:]]
        ours = torch.tensor(llm.score(ids[:split], ids[split:]))
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["multi-head", "linear rope", "llama3 rope, grouped"])
def test_both_spellings_of_the_configuration_are_the_same_model(kind: str, tmp_path: Path) -> None:
    make(tmp_path, kind)
    prompt = torch.randint(3, 211, (300,)).tolist()
    first = LLM(tmp_path, policy="full", dtype="float32")
    respell(tmp_path)
    second = LLM(tmp_path, policy="full", dtype="float32")
    assert first.config == second.config
    assert torch.equal(first.prefill([prompt])[0].logits, second.prefill([prompt])[0].logits)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits(kind: str, tmp_path: Path) -> None:
    # Less spread: at 0.2 rounding alone moves transformers' own logits 2 to 4 % away from float32's.
    reference = make(tmp_path, kind, spread=0.05).bfloat16()
    reference.save_pretrained(tmp_path)
    prompt = torch.randint(3, 211, (300,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0, -1].float()
    llm = LLM(tmp_path, policy="full", dtype="bfloat16")
    ours = llm.prefill([prompt])[0].logits
    assert (ours - expected).abs().max() <= 3e-2 * expected.abs().max()
    # The step of one token has a form of attention of its own: its scores against the prompt's form.
    (stepped,) = llm.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=True))
    together = llm.score(prompt, stepped.token_ids)
    assert stepped.logprobs == pytest.approx(together, abs=3e-2 * expected.abs().max().item())


def test_a_shard_index_loads_the_same_model(tmp_path: Path) -> None:
    reference = make(tmp_path / "whole", "grouped")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    prompt = [5, 7, 11]
    whole, shards = (
        LLM(tmp_path / name, policy="full").prefill([prompt])[0].logits for name in ("whole", "shards")
    )
    assert torch.equal(whole, shards)


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    """transformers keeps a stored head that differs, whatever `tie_word_embeddings` says; so do we."""
    reference = make(tmp_path, "multi-head")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with torch.no_grad():
        expected = reference(torch.tensor([[5, 7, 11]])).logits[0, -1]
    torch.testing.assert_close(
        LLM(tmp_path, policy="full").prefill([[5, 7, 11]])[0].logits, expected, atol=2e-4, rtol=0
    )
