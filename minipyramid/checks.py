"""One way to check a number that a user gave."""

import math
from typing import Any

# Python's own rule, less bool as a number.
ACCEPTED: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
Limits = tuple[type, float, float]  # what kind of number, and the lowest and highest that it may be


def check_number(name: str, value: Any, limits: Limits, error: type[Exception], wrong_type: type[Exception]) -> Any:
    """The value as that kind of number; raises `wrong_type` or `error`, naming it and what was expected."""
    kind, lowest, highest = limits
    if type(value) not in ACCEPTED[kind]:
        raise wrong_type(f"{name} is {value!r:.60}, expected {kind.__name__}")
    if not lowest <= value <= highest:
        least = "above 0" if 0 < lowest < 1e-6 else f"{lowest}"
        limits = f"{least} to {highest}" if highest < math.inf else f"at least {lowest}"
        raise error(f"{name} is {value}, expected {limits}")
    return kind(value)
