"""Text to token ids and back, by sentencepiece, and the text of a running generation, piece by piece.

Two things that a plain `encode` and `decode` get wrong are handled here. sentencepiece takes `</s>` in a text for
four plain characters and knows no tokens that were added later, so texts are split on special tokens first. And
decoding token by token loses spaces and breaks characters that span tokens, so ids are turned into bytes, one table
look-up each, and an incremental UTF-8 decoder says how much of them is text already.
"""

import codecs
import re
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minipyramid.config import read_json
from minipyramid.errors import RequestError, TokenizerError


class Tokenizer:
    """A checkpoint's `tokenizer.model`, with what `added_tokens.json` and `tokenizer_config.json` lay over it."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Raises `TokenizerError` where a file is unreadable or has not the model's `vocab_size`."""
        file = directory / "tokenizer.model"
        try:
            self._sp = sp = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, TypeError) as error:  # the last for a path that is no Unicode
            raise TokenizerError(f"{file} is not a sentencepiece model; expected one, such as Llama 2's") from error
        # sentencepiece sets a space before every text, but not after a character that is a piece of its own.
        apart = (c for c in "\n\u0001\u2603\u2e3b" if "".join(sp.encode(c, out_type=str)).strip("\u2581"))
        self._anchor = next(apart, "\u2e3b")
        self.bos_id: int = sp.bos_id()
        settings = read_json(directory / "tokenizer_config.json", optional=True)
        # Llama's tokenizers begin every text with the beginning-of-text token unless they say otherwise.
        self.add_bos = self.bos_id >= 0 and settings.get("add_bos_token") is not False
        self._bytes = [_piece_bytes(sp, i) for i in range(sp.vocab_size())]
        self._special = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        for token, content, silent in _added_tokens(directory, settings, vocab_size):
            self._bytes += [b""] * (token + 1 - len(self._bytes))
            self._bytes[token] = b"" if silent else content.encode()
            self._special[content] = token
        longest_first = sorted(self._special, key=len, reverse=True)
        # Embeddings are often padded to a round number of rows, but not by more than this.
        if not vocab_size - 512 < (size := len(self._bytes)) <= vocab_size:
            raise TokenizerError(f"{file} has {size} tokens, but the model has {vocab_size}; expected the model's own")
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str, name: str = "the text", *, continues: bool = False) -> list[int]:
        """Token ids of a text; one that `continues` another gets no beginning-of-text token and no space before it.

        Raises `RequestError`, calling it `name`, for text that has no UTF-8 form.
        """
        try:
            text.encode()  # sentencepiece's own word for a lone surrogate is no help
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} is not valid Unicode ({error.reason}); give UTF-8 text") from error
        ids = [self.bos_id] if self.add_bos and not continues else []
        for i, part in enumerate(self._split.split(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif part and (i or continues):  # inside a text
                ids += self._sp.encode(self._anchor + part)[len(self._sp.encode(self._anchor)) :]
            elif part:
                ids += self._sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of ids, special tokens left out; unless it `continues` another, the space before it is dropped."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text if continues else text.removeprefix(" ")

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token; none for a special one and for the padding rows of an embedding."""
        return self._bytes[token] if token < len(self._bytes) else b""


def _piece_bytes(sp: SentencePieceProcessor, i: int) -> bytes:
    piece: str = sp.id_to_piece(i)
    if sp.is_control(i):
        return b""
    if sp.is_unknown(i):
        return b" \xe2\x81\x87 "  # as sentencepiece writes it
    if sp.is_byte(i):
        return bytes([int(piece[1:-1], 16)])  # <0x0A>
    return piece.replace("\u2581", " ").encode()


def _added_tokens(directory: Path, settings: dict[str, Any], vocab_size: int) -> list[tuple[int, str, bool]]:
    """(id, text, whether it is silent in output) of every token beyond the sentencepiece model."""
    older = read_json(directory / "added_tokens.json", optional=True)
    newer = settings.get("added_tokens_decoder") or {}
    try:
        tokens = {index(token): (content, True) for content, token in older.items()}
        tokens |= {int(token): (entry["content"], bool(entry.get("special", True))) for token, entry in newer.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(f"{directory}: added tokens are malformed, expected ids with a content each") from error
    for token, (content, _) in tokens.items():
        if not isinstance(content, str) or not 0 <= token < vocab_size:
            raise TokenizerError(f"{directory}: the added token {token} is {content!r}, expected a text for a known id")
    return [(token, content, silent) for token, (content, silent) in sorted(tokens.items()) if content]


class TextStream:
    """The text of a generation as it grows: whole characters, and nothing that may turn out to be a stop string.

    `push` returns what became certain, `finish` the rest; joined they are the text up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Iterable[str] = (), *, at_start: bool = False) -> None:
        """`at_start`: nothing stands before this text, so it begins without a space."""
        self.tokenizer, self.stop, self.at_start = tokenizer, tuple(stop), at_start
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; returns the text that became certain with it."""
        return self._release(self.tokenizer.token_bytes(token)) if self.tokenizer else ""

    def finish(self) -> str:
        """Characters that stayed incomplete come out as U+FFFD."""
        text = self._release(b"", final=True) + self._held
        self._held = ""
        return text

    def _release(self, data: bytes, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._decoder.decode(data, final)
        if self.at_start and text:
            text, self.at_start = text.removeprefix(" "), False
        self._held += text
        found = [at for at in (self._held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        ends = ((s[:n], n) for s in self.stop for n in range(1, min(len(s), len(self._held) + 1)))
        keep = max((n for beginning, n in ends if self._held.endswith(beginning)), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text
