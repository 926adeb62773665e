"""What a layout of quantised weights has to say, so that the rest of the loading need not know it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minipyramid.errors import ConfigError, check_number
from minipyramid.quantised import Quantised

INT32 = (torch.int32,)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised weight consists of."""

    shapes: list[list[int]]  # any of these
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Layout(Protocol):
    """How the quantised weights of a checkpoint lie in its files."""

    @property
    def method(self) -> str:
        """As it is called in `config.json`, with what tells it from others of the name."""

    @property
    def bits(self) -> int:
        """Of each weight."""

    @property
    def mark(self) -> str:
        """The part that every quantised linear layer has, and no plain one."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Parts of which nothing is read: what activations were to be quantised by."""

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """The parts of a weight [out, in] of these rows and columns, by what follows the layer's name."""

    def read(self, parts: dict[str, Tensor], rows: int, columns: int) -> Quantised:
        """The weight of parts that are as they should be. Raises `ValueError` for what they hold."""


def expect(settings: Settings, name: str, allowed: tuple[Any, ...]) -> Any:
    """A field that has one of these values; the first if it is absent."""
    value = settings.get(name)
    value = allowed[0] if value is None else value
    # The type counts, too, since 1 equals True.
    if not any(value == one and type(value) is type(one) for one in allowed):
        listed = " or ".join(map(repr, allowed))
        raise ConfigError(f"{name} is {value!r:.60}, which is not implemented; expected {listed}")
    return value


def group_size(settings: Settings, default: int) -> int:
    """Columns of a group; -1 for all."""
    value = settings.get("group_size")
    if value == -1 or (value is None and default == -1):
        return -1
    limits = (int, 1, 2**20)
    return int(
        check_number("group_size", default if value is None else value, limits, ConfigError, ConfigError)
    )


def size_of(block: int, whole: int) -> int:
    """Rows or columns that share a scale, where -1 stands for all of them."""
    return whole if block == -1 else block


def unpack_ints(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Whole numbers of 4 or 8 bits that lie in numbers of 32, the first in the lowest bits.

    Along the axis there are 32 / bits times as many then.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(-1, *[1] * (packed.dim() - axis - 1))
    return (packed.unsqueeze(axis + 1) >> shifts & (1 << bits) - 1).flatten(axis, axis + 1)
