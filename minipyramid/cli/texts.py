"""A text to measure by, and its tokens."""

import lzma
from pathlib import Path
from typing import IO

from minipyramid import RequestError
from minipyramid.tokenizer import load_tokenizer

MOST_BYTES = 256 << 20  # of a text; what is larger, or never ends, would fill the memory


def read_text(file: str) -> str:
    """A UTF-8 text, or its .xz. Raises `RequestError` where it is no text, or larger than `MOST_BYTES`."""
    try:
        with lzma.open(file) if file.endswith(".xz") else Path(file).open("rb") as opened:
            return read_at_most(opened, MOST_BYTES, f"--text {file}", "give a part of it").decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise RequestError(f"--text {file} cannot be read as UTF-8 text: {error}") from error


def read_at_most(file: IO[bytes], most: int, name: str, way_out: str) -> bytes:
    """All of a file; `RequestError` where it is larger than `most` bytes, or never ends."""
    data = file.read(most + 1)
    if len(data) > most:
        raise RequestError(f"{name} is larger than {most >> 20} MiB; {way_out}")
    return data


def read_tokens(directory: Path, vocab_size: int, text: str, file: str, least: int) -> list[int]:
    """The text's tokens, by the tokenizer of a checkpoint's directory, before its weights are read.

    Raises `RequestError` where they are fewer than `least`, or there is no tokenizer.
    """
    tokenizer = load_tokenizer(directory, vocab_size)
    if tokenizer is None:
        raise RequestError(
            f"{directory} has no tokenizer.model or tokenizer.json, which --text needs; add it"
        )
    tokens = tokenizer.encode(text, continues=True)
    if len(tokens) < least:
        raise RequestError(f"--text {file} has {len(tokens)} tokens, expected {least} or more")
    return tokens
