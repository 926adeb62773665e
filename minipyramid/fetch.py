"""Files of a hub repository, into huggingface_hub's cache.

Apart from `minipyramid/hub.py`, which decides what is fetched: huggingface_hub takes 0.4 s to be imported, a
tenth of a command's start, and nobody who names a directory has to wait for it.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from minipyramid.errors import CheckpointError

# What huggingface_hub raises, and what the user is told. The first that fits counts: a GatedRepoError is a
# RepositoryNotFoundError, too.
FAILURES = {
    errors.GatedRepoError: "is gated; accept its terms on the hub and log in, or set HF_TOKEN",
    errors.RepositoryNotFoundError: (
        "is neither a directory nor a repository; check the name or set HF_TOKEN"
    ),
    errors.RevisionNotFoundError: "is not on the hub; expected a branch, tag or commit of the repository",
    errors.HFValidationError: "is neither a directory nor a repository id of the form owner/name",
    errors.LocalEntryNotFoundError: (
        "is no directory, is not complete in the hub's cache, and the hub cannot be reached or is offline"
    ),
}


def download(name: str, revision: str | None, wanted: str, progress: bool, told_as: str) -> Path:
    """The directory with the files of these patterns; `progress` shows bars on a terminal.

    Raises:
        CheckpointError: access is refused, the hub cannot be reached, or the disk has no room.
    """
    shown = progress and sys.stderr is not None and sys.stderr.isatty()
    bars = tqdm if shown else _NoBar
    which: dict[str, Any] = {"revision": revision, "allow_patterns": wanted.split()}
    try:
        with _without_remarks():
            _check_room(name, which)
            return Path(snapshot_download(name, tqdm_class=bars, **which))
    except CheckpointError:
        raise
    # What a download may raise differs by huggingface_hub's version (requests or httpx, the disk, a proxy).
    except Exception as error:
        raise CheckpointError(f"{told_as} {_told(error)}") from error


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Without huggingface_hub's lines on patterns that no file has, which is how kinds of files are tried."""
    log = logging.getLogger("huggingface_hub._snapshot_download")

    def wanted(record: logging.LogRecord) -> bool:
        return "No files matched" not in record.getMessage()

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def has_gguf(name: str, revision: str | None) -> bool:
    """Whether a repository holds GGUF files, if the hub tells."""
    try:
        return any(file.endswith(".gguf") for file in HfApi().list_repo_files(name, revision=revision))
    except Exception:  # out of reach, say
        return False


def _check_room(name: str, which: dict[str, Any]) -> None:
    """Raise `CheckpointError` if the disk has no room for what is to be fetched."""
    if "dry_run" not in signature(snapshot_download).parameters or constants.HF_HUB_OFFLINE:
        return  # an older huggingface_hub cannot tell beforehand
    try:
        files: Any = snapshot_download(name, tqdm_class=_NoBar, dry_run=True, **which)
    except Exception:  # out of reach, say; the download itself knows what is in the cache
        return
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(d for d in (cache, *cache.parents) if d.exists())).free
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB are to be fetched, and {cache} has room for {free / 2**30:.1f}"
        raise CheckpointError(f"{name}: {sizes}; free some, or set HF_HOME to another disk")


def _told(error: BaseException) -> str:
    """What the user is told about a failed download."""
    # huggingface_hub says "not in the cache" also if the hub did answer, but with an error.
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    for kind, message in FAILURES.items():
        if isinstance(error, kind):
            return message
    # All lines of the reason, since the first does not name the file.
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"could not be fetched from the hub; try again, or give a directory ({reason})"


class _NoBar(tqdm):
    """No bar: huggingface_hub shows its bars everywhere, but without a terminal stderr is for errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = True
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
