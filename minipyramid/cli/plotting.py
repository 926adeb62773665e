"""Drawing needs matplotlib, which is an optional extra."""

import importlib
from typing import Any

from minipyramid.errors import RequestError


def load_matplotlib() -> Any:
    """The part of it that draws into files; looked for where a plot is asked for."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RequestError(
            '--plot needs matplotlib; install it with pip install "minipyramid[plot]"'
        ) from error
