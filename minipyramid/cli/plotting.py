"""Drawing needs matplotlib, which is an optional extra."""

import importlib
import io
from pathlib import Path
from typing import Any

from minipyramid.cli.terminal import check_writable, write_whole
from minipyramid.errors import RequestError


def load_matplotlib() -> Any:
    """The part of it that draws into files; looked for where a plot is asked for."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RequestError(
            '--plot needs matplotlib; install it with pip install "minipyramid[plot]"'
        ) from error


def save_plot(figure: Any, path: Path, **how: Any) -> None:
    """Write a figure in the format that the file's name says. Raises `RequestError` where it cannot be."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), **how)
    write_whole("--plot", path, drawn.getvalue())


def check_plot(file: str | None) -> None:
    """Refuse what `--plot` cannot write, before anything is measured; None is no plot."""
    if file is not None:
        load_matplotlib()
        if Path(file).suffix not in (".png", ".svg", ".pdf"):
            raise RequestError(f"--plot is {file}, expected a name that ends with .png, .svg or .pdf")
        check_writable("--plot", Path(file))
