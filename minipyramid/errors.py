"""What can go wrong, by whose part it is (the checkpoint, the tokenizer, a configuration, a request), and the one
way in which numbers are checked.

Every message is one sentence that names the thing, what was expected and, where there is one, the way out, so a
program can print it as it stands and a person can act on it. A value of the wrong Python type raises `TypeError`.
"""

from dataclasses import field
from typing import Any


class MiniPyramidError(Exception):
    """Base of all errors that this package raises for its user's input."""


class CheckpointError(MiniPyramidError):
    """A checkpoint that is missing, unreachable, damaged or not what its configuration says."""


class TokenizerError(MiniPyramidError):
    """A tokenizer that is missing, unreadable or of another vocabulary than the model."""


class ConfigError(MiniPyramidError):
    """A configuration that the engine cannot run as it is meant."""


class RequestError(MiniPyramidError):
    """A prompt or a sampling parameter that cannot be served."""


class BudgetError(MiniPyramidError):
    """A share of the full cache that no schedule can come down to; `smallest` is one that can."""

    def __init__(self, message: str, smallest: float = 1.0) -> None:
        super().__init__(message)
        self.smallest = smallest


def number(default: Any, lowest: float, highest: float, kind: type | None = None) -> Any:
    """A dataclass's field with limits that it is to be checked against; its `kind` is the default's if not given."""
    return field(default=default, metadata={"limits": (kind or type(default), lowest, highest)})


Limits = tuple[type, float, float]  # what kind of number, and the lowest and highest that it may be


def check_number(name: str, value: Any, limits: Limits, error: type[Exception], wrong_type: type[Exception]) -> Any:
    """The value as that kind of number; raises `wrong_type` or `error`, naming it and what was expected."""
    kind, lowest, highest = limits
    if type(value) not in ((int, float) if kind is float else (kind,)):  # Python's own rule, less bool as a number
        raise wrong_type(f"{name} is {value!r:.60}, expected {kind.__name__}")
    if not lowest <= value <= highest:
        lower = "above 0" if 0 < lowest < 1e-6 else f"{lowest}"
        allowed = f"at least {lowest}" if highest > 1e6 and value < lowest else f"{lower} to {highest}"
        raise error(f"{name} is {value!r:.60}, expected {allowed}")
    return kind(value)
