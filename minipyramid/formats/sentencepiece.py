"""Text to token ids and back by a sentencepiece model, `tokenizer.model`.

A plain `encode` gets one thing wrong: sentencepiece takes `</s>` in a text for four plain characters and does
not know tokens that were added later, so a text is split at special tokens first. Ids are turned into bytes
by one table look-up each, for decoding token by token would lose spaces and break characters that span
tokens.
"""

import re
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minipyramid.config import read_json
from minipyramid.errors import TokenizerError
from minipyramid.formats.tokenizers import check_size, prefixes_each_part
from minipyramid.tokenizer import check_unicode

# What sentencepiece writes for a space.
SPACE = "\u2581"
ANCHORS = "\n\u0001\u2603\u2e3b"


class SentencePieceTokenizer:
    """A checkpoint's `tokenizer.model`, with the tokens that its JSON files add."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Raises `TokenizerError` if a file is unreadable or does not have the model's `vocab_size`."""
        file = directory / "tokenizer.model"
        self._sp = sp = open_model(file)
        # sentencepiece sets a space before every text, but none after a character that is a piece of its own.
        # So a text that needs no space is encoded behind such an anchor, whose ids are then cut off. Several
        # are tried, since the normaliser may turn a character into a space or into nothing, and a piece may
        # join it with what follows, whose ids would be cut off with its own.
        joined = {character for i in range(sp.vocab_size()) for character in sp.id_to_piece(i)[:-1]}
        visible = (c for c in ANCHORS if "".join(sp.encode(c, out_type=str)).strip(SPACE))
        self._anchor = next((c for c in visible if c not in joined), ANCHORS[-1])
        self._anchor_length = len(sp.encode(self._anchor))
        self.bos_id: int = sp.bos_id()
        settings = read_json(directory / "tokenizer_config.json", optional=True)
        # Llama's tokenizers begin every text with the beginning-of-text token unless they say otherwise.
        self.add_bos = self.bos_id >= 0 and settings.get("add_bos_token") is not False
        self.eos_ids: tuple[int, ...] = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        self.adds_space: bool = "".join(sp.encode("a", out_type=str)).startswith(SPACE)
        beside = read_json(directory / "tokenizer.json", optional=True)
        self.adds_space_again = self.adds_space and _adds_space_again(directory, settings, beside)
        ids = range(sp.vocab_size())
        self._bytes = [_piece_bytes(sp, i) for i in ids]
        self.special_tokens = {sp.id_to_piece(i): i for i in ids if sp.is_control(i)}
        self._add_tokens(directory, settings, beside, vocab_size)
        size = len(self._bytes)
        check_size(file, size, vocab_size)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        # Without special tokens a pattern that matches nothing.
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._split = re.compile(f"({pattern})")

    def _add_tokens(
        self, directory: Path, settings: dict[str, Any], beside: dict[str, Any], vocab_size: int
    ) -> None:
        """Add the tokens that sentencepiece's model lacks, or for which the JSON files have another text."""
        older = read_json(directory / "added_tokens.json", optional=True)
        newer = settings.get("added_tokens_decoder") or {}
        # By id, the text and whether it is left out of output.
        tokens: dict[int, tuple[Any, bool]] = {}
        try:
            for content, token in older.items():
                tokens[index(token)] = content, True
            for entry in beside.get("added_tokens") or []:
                tokens[int(entry["id"])] = entry["content"], bool(entry.get("special", True))
            for token, entry in newer.items():
                tokens[int(token)] = entry["content"], bool(entry.get("special", True))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            message = f"{directory}: added tokens are malformed, expected ids with a content each"
            raise TokenizerError(message) from error
        for token, (content, silent) in sorted(tokens.items()):
            if not isinstance(content, str) or not 0 <= token < vocab_size:
                problem = f"the added token {token} is {content!r}, expected a text for a known id"
                raise TokenizerError(f"{directory}: {problem}")
            if content:
                self._bytes += [b""] * (token + 1 - len(self._bytes))
                self._bytes[token] = b"" if silent else content.encode(errors="replace")
                self.special_tokens[content] = token

    def encode(
        self, text: str, name: str = "the text", *, continues: bool = False, literal: bool = False
    ) -> list[int]:
        """Token ids of a text; arguments and errors as those of `Tokenizer.encode`."""
        check_unicode(text, name)
        ids = [self.bos_id] if self.add_bos and not continues else []
        spaced = not continues
        for part in [text] if literal else self._split.split(text):
            if part in self.special_tokens and not literal:
                ids.append(self.special_tokens[part])
                spaced = self.adds_space_again
            elif part and spaced:
                ids += self._sp.encode(part)
            elif part:
                ids += self._sp.encode(self._anchor + part)[self._anchor_length :]
        return ids

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of ids without special tokens; begins without a space unless it `continues` another."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text if continues or not self.adds_space else text.removeprefix(" ")

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token. Special tokens have none, nor have the padding rows of an embedding."""
        return self._bytes[token] if token < len(self._bytes) else b""


def open_model(file: Path) -> SentencePieceProcessor:
    """Raises `TokenizerError` if it is no sentencepiece model."""
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
        # A damaged one may load, and have pieces that are no UTF-8.
        for i in range(pieces.vocab_size()):
            pieces.id_to_piece(i)
    # TypeError stands for a path that is not Unicode.
    except (RuntimeError, OSError, TypeError, UnicodeDecodeError) as error:
        message = f"{file} is not a sentencepiece model; expected one, such as Llama 2's"
        raise TokenizerError(message) from error
    return pieces


def _adds_space_again(directory: Path, settings: dict[str, Any], beside: dict[str, Any]) -> bool:
    """Whether a text behind a special token gets a space as one at the beginning does.

    In Meta's own code it does, for that encodes each turn of a chat by itself. Where there are files of
    transformers, a `tokenizer.json` says it, or else `legacy`.
    """
    if beside:
        return prefixes_each_part(beside)
    return not (directory / "tokenizer_config.json").exists() or settings.get("legacy") is True


def _piece_bytes(sp: SentencePieceProcessor, i: int) -> bytes:
    piece: str = sp.id_to_piece(i)
    if sp.is_control(i):
        return b""
    if sp.is_unknown(i):
        return b" \xe2\x81\x87 "  # as sentencepiece writes it
    if sp.is_byte(i):
        return bytes([int(piece[1:-1], 16)])  # <0x0A>
    return piece.replace(SPACE, " ").encode()
