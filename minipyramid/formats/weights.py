"""The weights of a checkpoint, whichever files they are in: checked, read, and joined to parameters.

A format gives its tensors as `Stored`, under Hugging Face's names; everything else is done here for all.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minipyramid.config import ModelConfig, read_json
from minipyramid.errors import CheckpointError
from minipyramid.formats.names import Sources, parameter_sources

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Stored:
    """A tensor that a file holds, and that is read when it is asked for."""

    path: Path
    shape: list[int]
    read: Callable[[], Tensor]


def read_parameters(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress = None
) -> dict[str, Tensor]:
    """Every parameter by its name, cast to `dtype`, on `device`.

    Raises `CheckpointError` if a file is missing or damaged, or a tensor missing, left over or misshapen.
    """
    sources, state = parameter_sources(config), dict[str, Tensor]()
    with ExitStack() as stack:
        tensors = _open(directory, config, stack)
        # Like transformers: the head is tied if it is absent or equal, and one that differs is kept.
        if config.tie_word_embeddings and "lm_head.weight" not in tensors:
            del sources["lm_head.weight"]
        _check_shapes(directory, tensors, sources)
        for name, parts in sources.items():
            state[name] = torch.cat([_read(tensors[part], part, dtype) for part, _ in parts]).to(device)
            if progress:
                progress(len(state), len(sources))
    return state


def _open(directory: Path, config: ModelConfig, stack: ExitStack) -> dict[str, Stored]:
    """Open every file of weights; safetensors first, since nothing in them can run."""
    from minipyramid.formats import meta, safetensors, torch_files

    for kind in (safetensors, torch_files):
        if (directory / kind.WHOLE).exists() or (directory / kind.INDEX).exists():
            tensors: dict[str, Stored] = {}
            for path in _shards(directory, kind.WHOLE, kind.INDEX):
                tensors |= kind.open_file(path, stack)
            return tensors
    if meta.shards(directory):
        return meta.open_tensors(directory, config)
    expected = f"expected {safetensors.WHOLE} or shards with {safetensors.INDEX}, {torch_files.WHOLE}"
    raise CheckpointError(f"{directory} has no weights; {expected} or {meta.FIRST}")


def _shards(directory: Path, whole: str, index: str) -> list[Path]:
    """The files that hold weights."""
    if (directory / whole).exists():
        return [directory / whole]
    shard_of = read_json(directory / index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{directory / index} has no weight_map from tensors to shards; fetch it again")
    paths = [directory / shard for shard in sorted(set(shard_of.values()))]
    for path in paths:
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{path} is missing, though {index} names it; fetch the checkpoint again")
    return paths


def _check_shapes(directory: Path, tensors: dict[str, Stored], sources: Sources) -> None:
    """Before any tensor is read, check that each is there with its shape, and no other."""
    expected = dict(part for parts in sources.values() for part in parts)
    for name, shape in expected.items():
        asked = list(shape)
        if name not in tensors:
            raise CheckpointError(f"{directory} lacks the tensor {name}, expected with shape {asked}")
        found = tensors[name]
        if found.shape != asked:
            problem = f"{name} has shape {found.shape}, but config.json asks for {asked}"
            raise CheckpointError(f"{found.path}: {problem}")
    for name in sorted(tensors.keys() - expected.keys()):
        # Old checkpoints store rotary frequencies, which are computed here.
        if not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{directory} holds {name}, no tensor of this Llama; check config.json")


def _read(stored: Stored, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor, cast to `dtype`; raises `CheckpointError` if it is quantised or not finite."""
    tensor = stored.read()
    if not tensor.is_floating_point():
        expected = "expected floating point; quantised weights are not read"
        raise CheckpointError(f"{stored.path}: {name} holds {tensor.dtype}, {expected}")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        problem = f"{name} holds values that are not finite in {dtype}"
        raise CheckpointError(f"{stored.path}: {problem}; fetch it again")
    return tensor
