"""From a directory or a hub repository to a model: every parameter arrives, with its shape, or is named.

The model is built on the `meta` device, where it takes no memory, and tensors are read from memory-mapped
safetensors, joined where the model fuses projections, and assigned. Nothing is initialised to be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipyramid.config import ModelConfig, read_json
from minipyramid.errors import CheckpointError
from minipyramid.model import Model
from minipyramid.rope import inverse_frequencies

# `model*`, since a repository may hold the same weights again under other names and in other layouts.
WANTED = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
          "tokenizer.model", "tokenizer_config.json", "added_tokens.json"]  # fmt: skip

Progress = Callable[[int, int], None]  # parameters assigned, of how many


class _Bar(tqdm):
    """The hub's progress bars, on a terminal only: elsewhere stderr is for what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or None})  # type: ignore[no-untyped-call]


def locate(model: str | Path, revision: str | None = None) -> Path:
    """The checkpoint's directory; a name that is no local path is fetched from the hub into its own cache.

    Raises:
        CheckpointError: nothing is there, access is refused, or the hub cannot be reached.
    """
    if not isinstance(model, (str, Path)) or not isinstance(revision, (str, type(None))):
        raise TypeError(f"model is {model!r} at revision {revision!r}, expected a path or a repository id, and a name")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if path.exists():
        raise CheckpointError(f"{name} is a file; expected a checkpoint's directory or a hub repository id")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist; expected a checkpoint's directory or a hub repository id")
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, tqdm_class=_Bar))
    except hub_errors.GatedRepoError as error:  # before RepositoryNotFoundError, of which it is one
        raise CheckpointError(
            f"{name} is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory nor a repository that the hub shows; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision!r} on the hub; expected a branch, tag or commit"
        ) from error
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a directory nor a repository id of the form owner/name") from error
    # What a download may still raise differs by the hub library's version (requests or httpx, the disk, a proxy).
    except Exception as error:
        # The hub library says "not in the cache" also where the hub did answer, but with an error.
        why = error.__cause__ if isinstance(error.__cause__, hub_errors.HfHubHTTPError) else error
        if isinstance(why, hub_errors.LocalEntryNotFoundError):
            raise CheckpointError(
                f"{name}{at} is neither a directory nor complete in the hub's cache, "
                "and the hub cannot be reached or is set offline"
            ) from error
        reason = " ".join(str(why).split()) or type(why).__name__  # the file's name is not in its first line
        raise CheckpointError(
            f"{name}{at} could not be fetched from the hub; try again, or give a directory ({reason})"
        ) from error


def load(directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device,
         progress: Progress | None = None) -> Model:  # fmt: skip
    """Build the model and assign every parameter, cast to `dtype`, on `device`.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or misshapen.
    """
    with torch.device("meta"):
        model = Model(config)
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        sources = _sources(config)
        # transformers ties where the head is absent or equal, and keeps a head that differs.
        if config.tie_word_embeddings and "lm_head.weight" not in tensors:
            sources["lm_head"] = sources["embed_tokens"]
        expected = {name for names in sources.values() for name, _ in names}
        left_over = sorted(n for n in tensors.keys() - expected if not n.endswith("rotary_emb.inv_freq"))
        if left_over:
            raise CheckpointError(
                f"{directory} holds {left_over[0]}, which a {config.num_hidden_layers}-layer Llama does not have"
            )
        state: dict[str, Tensor] = {}
        for name, parts in sources.items():
            joined = torch.cat([_read(tensors, directory, part, shape).to(dtype) for part, shape in parts])
            state[name] = joined.to(device)
            if progress:
                progress(len(state), len(sources))
    if config.tie_word_embeddings and torch.equal(state["lm_head"], state["embed_tokens"]):
        state["lm_head"] = state["embed_tokens"]
    model.load_state_dict(state, strict=True, assign=True)
    model.inv_freq = inverse_frequencies(config).to(device)  # not stored in checkpoints
    return model.requires_grad_(False).eval()


Shape = tuple[int, ...]


def _sources(config: ModelConfig) -> dict[str, list[tuple[str, Shape]]]:
    """For each parameter of ours the tensors that it joins, with the shapes they must have."""
    hidden, ffn, vocab, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    in_layer: dict[str, list[tuple[str, Shape]]] = {
        "input_layernorm": [("input_layernorm", (hidden,))],
        "qkv_proj": [(f"self_attn.{n}_proj", (size, hidden)) for n, size in (("q", q), ("k", kv), ("v", kv))],
        "o_proj": [("self_attn.o_proj", (hidden, q))],
        "post_attention_layernorm": [("post_attention_layernorm", (hidden,))],
        "gate_up_proj": [(f"mlp.{n}_proj", (ffn, hidden)) for n in ("gate", "up")],
        "down_proj": [("mlp.down_proj", (hidden, ffn))],
    }
    sources: dict[str, list[tuple[str, Shape]]] = {
        "embed_tokens": [("model.embed_tokens.weight", (vocab, hidden))],
        "norm": [("model.norm.weight", (hidden,))],
        "lm_head": [("lm_head.weight", (vocab, hidden))],
    }
    for i in range(config.num_hidden_layers):
        for name, parts in in_layer.items():
            sources[f"layers.{i}.{name}"] = [(f"model.layers.{i}.{part}.weight", shape) for part, shape in parts]
    return sources


Tensors = Mapping[str, tuple[Any, str]]  # tensor's name -> the open file that holds it, and that file's name


def _open(directory: Path, stack: ExitStack) -> Tensors:
    """Open `model.safetensors`, or every shard that the index names; nothing is read yet."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.exists():
        shards = [single.name]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to shards")
        shards = sorted(set(weight_map.values()))
    else:
        raise CheckpointError(f"{directory} has no weights; expected {single.name} or shards with {index.name}")
    tensors: dict[str, tuple[Any, str]] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {index.name} names it; fetch the checkpoint again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({_first_line(error)}); fetch it again"
            ) from error
        tensors |= dict.fromkeys(file.keys(), (file, shard))
    return tensors


def _read(tensors: Tensors, directory: Path, name: str, shape: Shape) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{directory} lacks the tensor {name}, expected with shape {list(shape)}")
    file, shard = tensors[name]
    found = file.get_slice(name).get_shape()
    if found != list(shape):
        raise CheckpointError(f"{directory / shard}: {name} has shape {found}, but config.json asks for {list(shape)}")
    tensor: Tensor = file.get_tensor(name)
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{directory / shard}: {name} holds {tensor.dtype}, expected floating point; quantised weights are not read"
        )
    return tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
