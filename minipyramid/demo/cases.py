"""The prompts of the demo: given ones, or questions about facts in a book, and that book as it stands."""

import argparse
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from minipyramid import LLM, RequestError
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.eval.books import sentences, stretch
from minipyramid.eval.stories import story
from minipyramid.tokenizer import Tokenizer

PROMPT_TOKENS = 512  # of each, where no number is given


@dataclass(frozen=True)
class Case:
    """A prompt, and the known answer where it ends with a question."""

    prompt: str
    answer: str | None = None


def names(prompts: int) -> list[str]:
    """What so many prompts are called."""
    return ["the prompt"] if prompts == 1 else [f"prompt {i}" for i in range(prompts)]


def first_of_each(cases: list[Case]) -> list[int]:
    """Of prompts that ask something, and of those that do not, the first."""
    first: dict[bool, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(case.answer is None, i)
    return list(first.values())


def tell(args: argparse.Namespace, llm: LLM, tokenizer: Tokenizer) -> list[Case]:
    """Different questions, and last a stretch of the book, as long as the first of them."""
    tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    llm.config.check_length(tokens, args.max_new_tokens, f"a prompt of --prompt-tokens {tokens}")
    try:
        text = DEFAULT_TEXT.read_text(encoding="utf-8")
        book = Book(sentences(text), tokenizer, random.Random(args.seed or 0))
        next(book.stretch(tokens))  # a text that is too short is refused now
    except (OSError, RequestError) as error:
        told = f"no prompts can be drawn from {DEFAULT_TEXT.name} ({error})"
        raise RequestError(f"{told}; give them by --prompt-file, or fewer --prompt-tokens") from error
    asked = [book.ask(tokens) for _ in range(args.batch_size or 1)]
    return [*asked, book.as_it_stands(len(tokenizer.encode(asked[0].prompt)))]


@dataclass(frozen=True)
class Book:
    """What prompts are drawn from."""

    sentences: list[str]
    tokenizer: Tokenizer
    rng: random.Random

    def count(self, sentence: str) -> int:
        """Its tokens behind another sentence."""
        return len(self.tokenizer.encode(" " + sentence, continues=True))

    def stretch(self, tokens: int) -> Iterator[str]:
        """Sentences from a random one on, of so many tokens or more."""
        return stretch(self.sentences, self.rng, tokens, self.count)

    def ask(self, tokens: int) -> Case:
        """A stretch that facts are planted in, and a question about one of them: whole sentences that fit."""
        room = 0  # for the question
        while room < tokens:
            among = self.stretch(tokens)
            told = story(self.rng, tokens - room, self.count, asked_within=False, among=among)
            question, answer = told.asked[0]
            over = len(self.tokenizer.encode(told.text + question)) - tokens
            if over <= 0:
                return Case(told.text + question, answer)
            room += over
        raise RequestError(f"--prompt-tokens {tokens} is too few for a fact and its question; give more")

    def as_it_stands(self, tokens: int) -> Case:
        """A stretch of so many tokens, or as many as whole words have."""
        words = " ".join(self.stretch(tokens)).split()[:tokens]

        def length(some: int) -> int:
            return len(self.tokenizer.encode(" ".join(words[:some])))

        fit = bisect_right(range(1, len(words)), tokens, key=length)
        return Case(" ".join(words[:fit]))
