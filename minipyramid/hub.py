"""Where a checkpoint lies: a directory, or a hub repository that is fetched into huggingface_hub's cache.

Cache, token, endpoint and offline settings are those of huggingface_hub. Only what the engine reads is
fetched.
"""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from minipyramid.errors import CheckpointError, expect_type

# `model*`, since a repository may hold the same weights again under other names and in other layouts.
WANTED = (
    "*config.json pyramid.json added_tokens.json tokenizer.json tokenizer.model *.jinja model*.safetensors*"
)
EXPECTED = "expected a checkpoint's directory or a hub repository id"

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
        "is not complete in the hub's cache, and the hub cannot be reached or is offline"
    ),
}


def locate(
    model: str | Path, revision: str | None = None, progress: bool = False, wanted: str = WANTED
) -> Path:
    """The checkpoint's directory. Any name but a local path is fetched; `progress` shows bars on a terminal.

    Raises:
        CheckpointError: nothing is there, access is refused, or the hub cannot be reached.
    """
    expect_type("model", model, (str, Path), "a path or a repository id")
    expect_type("revision", revision, (str, type(None)), "a name")
    name = str(model)
    if not name:
        raise CheckpointError(f"the model's name is empty; {EXPECTED}")
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        message = f"{name!r} is no path ({error}); expected a directory or a hub repository id"
        raise CheckpointError(message) from error
    if path.is_dir():
        if revision is None:
            return path
        problem = f"is a directory and has no revision {revision!r}"
        raise CheckpointError(f"{name} {problem}; leave the revision out")
    if exists:
        raise CheckpointError(f"{name} is a file; {EXPECTED}")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist; {EXPECTED}")
    bars = tqdm if progress and sys.stderr.isatty() else _NoBar
    files = wanted.split()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, tqdm_class=bars))
    # What a download may raise differs by huggingface_hub's version (requests or httpx, the disk, a proxy).
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"{name}{at} {_told(error)}") from error


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
