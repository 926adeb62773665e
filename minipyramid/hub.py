"""Where a checkpoint lies: a directory, or a hub repository that is fetched into huggingface_hub's cache.

Cache, token, endpoint and offline settings are those of huggingface_hub. Only what the engine reads is
fetched (`minipyramid/fetch.py`): first what is small and can be looked at, then weights.
"""

from pathlib import Path

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
SHAPE = "shape:"  # before the name of a shape that is known without weights (`cli/shapes.py`)
EXPECTED = "expected a checkpoint's directory or a hub repository id"


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
    if name.startswith(SHAPE):
        raise CheckpointError(
            f"{name} has no weights; plan it (--plan), or measure it with minipyramid.bench"
        )
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist; {EXPECTED}")
    from minipyramid.fetch import download, has_gguf  # a directory does without

    at = f" at revision {revision!r}" if revision else ""
    directory = download(name, revision, wanted, progress, f"{name}{at}")
    if wanted == SETTINGS and not any((directory / file).exists() for file in CONFIGURATIONS):
        files = " (GGUF files are not read)" if has_gguf(name, revision) else ""
        expected = f"expected {' or '.join(CONFIGURATIONS)}, as in the Hugging Face layout"
        raise CheckpointError(f"{name} has no configuration{files}; {expected}")
    return directory


def fetch_weights(model: str | Path, revision: str | None, directory: Path, progress: bool = False) -> None:
    """Fetch the weights that belong to what `locate` has fetched; a local directory has them already.

    Raises `CheckpointError` if there is no room for them, and as `locate` does.
    """
    if Path(model).expanduser().is_dir():
        return
    from minipyramid.fetch import download

    for wanted in WEIGHTS:
        # Not by the commit that the directory is called by: out of reach, huggingface_hub asks for each of a
        # commit's missing files again and again, and tells so.
        fetched = download(str(model), revision, wanted, progress, str(model))
        if fetched != directory:
            raise CheckpointError(f"{model} has got another commit since it was asked for; ask again")
        if any(directory.glob(wanted)):
            return
