"""The work that all methods are given: the same prompts, and as many tokens to generate."""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.config import ModelConfig
from minipyramid.tokenizer import load_tokenizer

SHORTEST_PROMPT, SHORTEST_GENERATION = 20, 16  # of --ragged


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens are generated behind each; the end of text is ignored."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def generated(self) -> int:
        """Tokens that are generated altogether. Only these count as throughput."""
        return sum(self.new_tokens)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Prompt tokens and new tokens of each request."""
        return [(len(prompt), new) for prompt, new in zip(self.prompts, self.new_tokens, strict=True)]


def make_work(args: argparse.Namespace, config: ModelConfig) -> Work:
    """Prompts that all differ, of one length unless `--ragged` is given.

    They are windows of a book, evenly spaced. Where there is no tokenizer they are random ids, as at a shape,
    whose weights are random as well. Raises `RequestError` where the model's context is too short.
    """
    rng = random.Random(args.seed)
    lengths, new = [args.prompt_tokens] * args.batch_size, [args.max_new_tokens] * args.batch_size
    if args.ragged:
        lengths = [rng.randint(min(SHORTEST_PROMPT, n), n) for n in lengths]
        new = [rng.randint(min(SHORTEST_GENERATION, n), n) for n in new]
    for i, (prompt_tokens, new_tokens) in enumerate(zip(lengths, new, strict=True)):
        config.check_length(prompt_tokens, new_tokens, f"prompt {i}")
    tokenizer = load_tokenizer(Path(args.model), config.vocab_size)
    if tokenizer is not None and DEFAULT_TEXT.is_file():
        tokens = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    else:
        tokens = [rng.randrange(3, config.vocab_size) for _ in range(max(lengths) * len(lengths))]
    first = rng.randrange(len(tokens))
    prompts = []
    for i, length in enumerate(lengths):
        start = first + i * len(tokens) // len(lengths)
        prompts.append([tokens[(start + j) % len(tokens)] for j in range(length)])
    return Work(prompts, new)
