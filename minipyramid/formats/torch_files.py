"""Weights in files that torch has written, `pytorch_model.bin`: one file, or shards that an index names.

Such a file is a pickle, which could run anything; only tensors and plain containers are read of it.
"""

import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid.errors import CheckpointError
from minipyramid.formats.weights import Stored

WHOLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def open_file(path: Path, _: ExitStack) -> dict[str, Stored]:
    """The tensors of a file, mapped into memory where the file is of the kind that can be."""
    return {name: Stored(path, list(t.shape), t.clone) for name, t in load_tensors(path).items()}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises `CheckpointError` if the file is damaged, or holds anything but tensors."""
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no tensors by name; expected a model's weights")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds no tensors by name (see {name!r:.60}); expected weights")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain tensor; save a dense one")
    return loaded


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = "is damaged, or holds more than tensors, which could run anything when it is read"
        raise CheckpointError(f"{path} {problem}; take safetensors") from error
    # torch's reader is not written for damaged files, and raises what comes.
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged ({type(error).__name__}); fetch it") from error
