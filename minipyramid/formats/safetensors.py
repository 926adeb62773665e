"""Weights in safetensors: one file, or shards that an index names."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipyramid.errors import CheckpointError
from minipyramid.formats.weights import Stored

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_file(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of a file, which stays open as long as the stack; nothing is read yet."""
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{path} is truncated or no safetensors file ({why}); fetch it again"
        raise CheckpointError(message) from error
    return {
        name: Stored(path, file.get_slice(name).get_shape(), partial(_tensor, file, path, name))
        for name in file.keys()  # noqa: SIM118 it is no dictionary
    }


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:  # torch has no such numbers
        raise CheckpointError(
            f"{path}: {name} cannot be read ({error}); expected float32 or the like"
        ) from error
    return tensor
