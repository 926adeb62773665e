"""A policy's settings from the fields of a JSON file.

Published files of PyramidInfer nest their fields in two objects, beside `model` and `size`. Flat ones are
read, too.
"""

from dataclasses import fields
from typing import Any, TypeVar

from minipyramid.errors import ConfigError, nearest
from minipyramid.policy import Policy

STAGES = ("prefill_stage", "generation_stage")  # of a published file
UNUSED = ("model", "size")  # for whom a published file is
Settings = TypeVar("Settings", bound=Policy)


def settings_of(kind: type[Settings], given: dict[str, Any], source: str) -> Settings:
    """Check the fields and make the policy; messages begin with `source`.

    Raises `ConfigError` for a name that is no setting, and for a value that cannot be.
    """
    flat = {name: value for name, value in given.items() if name not in (*STAGES, *UNUSED)}
    for stage in STAGES:
        part = given.get(stage, {})
        if not isinstance(part, dict):
            raise ConfigError(f"{source}: {stage} is {part!r:.60}, expected an object")
        for name in flat.keys() & part.keys():
            raise ConfigError(f"{source}: {name!r:.60} is given twice; give it once")
        flat |= part
    known = [field.name for field in fields(kind)]
    for name in flat:
        if name not in known:
            raise ConfigError(f"{source}: {name!r:.60} is no setting; {nearest(name, [*known, *STAGES])}")
    try:
        return kind(**flat)
    except (ConfigError, TypeError) as error:  # a wrong type in a file is no mistake of the caller
        raise ConfigError(f"{source}: {error}") from error
