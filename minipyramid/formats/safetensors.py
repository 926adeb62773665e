"""Weights in safetensors: one file, or shards that an index names."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipyramid.config import read_json
from minipyramid.errors import CheckpointError
from minipyramid.formats.names import Sources

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A stored tensor's name -> the open file that holds it, and its path.
Tensors = dict[str, tuple[Any, Path]]


def open_tensors(directory: Path, stack: ExitStack) -> Tensors:
    """Open every file of weights; nothing is read yet."""
    tensors: Tensors = {}
    for shard in _shards(directory):
        path = directory / shard
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{path} is missing, though {INDEX} names it; fetch the checkpoint again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"{path} is truncated or no safetensors file ({why}); fetch it again"
            raise CheckpointError(message) from error
        tensors |= dict.fromkeys(file.keys(), (file, path))
    return tensors


def _shards(directory: Path) -> list[str]:
    """The names of the files that hold weights."""
    index = directory / INDEX
    if (directory / WHOLE).exists():
        return [WHOLE]
    if not index.exists():
        raise CheckpointError(f"{directory} has no weights; expected {WHOLE} or shards with {INDEX}")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to shards; fetch it again")
    return sorted(set(shard_of.values()))


def check_shapes(directory: Path, tensors: Tensors, sources: Sources) -> None:
    """Before any tensor is read, check that each is there with its shape, and no other."""
    expected = dict(part for parts in sources.values() for part in parts)
    for name, shape in expected.items():
        asked = list(shape)
        if name not in tensors:
            raise CheckpointError(f"{directory} lacks the tensor {name}, expected with shape {asked}")
        file, path = tensors[name]
        found = file.get_slice(name).get_shape()
        if found != asked:
            raise CheckpointError(f"{path}: {name} has shape {found}, but config.json asks for {asked}")
    for name in sorted(tensors.keys() - expected.keys()):
        # Old checkpoints store rotary frequencies, which are computed here.
        if not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{directory} holds {name}, no tensor of this Llama; check config.json")


def read_tensor(tensors: Tensors, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor, cast to `dtype`; raises `CheckpointError` if it is quantised or not finite."""
    file, path = tensors[name]
    tensor: Tensor = file.get_tensor(name)
    if not tensor.is_floating_point():
        expected = "expected floating point; quantised weights are not read"
        raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, {expected}")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite in {dtype}; fetch it again")
    return tensor
