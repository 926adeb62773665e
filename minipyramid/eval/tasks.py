"""What every policy's cache is asked, and of which contexts.

*Text*: how well what follows in a book is foretold. *Recall*: facts that were planted in a story, or among
a book's sentences, are asked for, the question in the pruned prompt (where it votes) and after it (where
nothing knows of it yet). *Writing*: the greedy text.

The last token before what is scored is never part of the context, so that every figure went through the
pruned cache. Of a text that is written the prompt is the whole context, for that is how the engine writes.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipyramid import LLM, RequestError
from minipyramid.eval.books import stretch
from minipyramid.eval.context import HeldContext
from minipyramid.eval.stories import Story, story

QUESTIONS = 4  # of a story, at most; each in the prompt costs a prompt of its own
PARTS = 3  # of a story, for recall by where a fact stands
QUESTION = 40  # tokens that are left for a question and its answer at first
LEAST_STORY = 64  # tokens

Figures = dict[str, float]


# --- the tasks ---


@dataclass(frozen=True)
class Task:
    """One context, and what its cache is asked."""

    context: list[int]

    def ask(self, held: HeldContext) -> Any:
        """What a cache of the context answers."""
        raise NotImplementedError

    def figures(self, answer: Any, full: Any) -> Figures:
        """Figures by name, from a policy's answer and the full cache's."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Task):
    """What follows in a book: its loss, KL divergence from the full cache (nats) and agreement with it."""

    following: list[int]  # the first of these is read and not scored

    def ask(self, held: HeldContext) -> Tensor:
        """Log-probabilities of what may follow each but the last.  [len(following) - 1, vocab_size]"""
        return held.follow(self.following[:1], self.following[1:-1])

    def figures(self, answer: Tensor, full: Tensor) -> Figures:
        """Means over the tokens; the divergence is of the full cache's distribution from the pruned one's."""
        target = torch.tensor(self.following[1:], device=answer.device)[:, None]
        loss, full_loss = (-float(logprobs.gather(1, target).mean()) for logprobs in (answer, full))
        return {
            "loss": loss,
            "loss_above_full": loss - full_loss,
            "kl": float((full.exp() * (full - answer)).sum(-1).mean()),
            "agreement": float((answer.argmax(-1) == full.argmax(-1)).float().mean()),
        }


@dataclass(frozen=True)
class Writing(Task):
    """A greedy text: where it first differs from the full cache's, and by how much its length does."""

    new_tokens: int

    def ask(self, held: HeldContext) -> list[int]:
        """The text's tokens."""
        return held.write(self.new_tokens)

    def figures(self, answer: list[int], full: list[int]) -> Figures:
        """An equal text counts as one that differs behind its last token."""
        same = [a == b for a, b in zip(answer, full, strict=False)]
        return {
            "first_difference": self.new_tokens if answer == full else [*same, False].index(False),
            "identical": float(answer == full),
            "length_drift": len(answer) - len(full),
        }


@dataclass(frozen=True)
class Question:
    """A question, its answer, and in which part of the story the fact stands."""

    question: list[int]
    answer: list[int]
    part: int

    def hit(self, held: HeldContext, question: list[int]) -> float:
        """1 if every token of the answer is the first choice, given those before it, else 0."""
        choices: list[int] = held.follow(question, self.answer[:-1]).argmax(-1).tolist()
        return float(choices == self.answer)


@dataclass(frozen=True)
class RecallAfter(Task):
    """All questions of a story, each behind its pruned cache."""

    questions: list[Question]
    prefix: str  # of its figures' names, by what the facts stand among

    def ask(self, held: HeldContext) -> list[float]:
        """Which answers are right."""
        return [q.hit(held, q.question) for q in self.questions]

    def figures(self, answer: list[float], full: list[float]) -> Figures:
        """The share of right answers, also by the fact's part of the story, and the story's length."""
        hits: dict[int, list[float]] = {}
        for question, hit in zip(self.questions, answer, strict=True):
            hits.setdefault(question.part, []).append(hit)
        figures = {f"after_part_{part + 1}": statistics.fmean(some) for part, some in hits.items()}
        figures |= {"after": statistics.fmean(answer), "story_tokens": len(self.context)}
        return {self.prefix + name: value for name, value in figures.items()}


@dataclass(frozen=True)
class RecallInside(Task):
    """One question, whose last token alone is behind the pruned cache."""

    question: Question
    prefix: str

    def ask(self, held: HeldContext) -> float:
        """Whether the answer is right."""
        return self.question.hit(held, self.question.question[-1:])

    def figures(self, answer: float, full: float) -> Figures:
        """The same, also by the fact's part of the story."""
        inside = f"{self.prefix}inside"
        return {inside: answer, f"{inside}_part_{self.question.part + 1}": answer}


# --- where they come from: each of these goes on without end, and what it yields together is one sample ---


def texts(
    llm: LLM, tokens: list[int], context: int, continuation: int, rng: random.Random
) -> Iterator[list[Text]]:
    """Windows of the text; each begins like a prompt."""
    begin = llm.tokenizer.encode("") if llm.tokenizer else []
    while True:
        start = rng.randrange(len(tokens) - context - continuation + len(begin) + 1)
        ids = begin + tokens[start : start + context + continuation - len(begin)]
        yield [Text(ids[: context - 1], ids[context - 1 :])]


def openings(
    llm: LLM, tokens: list[int], context: int, new_tokens: int, rng: random.Random
) -> Iterator[list[Writing]]:
    """Windows of the text that are written on."""
    for (window,) in texts(llm, tokens, context + 1, 0, rng):
        yield [Writing(window.context, new_tokens)]


def planted(
    llm: LLM, context: int, rng: random.Random, book: Sequence[str] | None = None
) -> Iterator[list[Task]]:
    """Of every story all questions after it, asked of one cache; then each inside, with its own.

    Args:
        book: sentences of which a stretch is what the facts stand among; None for made-up ones.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError("stories are text, and the checkpoint has no tokenizer; leave --recall out")

    def pieces(text: str) -> list[int]:
        return tokenizer.encode(text, continues=True)

    def count(sentence: str) -> int:
        return len(pieces(" " + sentence))

    prefix = "" if book is None else "prose_"
    while True:
        room = QUESTION
        while True:  # until the longest question and its answer fit behind the story
            if context - room < LEAST_STORY:
                raise RequestError(
                    f"--context {context} is too short for a story and its question in these tokens"
                )
            among = None if book is None else stretch(book, rng, context - room, count)
            tale = story(rng, context - room, count, asked_within=False, among=among)
            ids, questions = tokenizer.encode(tale.text), []
            for question, answer in tale.asked[:QUESTIONS]:
                # As one text, for their pieces are those of the whole.
                both, length = pieces(question + answer), len(pieces(question))
                questions.append(Question(both[:length], both[length:], part_of(tale, question, answer)))
            longest = max(len(q.question) + len(q.answer) for q in questions)
            if len(ids) + longest <= context:
                break
            room += len(ids) + longest - context
        inside = [RecallInside(ids + q.question[:-1], q, prefix) for q in questions]
        yield [RecallAfter(ids, questions, prefix), *inside]


def part_of(tale: Story, question: str, answer: str) -> int:
    """Which third of the first three quarters, where facts are planted, the fact stands in."""
    sentence = question.rpartition("Answer: ")[2] + answer.removesuffix(".")
    return min(PARTS - 1, int(PARTS * tale.text.index(sentence) / (0.75 * len(tale.text))))
