"""Text to ids and back, and the text of a running generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers import WEIGHTS, train_pieces, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minipyramid import LLM, RequestError, SamplingParams, TokenizerError
from minipyramid.formats.sentencepiece import SentencePieceTokenizer
from minipyramid.formats.tokenizers import check_size
from minipyramid.tokenizer import TextStream, Tokenizer

ADDED = {"<|im_start|>": True, "<think>": False}


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return SentencePieceTokenizer(tiny_dir, 320)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@given(text=TEXTS)
@example(text=" two  spaces ")
@example(text="\n\nline\tand caf\u00e9 \U0001f98a\u200d\U0001f525")
@settings(deadline=None)
def test_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    if "<s>" not in text and "</s>" not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, continues=True), continues=True) == text


@given(text=TEXTS)
@settings(deadline=None)
def test_ids_are_those_of_sentencepiece(tokenizer: Tokenizer, tiny_dir: Path, text: str) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model"))
    if "<s>" not in text and "</s>" not in text:
        assert tokenizer.encode(text) == [1, *plain.encode(text)]


def test_special_tokens_in_a_text_are_tokens(tokenizer: Tokenizer) -> None:
    """sentencepiece takes `</s>` for letters; a chat's end of turn would never be seen."""
    ids = tokenizer.encode("the fox</s><s>went")
    assert tokenizer.adds_space_again  # for no file of transformers' is there
    assert ids == [*tokenizer.encode("the fox"), 2, 1, *tokenizer.encode("went")[1:]]
    assert tokenizer.decode(ids) == "the fox went"


def test_added_tokens_are_laid_over_the_model(tiny_dir: Path, tmp_path: Path) -> None:
    """sentencepiece raises IndexError for an id beyond its table."""
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    size = sentencepiece.SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model")).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size}))
    decoder = {
        str(size + 2): {"content": "<think>", "special": False},
        "2": {"content": "</s>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "add_bos_token": False})
    )
    tokenizer = SentencePieceTokenizer(tmp_path, size + 3)
    ids = tokenizer.encode("<|user|>the fox<think>went")
    assert ids[0] == size
    assert size + 2 in ids
    assert tokenizer.decode(ids) == "the fox<think>went"
    assert tokenizer.decode([size + 1, 10_000]) == ""


def test_tokens_that_a_json_file_beside_it_adds_are_known(tmp_path: Path) -> None:
    """A fine-tune saved by transformers 5 has them nowhere else, and its marks of turns were plain text."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(train_pieces(tmp_path))).vocab_size()
    added = [{"id": size + i, "content": c, "special": s} for i, (c, s) in enumerate(ADDED.items())]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "normalizer": None}))
    tokenizer = SentencePieceTokenizer(tmp_path, size + 2)
    ids = tokenizer.encode("<|im_start|>the fox<think>")
    assert (ids[1], ids[-1]) == (size, size + 1)
    assert tokenizer.decode(ids) == "the fox<think>"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": size}]}))
    with pytest.raises(TokenizerError, match="added tokens are malformed"):
        SentencePieceTokenizer(tmp_path, size + 2)


def test_embeddings_may_be_padded(tmp_path: Path) -> None:
    """By a fortieth of them in DeepSeek's first, whose tokenizer was refused."""
    file = tmp_path / "tokenizer.json"
    check_size(file, 100_015, 102_400)
    check_size(file, 320, 320 + 511)
    for size, vocab_size in ((100_015, 104_000), (320, 320 + 512), (321, 320)):
        with pytest.raises(TokenizerError, match=f"has {size} tokens, but the model has {vocab_size}"):
            check_size(file, size, vocab_size)


def test_ids_equal_those_of_transformers_for_the_embedded_tokenizer() -> None:
    """Against sentencepiece itself, on real text with quotes, numbers, line breaks and repeated spaces."""
    if not (WEIGHTS / "tokenizer.model").exists():
        pytest.skip("no embedded checkpoint in this tree")
    text = 'Nora paid 47 coins.\n"Who?"  said the  fox \u2014 \u00e9t\u00e9.'
    plain = sentencepiece.SentencePieceProcessor(model_file=str(WEIGHTS / "tokenizer.model"))
    assert SentencePieceTokenizer(WEIGHTS, 4096).encode(text) == [1, *plain.encode(text)]
    assert (
        SentencePieceTokenizer(WEIGHTS, 4096).decode(plain.encode(text))
        == plain.decode(plain.encode(text))
        == text
    )


@given(text=TEXTS, stop=st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2))
@example(text="caf\u00e9 \U0001f98a", stop=[])
@example(text="aab", stop=["ab", "b"])
@settings(deadline=None)
def test_streamed_pieces_join_to_the_text_before_the_first_stop(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    """No broken character, no lost space, no stop string, nor its beginning, ever shown."""
    if "<s>" in text or "</s>" in text:
        return
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text, continues=True):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    # The stop that is complete first ends the text; of two that are complete at once, the one that began
    # first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    joined = "".join(pieces)
    assert "\ufffd" not in joined or "\ufffd" in text
    if not ends:
        assert joined == text
        assert not stream.stopped
    else:
        assert stream.stopped
        assert text.startswith(joined)
        assert not any(s in joined for s in stop)
        assert any(text.startswith(s, len(joined)) for s in stop)


def test_a_text_that_nothing_precedes_begins_without_a_space(tiny: LLM) -> None:
    """Behind nothing but the beginning-of-text token a first word has no space; behind a prompt it has."""
    word = tiny.tokenizer.encode("fox")[1:] if tiny.tokenizer else []
    for at_start, text in ((True, "fox"), (False, " fox")):
        stream = TextStream(tiny.tokenizer, at_start=at_start)
        assert "".join(map(stream.push, word)) + stream.finish() == text
    assert not tiny.generate([[1]], SamplingParams(temperature=2.0, seed=2))[0].text.startswith(" ")


def test_a_continuation_gets_no_space_whatever_the_normaliser_does(tmp_path: Path) -> None:
    """sentencepiece's default rule turns line breaks into spaces, so a line break cannot be told from one."""
    text = ["the fox went home", "who is there"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=20, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(tmp_path, 20)
    assert tokenizer.decode(tokenizer.encode("fox", continues=True), continues=True) == "fox"
    assert tokenizer.decode(tokenizer.encode(" fox", continues=True), continues=True) == " fox"


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("added_tokens.json", {"<a>": "x"}, "malformed"),
        ("added_tokens.json", {"<a>": -1}, "added token -1"),
        ("added_tokens.json", {"<a>": 10**9}, "added token 1000000000"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 7}}}, "added token 5 is 7"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "x"}}, "malformed"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["x"]}, "malformed"),
    ],
)
def test_malformed_added_tokens_are_named(
    tiny_dir: Path, tmp_path: Path, file: str, content: Any, word: str
) -> None:
    write_checkpoint(tmp_path)
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=word):
        LLM(tmp_path)


def test_a_text_that_encodes_to_nothing_is_empty(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox went home", "who is there"] * 30),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=20, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    llm = LLM(tmp_path)
    for call in (lambda: llm.generate(" "), lambda: llm.score("fox", " ")):
        with pytest.raises(RequestError, match="empty"):
            call()


def test_a_character_over_several_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f98a", continues=True)
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["\U0001f98a"]
    cut = TextStream(tokenizer)
    assert [cut.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert cut.finish() == "\ufffd"


@pytest.mark.parametrize("stop", [(), ("a",), ("e", "th")])
def test_streaming_equals_generating(tiny: LLM, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=2.0, seed=11, stop=stop)
    pieces = list(tiny.stream("the fox", params))
    (completion,) = tiny.generate("the fox", params)
    assert "".join(pieces) == completion.text
    assert not any(s in completion.text for s in stop)
    assert len(pieces) > 1 or stop


def test_a_stop_string_ends_with_reason_stop(tiny: LLM) -> None:
    free = tiny.generate(
        "the fox", SamplingParams(max_new_tokens=40, temperature=2.0, seed=11, ignore_eos=True)
    )[0]
    stop = free.text[10:13]
    params = SamplingParams(max_new_tokens=40, temperature=2.0, seed=11, ignore_eos=True, stop=stop)
    ended = tiny.generate("the fox", params)[0]
    assert ended.finish_reason == "stop"
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]


def test_a_checkpoint_without_a_tokenizer_runs_on_ids_and_says_so_on_text(tmp_path: Path) -> None:
    llm = LLM(write_checkpoint(tmp_path))
    assert len(llm.generate([[5, 6]], SamplingParams(max_new_tokens=3, ignore_eos=True))[0].token_ids) == 3
    with pytest.raises(TokenizerError, match="has no tokenizer; give token ids"):
        llm.generate("text")
    with pytest.raises(TokenizerError, match="has no tokenizer; give token ids"):
        llm.generate([[5, 6]], SamplingParams(stop="x"))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff"])
def test_an_unreadable_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a sentencepiece model"):
        LLM(tmp_path)


@pytest.mark.parametrize("vocab_size", [100, 5000])
def test_a_vocabulary_that_does_not_match_is_refused(tmp_path: Path, vocab_size: int) -> None:
    train_pieces(write_checkpoint(tmp_path, vocab_size=vocab_size).joinpath())
    with pytest.raises(TokenizerError, match=f"but the model has {vocab_size}"):
        LLM(tmp_path)


def test_text_that_is_no_unicode_is_refused(tiny: LLM) -> None:
    """A command line's undecodable byte arrives as a lone surrogate, which no tokenizer takes."""
    with pytest.raises(RequestError, match="Unicode"):
        tiny.generate("fox \udcff")
