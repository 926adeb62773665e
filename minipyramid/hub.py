"""Where a checkpoint lies: a directory, or a hub repository that is fetched into huggingface_hub's cache.

Cache, token, endpoint and offline settings are those of huggingface_hub. Only what the engine reads is
fetched: first what is small and can be looked at, then weights.
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

from minipyramid.errors import CheckpointError, expect_type

# Everything but weights, which may be gigabytes: it is fetched and looked at first. `pyramid.safetensors` has
# the lines of a profile, under the name that `minipyramid.calibrate` gives it.
SETTINGS = (
    "*config.json params.json pyramid.json pyramid.safetensors added_tokens.json tokenizer.json "
    "tokenizer.model *.jinja"
)
# Of weights the first kind that a repository has. `model*`, since it may hold the same weights again under
# other names and in other layouts.
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "consolidated.*.pth")
CONFIGURATIONS = ("config.json", "params.json")
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
        "is no directory, is not complete in the hub's cache, and the hub cannot be reached or is offline"
    ),
}


def locate(
    model: str | Path, revision: str | None = None, progress: bool = False, wanted: str = SETTINGS
) -> Path:
    """The checkpoint's directory; of a repository all but weights. `progress` shows bars on a terminal.

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
        gguf = " (GGUF files are not read)" if path.suffix.lower() == ".gguf" else ""
        raise CheckpointError(f"{name} is a file{gguf}; {EXPECTED}")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist; {EXPECTED}")
    at = f" at revision {revision!r}" if revision else ""
    directory = _download(name, revision, wanted, progress, f"{name}{at}")
    if wanted == SETTINGS and not any((directory / file).exists() for file in CONFIGURATIONS):
        files = " (GGUF files are not read)" if _has_gguf(name, revision) else ""
        expected = f"expected {' or '.join(CONFIGURATIONS)}, as in the Hugging Face layout"
        raise CheckpointError(f"{name} has no configuration{files}; {expected}")
    return directory


def fetch_weights(model: str | Path, revision: str | None, directory: Path, progress: bool = False) -> None:
    """Fetch the weights that belong to what `locate` has fetched; a local directory has them already.

    Raises `CheckpointError` if there is no room for them, and as `locate` does.
    """
    if Path(model).expanduser().is_dir():
        return
    for wanted in WEIGHTS:
        # Not by the commit that the directory is called by: out of reach, huggingface_hub asks for each of a
        # commit's missing files again and again, and tells so.
        fetched = _download(str(model), revision, wanted, progress, str(model))
        if fetched != directory:
            raise CheckpointError(f"{model} has got another commit since it was asked for; ask again")
        if any(directory.glob(wanted)):
            return


def _download(name: str, revision: str | None, wanted: str, progress: bool, told_as: str) -> Path:
    bars = tqdm if progress and sys.stderr.isatty() else _NoBar
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


def _has_gguf(name: str, revision: str | None) -> bool:
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
