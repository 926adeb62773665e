"""Books cut into sentences, and facts planted in a stretch of them."""

from __future__ import annotations

import random
import re

import pytest

from minipyramid import RequestError
from minipyramid.eval.books import sentences, stretch
from minipyramid.eval.stories import NAMES, THINGS, Story, story

BOOK = [f"Sentence {i} of the book says nothing that anybody asks for." for i in range(400)]


def words(text: str) -> int:
    return len(text.split())


def told(seed: int, book: list[str], tokens: int = 600) -> Story:
    rng = random.Random(seed)
    return story(rng, tokens, words, asked_within=False, among=stretch(book, rng, tokens, words))


def test_a_book_is_cut_where_its_sentences_end() -> None:
    text = """CHAPTER I. In which nothing happens
Mr. H. G. Wells, who was late, sat down. "Why so?" he asked. "I do not know!"
"What then?"
Nobody said a word of it; the lamp was burning.
"""
    assert sentences(text) == [
        "Mr. H. G. Wells, who was late, sat down.",
        '"Why so?" he asked.',
        '"I do not know!"',
        '"What then?" Nobody said a word of it; the lamp was burning.',
    ]


def test_where_blank_lines_part_the_paragraphs_a_line_break_ends_no_sentence() -> None:
    text = "THE HOUSE\n\nHe went with\nNora to the river\nof a morning. It\nrained.\n\nThey came home late.\n"
    assert sentences(text) == [
        "He went with Nora to the river of a morning.",
        "It rained. They came home late.",
    ]


def test_what_is_too_long_for_a_sentence_is_left_out() -> None:
    assert sentences("One two three. " + "And so on " * 30 + "ever. Four five six.") == [
        "One two three.",
        "Four five six.",
    ]


def test_facts_stand_among_the_books_sentences_as_they_follow_each_other() -> None:
    for seed in range(20):
        tale = told(seed, BOOK)
        numbers = [int(i) for i in re.findall(r"Sentence (\d+) of the book", tale.text)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        *_, last_fact = re.split(r"Sentence \d+ of the book says nothing that anybody asks for\.", tale.text)
        assert last_fact == ""  # the last quarter has none
        for question, answer in tale.asked:
            before = tale.text[: tale.text.index(question.split("Answer: ")[1] + answer.removesuffix("."))]
            assert before.count("Sentence") <= 0.75 * len(numbers)
        assert 540 <= words(tale.text) <= 600


def test_no_sentence_of_a_book_answers_a_question() -> None:
    """A book that says where every thing is, and what everybody does, must leave out what is asked for."""
    book = [f"Look, {who} lives in the hills." for who in NAMES]
    book += [f"He said that the {what} is on the wall." for what in THINGS]
    random.Random(0).shuffle(book)
    contradicted = 0
    for seed in range(20):
        tale = told(seed, book, tokens=400)
        for question, _ in tale.asked:
            stem = question.split("Answer: ")[1].lower()
            assert tale.text.lower().count(f"{stem} ") == 1
            contradicted += any(stem in sentence.lower() for sentence in book)
    assert contradicted > 5


def test_a_seed_draws_the_same_stretch_and_any_place_can_be_drawn() -> None:
    def first(seed: int) -> str:
        return next(stretch(BOOK, random.Random(seed), 11 * 390, words))

    drawn = [first(seed) for seed in range(200)]
    assert drawn == [first(seed) for seed in range(200)]
    assert {*drawn} == {*BOOK[:11]}  # from the last one on 390 sentences follow with the last


def test_a_stretch_has_as_many_tokens_as_were_asked_for() -> None:
    for seed in range(20):
        assert sum(map(words, stretch(BOOK, random.Random(seed), 4001, words))) >= 4001


def test_a_book_that_is_too_short_for_a_stretch_is_refused() -> None:
    with pytest.raises(
        RequestError, match="has 4400 tokens in sentences, expected 4401 or more; give a longer text"
    ):
        next(stretch(BOOK, random.Random(0), 4401, words))
