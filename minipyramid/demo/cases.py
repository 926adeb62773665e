"""The prompts of the demo: given ones, or stories with a question whose answer is known."""

import argparse
import random
from dataclasses import dataclass

from minipyramid import LLM, RequestError
from minipyramid.eval.stories import filler, story
from minipyramid.tokenizer import Tokenizer

PROMPT_TOKENS = 512  # of a story, where no number is given


@dataclass(frozen=True)
class Case:
    """A prompt, and the answer that its story knows."""

    prompt: str
    answer: str | None = None


def tell(args: argparse.Namespace, llm: LLM, tokenizer: Tokenizer) -> list[Case]:
    """Different stories, each followed by a question about it."""
    tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    llm.config.check_length(tokens, args.max_new_tokens, f"a story of --prompt-tokens {tokens}")
    rng = random.Random(args.seed or 0)
    return [tell_one(rng, tokens, tokenizer) for _ in range(args.batch_size or 1)]


def tell_one(rng: random.Random, tokens: int, tokenizer: Tokenizer) -> Case:
    """A story leaves room for several questions; one is asked here, and the rest is filled with story."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, continues=True))

    told = story(rng, tokens, count)
    (question, answer), text = told.asked[0], told.text
    left = tokens - len(tokenizer.encode(text + question))
    if left < 0:
        raise RequestError(
            f"--prompt-tokens {tokens} is too few for a story in these tokens, which has {tokens - left}"
        )
    while True:
        sentence = " " + filler(rng)
        left -= count(sentence)
        if left < 0:
            return Case(text + question, answer)
        text += sentence
