"""Tokenizers of every kind against the libraries that they come from, on thousands of texts."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import tokenizers
from helpers import train_pieces, write_checkpoint
from tokenizer_files import LANGUAGES, SPECIALS, WORDS, trained, write_json, write_llama2_json, write_pieces
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minipyramid import LLM, SamplingParams, TokenizerError
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.tokenizer import TextStream, Tokenizer, load_tokenizer


@functools.cache
def texts() -> list[str]:
    """More than 3,000: prose, languages, emoji, code, white space, special tokens, random ones, long ones."""
    lots = random.Random(0)
    prose = DEFAULT_TEXT.read_text(encoding="utf-8")
    code = Path(__file__).read_text(encoding="utf-8")
    listed = ["", " ", "\n", "a", " a", "  a", "a ", "\n\n a", "1234567", "'s 'S 'Ll", "\u2581a", "<0x41>"]
    for source, count in ((prose, 1100), (code, 500), ("".join(LANGUAGES), 1200)):
        for _ in range(count):
            start = lots.randrange(len(source))
            listed.append(source[start : start + lots.choice([3, 10, 40, 120])])
    letters = [
        *"\t\n\r  \u00a0'.-_0123456789aZ\u00df\u4eca\u0301",
        "\U0001f98a",
        "\u200d",
        "<|",
        "|>",
        "</s>",
    ]
    listed += ["".join(lots.choices(letters, k=lots.randrange(1, 25))) for _ in range(700)]
    pieces = [*SPECIALS, "<s>", "</s>", "<unk>", " ", "\n", "fox", " fox "]
    listed += ["".join(lots.choices(pieces, k=lots.randrange(1, 6))) for _ in range(300)]
    return list(dict.fromkeys([*listed, prose[:20_000], code, " " * 500, "ab" * 1000]))


@functools.cache
def ranks() -> dict[bytes, int]:
    """The tokens of the trained one as bytes; the alphabet comes first, then merges in their order."""
    byte_of = {c: b for b, c in _gpt2_characters().items()}
    vocab = trained().get_vocab(with_added_tokens=False)
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()}


def _gpt2_characters() -> dict[int, str]:
    """As in GPT-2's own code: bytes that print stand for themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def by_ranks(text: str, special: bool = True) -> list[int]:
    """tiktoken's algorithm, slowly: split, then merge the pair with the lowest rank until there is none."""
    ids: list[int] = []
    pattern = "|".join(map(regex.escape, SPECIALS)) if special else "(?!)"
    for part in regex.split(f"({pattern})", text):
        if special and part in SPECIALS:
            ids.append(len(ranks()) + SPECIALS.index(part))
            continue
        for word in regex.findall(WORDS, part):
            ids += ranks_of(word)
    return ids


@functools.cache
def ranks_of(word: str) -> list[int]:
    """The merges of one word of a text."""
    table, pieces = ranks(), [bytes([b]) for b in word.encode()]
    while len(pieces) > 1:
        pairs = [table.get(a + b, 1 << 30) for a, b in itertools.pairwise(pieces)]
        best = min(pairs)
        if best == 1 << 30:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [table[piece] for piece in pieces]


def write_ranks(directory: Path) -> int:
    """Llama 3's own `tokenizer.model`; returns the vocabulary's size."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items()]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return len(lines) + len(SPECIALS)


KINDS: dict[str, Callable[[Path], int]] = {
    "tokenizer.json": write_json,
    "rank file": write_ranks,
    "sentencepiece": write_pieces,
    "Llama 2's tokenizer.json": write_llama2_json,
    "Llama 2's, legacy": functools.partial(write_llama2_json, legacy=True),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def written(kind: str, directory: Path) -> int:
    directory.mkdir()
    return KINDS[kind](directory)


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "checkpoint"
    written(kind, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(kind: str, directory: Path) -> Tokenizer:
    loaded = load_tokenizer(directory, written(kind, directory))
    assert loaded
    return loaded


def reference(kind: str, directory: Path) -> Callable[[str], list[int]]:
    """Ids of a text by the library that the file comes from."""
    if kind == "rank file":
        return lambda text: [len(ranks()), *by_ranks(text)]
    if kind == "sentencepiece":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        return lambda text: [1, *pieces.encode(text)]
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda text: list(library.encode(text).ids)


def test_ids_equal_the_references_on_thousands_of_texts(
    kind: str, directory: Path, tokenizer: Tokenizer
) -> None:
    expected = reference(kind, directory)
    # Of sentencepiece's own marks its library knows nothing; tests/test_chat.py has them.
    marks = ("<s>", "</s>") if kind == "sentencepiece" else ()
    compared = [text for text in texts() if not any(mark in text for mark in marks)]
    assert len(compared) >= 3000
    for text in compared:
        assert tokenizer.encode(text) == expected(text), repr(text[:80])


def test_ids_equal_transformers(kind: str, directory: Path, tokenizer: Tokenizer) -> None:
    """With what transformers adds to a text by itself."""
    if kind == "tokenizer.json":
        theirs: Any = AutoTokenizer.from_pretrained(directory)
    elif "json" in kind:
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    else:
        pytest.skip("transformers makes another tokenizer of this file")
    for text in texts()[::5]:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], repr(text[:80])


def test_streamed_text_equals_decoded_text(kind: str, directory: Path, tokenizer: Tokenizer) -> None:
    """And both equal what the library decodes, and the text itself."""
    if kind == "sentencepiece":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        decode: Callable[[list[int]], str] = pieces.decode
    elif kind == "rank file":
        bytes_of = {rank: token for token, rank in ranks().items()}
        decode = lambda ids: b"".join(bytes_of.get(i, b"") for i in ids).decode(errors="replace")  # noqa: E731
    else:
        library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        decode = functools.partial(library.decode, skip_special_tokens=True)
    for text in texts():
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer, at_start=True)
        streamed = "".join(map(stream.push, ids)) + stream.finish()
        assert streamed == tokenizer.decode(ids)
        if not any(special in text for special in tokenizer.special_tokens):
            assert streamed == decode(ids)
            assert streamed == as_written(text, kind, tokenizer)


def as_written(text: str, kind: str, tokenizer: Tokenizer) -> str:
    """What can be had back of a text: where a sign is written for a space, it cannot be told from one."""
    spaced = text.replace("\u2581", " ") if tokenizer.adds_space else text
    # This file has the library set a space before a text unless it begins with one, and always take one away.
    return spaced.removeprefix(" ") if kind == "Llama 2's tokenizer.json" else spaced


def test_what_continues_a_text_gets_no_space_and_no_beginning(tokenizer: Tokenizer) -> None:
    for text in texts()[::7]:
        ids = tokenizer.encode(text, continues=True, literal=True)
        expected = text.replace("\u2581", " ") if tokenizer.adds_space else text
        assert tokenizer.decode(ids, continues=True) == expected


def test_no_special_token_is_recognised_in_literal_text(kind: str, tokenizer: Tokenizer) -> None:
    specials = set(tokenizer.special_tokens.values())
    everything = "".join(tokenizer.special_tokens) + " fox ".join(tokenizer.special_tokens)
    for text in [everything, *texts()[-304:]]:
        for continues in (False, True):
            ids = tokenizer.encode(text, continues=continues, literal=True)
            ids = ids[1:] if tokenizer.add_bos and not continues else ids
            assert not specials & set(ids)
            spaced = text.replace("\u2581", " ") if tokenizer.adds_space else text
            expected = spaced if continues else as_written(text, kind, tokenizer)
            assert tokenizer.decode(ids, continues=continues) == expected
            if kind == "rank file":
                assert ids == by_ranks(text, special=False)


def test_a_word_that_is_a_token_is_never_taken_apart(tmp_path: Path) -> None:
    """Merges alone cannot always build it (`ignore_merges`): " Viet" was three ids in place of one."""
    size = write_ranks(tmp_path)
    table = [token for token, _ in sorted(ranks().items(), key=lambda item: item[1])]
    lines = [*table, b"qzqzq"]  # no part of it is a token
    listed = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(lines))
    (tmp_path / "tokenizer.model").write_text(listed)
    tokenizer = load_tokenizer(tmp_path, size + 1)
    assert tokenizer
    assert tokenizer.encode("qzqzq", continues=True) == [len(table)]


def test_a_rank_file_ends_a_text_in_three_ways_and_takes_names_from_the_settings(tmp_path: Path) -> None:
    size = write_ranks(tmp_path)
    first = size - len(SPECIALS)
    given = {"added_tokens_decoder": {str(first + 2): {"content": "<|mine|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    tokenizer = load_tokenizer(tmp_path, size + 3)
    assert tokenizer
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert tokenizer.eos_ids == tuple(first + SPECIALS.index(name) for name in ends)
    assert tokenizer.special_tokens["<|mine|>"] == first + 2
    assert tokenizer.special_tokens["<|reserved_special_token_5|>"] == size + 2


@pytest.mark.parametrize("wanted", [None, True, False])
def test_a_text_begins_as_the_checkpoint_says(tmp_path: Path, wanted: bool | None) -> None:
    size = write_json(tmp_path)
    settings = {"bos_token": {"content": SPECIALS[0]}, "eos_token": "<|eot_id|>", "add_bos_token": wanted}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, size)
    assert tokenizer
    begins = tokenizer.encode("fox")[0] == tokenizer.special_tokens[SPECIALS[0]] == tokenizer.bos_id
    assert begins == (wanted is not False)
    assert tokenizer.eos_ids == (tokenizer.special_tokens["<|eot_id|>"],)


def test_a_checkpoint_with_a_tokenizer_json_writes_texts(tmp_path: Path) -> None:
    """And ends them where the tokenizer's files say so, if its configuration does not."""
    write_checkpoint(tmp_path, vocab_size=write_json(tmp_path), eos_token_id=None)
    llm = LLM(tmp_path)
    assert llm.tokenizer
    assert llm.engine.eos_ids == llm.tokenizer.eos_ids == (llm.tokenizer.special_tokens["<|eot_id|>"],)
    params = SamplingParams(max_new_tokens=20, temperature=1.5, seed=1)
    (completion,) = llm.generate("The fox", params)
    assert "".join(llm.stream("The fox", params)) == completion.text
    assert completion.prompt_token_ids == trained().encode("The fox").ids


def test_an_added_token_that_is_not_special_is_text(tmp_path: Path) -> None:
    size = write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": size, "content": "<think>", "special": False, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path, size + 1)
    assert tokenizer
    ids = tokenizer.encode("a<think>b<|eot_id|>")
    assert size in ids
    assert tokenizer.decode(ids) == "a<think>b"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder WordPiece"),
        ({"decoder": None}, "decoder none"),
        ({"model": {"type": "BPE"}}, "no tokenizer that can be read"),
        ({"model": 5}, "no tokenizer that can be read"),
        ({"added_tokens": "x"}, "no tokenizer that can be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_run_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    size = write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(TokenizerError, match=word):
        load_tokenizer(tmp_path, size)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    size = write_json(tmp_path)
    for vocab_size in (size - 1, size + 512):
        with pytest.raises(TokenizerError, match=f"has {size} tokens"):
            load_tokenizer(tmp_path, vocab_size)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path, size)


def test_a_text_that_the_library_cannot_take_in_is_told(tmp_path: Path) -> None:
    """It was the library's own Exception: a batch died of it, and could not be resumed."""
    spec = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "[UNK]")).to_str())
    spec |= {
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path, 1)
    assert tokenizer is not None
    assert tokenizer.encode("a") == [0]
    with pytest.raises(TokenizerError, match=r"cannot take in 'hello' .*UNK"):
        tokenizer.encode("hello")


@pytest.mark.parametrize("write", [write_json, write_ranks])
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    tmp_path: Path, write: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = write(tmp_path)
    monkeypatch.setattr("minipyramid.formats.tokenizers.find_spec", lambda _: None)
    with pytest.raises(TokenizerError, match=r"pip install 'minipyramid\[bpe\]'"):
        load_tokenizer(tmp_path, size)


def test_a_damaged_rank_file_is_refused(tmp_path: Path) -> None:
    size = write_ranks(tmp_path)
    file = tmp_path / "tokenizer.model"
    whole = file.read_text()
    for damaged, word in (
        (whole.replace(" 7\n", " 8\n"), "ranked from 0"),
        (whole + "AA", "a token and its rank"),
        (whole + "!! 9\n", "a token and its rank"),
    ):
        file.write_text(damaged)
        with pytest.raises(TokenizerError, match=word):
            load_tokenizer(tmp_path, size)
    file.write_text(whole)
    with pytest.raises(TokenizerError, match="expected at most"):
        load_tokenizer(tmp_path, size - 1)


def test_no_line_break_is_lost_where_a_piece_has_several(tmp_path: Path) -> None:
    """What stood behind a special token lost its first characters with the anchor that a piece had joined."""
    train_pieces(tmp_path, user_defined_symbols=["\n\n", "\n "])
    tokenizer = load_tokenizer(tmp_path, 320)
    assert tokenizer
    for text in ("\n", "\nfox", "\n\nfox", "\n fox", "\n\n\n", "fox\n\n"):
        ids = tokenizer.encode(text, continues=True)
        assert tokenizer.decode(ids, continues=True) == text


def test_merges_are_not_left_out_at_random(tmp_path: Path) -> None:
    """A file that says so, for training, gave one prompt other tokens every time."""
    size = write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path, size)
    assert tokenizer
    assert len({tuple(tokenizer.encode("Once upon a time there was")) for _ in range(9)}) == 1


def test_a_sentencepiece_model_with_pieces_that_are_no_text_is_refused(tmp_path: Path) -> None:
    """It used to end in a UnicodeDecodeError, at the first prompt or at the first word of an answer."""
    file = train_pieces(tmp_path)
    data = file.read_bytes()
    at = data.index("\u2581the".encode())
    file.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path, 320)


def test_damaged_tokenizer_files_end_in_one_line(tmp_path: Path) -> None:
    """Bytes changed at random, and files cut short: read as a tokenizer, or refused by a TokenizerError."""
    size, lots = write_json(tmp_path), random.Random(0)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(lots.choice([1, 3])):
            data[lots.randrange(len(data))] = lots.choice(b'"{}[]0:,x\xff')
        file.write_bytes(bytes(data[: lots.randrange(len(data))] if lots.random() < 0.2 else data))
        try:
            loaded = load_tokenizer(tmp_path, size)
            assert loaded
            loaded.decode(loaded.encode("a text"))
        except TokenizerError:
            continue


def test_a_beginning_that_the_model_does_not_know_is_told(tmp_path: Path) -> None:
    """Every text was refused, for a token that nobody had given."""
    size = write_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    special = {"<far>": {"id": "<far>", "ids": [9999], "tokens": ["<far>"]}}
    begin = [{"SpecialToken": {"id": "<far>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": begin, "pair": begin * 2}
    spec["post_processor"] |= {"special_tokens": special}
    spec["post_processor"]["pair"][3] = {"Sequence": {"id": "B", "type_id": 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="begins texts with the token 9999"):
        load_tokenizer(tmp_path, size)
