"""What the published code's generation costs: recall with its defect, and without it.

    python tests/published_defect.py --samples 20

In generation that code compares a layer's pruned length with the count of all tokens ever seen. So a layer that pruned
its prompt always seems to have 16 tokens waiting, and drops up to 16 of its oldest at every step, until only the
protected tail is left: prompt and sinks are gone. Here a story is pruned, sentences of filler are generated behind it
(they are given, so that both sides read the same, and both keep them), and then a fact of the story is asked for.
Nothing but this file has the switch.
"""

from __future__ import annotations

import random
import sys
from itertools import islice

import torch

from minipyramid import LLM, MiniPyramidError, PyramidConfig, RequestError, TokenizerError
from minipyramid.baselines import hold_pyramid
from minipyramid.cache import KVCache
from minipyramid.eval import interval, planted
from minipyramid.generate import DEFAULT_MODEL, Parser, print_error
from minipyramid.stories import filler


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
def read(llm: LLM, cache: KVCache, between: list[int], settings: PyramidConfig, *, defect: bool) -> None:
    """Take tokens in as if they were generated."""
    for token in between:
        llm.model.step(torch.tensor([token]), [cache])
        if defect:
            drop_oldest(cache, settings)


def recall(
    llm: LLM, settings: PyramidConfig, context: int, generated: int, samples: int, *, defect: bool
) -> list[float]:
    """Of every story the share of answers that are the first choice, `generated` tokens behind it."""
    tokenizer, shares = llm.tokenizer, []
    if tokenizer is None:
        raise TokenizerError("the checkpoint has no tokenizer.model, which stories need; add it")
    stories = planted(llm, context, random.Random(0))
    for task, *_ in islice(stories, samples):
        cache = hold_pyramid(llm, task.context, settings, generated + task.room)
        rng = random.Random(len(shares))
        between = tokenizer.encode("".join(" " + filler(rng) for _ in range(generated)), continues=True)[:generated]
        read(llm, cache, between, settings, defect=defect)
        shares.append(task.ask(cache, cache)["after"])
    return shares


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = Parser(
        prog="published_defect.py", allow_abbrev=False, description="Recall with the defect and without it."
    )
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens of a story and a question (1024)"
    )
    parser.add_argument("--generated", type=int, default=64, metavar="N", help="tokens behind the story (64)")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="stories (20)")
    args = parser.parse_args(argv)
    try:
        for name, least in (("context", 128), ("generated", 0), ("samples", 2)):
            if vars(args)[name] < least:
                raise RequestError(f"--{name} is {vars(args)[name]}, expected {least} or more")
        llm = LLM(args.model, pyramid="llama2-7b")
        llm.config.check_length(args.context, args.generated, "the story")
        settings = PyramidConfig.preset("llama2-7b")
        for name, defect in (("without the defect", False), ("with the defect", True)):
            shares = recall(llm, settings, args.context, args.generated, args.samples, defect=defect)
            mean, low, high = interval(shares, 0)
            print(f"recall {name:18} {mean:.3f} [{low:.3f}, {high:.3f}] of {len(shares)} stories")
    except MiniPyramidError as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
