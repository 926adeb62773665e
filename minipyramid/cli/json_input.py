"""One JSON object that comes from outside: a line of a file, or the body of a request."""

import json
from typing import Any

from minipyramid.errors import RequestError


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """The object that the bytes say; raises `RequestError`, which calls them `name`, where they say none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    # The parser recurses, so nesting without end is an error of Python's own.
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON in UTF-8 ({error}); give one object") from error
    if not isinstance(value, dict):
        raise RequestError(f"{name} is {value!r:.60}, expected a JSON object")
    return value
