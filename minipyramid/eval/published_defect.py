"""What the published code's generation costs: recall and perplexity with its defect, and without it.

    python -m minipyramid.eval.published_defect --samples 10

In generation that code compares a layer's pruned length with the count of all tokens ever seen. So a layer
that pruned 16 tokens or more of its prompt always seems to have 16 tokens pending, and drops up to 16 of its
oldest at every step, until only the protected tail is left: prompt and sinks are gone. Here a prompt is
pruned and tokens are generated behind it. (They are given, so that both sides read the same, and both keep
them.) Of a book the perplexity of these is taken; a story is asked for its facts after them. Nothing but this
file has the switch.
"""

import argparse
import random
import sys
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from minipyramid import LLM, PyramidConfig, RequestError, TokenizerError
from minipyramid.cache import HeldTokens
from minipyramid.cli.terminal import DEFAULT_MODEL, DEFAULT_TEXT, Parser, exit_status
from minipyramid.eval.context import HeldContext
from minipyramid.eval.report import interval, perplexity
from minipyramid.eval.stories import filler
from minipyramid.eval.tasks import planted
from minipyramid.tokenizer import Tokenizer


@dataclass(frozen=True)
class Size:
    """How much is measured; tokens, and stories or windows."""

    context: int
    generated: int
    samples: int


def drop_oldest(held: HeldTokens, settings: PyramidConfig) -> HeldTokens:
    """A layer that holds a group or more less than was seen drops its oldest tokens, as if pending."""
    group = settings.exceed_length_to_compress
    tail = settings.recent_tokens(held.position)
    layers = []
    for (keys, values, positions), n in zip(held.layers, held.lengths, strict=True):
        drop = max(0, min(group, n - tail)) if held.position - n >= group else 0
        layers.append((keys[:, drop:], values[:, drop:], positions[..., drop:]))
    return replace(held, layers=layers, lengths=[positions.shape[-1] for _, _, positions in layers])


def read(context: HeldContext, tokens: list[int], settings: PyramidConfig, *, defect: bool) -> Tensor:
    """Take tokens in as if they were generated; returns the log-probabilities of what may follow each.

    Returns [n, vocab_size].
    """
    logits = []
    for token in tokens:
        (prefill,) = context.llm.prefill([token], context.conversation)
        logits.append(prefill.logits)
        if defect and context.conversation.held:
            context.conversation.held = drop_oldest(context.conversation.held, settings)
    return torch.stack(logits).log_softmax(-1)


def recall(llm: LLM, settings: PyramidConfig, size: Size, *, defect: bool) -> list[float]:
    """Of every story the share of answers that are the first choice, behind so many tokens of filler."""
    tokenizer = tokenizer_of(llm)
    shares: list[float] = []
    for task, *_ in islice(planted(llm, size.context, random.Random(0)), size.samples):
        context = HeldContext(llm, settings, task.context)
        rng = random.Random(len(shares))
        between = tokenizer.encode("".join(" " + filler(rng) for _ in range(size.generated)), continues=True)
        read(context, between[: size.generated], settings, defect=defect)
        answer = task.ask(context)
        shares.append(task.figures(answer, answer)["after"])
    return shares


def losses(llm: LLM, settings: PyramidConfig, size: Size, *, defect: bool) -> list[float]:
    """Of every window of a book the loss of the tokens that are generated behind it, nats."""
    text = tokenizer_of(llm).encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    rng, found = random.Random(0), []
    for _ in range(size.samples):
        start = rng.randrange(len(text) - size.context - size.generated)
        ids = text[start : start + size.context + size.generated]
        context = HeldContext(llm, settings, ids[: size.context - 1])
        logprobs = read(context, ids[size.context - 1 : -1], settings, defect=defect)
        target = torch.tensor(ids[size.context :], device=logprobs.device)[:, None]
        found.append(-float(logprobs.gather(1, target).mean()))
    return found


def tokenizer_of(llm: LLM) -> Tokenizer:
    """The checkpoint's; raises `TokenizerError` where there is none."""
    if llm.tokenizer is None:
        raise TokenizerError(
            "the checkpoint has no tokenizer.model or tokenizer.json, which texts need; add it"
        )
    return llm.tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = Parser(
        prog="minipyramid.eval.published_defect",
        allow_abbrev=False,
        description="Quality with and without the defect.",
    )
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    add("--context", type=int, default=1024, metavar="N", help="tokens of a story and a question (1024)")
    add("--generated", type=int, default=64, metavar="N", help="tokens behind the story (64)")
    add("--samples", type=int, default=10, metavar="N", help="stories, and windows of a book (10)")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Print recall and perplexity of two settings, with the defect and without it."""
    for name, least in (("context", 128), ("generated", 1), ("samples", 2)):
        if vars(args)[name] < least:
            raise RequestError(f"--{name} is {vars(args)[name]}, expected {least} or more")
    llm = LLM(args.model, policy="full")
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
