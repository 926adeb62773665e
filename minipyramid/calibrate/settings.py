"""A profile as the files that `Profile` is read from."""

import ctypes
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid.cli.terminal import unfinished
from minipyramid.config import read_json
from minipyramid.errors import CheckpointError, ConfigError, RequestError
from minipyramid.policies import load_policy
from minipyramid.policies.fitted import read_fitted
from minipyramid.policies.levels import Level

DIGITS = 4  # of a share; a tenth of a token at 1,024
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_profile(
    out: Path,
    levels: list[Level],
    lines: Tensor,
    measured: dict[str, Any],
    *,
    guess_weights: dict[int, Tensor] | None = None,
) -> None:
    """Write `out`, and beside it what was fitted: stand-ins, and lines of `fitted` and guesses that are used.

    A kill leaves each file as it was, or whole and new. Raises `RequestError` where they cannot be written,
    or could not be read.
    """
    settings: dict[str, Any] = {"policy": "profile", "levels": [written(level) for level in levels]}
    files, fitted = {}, {}
    if any("fitted" in score for level in levels for score in level.scores):
        fitted["lines"] = lines
    for depth in {level.depth for level in levels if level.is_guessing}:
        fitted["guesses"] = (guess_weights or {})[depth].half()  # they are the larger part of the file
    stand_ins = [level.stand_ins for level in levels if level.stand_ins is not None]
    if stand_ins and len(stand_ins) != len(levels):
        raise ValueError("some levels have stand-ins and others none")
    if stand_ins:
        fitted["stand_ins"] = torch.stack(stand_ins)
    for name, tensor in fitted.items():
        if not tensor.half().isfinite().all():  # as what reads them asks
            told = f"{name.replace('_', '-')} that were fitted exceed float16's numbers"
            raise RequestError(f"{told}; this model's values are too large for a profile")
    if fitted:
        beside = out.with_suffix(".safetensors")
        settings["fitted"] = beside.name
        files[beside] = in_safetensors(fitted)
    files[out] = in_lines(settings | {"measured": measured}).encode()
    try:
        for path, content in files.items():
            unfinished(path).write_bytes(content)
        for path in files:  # all are whole now, and fit together
            unfinished(path).replace(path)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error}") from error
    finally:
        for path in files:
            with suppress(OSError):
                unfinished(path).unlink(missing_ok=True)


def in_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file: the length of a JSON header, the header, and all numbers.

    The library's own `save` needs numpy, which nothing else here does, and its `save_file` lets nobody but
    its owner read the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    numbers, end = [], 0
    for name, tensor in tensors.items():
        flat = tensor.cpu().contiguous()
        numbers.append(ctypes.string_at(flat.data_ptr(), flat.nbytes))
        where = [end, end := end + flat.nbytes]
        header[name] = {"dtype": DTYPES[flat.dtype], "shape": list(flat.shape), "data_offsets": where}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)  # so that numbers begin at a multiple of 8 bytes
    return b"".join([len(written).to_bytes(8, "little"), written, *numbers])


def check_replaced(out: Path) -> None:
    """Refuse to write over a file that no profile consists of, a checkpoint's config.json, say."""
    for path, read in ((out, load_policy), (out.with_suffix(".safetensors"), read_fitted)):
        if not path.is_file() or not path.stat().st_size:
            continue
        try:
            # Settings are replaced also where what was fitted is lost.
            if path != out or read_json(out).get("policy") != "profile":
                read(path)
        except (CheckpointError, ConfigError) as error:
            told = f"--out {out} would write over {path}, which is no part of a profile"
            raise RequestError(f"{told}; move it away or give another name") from error


def written(level: Level) -> dict[str, Any]:
    """A level's lists, shares rounded to `DIGITS`, but never so that a layer holds more than it computes.

    That would be a guess.
    """
    return {
        "computed": [round(share, DIGITS) for share in level.computed],
        "held": [
            round(held, DIGITS) if held > computed else min(round(held, DIGITS), round(computed, DIGITS))
            for held, computed in zip(level.held, level.computed, strict=True)
        ],
        "scores": list(level.scores),
        "newest": list(level.newest),
    }


def in_lines(settings: dict[str, Any]) -> str:
    """JSON with a line for each list of a level, so that two profiles can be compared line by line."""
    fields = []
    for name, value in settings.items():
        shown = json.dumps(value)
        if name == "levels":
            shown = "[\n" + ",\n".join(level_in_lines(level) for level in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {shown}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def level_in_lines(level: dict[str, Any]) -> str:
    """One object of `levels`."""
    lists = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in level.items()]
    return "  {\n   " + ",\n   ".join(lists) + "\n  }"
