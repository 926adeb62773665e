"""A profile's file: JSON with the levels, and beside it what was fitted to the checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipyramid.errors import ConfigError
from minipyramid.policies.fitted import read_fitted
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.settings import STAGES, settings_of


def is_name_beside(file: Any) -> bool:
    """Whether it names a file in the settings' own directory, so that both files move together."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


def read_profile(given: dict[str, Any], path: Path) -> Profile:
    """From the fields of a file; `fitted` names the file beside it of what was fitted."""
    given = dict(given)
    levels, file = given.pop("levels", None), given.pop("fitted", None)
    if not isinstance(levels, list) or not (file is None or is_name_beside(file)):
        raise ConfigError(
            f"{path}: expected levels, a list, and fitted, the name of a .safetensors file beside it or none"
        )
    for name in ("lines", "guesses", "source", *STAGES):
        if name in given:
            raise ConfigError(f"{path}: {name!r} is no setting of a profile; expected flat fields and fitted")
    try:
        read = tuple(Level.read(level) for level in levels)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    fitted = {} if file is None else read_fitted(path.parent / file)
    if "stand_ins" in fitted:
        stand_ins = fitted.pop("stand_ins")
        if len(stand_ins) != len(read):
            told = f"{path}: the stand-ins are of {len(stand_ins)} levels, expected {len(read)}"
            raise ConfigError(f"{told}; calibrate again")
        read = tuple(replace(level, stand_ins=own) for level, own in zip(read, stand_ins, strict=True))
    return settings_of(Profile, given | {"levels": read, "source": str(path)} | fitted, str(path))
