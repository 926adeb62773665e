"""Llama 3's own tokenizer file: a line per token, its bytes in base64 and its rank.

It becomes a `tokenizer.json` in memory. Two tokens are merged if the text of both is a token, the lowest rank
first; a word that is a token as a whole is never taken apart (`ignore_merges`), without which " Vi\u1ec7t"
would be three ids in place of one. The file does not say what it splits words by, nor its special tokens;
both are those that Meta's code gives to every Llama 3.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from minipyramid.config import read_json
from minipyramid.errors import TokenizerError
from minipyramid.formats.bpe import BpeTokenizer, byte_characters

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Behind the last rank in this order, as in Llama 3.1; Llama 3 has reserved tokens where 3.1 has names.
SPECIAL = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
    "reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"
).split()
ENDS = "end_of_text", "eom_id", "eot_id"


def read_ranks(file: Path, vocab_size: int) -> BpeTokenizer:
    """The tokenizer; the model's ids behind the last rank are its special tokens.

    Raises `TokenizerError` if the file is damaged, or has no ids left for special tokens.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise TokenizerError(f"{file} is damaged, expected a token and its rank a line") from error
    if sorted(ranks.values()) != list(range(len(lines))) or not len(ranks) + len(SPECIAL) <= vocab_size:
        expected = f"expected at most {vocab_size - len(SPECIAL)}, ranked from 0 without a gap"
        raise TokenizerError(f"{file} has {len(lines)} tokens, {expected}")
    special = _special_tokens(file.parent, len(ranks), vocab_size)
    begin = special[len(ranks)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    spec = {
        "version": "1.0",
        "added_tokens": [_added(content, token) for token, content in special.items()],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {begin: {"id": begin, "ids": [len(ranks)], "tokens": [begin]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, **_vocabulary(ranks)},
    }
    ends = tuple(len(ranks) + SPECIAL.index(name) for name in ENDS)
    return BpeTokenizer(spec, file, vocab_size, ends)


def _vocabulary(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Tokens and merges as `tokenizers` has them, bytes written as printable characters."""
    characters = byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [
        (rank, ranks[token[:i]], ranks[token[i:]], [text[token[:i]], text[token[i:]]])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return {
        "vocab": {text[token]: rank for token, rank in ranks.items()},
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _special_tokens(directory: Path, first: int, vocab_size: int) -> dict[int, str]:
    """By id; those that a `tokenizer_config.json` beside the file names have its names."""
    reserved = [f"reserved_special_token_{i}" for i in range(3, vocab_size - first - len(SPECIAL) + 3)]
    names = {first + i: f"<|{name}|>" for i, name in enumerate([*SPECIAL, *reserved])}
    given = read_json(directory / "tokenizer_config.json", optional=True).get("added_tokens_decoder")
    for token, entry in given.items() if isinstance(given, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if token.isdecimal() and int(token) in names and isinstance(content, str) and content:
            names[int(token)] = content
    return names


def _added(content: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": True, **flags}
