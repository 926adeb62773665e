"""What is wrong is named in one sentence, by an error of ours, and never run approximately."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import TINY, random_tensors, write_checkpoint
from safetensors.torch import save_file

from minipyramid import (
    LLM,
    CheckpointError,
    ConfigError,
    Conversation,
    MiniPyramidError,
    RequestError,
    SamplingParams,
)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = random_tensors(TINY)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path) -> Path:
    """Split model.safetensors into two shards with their index."""
    tensors = random_tensors(TINY)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, directory / file)
    weight_map = {n: file for file, members in parts.items() for n in members}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory / "model-00002-of-00002.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


Q = "model.layers.1.self_attn.q_proj.weight"
# What is done to a whole checkpoint, and the words that its error must hold.
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config.json": (lambda d: (d / "config.json").unlink(), ["config.json", "is missing"]),
    "config.json is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        ["config.json", "cannot be read"],
    ),
    "config.json is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "list"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "weights truncated": (lambda d: truncate(d / "model.safetensors"), ["model.safetensors", "truncated"]),
    "weights empty": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        ["model.safetensors", "truncated"],
    ),
    "shard missing": (lambda d: shard(d).unlink(), ["model-00002-of-00002.safetensors", "is missing"]),
    "shard truncated": (lambda d: truncate(shard(d)), ["model-00002-of-00002.safetensors", "truncated"]),
    "index without a map": (
        lambda d: (shard(d), (d / "model.safetensors.index.json").write_text("{}")),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "tensor missing": (lambda d: rewrite(d, lambda t: t.pop(Q)), [Q, "lacks", "[32, 32]"]),
    "tensor misshapen": (
        lambda d: rewrite(d, lambda t: t.update({Q: torch.zeros(16, 32)})),
        [Q, "[16, 32]", "[32, 32]"],
    ),
    "tensor left over": (
        lambda d: rewrite(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        ["model.layers.0.self_attn.q_proj.bias"],
    ),
    "tensor quantised": (
        lambda d: rewrite(d, lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)})),
        [Q, "int8"],
    ),
    "tensor not a number": (
        lambda d: rewrite(d, lambda t: t.update({Q: torch.full((32, 32), float("nan"))})),
        [Q, "not finite"],
    ),
    "shard outside": (
        lambda d: (
            shard(d),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        ),
        ["../b", "is missing"],
    ),
    "optional file is a dangling link": (
        lambda d: (d / "generation_config.json").symlink_to(d / "gone"),
        ["generation_config.json"],
    ),
    "head missing": (lambda d: rewrite(d, lambda t: t.pop("lm_head.weight")), ["lm_head.weight", "lacks"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    spoil, words = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as error:
        LLM(tmp_path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_leftover_rotary_tables_are_ignored(tmp_path: Path) -> None:
    """Old checkpoints store `rotary_emb.inv_freq`, which is computed here."""
    write_checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert LLM(tmp_path).prefill([[5]])


@pytest.mark.parametrize(
    "name", ["./no/such/directory", "/no/such/directory", "no/such/directory", "../nothing"]
)
def test_a_missing_directory_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} does not exist"):
        LLM(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        LLM(tmp_path / "model.safetensors")


# Fields that make a configuration one that is not implemented, and the words of the refusal.
UNSUPPORTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "model_type": ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
    "no model_type": ({"model_type": None}, ["model_type"]),
    "attention bias": ({"attention_bias": True}, ["attention_bias"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "short sliding window": ({"sliding_window": 128}, ["sliding_window 128", "256"]),
    "sliding window is a text": ({"sliding_window": "128"}, ["sliding_window", "'128'"]),
    "original context is a text": (
        {"original_max_position_embeddings": "64"},
        ["original_max_position", "'64'"],
    ),
    "dtype is a list": ({"torch_dtype": ["float32"]}, ["dtype", "float32"]),
    "rope type is a list": ({"rope_scaling": {"type": ["linear"]}}, ["rope_type"]),
    "size is true": ({"hidden_size": True}, ["hidden_size", "True"]),
    "epsilon is infinite": ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
    "mistral's default window": (
        {"model_type": "mistral", "max_position_embeddings": 8192},
        ["sliding_window 4096"],
    ),
    "unknown rope, new spelling": (
        {"rope_parameters": {"rope_type": "yarn"}},
        ["rope_type", "yarn", "llama3"],
    ),
    "unknown rope, old spelling": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["rope_type", "dynamic"],
    ),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, ["factor", "linear"]),
    "rope factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor"]),
    "rope is a text": ({"rope_scaling": "linear"}, ["rope", "linear"]),
    "partial rotary": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary"],
    ),
    "heads do not divide": (
        {"num_key_value_heads": 3},
        ["num_key_value_heads is 3", "num_attention_heads 4"],
    ),
    "odd head": ({"head_dim": 7}, ["head_dim", "7"]),
    "size absent": ({"hidden_size": None}, ["hidden_size"]),
    "size is a text": ({"vocab_size": "320"}, ["vocab_size", "'320'"]),
    "size is negative": ({"intermediate_size": -1}, ["intermediate_size", "-1"]),
    "epsilon": ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
    "theta": ({"rope_theta": -1}, ["rope_theta"]),
    "dtype": ({"torch_dtype": "float8"}, ["dtype", "float8", "bfloat16"]),
    "eos beyond": ({"eos_token_id": [2, 320]}, ["eos_token_id", "320"]),
    "size is huge": ({"hidden_size": 10**400}, ["hidden_size"]),
    "layers without end": ({"num_hidden_layers": 2**31}, ["num_hidden_layers", "4096"]),
    "theta rounds to nothing": ({"rope_theta": 1e-320}, ["rope_theta"]),
    "tie is 0": ({"tie_word_embeddings": 0}, ["tie_word_embeddings"]),
    "dtype is 0": ({"torch_dtype": 0}, ["dtype"]),
    "rope is 0": ({"rope_scaling": 0}, ["rope"]),
    "eos": ({"eos_token_id": "two"}, ["eos_token_id", "'two'"]),
    "tie": ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_configuration_that_is_not_implemented_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, words = UNSUPPORTED[case]
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
    with pytest.raises(ConfigError) as error:
        LLM(tmp_path)
    for word in ("config.json", *words):
        assert word in str(error.value)


def test_mistral_within_its_window_is_a_llama(tmp_path: Path) -> None:
    """`sliding_window: null` means none; an absent one means 4096, which the context here does not reach."""
    (prompt,) = [[5, 6, 7]]
    plain = LLM(write_checkpoint(tmp_path)).prefill([prompt])[0].logits
    for changes in ({"model_type": "mistral"}, {"model_type": "mistral", "sliding_window": None}):
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
        assert torch.equal(LLM(tmp_path).prefill([prompt])[0].logits, plain)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", ["empty"]),
        ([[]], ["empty"]),
        (["fox", ""], ["prompt 1", "empty"]),
        ([[5] * 257], ["257 tokens", "context of 256", "shorten it by 65"]),
        ([[5] * 250], ["250 tokens", "64 new", "context of 256", "at most 6"]),
        ([[5] * 256], ["256 tokens", "context of 256"]),
        ([[5, 320]], ["token id 320", "0 to 319"]),
        ([[-1]], ["token id -1"]),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(tiny: LLM, prompts: Any, words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        tiny.generate(prompts)
    for word in words:
        assert word in str(error.value)


def test_requests_are_refused_wherever_they_come_in(tiny: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        tiny.score("fox", "")
    with pytest.raises(RequestError, match="empty"):
        tiny.prefill(cast("list[list[int]]", [[]]))
    with pytest.raises(RequestError, match="empty"):
        next(tiny.stream(""))
    with pytest.raises(RequestError, match="context of 256"):
        tiny.score([5] * 200, [5] * 57)
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        tiny.generate(["fox"], [SamplingParams(), SamplingParams()])
    assert len(tiny.score([5] * 200, [5] * 56)) == 56
    assert tiny.prefill([[5] * 256])[0].kv_lengths == [256] * 3


@pytest.mark.parametrize(
    "prompts", [None, 3, 3.5, [None], [[1.5]], [["fox"]], ("fox",), {"fox": 1}, [[True]], b"fox"]
)
def test_a_prompt_of_a_wrong_type_raises_type_error(tiny: LLM, prompts: Any) -> None:
    with pytest.raises(TypeError):
        tiny.generate(prompts)


def test_other_wrong_types_raise_type_error(tiny: LLM, tiny_dir: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: LLM(3),  # type: ignore[arg-type]
        lambda: LLM(None),  # type: ignore[arg-type]
        lambda: LLM(tiny_dir, dtype=32),  # type: ignore[arg-type]
        lambda: LLM(tiny_dir, device=3.5),  # type: ignore[arg-type]
        lambda: LLM(tiny_dir, revision=3),  # type: ignore[arg-type]
        lambda: tiny.generate("fox", {"temperature": 1}),  # type: ignore[arg-type]
        lambda: tiny.score("fox", None),  # type: ignore[arg-type]
        lambda: list(tiny.stream(["fox"])),  # type: ignore[list-item]
        lambda: tiny.stream(5),  # type: ignore[arg-type]
        lambda: tiny.score(5, [6]),  # type: ignore[arg-type]
        lambda: tiny.generate("fox", {}),  # type: ignore[arg-type]
        lambda: tiny.generate("fox", 0),  # type: ignore[arg-type]
        lambda: tiny.logits("fox", None),  # type: ignore[arg-type]
        lambda: tiny.logits("fox", "fox"),  # type: ignore[arg-type]
        lambda: tiny.logits("fox", [5.5]),  # type: ignore[list-item]
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"is .*expected"):
            call()


@pytest.mark.parametrize("wrong", ["x", 5, [], Conversation, {"held": None}])
def test_what_is_no_conversation_is_a_type_error(tiny: LLM, wrong: Any) -> None:
    """`score` and `logits` looked for its attributes before anything had checked it."""
    for call in (
        lambda: tiny.score("fox", "fox", wrong),
        lambda: tiny.logits("fox", [5], wrong),
        lambda: tiny.prefill("fox", wrong),
        lambda: tiny.stream("fox", None, wrong),
    ):
        with pytest.raises(TypeError, match=r"conversation is .*expected a Conversation"):
            call()


def test_what_a_conversation_holds_is_checked(tiny: LLM) -> None:
    ids: list[Any] = [None, "fox", [5.5], [True], 5]
    for wrong in ids:
        with pytest.raises(TypeError, match="the conversation's token_ids"):
            tiny.stream("fox", None, Conversation(None, wrong))
    with pytest.raises(RequestError, match="token id 320"):
        tiny.score("fox", "fox", Conversation(None, [5, 320]))
    for held in ("fox", [5], 0):
        with pytest.raises(TypeError, match="the conversation's held"):
            tiny.logits("fox", [5], Conversation(held))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting",
    [{"dtype": "float8"}, {"device": "tpu9"}, {"device": ""}, {"device": "cuda:99"}, {"device": "meta"}],
)
def test_settings_of_the_engine_are_refused_by_name(tiny_dir: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LLM(tiny_dir, **setting)


@pytest.mark.parametrize(
    ("lengths", "new", "error"),
    [([], 3, RequestError), ([0], 3, RequestError), ([-5], 3, RequestError), ([5], 0, RequestError),
     ([250], 64, RequestError), (["5"], 3, TypeError), ([5], 1.5, TypeError)],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(
    tiny: LLM, lengths: Any, new: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny.plan(lengths, new)


def test_a_sizes_disagreement_is_told_before_memory_is_taken(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "intermediate_size": 2**40}))
    with pytest.raises(CheckpointError, match=str(2**40)):
        LLM(tmp_path)


def test_a_callers_list_is_copied(tiny: LLM) -> None:
    """A list that is changed after the call must not change what was checked."""
    prompt = [5, 6, 7]
    expected = tiny.generate([prompt])[0]
    stream = tiny.stream(prompt)
    prompt.append(99999)
    assert "".join(stream) == expected.text
    assert expected.prompt_token_ids == [5, 6, 7]


def test_a_local_directory_has_no_revisions(tiny_dir: Path) -> None:
    """A setting that cannot be heeded is not swallowed."""
    with pytest.raises(CheckpointError, match="revision 'main'"):
        LLM(tiny_dir, revision="main")


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/model", "a\0b"])
def test_a_name_that_is_no_path_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="repository id"):
        LLM(name)


def test_nothing_to_do_is_no_error(tiny: LLM) -> None:
    assert tiny.generate([]) == []
    assert tiny.prefill([]) == []


def test_all_errors_derive_from_one() -> None:
    assert all(issubclass(e, MiniPyramidError) for e in (CheckpointError, ConfigError, RequestError))


def test_a_tensor_or_an_array_is_no_prompt(tiny: LLM) -> None:
    for ids in (torch.tensor([5, 6, 7]), np.array([5, 6])):
        for call in (lambda ids=ids: tiny.stream(ids), lambda ids=ids: tiny.generate([ids])):
            with pytest.raises(TypeError, match="token ids"):
                call()
