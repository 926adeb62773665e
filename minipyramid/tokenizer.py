"""What the engine asks of a tokenizer, and the text of a running generation, piece by piece.

Decoding token by token loses spaces and breaks characters that span tokens. So a tokenizer turns each id into
bytes, and an incremental UTF-8 decoder says how many of them are complete characters. How a checkpoint's own
tokenizer is read stands in `minipyramid/formats/`.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from minipyramid.errors import RequestError


class Tokenizer(Protocol):
    """Text to token ids and back; the rest of the engine does not know of which kind it is."""

    bos_id: int
    add_bos: bool  # whether a text begins with it
    eos_ids: tuple[int, ...]  # that end a text, for a model whose configuration names none
    adds_space: bool  # before a text that follows no other, which decoding takes away again
    adds_space_again: bool  # before a text behind a special token, too

    @property
    def special_tokens(self) -> dict[str, int]:
        """Texts that are tokens of their own, such as `</s>`, and their ids."""

    def encode(
        self, text: str, name: str = "the text", *, continues: bool = False, literal: bool = False
    ) -> list[int]:
        """Token ids of a text; if it `continues` another, without a beginning-of-text token or a space.

        `literal`: the texts of special tokens are plain text. Raises `RequestError`, which calls the text
        `name`, if it has no UTF-8 form.
        """

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of ids without special tokens; begins without a space unless it `continues` another."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token. Special tokens have none, nor have the padding rows of an embedding."""


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """A checkpoint's tokenizer; None where there is none, for the engine runs on token ids, too.

    Raises `TokenizerError` if a file is unreadable or does not have the model's `vocab_size`.
    """
    from minipyramid.formats.tokenizers import read_tokenizer

    return read_tokenizer(directory, vocab_size)


def check_unicode(text: str, name: str) -> None:
    """Raise `RequestError` for a lone surrogate, of which tokenizers' own messages say nothing of use."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is not valid Unicode ({error.reason}); give UTF-8 text") from error


class TextStream:
    """The text of a generation as it grows: whole characters, and nothing that may begin a stop string.

    `push` returns the text that became certain, `finish` the rest. Joined, they are the text up to the first
    stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Iterable[str] = (), *, at_start: bool = False
    ) -> None:
        """`at_start`: no text stands before this one, so it begins without the tokenizer's space."""
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self.at_start = at_start and tokenizer is not None and tokenizer.adds_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The end of the text, while it may begin a stop string.
        self._uncertain = ""

    def push(self, token: int) -> str:
        """Take a token; returns the text that became certain with it."""
        return self._release(self.tokenizer.token_bytes(token)) if self.tokenizer else ""

    def finish(self) -> str:
        """The rest of the text. Characters that stayed incomplete become U+FFFD."""
        text = self._release(b"", final=True) + self._uncertain
        self._uncertain = ""
        return text

    def _release(self, data: bytes, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._decoder.decode(data, final)
        if text and self.at_start:
            text = text.removeprefix(" ")
            self.at_start = False
        text = self._uncertain + text
        found = [text.index(s) for s in self.stop if s in text]
        if found:
            self.stopped = True
            self._uncertain = ""
            return text[: min(found)]
        # No stop string can begin within so many characters.
        certain = 0
        while certain < len(text) and not any(s.startswith(text[certain:]) for s in self.stop):
            certain += 1
        self._uncertain = text[certain:]
        return text[:certain]
