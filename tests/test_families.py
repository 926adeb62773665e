"""Random checkpoints in the configuration of each family, but smaller, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minipyramid import LLM, ConfigError, SamplingParams

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
# What tells a family from the others, as in its repository's config.json; heads are in its proportion.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2 7B": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "CodeLlama 7B": {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "Vicuna 7B 16k": {"max_position_embeddings": 4096,
                      "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "TinyLlama 1.1B": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "num_attention_heads": 8,
                       "num_key_value_heads": 1},
    "Llama 3 8B": {"max_position_embeddings": 8192, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Llama 3.1 8B": {"max_position_embeddings": 131072, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                     "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0}},
    "Llama 3.2 1B": {"max_position_embeddings": 131072, "num_key_value_heads": 1, "head_dim": 64,
                     "tie_word_embeddings": True, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}},
    "SmolLM2 135M": {"max_position_embeddings": 8192, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "Mistral 7B v0.3": {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None,
                        "num_key_value_heads": 1,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "Qwen2 7B": {"model_type": "qwen2", "max_position_embeddings": 32768, "num_key_value_heads": 2,
                 "use_sliding_window": False, "sliding_window": 4096, "rms_norm_eps": 1e-6,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "Qwen3 0.6B": {"model_type": "qwen3", "max_position_embeddings": 40960, "num_key_value_heads": 2,
                   "head_dim": 32, "tie_word_embeddings": True, "use_sliding_window": False,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
}  # fmt: skip
COMMON: dict[str, Any] = {"model_type": "llama", "vocab_size": 211, "hidden_size": 64,
                          "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
                          "num_key_value_heads": 4,
                          "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip


def make(directory: Path, family: str) -> Any:
    torch.manual_seed(len(family))
    fields = {**COMMON, **FAMILIES[family]}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms that do nothing would hide a mistake
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * (0.5 if "bias" in name else 0.1))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = make(tmp_path, family)
    prompt = torch.randint(3, 211, (200,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    llm = LLM(tmp_path, policy="full", dtype="float32")
    torch.testing.assert_close(llm.prefill([prompt])[0].logits, expected, atol=5e-4, rtol=1e-4)
    (ours,) = llm.generate([prompt], SamplingParams(max_new_tokens=32, ignore_eos=True))
    assert ours.token_ids == out[0, 200:].tolist()


def test_a_stretched_context_is_as_long_as_it_was_stretched(tmp_path: Path) -> None:
    """Vicuna's configuration for 16,384 tokens names 4,096, and a factor of 4; more was refused."""
    reference = make(tmp_path, "Vicuna 7B 16k")
    llm = LLM(tmp_path, policy="full", dtype="float32")
    assert llm.config.max_position_embeddings == 16384
    prompt = torch.randint(3, 211, (4200,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(llm.prefill([prompt])[0].logits, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "mixtral", "qwen2_moe", "phi3"])
def test_other_families_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model_type is '{model_type}', which is not implemented"):
        LLM(tmp_path)


def test_a_sliding_window_is_refused_with_the_way_out(tmp_path: Path) -> None:
    fields = {**COMMON, "sliding_window": 4096, "max_position_embeddings": 32768}
    fields.pop("model_type")
    AutoConfig.for_model("mistral", **fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sliding_window 4096 is not implemented below"):
        LLM(tmp_path)
