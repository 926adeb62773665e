"""Which file a checkpoint's tokenizer is read from."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipyramid.config import read_json
from minipyramid.errors import CheckpointError, TokenizerError
from minipyramid.tokenizer import Tokenizer


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """A sentencepiece model, else `tokenizer.json`, else Llama 3's rank file; None where there is none.

    sentencepiece comes first since it is what a `tokenizer.json` beside it was made from.

    Raises `TokenizerError` if the file cannot be read, or if the package that reads it is missing.
    """
    model, file = directory / "tokenizer.model", directory / "tokenizer.json"
    has_ranks = False
    if model.is_file():
        # Here, since the package that reads rank files may be missing.
        try:
            with model.open("rb") as opened:
                first = opened.readline(1000).split()
        except OSError as error:
            raise TokenizerError(f"{model} cannot be read ({error}); fetch it again") from error
        # A line of it is a token in base64 and its rank; a sentencepiece model begins with a line break.
        has_ranks = len(first) == 2 and first[1].isdigit()
        if not has_ranks:
            from minipyramid.formats.sentencepiece import SentencePieceTokenizer

            return SentencePieceTokenizer(directory, vocab_size)
    if file.is_file():
        _check_package(file)
        from minipyramid.formats.bpe import BpeTokenizer

        try:
            spec = read_json(file, holds="a tokenizer")
        except CheckpointError as error:
            raise TokenizerError(str(error)) from error
        return BpeTokenizer(spec, file, vocab_size)
    if has_ranks:
        _check_package(model)
        from minipyramid.formats.ranks import read_ranks

        return read_ranks(model, vocab_size)
    return None


def check_size(file: Path, size: int, vocab_size: int) -> None:
    """Raise `TokenizerError` unless a tokenizer of so many tokens may be the model's.

    Embeddings are padded to a round number of rows: hardly by 512 or more, and large ones by a fortieth.
    """
    if not vocab_size - max(512, vocab_size // 32) < size <= vocab_size:
        expected = f"but the model has {vocab_size}; expected the model's own"
        raise TokenizerError(f"{file} has {size} tokens, {expected}")


def parts_of(given: Any, name: str) -> list[dict[str, Any]]:
    """The members of a sequence of normalizers, pre-tokenizers or decoders, or the single one."""
    if not isinstance(given, dict):
        return []
    parts = given.get(name, []) if given.get("type") == "Sequence" else [given]
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def prefixes_each_part(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` sets a space also before what follows a special token.

    The library takes each part between special tokens by itself; only the scheme "first" looks where it is.
    """
    prepends = any(part.get("type") == "Prepend" for part in parts_of(spec.get("normalizer"), "normalizers"))
    splits = parts_of(spec.get("pre_tokenizer"), "pretokenizers")
    schemes = [part.get("prepend_scheme", "always") for part in splits if part.get("type") == "Metaspace"]
    return prepends or "always" in schemes


def _check_package(file: Path) -> None:
    if find_spec("tokenizers") is None:
        install = "pip install 'minipyramid[bpe]'"
        raise TokenizerError(f"{file} needs the package tokenizers, which is not installed; {install}")
