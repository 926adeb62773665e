"""What is learnt from: prose, stories, drills and words said twice, as rows of tokens and their weights.

Half of the stories lie in a stretch of a book: a model that had seen facts among made-up sentences alone lost
a sixth of its answers there. Answers weigh five times as much as prose, a story's filler 0.3 and a drill's
0.02, for a random name cannot be foreseen and would only drown the signal. Batches of these are made in a
second process, a few ahead.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from minipyramid.eval.books import stretch
from minipyramid.eval.stories import WORDS, Story, drill, made_up, story

BOS, EOS = 1, 2
ANSWER_WEIGHT, FILLER_WEIGHT = 5.0, 0.3
AHEAD = 4  # batches that are made before they are needed

Row = tuple[list[int], list[float]]  # T + 1 ids, and the weights of the last T of them


class Data:
    """Rows of one length: prose, stories, and random tokens said twice or more.

    Args:
        prose: tokens of the books.
        book: their sentences.
    """

    def __init__(
        self,
        tokenizer: sentencepiece.SentencePieceProcessor,
        prose: np.ndarray,
        book: Sequence[str],
        seed: int | str,
    ) -> None:
        self.tokenizer, self.prose, self.sentences = tokenizer, prose, book
        self.rng = random.Random(seed)
        self.costs: dict[str, int] = {}

    def count(self, text: str) -> int:
        if text not in self.costs:
            if len(self.costs) > 200_000:
                self.costs.clear()
            self.costs[text] = len(self.tokenizer.encode(text))
        return self.costs[text]

    def stretch(self, tokens: int) -> Iterator[str]:
        return stretch(self.sentences, self.rng, tokens, self.count)

    def mixed(self) -> Iterator[str]:
        invented = made_up(self.rng)
        while True:
            yield next(invented) if self.rng.random() < 0.4 else self.rng.choice(self.sentences)

    def among(self, tokens: int) -> Iterator[str]:
        """What a story's facts stand among: made-up sentences, these and a book's mixed, or a stretch."""
        kinds = (made_up(self.rng), self.mixed(), self.stretch(tokens))
        (kind,) = self.rng.choices(kinds, (0.25, 0.25, 0.5))
        return kind

    def story(self, length: int) -> Row:
        tokens = length - 2
        return self.told(story(self.rng, tokens, self.count, among=self.among(tokens)), length)

    def drill(self, length: int) -> Row:
        return self.told(drill(self.rng, length - 2, self.count), length, filler=0.02)

    def told(self, tale: Story, length: int, filler: float = FILLER_WEIGHT) -> Row:
        ids = [BOS, *self.tokenizer.encode(tale.text)]
        weights = [filler] * (len(ids) - 1)
        for question, answer in tale.asked:
            # Question and answer as one string, for their pieces are those of the whole; the full stop before
            # it keeps sentencepiece from setting a space there.
            both = self.tokenizer.encode("." + question + answer)[1:]
            asked = len(self.tokenizer.encode("." + question)) - 1
            ids += both
            weights += [filler] * asked + [ANSWER_WEIGHT] * (len(both) - asked)
        ids, weights = [*ids, EOS][: length + 1], [*weights, filler][:length]
        pad = length + 1 - len(ids)
        return ids + [EOS] * pad, weights + [0.0] * pad

    def copy(self, length: int) -> Row:
        """Words in a random order, said twice or more: half of the rows words of the stories, half any
        pieces.
        """
        if self.rng.random() < 0.5:
            n = self.rng.randint(8, length // 2)
            once = [self.rng.randint(3, self.tokenizer.vocab_size() - 1) for _ in range(n)]
        else:
            words = " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(4, length // 6)))
            once = self.tokenizer.encode(words)
            n = len(once)
        ids = ([BOS] + once * (length // n + 1))[: length + 1]
        return ids, ([0.0] * n + [1.0] * length)[:length]

    def book(self, length: int) -> Row:
        start = self.rng.randrange(len(self.prose) - length - 1)
        return [BOS, *self.prose[start : start + length].tolist()], [1.0] * length

    def batch(self, rows: int, length: int, shares: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Rows of each kind (a method of this class) as often as its share says."""
        kinds = self.rng.choices(list(shares), list(shares.values()), k=rows)
        made = [getattr(self, kind)(length) for kind in kinds]
        return torch.tensor([ids for ids, _ in made]), torch.tensor([w for _, w in made])


Batch = tuple[Tensor, Tensor]  # ids [rows, T + 1] and weights [rows, T]
Wanted = tuple[int, int, dict[str, float]]  # rows, their length, and the shares of their kinds


def make_batches(data: Data, seed: str, pipe: Connection) -> None:
    """What the second process does: a batch for each that is asked for, until nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then hangs up
    data.rng.seed(seed)
    with suppress(EOFError, ConnectionError):
        while True:
            # As arrays, for tensors would be sent as shared memory that must outlive this process.
            pipe.send([part.numpy() for part in data.batch(*pipe.recv())])


@contextmanager
def made_ahead(data: Data, seed: str, want: Callable[[], Wanted]) -> Iterator[Iterator[Batch]]:
    """Batches without end, made in a second process while the model learns: a third less time per step.

    `AHEAD` of them are asked for before the first is needed, so no more than these ever wait. The process
    ends with the run, however that ends: its pipe is closed then.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in any state
    pipe, theirs = context.Pipe()
    process = context.Process(target=make_batches, args=(data, seed, theirs), daemon=True)
    process.start()
    theirs.close()  # the process alone holds this end, so that its death is an end of file here

    def batches() -> Iterator[Batch]:
        try:
            for _ in range(AHEAD):
                pipe.send(want())
            while True:
                pipe.send(want())
                ids, weights = pipe.recv()
                yield torch.from_numpy(ids), torch.from_numpy(weights)
        except (EOFError, ConnectionError) as error:
            died = "the process that makes documents has ended; what it died of stands above"
            raise RuntimeError(died) from error

    try:
        yield batches()
    finally:
        pipe.close()
        process.join()
