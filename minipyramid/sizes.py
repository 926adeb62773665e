"""Memory for the cache: a number of bytes as people write it, and what is free."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from minipyramid.errors import RequestError, expect_type

# Files that tell a container's limit, what it uses, and what of that it would give up, in the two versions of
# control groups; the third has a line for each count.
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def parse_bytes(size: int | str) -> int:
    """The bytes of a `kv_memory`, a number or a text as 500MiB or 2GB (units are powers of 1,024)."""
    expect_type("kv_memory", size, (int, str), "bytes or a text such as 2GiB")
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([KMGT]?)(?:i?B)?", str(size).strip(), re.I | re.ASCII)
    if not match or not (count := int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))):
        raise RequestError(f"kv_memory is {size!r:.60}, expected a byte or more, or a text such as 2GiB")
    return count


def memory_bound(given: int | str | None, device: torch.device) -> Callable[[], int]:
    """What tells how many bytes may be in flight: those given, or half of what is free when it is asked.

    Raises `RequestError` where what is given is no size.
    """
    if given is None:
        return lambda: default_memory(device)
    size = parse_bytes(given)
    return lambda: size


def default_memory(device: torch.device) -> int:
    """Half of the bytes that are free where the cache will be, for activations need some; else 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30
    # What the kernel would give up for the asking, its cache of files, counts as free.
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    return int(min(available, free_in_container(Path("/sys/fs/cgroup")))) // 2


def free_in_container(groups: Path) -> float:
    """Bytes that a container's own limit leaves, which may be far less than the machine has; inf without."""
    for limit, used, counts, given_up in CONTROL_GROUPS:
        try:
            most, taken = (int((groups / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
        return max(0, most - max(0, taken - count_in(groups / counts, given_up)))
    return math.inf


def count_in(file: Path, name: str) -> int:
    """The number behind a name, 0 where the file does not tell."""
    try:
        return int(dict(line.split() for line in file.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0
