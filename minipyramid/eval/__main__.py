"""`python -m minipyramid.eval`: policies put the same contexts into their caches and are asked the same.

What is asked: `tasks.py`. What equal bytes are: `compare.py`. What the figures mean: `report.py`. The bytes
that are reported are those of the text's contexts.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from minipyramid import RequestError
from minipyramid.cli.loading import load_full
from minipyramid.cli.plotting import check_plot
from minipyramid.cli.terminal import (
    DEFAULT_MODEL,
    DEFAULT_TEXT,
    Parser,
    ProgressLine,
    exit_status,
    listed,
    set_quiet,
    set_threads,
    tell,
)
from minipyramid.cli.texts import read_text, read_tokens
from minipyramid.config import ModelConfig
from minipyramid.eight_bits import with_kv_dtype
from minipyramid.eval.books import sentences
from minipyramid.eval.compare import Comparison, compare, no_samples, pick_policies
from minipyramid.eval.report import BY_PART, COLUMNS, plot, rows_of, table
from minipyramid.eval.tasks import QUESTION, openings, planted, texts
from minipyramid.formats.huggingface import read_config
from minipyramid.hub import locate
from minipyramid.policies import POLICIES, pick_policy
from minipyramid.policies.profile import Profile
from minipyramid.policy import check_share

NAMES = (*POLICIES, "streaming-split", "snapkv-split", "random-split")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="minipyramid.eval", allow_abbrev=False, description="Measure what pruning costs.")
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--text", default=str(DEFAULT_TEXT), metavar="FILE", help="UTF-8 text to continue, or its .xz")
    add("--context", type=listed(int), default=[512], metavar="N,N", help="tokens of the prompt (512)")
    add("--continuation", type=int, default=128, metavar="N", help="tokens scored after it (128)")
    add("--generate", type=int, default=0, metavar="N", help="also compare N generated tokens")
    add(
        "--recall",
        type=listed(str),
        nargs="?",
        const=["stories"],
        default=[],
        metavar="stories,prose",
        help="also ask for facts in made-up stories of --context (the default), or among sentences of --text",
    )
    add("--samples", type=int, default=8, metavar="N", help="windows, stories and openings (8)")
    add(
        "--policies",
        type=listed(str),
        metavar="NAME,NAME",
        help=f"{', '.join(NAMES)}, any NAME-split, a preset, a JSON file, or package.module:Name (these)",
    )
    add("--budgets", type=listed(float), default=[0.75, 0.5, 0.35], metavar="SHARE,SHARE")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--kv-dtype", default="auto", metavar="NAME", help="int8 holds keys and values in 8 bits")
    add("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0)
    add("--plot", metavar="FILE.png", help="draw quality against bytes (needs the extra plot)")
    add("--json", action="store_true", help="one JSON object on stdout instead of the table")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: report(run(args), args))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every context, task, policy and budget; returns what `--json` prints."""
    args.context = list(dict.fromkeys(args.context))
    check(args)
    set_threads(args.threads)
    set_quiet(args.quiet)
    text, directory = read_text(args.text), locate(args.model, args.revision)
    config = read_config(directory, args.quantize)
    comparison = what_to_compare(args, directory, config)
    least = max(args.context) + args.continuation
    tokens = read_tokens(directory, config.vocab_size, text, args.text, least)
    llm = load_full(args, kv_dtype=args.kv_dtype)
    book = sentences(text)
    if "prose" in args.recall:  # a text that is too short for the longest context is refused now
        next(planted(llm, max(args.context), random.Random(0), book))
    rows: list[dict[str, Any]] = []
    with EvalLine(len(args.context) * args.samples, quiet=args.quiet) as line:
        for context in args.context:
            samples = no_samples()
            # Each task draws from its own source, so that it draws the same whatever else is asked for.
            reading, telling, writing, hiding = (random.Random(f"{args.seed} {task}") for task in range(4))
            streams: list[Any] = [texts(llm, tokens, context, args.continuation, reading)]
            if "stories" in args.recall:
                streams.append(planted(llm, context, telling))
            if "prose" in args.recall:
                streams.append(planted(llm, context, hiding, book))
            if args.generate:
                streams.append(openings(llm, tokens, context, args.generate, writing))
            for _ in range(args.samples):
                for tasks in map(next, streams):
                    compare(llm, tasks, comparison, samples)
                line.update()
            rows += rows_of(samples, context, args.seed)
    ran = {
        "dtype": str(llm.dtype).removeprefix("torch."),
        "device": str(llm.device),
        "torch": torch.__version__,
    }
    return {
        "rows": rows,
        "settings": {name: value for name, value in vars(args).items() if name != "json"} | ran,
    }


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, as far as the command line alone tells."""
    for name, least in (("continuation", 1), ("samples", 2), ("generate", 0)):
        if vars(args)[name] < least:
            raise RequestError(f"--{name} is {vars(args)[name]}, expected {least} or more")
    shortest = min(args.context)
    if shortest < 16:
        raise RequestError(f"--context is {shortest}, expected 16 tokens or more")
    if args.recall and shortest < 128:
        raise RequestError(f"--context is {shortest}, expected 128 tokens or more for a story's facts")
    for among in args.recall:
        if among not in ("stories", "prose"):
            raise RequestError(f"--recall has {among!r}, expected stories, prose or both")
    for budget in args.budgets:
        check_share(budget, "--budgets")
    check_plot(args.plot)


def what_to_compare(args: argparse.Namespace, directory: Path, config: ModelConfig) -> Comparison:
    """Policies and budgets; refuses what the model cannot hold, before its weights are loaded."""
    with_kv_dtype(config, args.kv_dtype)  # refuses a format that the model does not run
    layers = config.num_hidden_layers
    config.check_length(max(args.context), max(args.continuation, args.generate), "the longest context")
    lengths = [context - 1 for context in args.context]
    if args.generate:
        lengths += args.context
    if args.recall:
        lengths += [context - 2 * QUESTION for context in args.context]  # a story may be as short
    for budget in args.budgets:
        if int(budget * min(lengths) * layers) < layers:
            raise RequestError(
                f"--budgets has {budget}, which is less than a token in each of {layers} layers; give more"
            )
    budgets = list(dict.fromkeys(args.budgets))
    names = args.policies
    if names is None:
        has_profile = isinstance(pick_policy("auto", directory, layers), Profile)
        names = [name for name in NAMES if has_profile or name != "profile"]
    chosen = pick_policies(names, directory, layers)
    for policy in chosen.values():
        policy.check_model(config)
    if args.policies is not None:
        comparison = Comparison(chosen, budgets)
        comparison.check(lengths, layers)
        return comparison
    refused: dict[tuple[str, float], RequestError] = {}
    for name in names:
        for budget in budgets:
            try:
                Comparison({name: chosen[name]}, [budget]).check(lengths, layers)
            except RequestError as error:
                refused[name, budget] = error
                tell(f"{name} is left out at {budget}: {error.__cause__}")
    args.policies = [name for name in names if any((name, budget) not in refused for budget in budgets)]
    if args.policies == ["full"]:
        raise next(iter(refused.values()))
    return Comparison({name: chosen[name] for name in args.policies}, budgets, frozenset(refused))


class EvalLine(ProgressLine):
    """How many samples are done."""

    def __init__(self, samples: int, quiet: bool) -> None:
        super().__init__(quiet)
        self.done, self.samples = 0, samples

    def update(self) -> None:
        """Called after each sample."""
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.samples - self.done)
        bar = "█" * (20 * self.done // self.samples)
        self.write(f"{bar:20} {self.done} of {self.samples} samples, {left:.0f} s left")


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print what was measured, and draw it."""
    try:
        if args.json:
            print(json.dumps(result))
        else:
            print(table(result["rows"], COLUMNS))
            if args.recall:
                print("\nThe same recall by where the fact stands:")
                print(table(result["rows"], BY_PART))
        print(end="", flush=True)  # so that a plot that fails costs no figures
    finally:  # and a reader that leaves early costs no plot
        if args.plot is not None:
            plot(result["rows"], Path(args.plot))


if __name__ == "__main__":
    sys.exit(main())
