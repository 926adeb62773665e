"""How a command speaks: results to stdout, everything else to stderr, one line for what is wrong.

Exit status 0; 2 for bad input; 130 after Ctrl-C and 143 after SIGTERM, with what was finished kept; 1 for a
defect of ours.
"""

import argparse
import difflib
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from minipyramid.errors import MiniPyramidError, RequestError
from minipyramid.scheduler import Scheduler

PACKAGE = Path(__file__).resolve().parent.parent
# In a checkout they lie beside the package, in an installed one inside it.
WEIGHTS = next(
    (d for d in (PACKAGE.parent / "weights", PACKAGE / "weights") if d.is_dir()), PACKAGE / "weights"
)
DEFAULT_MODEL = WEIGHTS / "storyteller"
DEFAULT_TEXT = WEIGHTS / "books-sample.txt"  # to measure by
SLOW_S, REFRESH_S = 1.0, 0.1  # what is quicker shows no progress, and how often it is written
MOST_THREADS = 1024  # beyond, starting them fails
Line = TypeVar("Line", bound="ProgressLine")


class Terminated(BaseException):
    """SIGTERM came, and the command has ended what it was at."""


class Signals:
    """Notes the first SIGINT or SIGTERM instead of breaking off; a second one does what it does elsewhere.

    At its end the block raises what was noted: `KeyboardInterrupt`, or `Terminated`.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._before: dict[int, Any] = {}

    def came(self) -> bool:
        """Whether one was noted."""
        return self.noted is not None

    def _note(self, number: int, frame: object) -> None:
        self.noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Signals":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._restore()
        if kind is None and self.came():
            raise KeyboardInterrupt if self.noted == signal.SIGINT else Terminated


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage above it."""

    def error(self, message: str) -> NoReturn:
        print_error(self._unknown_flag(message) or message)
        self.exit(2)

    def _unknown_flag(self, message: str) -> str:
        """The unknown flag alone; argparse names with it whatever else it could not place, as a prompt."""
        words = message.partition("unrecognized arguments: ")[2].split()
        flag = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        meant = f"did you mean {close[0]}?" if close else "--help lists them"
        return f"there is no flag {flag}; {meant}" if flag else ""

    def print_help(self, file: Any = None) -> None:
        """argparse would not tell that the help cannot be written."""
        status = exit_status(lambda: print(self.format_help(), end="", file=file))
        if status:
            self.exit(status)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """How a flag reads several values of a kind."""

    def read(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"  # what argparse calls it
    return read


def tell(text: str, end: str = "\n") -> None:
    """To stderr. Where that is closed or full nothing is told, for stdout is for results alone."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """One line on stderr, also where what it names holds a line break."""
    tell(f"minipyramid: error: {' '.join(str(error).split())}")


def discard_output() -> None:
    """Python flushes stdout once more at exit; what could not be written must not fail there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_status(command: Callable[[], None]) -> int:
    """Run what a command does; what goes wrong is told in one line, and by the status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text or a name may hold what the terminal's own encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    try:
        command()
        print(end="", flush=True)  # here, where a failure can still be told
    except MiniPyramidError as error:
        print_error(error)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `minipyramid ... | head`
        discard_output()
    except OSError as error:
        if error.filename is None:  # a full disk behind a redirection, say
            discard_output()
            print_error(f"the output cannot be written ({error})")
        else:  # a name that is too long, say
            print_error(f"a file cannot be read or written ({error})")
        return 2
    except Terminated:
        tell("minipyramid: terminated")
        return 143
    except KeyboardInterrupt:
        tell("\nminipyramid: interrupted")
        return 130
    return 0


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads; None leaves torch's own number."""
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise RequestError(f"--threads is {threads}, expected 1 to {MOST_THREADS}")
        torch.set_num_threads(threads)


def set_quiet(quiet: bool) -> None:
    """Whether what the engine would tell on stderr is kept back."""
    logging.getLogger("minipyramid").setLevel(logging.ERROR if quiet else logging.NOTSET)


def check_writable(flag: str, path: Path) -> None:
    """Refuse a file that cannot be opened for writing; nothing is left behind."""
    try:
        new = not path.exists()
        if not path.is_fifo():  # its reader would take this for the end
            path.open("ab").close()
        if new:
            path.resolve().unlink()  # where a link leads
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{flag} {path} cannot be written: {error}") from error


def unfinished(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".part")


def write_whole(flag: str, path: Path, content: bytes) -> None:
    """Write a file so that what stood there stays until the new one is whole.

    What is no plain file, a pipe or a terminal, is written to as it is. Raises `RequestError`.
    """
    target = path.resolve()  # where a link leads
    part = unfinished(target)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        part.write_bytes(content)
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise RequestError(f"{flag} {path} cannot be written: {error}") from error


def readable(size: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{size:.0f} B"


class ProgressLine:
    """A line on a terminal's stderr, written over while something takes long, wiped at the end."""

    def __init__(self, quiet: bool) -> None:
        self.wanted = sys.stderr is not None and sys.stderr.isatty() and not quiet
        self.began = self.written = time.monotonic()

    def write(self, text: str) -> None:
        """Show a text in place of the last one, if it is time."""
        now = time.monotonic()
        if self.wanted and now - self.began > SLOW_S and now - self.written > REFRESH_S:
            self.written = now
            tell(f"\r{text}\x1b[K", end="")

    def __enter__(self: Line) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.written > self.began:
            tell("\r\x1b[K", end="")


class LoadingLine(ProgressLine):
    """How much of a checkpoint is loaded."""

    def update(self, loaded: int, of: int) -> None:
        """Called after each parameter."""
        self.write(f"loading weights {100 * loaded // of:3d} %")


class RunningLine(ProgressLine):
    """How many requests wait, run and are finished, and how fast tokens come."""

    def update(self, now: Scheduler) -> None:
        """Called after each step."""
        running, rate = len(now.running), now.generated / (time.monotonic() - self.began)
        self.write(
            f"{len(now.waiting)} waiting, {running} running, {now.finished} finished, {rate:.0f} tokens/s"
        )
