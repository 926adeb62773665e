"""A number of bytes as people write it."""

import re

from minipyramid.errors import RequestError, expect_type


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or a text such as 500MiB or 2GB (units are powers of 1,024 either way)."""
    expect_type("the size", size, (int, str), "bytes or a text such as 2GiB")
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if not match or not (count := int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))):
        raise RequestError(f"the size is {size!r}, expected bytes or a text such as 2GiB")
    return count
