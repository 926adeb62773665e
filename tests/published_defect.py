"""What the published code's generation costs: recall and perplexity with its defect, and without it.

    python tests/published_defect.py --samples 10

In generation that code compares a layer's pruned length with the count of all tokens ever seen. So a layer that pruned
16 tokens or more of its prompt always seems to have 16 tokens waiting, and drops up to 16 of its oldest at every step,
until only the protected tail is left: prompt and sinks are gone. Here a prompt is pruned and tokens are generated
behind it (they are given, so that both sides read the same, and both keep them). Of a book the perplexity of these is
taken; a story is asked for one of its facts after them. Nothing but this file has the switch.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from minipyramid import LLM, PyramidConfig, RequestError, TokenizerError
from minipyramid.baselines import hold_pyramid
from minipyramid.cache import KVCache
from minipyramid.eval import interval, perplexity, planted
from minipyramid.generate import DEFAULT_MODEL, DEFAULT_TEXT, Parser, exit_status
from minipyramid.stories import filler
from minipyramid.tokenizer import Tokenizer


@dataclass(frozen=True)
class Size:
    context: int
    generated: int
    samples: int


def drop_oldest(cache: KVCache, settings: PyramidConfig) -> None:
    """Every layer that is shorter than all that was seen drops its oldest tokens, as if they were waiting."""
    row, gathered = cache.rows[0], settings.exceed_length_to_compress
    tail = 1 + settings.recent(row.position)
    for layer, n in enumerate(row.lengths):
        drop = min(gathered, n - tail)
        if row.position - n >= gathered and drop > 0:
            for slab in (cache.keys[layer], cache.values[layer]):
                slab[0, :, : n - drop] = slab[0, :, drop:n].clone()
            row.lengths[layer] = n - drop
            row.kept[layer] = row.kept[layer][drop:]


@torch.inference_mode()
def read(llm: LLM, cache: KVCache, tokens: list[int], settings: PyramidConfig, *, defect: bool) -> Tensor:
    """Take tokens in as if they were generated; returns the log-probabilities of what may follow each.  [n, vocab]"""
    logprobs = []
    for token in tokens:
        x = llm.model.step(torch.tensor([token]), [cache])
        logprobs.append(llm.model.logits(x)[0].log_softmax(-1))
        if defect:
            drop_oldest(cache, settings)
    return torch.stack(logprobs)


def recall(llm: LLM, settings: PyramidConfig, size: Size, *, defect: bool) -> list[float]:
    """Of every story the share of answers that are the first choice, behind so many sentences of filler."""
    tokenizer, shares = tokenizer_of(llm), []
    for task, *_ in islice(planted(llm, size.context, random.Random(0)), size.samples):
        cache = hold_pyramid(llm, task.context, settings, size.generated + task.room)
        rng = random.Random(len(shares))
        between = tokenizer.encode("".join(" " + filler(rng) for _ in range(size.generated)), continues=True)
        read(llm, cache, between[: size.generated], settings, defect=defect)
        shares.append(task.ask(cache, cache)["after"])
    return shares


def losses(llm: LLM, settings: PyramidConfig, size: Size, *, defect: bool) -> list[float]:
    """Of every window of a book the loss of the tokens that are generated behind it, nats."""
    text = tokenizer_of(llm).encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    rng, found = random.Random(0), []
    for _ in range(size.samples):
        start = rng.randrange(len(text) - size.context - size.generated)
        ids = text[start : start + size.context + size.generated]
        cache = hold_pyramid(llm, ids[: size.context - 1], settings, size.generated + 1)
        logprobs = read(llm, cache, ids[size.context - 1 : -1], settings, defect=defect)
        found.append(-float(logprobs.gather(1, torch.tensor(ids[size.context :])[:, None]).mean()))
    return found


def tokenizer_of(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise TokenizerError("the checkpoint has no tokenizer.model, which texts need; add it")
    return llm.tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = Parser(prog="published_defect.py", allow_abbrev=False, description="Quality with and without the defect.")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens of a story and a question (1024)"
    )
    parser.add_argument("--generated", type=int, default=64, metavar="N", help="tokens behind the story (64)")
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="stories, and windows of a book (10)")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    for name, least in (("context", 128), ("generated", 1), ("samples", 2)):
        if vars(args)[name] < least:
            raise RequestError(f"--{name} is {vars(args)[name]}, expected {least} or more")
    llm = LLM(args.model, pyramid="llama2-7b")
    llm.config.check_length(args.context, args.generated, "the story")
    shipped, size = PyramidConfig.preset("llama2-7b"), Size(args.context, args.generated, args.samples)
    gentle = replace(shipped, prefill_decay_strategy="constant", prefill_decay_ratio=0.98)
    for name, settings in (("as shipped for 7B", shipped), ("constant at 0.98", gentle)):
        for defect in (False, True):
            right = interval(recall(llm, settings, size, defect=defect), 0)
            text = interval(losses(llm, settings, size, defect=defect), 0, perplexity)
            print(
                f"{name}, {'with' if defect else 'without'} the defect: recall {right[0]:.3f} "
                f"[{right[1]:.3f}, {right[2]:.3f}], perplexity {text[0]:.1f} [{text[1]:.1f}, {text[2]:.1f}]"
            )


if __name__ == "__main__":
    sys.exit(main())
