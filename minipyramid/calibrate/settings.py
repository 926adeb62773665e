"""A profile as the files that `Profile` is read from."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from minipyramid.errors import RequestError
from minipyramid.policies.profile import Level

DIGITS = 4  # of a share; a thousandth of a token at 1,024


def write_profile(out: Path, levels: list[Level], lines: Tensor, measured: dict[str, Any]) -> None:
    """Write `out`, and beside it the lines of the score `fitted` where a layer chooses by it.

    A kill leaves the former files or whole new ones. Raises `RequestError` where they cannot be written.
    """
    settings: dict[str, Any] = {"policy": "profile", "levels": [written(level) for level in levels]}
    beside = out.with_suffix(".safetensors")
    try:
        if any("fitted" in score for level in levels for score in level.scores):
            settings["fitted"] = beside.name
            save_file({"lines": lines.cpu().contiguous()}, partial(beside))
            partial(beside).replace(beside)
        partial(out).write_text(in_lines(settings | {"measured": measured}), "utf-8")
        partial(out).replace(out)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error}") from error


def partial(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".part")


def written(level: Level) -> dict[str, Any]:
    """Shares to `DIGITS`."""
    return {
        "computed": [round(share, DIGITS) for share in level.computed],
        "held": [
            min(round(held, DIGITS), round(computed, DIGITS))
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
