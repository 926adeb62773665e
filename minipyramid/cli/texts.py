"""A text to measure by, and its tokens."""

import lzma
from pathlib import Path

from minipyramid import LLM, RequestError

MOST_BYTES = 256 << 20  # of a text; what is larger, or never ends, would fill the memory


def read_text(file: str) -> str:
    """A UTF-8 text, or its .xz. Raises `RequestError` where it is none, or larger than `MOST_BYTES`."""
    try:
        with lzma.open(file) if file.endswith(".xz") else Path(file).open("rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise RequestError(f"--text {file} is larger than {MOST_BYTES >> 20} MiB; give a part of it")
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise RequestError(f"--text {file} cannot be read as UTF-8 text: {error}") from error


def read_tokens(llm: LLM, text: str, file: str, least: int) -> list[int]:
    """The text's tokens; `RequestError` where they are fewer than `least`, or cannot be told."""
    if llm.tokenizer is None:
        raise RequestError(f"{llm.directory} has no tokenizer.model, which --text needs; add it")
    tokens = llm.tokenizer.encode(text, continues=True)
    if len(tokens) < least:
        raise RequestError(f"--text {file} has {len(tokens)} tokens, expected {least} or more")
    return tokens
