"""Text to token ids and back by a `tokenizer.json`, through the `tokenizers` library.

Its ids are the library's. What the library does not do is done here: text that follows other text gets no
space in front, the texts of special tokens can be left unrecognised, and each token has its own bytes, which
a text that streams needs. All three are read off the file's JSON.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from minipyramid.config import read_json
from minipyramid.errors import TokenizerError
from minipyramid.formats.tokenizers import check_size, parts_of, prefixes_each_part
from minipyramid.tokenizer import check_unicode

Fields = dict[str, Any]
SPACE = "\u2581"  # what sentencepiece, and files that were made from its models, write for a space
# Decoders whose tokens are bytes written as printable characters, and those whose tokens are text.
BYTES, TEXT = {"ByteLevel"}, {"ByteFallback", "Metaspace", "Replace"}


class BpeTokenizer:
    """A checkpoint's `tokenizer.json`, or what was made of another file in its form."""

    def __init__(self, spec: Fields, file: Path, vocab_size: int, eos_ids: tuple[int, ...] = ()) -> None:
        """`spec` is the JSON.

        Raises `TokenizerError` if it cannot be used or does not have the model's `vocab_size`.
        """
        self._spec, self._file = spec, file
        self._libraries: dict[tuple[bool, bool], Library] = {}
        try:
            library = self._library(prefixed=True, literal=False)
            size = 1 + max(library.get_vocab(with_added_tokens=True).values())
            added = library.get_added_tokens_decoder()
            check_size(file, size, vocab_size)
            self._bytes = self._table(library, size)
            first = self._ids(library, "a")[:1]
        except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
            raise TokenizerError(f"{file} is damaged ({type(error).__name__}); fetch it again") from error
        for token, entry in added.items():
            self._bytes[token] = b"" if entry.special else entry.content.encode(errors="replace")
        self.special_tokens: dict[str, int] = {entry.content: token for token, entry in added.items()}
        settings = read_json(file.parent / "tokenizer_config.json", optional=True)
        begin = self._ids(library, "", specials=True)
        self.bos_id: int = self._named(settings, "bos_token", begin[0] if begin else -1)
        if self.bos_id >= vocab_size:
            told = f"{file} begins texts with the token {self.bos_id}, and the model has {vocab_size}"
            raise TokenizerError(f"{told}; fetch it again")
        wanted = settings.get("add_bos_token")
        self.add_bos = self.bos_id >= 0 and (begin[:1] == [self.bos_id] if wanted is None else wanted is True)
        end = self._named(settings, "eos_token", -1)
        self.eos_ids = eos_ids or ((end,) if end >= 0 else ())
        self.adds_space = not self._is_bytes and self.decode(first, continues=True).startswith(" ")
        self.adds_space_again = self.adds_space and prefixes_each_part(spec)

    def _named(self, settings: Fields, name: str, default: int) -> int:
        """The id of a token that `tokenizer_config.json` gives as a text, or as an object with one."""
        given = settings.get(name)
        content = given.get("content") if isinstance(given, dict) else given
        return self.special_tokens.get(content, default) if isinstance(content, str) else default

    def _library(self, *, prefixed: bool, literal: bool) -> Library:
        """The library's tokenizer, made when it is first asked for.

        `prefixed`: with the space that the file sets before a text. `literal`: special tokens are plain text.
        """
        key = (prefixed, literal)
        if key not in self._libraries:
            spec = self._spec if prefixed else {**self._spec, **_without_prefix(self._spec)}
            spec = {**spec, "added_tokens": []} if literal else spec
            # A file may say to pad or cut texts, or to leave merges out at random, which only a training run
            # would want.
            spec = {**spec, "truncation": None, "padding": None}
            if isinstance(spec.get("model"), dict) and spec["model"].get("dropout"):
                spec["model"] = {**spec["model"], "dropout": None}
            try:
                self._libraries[key] = Library.from_str(json.dumps(spec))
            except Exception as error:  # the library raises no class of its own
                why = " ".join(str(error).split())
                raise TokenizerError(f"{self._file} is no tokenizer that can be read ({why})") from error
        return self._libraries[key]

    def _table(self, library: Library, size: int) -> list[bytes]:
        """Each token's bytes."""
        decoders = {part.get("type") for part in parts_of(self._spec.get("decoder"), "decoders")}
        self._is_bytes = bool(decoders & BYTES)
        if not decoders & (BYTES | TEXT):
            shown = ", ".join(map(str, decoders)) or "none"
            expected = f"expected one of {', '.join(sorted(BYTES | TEXT))}"
            raise TokenizerError(f"{self._file}: the decoder {shown} is not implemented; {expected}")
        pieces = (library.id_to_token(i) or "" for i in range(size))
        if self._is_bytes:
            byte_of = {character: byte for byte, character in byte_characters().items()}
            return [_from_characters(piece, byte_of) for piece in pieces]
        return [_from_text(piece) for piece in pieces]

    def encode(
        self, text: str, name: str = "the text", *, continues: bool = False, literal: bool = False
    ) -> list[int]:
        """Token ids of a text; arguments and errors as those of `Tokenizer.encode`."""
        check_unicode(text, name)
        library = self._library(prefixed=not (continues and self.adds_space), literal=literal)
        ids = self._ids(library, text)
        return [self.bos_id, *ids] if self.add_bos and not continues else ids

    def _ids(self, library: Library, text: str, *, specials: bool = False) -> list[int]:
        try:
            ids: list[int] = library.encode(text, add_special_tokens=specials).ids
        except Exception as error:  # the library raises no class of its own
            raise TokenizerError(
                f"{self._file} cannot take in {text!r:.60} ({error}); fetch it again"
            ) from error
        return ids

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of ids without special tokens; begins without a space unless it `continues` another."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text if continues or not self.adds_space else text.removeprefix(" ")

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token. Special tokens have none, nor have the padding rows of an embedding."""
        return self._bytes[token] if token < len(self._bytes) else b""


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 had it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _from_characters(piece: str, byte_of: dict[str, int]) -> bytes:
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return piece.encode()  # as the library reads a token that was added as text


def _from_text(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _without_prefix(spec: Fields) -> Fields:
    """The parts of a `tokenizer.json` that set a space before a text, but now do not."""
    normalizers = [p for p in parts_of(spec.get("normalizer"), "normalizers") if p.get("type") != "Prepend"]
    splits = [
        {**part, "prepend_scheme": "never"} if part.get("type") == "Metaspace" else part
        for part in parts_of(spec.get("pre_tokenizer"), "pretokenizers")
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
    }
