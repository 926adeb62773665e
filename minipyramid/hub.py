"""Where a checkpoint lies: a directory, or a hub repository that is fetched into the hub library's own cache.

Cache, token, endpoint and offline settings are those of huggingface_hub. Only what the engine reads is fetched.
"""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from minipyramid.errors import CheckpointError

# `model*`, since a repository may hold the same weights again under other names and in other layouts.
WANTED = "*config.json pyramid.json added_tokens.json tokenizer.model model*.safetensors*"

# What the hub library raises, and what to tell; the first that fits (a gated repository is also one not found).
FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (errors.GatedRepoError, "is gated; accept its terms on the hub and log in, or set HF_TOKEN"),
    (errors.RepositoryNotFoundError, "is neither a directory nor a repository; check the name or set HF_TOKEN"),
    (errors.RevisionNotFoundError, "is not on the hub; expected a branch, tag or commit of the repository"),
    (errors.HFValidationError, "is neither a directory nor a repository id of the form owner/name"),
    (errors.LocalEntryNotFoundError, "is not complete in the hub's cache, and the hub cannot be reached or is offline"),
)


def locate(model: str | Path, revision: str | None = None, progress: bool = False, wanted: str = WANTED) -> Path:
    """The checkpoint's directory; a name that is no local path is fetched, on a terminal with `progress` bars.

    Raises:
        CheckpointError: nothing is there, access is refused, or the hub cannot be reached.
    """
    if not isinstance(model, (str, Path)) or not isinstance(revision, (str, type(None))):
        raise TypeError(f"model is {model!r} at revision {revision!r}, expected a path or a repository id, and a name")
    name = str(model)
    if not name:
        raise CheckpointError("the model's name is empty; expected a checkpoint's directory or a hub repository id")
    try:
        path = Path(model).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name!r} is no path ({error}); expected a directory or a hub repository id") from error
    if path.is_dir() and revision is not None:
        raise CheckpointError(f"{name} is a directory and has no revision {revision!r}; leave the revision out")
    if path.is_dir():
        return path
    if there:
        raise CheckpointError(f"{name} is a file; expected a checkpoint's directory or a hub repository id")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist; expected a checkpoint's directory or a hub repository id")
    try:
        bars = tqdm if progress and sys.stderr.isatty() else _NoBar
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted.split(), tqdm_class=bars))
    # What a download may raise differs by the hub library's version (requests or httpx, the disk, a proxy).
    except Exception as error:
        # The library says "not in the cache" also where the hub did answer, but with an error.
        why = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        reason = " ".join(str(why).split()) or type(why).__name__  # the file's name is not in its first line
        unknown = f"could not be fetched from the hub; try again, or give a directory ({reason})"
        told = next((message for kind, message in FAILURES if isinstance(why, kind)), unknown)
        raise CheckpointError(f"{name}{f' at revision {revision!r}' if revision else ''} {told}") from error


class _NoBar(tqdm):
    """The hub library shows its bars everywhere; where there is no terminal, stderr is for what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
