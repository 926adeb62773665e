"""The weights of a checkpoint, whichever files they are in: checked, read, and joined to parameters.

A format gives its tensors as `Stored`, under Hugging Face's names; everything else is done here for all.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig, read_json
from minipyramid.errors import CheckpointError
from minipyramid.formats.names import Sources, parameter_sources

if TYPE_CHECKING:
    from minipyramid.quantised import Packed, Quantised

Progress = Callable[[int, int], None] | None
log = logging.getLogger("minipyramid")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens"
UNPACKED = "minipyramid: %s weights (%s) become %s and take its bytes: none of torch's products is for them"
AT_LOAD = "int8"  # what `quantize` makes of plain weights


@dataclass(frozen=True)
class Stored:
    """A tensor that a file holds, and that is read when it is asked for."""

    path: Path
    shape: list[int]
    read: Callable[[], "Tensor | Quantised"]


def read_parameters(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress = None
) -> "dict[str, Tensor | Packed]":
    """Every parameter by its name, cast to `dtype`, on `device`; quantised weights in the form for products.

    Raises `CheckpointError` if a file is missing or damaged, or a tensor missing, left over or misshapen.
    """
    sources, state = parameter_sources(config), dict[str, "Tensor | Packed"]()
    with ExitStack() as stack:
        tensors = _open(directory, config, stack)
        if config.quantization and config.quantization != AT_LOAD:
            from minipyramid.formats.quantisation import gather

            shapes = dict(part for parts in sources.values() for part in parts)
            tensors = gather(tensors, shapes, config.quantization)
        # Like transformers: the head is tied if it is absent or equal, and one that differs is kept.
        is_tied = config.tie_word_embeddings and HEAD not in tensors
        if is_tied:
            del sources[HEAD]
        _check_shapes(directory, tensors, sources)
        unpacked = 0
        for i, (name, parts) in enumerate(sources.items(), 1):
            if progress:
                progress(i, len(sources))
            read = [_read(tensors[part], part, dtype) for part, _ in parts]
            if name == HEAD and config.tie_word_embeddings and _are_equal(read[0], state[EMBEDDING]):
                is_tied = True
                continue
            state[name] = parameter_of(name, read, config, dtype, device)
            unpacked += isinstance(state[name], Tensor) and not all(isinstance(t, Tensor) for t in read)
        if is_tied:
            state[HEAD] = parameter_of(HEAD, [state[EMBEDDING]], config, dtype, device)
    if unpacked:
        log.warning(UNPACKED, unpacked, config.quantization.method, str(dtype).removeprefix("torch."))
    return state


def parameter_of(
    name: str, parts: list[Any], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> "Tensor | Packed":
    """A parameter of the tensors that it joins. Raises `CheckpointError` where it is not finite."""
    # Of all parameters only linear layers' have such names.
    if config.quantization and name.endswith(".weight"):
        from minipyramid.quantised import joined_form

        form = joined_form(parts, dtype, device, in_int8=config.quantization == AT_LOAD)
        if isinstance(form, Tensor) and not form.isfinite().all():  # float8 has NaN, float16 an end
            raise CheckpointError(f"{name} holds values that are not finite in {dtype}; fetch it again")
        return form
    whole: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.to(device)


def _are_equal(head: Any, embedding: Any) -> bool:
    return isinstance(head, Tensor) and torch.equal(head.to(embedding.device), embedding)


def _open(directory: Path, config: ModelConfig, stack: ExitStack) -> dict[str, Stored]:
    """Open every file of weights; safetensors first, since nothing in them can run."""
    from minipyramid.formats import meta, safetensors, torch_files

    for kind in (safetensors, torch_files):
        if (directory / kind.WHOLE).exists() or (directory / kind.INDEX).exists():
            tensors: dict[str, Stored] = {}
            for path in _shards(directory, kind.WHOLE, kind.INDEX):
                opened = kind.open_file(path, stack)
                for name in sorted(tensors.keys() & opened.keys()):
                    both = f"{tensors[name].path} and {path.name} both hold {name}"
                    raise CheckpointError(f"{both}; fetch the checkpoint again")
                tensors |= opened
            return tensors
    if meta.shards(directory):
        return meta.open_tensors(directory, config)
    if any(directory.glob("*.gguf")):
        raise CheckpointError(f"{directory} holds GGUF files, which are not read; take safetensors")
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


def _read(stored: Stored, name: str, dtype: torch.dtype) -> "Tensor | Quantised":
    """One tensor, cast to `dtype`, or a quantised weight.

    Raises `CheckpointError` if the tensor holds no plain numbers, or some that are not finite.
    """
    tensor = stored.read()
    if not isinstance(tensor, Tensor):
        return tensor
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        expected = "expected float32, bfloat16 or float16, or quantised as config.json says, with its scales"
        raise CheckpointError(f"{stored.path}: {name} holds {tensor.dtype}, {expected}")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        problem = f"{name} holds values that are not finite in {dtype}"
        raise CheckpointError(f"{stored.path}: {problem}; fetch it again")
    return tensor
