"""The same weights in every kind of file give the same scores, to the bit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tensors, train_pieces, write_checkpoint
from meta_files import CONFIG, write_meta

from minipyramid import LLM, CheckpointError, ConfigError, MiniPyramidError
from minipyramid.formats import safetensors
from minipyramid.formats.meta import config_fields
from minipyramid.formats.torch_files import load_tensors

IDS = list(range(3, 60))


def scores(directory: Path) -> torch.Tensor:
    return LLM(directory, dtype="float32", policy="full").prefill([IDS])[0].logits


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return scores(write_checkpoint(tmp_path_factory.mktemp("safetensors"), **CONFIG))


def write_bin(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def write_old_bin(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard_of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        torch.save({name: t for name, t in tensors.items() if shard_of[name] == shard}, directory / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("write", [write_bin, write_old_bin, write_shards])
def test_bin_files_give_the_scores_of_safetensors(
    tmp_path: Path, expected: torch.Tensor, write: Callable[..., None]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    leftover = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write(tmp_path, {**random_tensors(CONFIG), **leftover})
    assert torch.equal(scores(tmp_path), expected)


def test_a_tensor_that_two_shards_hold_is_told(tmp_path: Path) -> None:
    """The last file in order won, whatever the index said, and the model wrote something else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = random_tensors(CONFIG)
    write_shards(tmp_path, tensors)
    last = tmp_path / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(last), "model.norm.weight": torch.zeros(32), **tensors}, last)
    with pytest.raises(CheckpointError, match=r"-00001-of-00002.bin and .*-00002-of-00002.bin both hold"):
        LLM(tmp_path)


def test_a_bin_file_of_tied_weights_holds_the_head_too(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    plain = write_checkpoint(tmp_path / "safetensors", **tied)
    (tmp_path / "config.json").write_text(json.dumps(tied))
    tensors = random_tensors(tied)
    write_bin(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert torch.equal(scores(tmp_path), scores(plain))


def test_safetensors_come_first(tmp_path: Path, expected: torch.Tensor) -> None:
    write_checkpoint(tmp_path, **CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert torch.equal(scores(tmp_path), expected)


class Runs:
    """What a pickle can do to those who read it carelessly."""

    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def test_a_bin_file_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "pytorch_model.bin"
    torch.save({**random_tensors(CONFIG), "x": Runs()}, file)
    with pytest.raises(CheckpointError, match="could run anything"):
        LLM(tmp_path)
    file.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CheckpointError):
        LLM(tmp_path)
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({7: torch.ones(2)}, "no tensors by name .see 7"),
        ({"other": 7}, "no tensors by name .see 'other'"),
        ({"other": torch.eye(3).to_sparse()}, "other is no plain tensor"),
        ({"other": torch.ones(2, device="meta")}, "other is no plain tensor"),
    ],
)
def test_what_a_bin_file_holds_beside_plain_tensors_is_named(
    tmp_path: Path, odd: dict[Any, Any], told: str
) -> None:
    """It was an AttributeError, or what torch says of such a tensor."""
    torch.save(odd, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=told):
        load_tensors(tmp_path / "weights.bin")


def test_numbers_that_torch_has_no_name_for_are_told(tmp_path: Path) -> None:
    """A well-formed file of 6-bit floats was a SafetensorError."""
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with ExitStack() as stack, pytest.raises(CheckpointError, match="x cannot be read"):
        safetensors.open_file(path, stack)["x"].read()


def test_damaged_bin_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "pytorch_model.bin"
    write_bin(tmp_path, random_tensors(CONFIG))
    whole = file.read_bytes()
    for damaged in (b"", b"x", whole[:1000], whole[: len(whole) // 2], whole[5:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            LLM(tmp_path)
    for odd in ([1, 2], {"x": 5}):
        torch.save(odd, file)
        with pytest.raises(CheckpointError, match="holds no tensors by name"):
            LLM(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("llama3", [False, True])
def test_metas_files_give_the_scores_of_safetensors(tmp_path: Path, count: int, llama3: bool) -> None:
    """Llama 2's say no size of the vocabulary and cut the embedding along the other axis than Llama 3's."""
    theta = {"rope_theta": 500000.0} if llama3 else {}
    plain = write_checkpoint(tmp_path / "safetensors", **{**CONFIG, **theta})
    write_meta(tmp_path, count, llama3, vocab_size=320 if llama3 else -1, **theta)
    assert torch.equal(scores(tmp_path), scores(plain))
    llm = LLM(tmp_path)
    assert llm.config.max_position_embeddings == (8192 if llama3 else 4096)
    assert llm.engine.eos_ids == ()
    train_pieces(tmp_path)
    assert LLM(tmp_path).engine.eos_ids == (2,)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "factor", "expected"),
    [(4096, 256, None, 11008), (4096, 1024, 1.3, 14336), (8192, 4096, 1.3, 28672)],
)
def test_the_feed_forwards_size_is_metas(
    tmp_path: Path, dim: int, multiple_of: int, factor: float | None, expected: int
) -> None:
    params = {"dim": dim, "multiple_of": multiple_of, "ffn_dim_multiplier": factor, "n_heads": 32,
              "n_layers": 2, "norm_eps": 1e-5, "vocab_size": 32000}  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert config_fields(tmp_path)["intermediate_size"] == expected


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"use_scaled_rope": True}, ConfigError, "does not say the factor"),
        ({"norm_eps": 1e-3}, ConfigError, "no Llama whose context is known"),
        ({"dim": "x"}, ConfigError, "malformed"),
        ({"n_heads": None}, ConfigError, "malformed"),
        ({"multiple_of": 0}, ConfigError, "malformed"),
        ({"multiple_of": 64}, CheckpointError, "has shape"),
        ({"n_layers": 4}, CheckpointError, "lacks the tensor"),
    ],
)
def test_what_metas_files_do_not_say_is_refused(
    tmp_path: Path, change: dict[str, Any], kind: type[MiniPyramidError], word: str
) -> None:
    write_meta(tmp_path, 1, False, vocab_size=320, **change)
    with pytest.raises(kind, match=word):
        LLM(tmp_path)


def test_a_shard_of_another_shape_is_told(tmp_path: Path) -> None:
    """It ended in an IndexError."""
    write_meta(tmp_path, 2, True, vocab_size=320, rope_theta=500000.0)
    file = tmp_path / "consolidated.01.pth"
    tensors = torch.load(file, weights_only=True)
    for other in (torch.zeros(4), torch.zeros(33, 16), torch.zeros(())):
        torch.save({**tensors, "layers.0.attention.wo.weight": other}, file)
        with pytest.raises(CheckpointError, match=r"wo\.weight has the shape .* in a shard"):
            LLM(tmp_path)
    file.rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.01\.pth, but has consolidated\.02\.pth"):
        LLM(tmp_path)


def test_the_first_llamas_largest_is_told_from_llama_2(tmp_path: Path) -> None:
    """It has Llama 2's eps, but every head its own keys and values."""
    for kv_heads, context in ((None, 2048), (8, 4096)):
        params = {"dim": 8192, "multiple_of": 4096, "n_heads": 64, "n_kv_heads": kv_heads, "n_layers": 80,
                  "norm_eps": 1e-5, "vocab_size": 32000}  # fmt: skip
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert config_fields(tmp_path)["max_position_embeddings"] == context


def test_a_missing_shard_of_metas_is_told(tmp_path: Path) -> None:
    """It was told as a wrong shape, of a config.json that was not there."""
    write_meta(tmp_path, 2, True, vocab_size=320, rope_theta=500000.0)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"1 files consolidated\.\*\.pth hold 16 of 32 rows"):
        LLM(tmp_path)


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF files are not read"):
        LLM(file)
    with pytest.raises(ConfigError, match="holds a GGUF file, which is not read"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="holds GGUF files, which are not read"):
        LLM(tmp_path)


def test_a_directory_without_weights_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"has no weights; expected model\.safetensors or shards"):
        LLM(tmp_path)
