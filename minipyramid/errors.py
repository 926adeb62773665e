"""The errors of this package, and the checks of types and ranges that raise them.

There is one class for each thing that can be at fault: the checkpoint, the tokenizer, a configuration, a
request, a memory budget. Every message is one sentence that names the thing, says what was expected and, if
there is one, the way out. So a program can print it unchanged, and a person can act on it. A value of the
wrong Python type raises `TypeError`.
"""

import difflib
from collections.abc import Collection
from dataclasses import field, fields
from typing import Any


class MiniPyramidError(Exception):
    """Base of all errors that this package raises for its user's input."""


class CheckpointError(MiniPyramidError):
    """A checkpoint is missing, unreachable, damaged, or does not match its configuration."""


class TokenizerError(MiniPyramidError):
    """A tokenizer is missing, unreadable, or has another vocabulary than the model."""


class ConfigError(MiniPyramidError):
    """The engine cannot run this configuration as it is meant."""


class RequestError(MiniPyramidError):
    """A prompt or a sampling parameter cannot be served."""


class BudgetError(MiniPyramidError):
    """No settings come down to this share of the full cache; `smallest` is a share that can be reached."""

    def __init__(self, message: str, smallest: float = 1.0) -> None:
        super().__init__(message)
        self.smallest = smallest


Error = type[Exception]
# The kind of number, the lowest and the highest value.
Limits = tuple[type, float, float]


def number(default: Any, lowest: float, highest: float, kind: type | None = None) -> Any:
    """A dataclass field for `check_fields` to check. Its kind is the default's unless one is given."""
    limits = (kind or type(default), lowest, highest)
    return field(default=default, metadata={"limits": limits})


def check_fields(settings: Any, error: Error) -> None:
    """Check every field made by `number`, and convert it (an int given for a float becomes a float).

    Raises `error` for a value out of range, `TypeError` for a wrong type.
    """
    for part in fields(settings):
        limits = part.metadata.get("limits")
        value = getattr(settings, part.name)
        # The default needs no check, and may be None, which is no number.
        if limits and value is not part.default:
            value = check_number(part.name, value, limits, error)
            # A frozen dataclass can be set only in this way.
            object.__setattr__(settings, part.name, value)


def check_number(name: str, value: Any, limits: Limits, error: Error, wrong_type: Error = TypeError) -> Any:
    """Convert the value to its kind of number; raises `wrong_type`, or `error` if it is out of range."""
    kind, lowest, highest = limits
    kinds = (int, float) if kind is float else (kind,)
    # By the exact type, since isinstance takes True for an int.
    if type(value) not in kinds:
        raise wrong_type(f"{name} is {value!r:.60}, expected {kind.__name__}")
    if lowest <= value <= highest:
        return kind(value)
    lower = "above 0" if 0 < lowest < 1e-6 else lowest
    allowed = f"{lower} to {highest}"
    # So high a limit only keeps out nonsense, and nobody who is below it needs to know it.
    if value < lowest and highest > 1e6:
        allowed = f"at least {lowest}"
    raise error(f"{name} is {value!r:.60}, expected {allowed}")


def expect_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise `TypeError` unless the value is of one of these kinds. A bool is no int unless bool is given."""
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    stray_bool = isinstance(value, bool) and bool not in allowed
    if stray_bool or not isinstance(value, allowed):
        raise TypeError(f"{name} is {value!r:.60}, expected {expected}")


def nearest(name: str, valid: Collection[str]) -> str:
    """What was probably meant, and otherwise all that could be."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(valid)}"


def not_finite(dtype: object) -> CheckpointError:
    """For logits that overflowed, or come from weights that are broken: no token may be chosen by them."""
    return CheckpointError(f"logits are not finite in {dtype}; load float32, or fetch it again")
