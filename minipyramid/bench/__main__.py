"""`python -m minipyramid.bench`: prompts and generation timed, against this machine's limits and others.

Only generated tokens count, all prompts differ, and every method generates as many (the end of text is
ignored), so methods do equal work. Which rows there are: `methods.py`. What a floor is: `floors.py`.
"""

import argparse
import json
import sys

from minipyramid import RequestError
from minipyramid.bench.growth import growth, growth_table
from minipyramid.bench.served import served, served_table
from minipyramid.bench.table import measure, table
from minipyramid.bench.workers import serve
from minipyramid.cli.terminal import DEFAULT_MODEL, Parser, exit_status, set_threads
from minipyramid.hub import SHAPE, locate
from minipyramid.policies import POLICIES
from minipyramid.sizes import parse_bytes

MOST_SEQUENCES = 10_000  # of --batch-size
LEAST = {"batch_size": 1, "prompt_tokens": 1, "max_new_tokens": 1, "runs": 1, "fixed": 0}
# Modes that measure something else, and the flags that they have no use for.
NO_USE = {
    "growth": "prompt_tokens max_new_tokens ragged policy kv_budget kv_memory fixed compile versus".split(),
    "served": "fixed compile versus growth".split(),
}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="minipyramid.bench", allow_abbrev=False, description="Time prompt and generation phases."
    )
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO", help="or shape:llama2-7b ...")
    add("--batch-size", type=int, default=8, metavar="N")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="with --ragged: at most")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="with --ragged: at most")
    add("--ragged", action="store_true", help="prompts and generations of different lengths")
    add(
        "--policy",
        default="auto",
        metavar="NAME,NAME",
        help="a row for each, as it is, below the row full, which is always there: "
        f"auto, {', '.join(POLICIES)}, a preset, a JSON file, or package.module:Name",
    )
    add(
        "--kv-budget",
        type=float,
        metavar="SHARE",
        help="also a row 'NAME SHARE' for each policy but full and auto, held to this share of the full "
        "cache, and a row 'budget SHARE', which is auto held to it",
    )
    add("--kv-memory", metavar="SIZE", help="bound of the keys and values in flight")
    add("--fixed", type=int, default=0, metavar="N", help="also the last row's policy in fixed batches of N")
    add("--compile", action="store_true", help="also the last row's policy with compiled decode steps")
    add("--growth", action="store_true", help="only a decode step's time by the number of tokens held")
    add("--served", action="store_true", help="only a server with --batch-size clients, against generate")
    add("--versus", choices=["transformers"], help="compare with this library, if it is installed")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--kv-dtype", default="auto", metavar="NAME", help="int8 holds keys and values in 8 bits")
    add("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--runs", type=int, default=3, metavar="N", help="medians of so many (default 3)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="a last line with everything as JSON")
    add("--serve", help=argparse.SUPPRESS)  # the row whose method this process runs
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args, argv))


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure and print, or be one of the processes that are measured."""
    check(args)
    set_threads(args.threads)
    if not args.model.startswith(SHAPE):
        args.model = str(locate(args.model))  # a repository's files, for all that reads them
    if args.serve:
        serve(args.serve, args)
        return
    if args.growth:
        result = growth(args)
        print(growth_table(result))
    elif args.served:
        result = served(args)
        print(served_table(result))
    else:
        result = measure(args, argv)
        print(table(result))
    if args.json:
        print(json.dumps(result))


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, as far as the flags alone tell."""
    for name, least in LEAST.items():
        given = vars(args)[name]
        if given < least:
            raise RequestError(f"--{name.replace('_', '-')} is {given}, expected at least {least}")
    if args.batch_size > MOST_SEQUENCES:
        raise RequestError(f"--batch-size is {args.batch_size}, expected at most {MOST_SEQUENCES}")
    if args.kv_memory is not None:
        parse_bytes(args.kv_memory)
    default = vars(build_parser().parse_args([]))
    for mode, unused in NO_USE.items():
        for name in unused:
            if vars(args)[mode] and vars(args)[name] != default[name]:
                flag = name.replace("_", "-")
                raise RequestError(f"--{mode} has no use for --{flag}; leave one of them out")


if __name__ == "__main__":
    sys.exit(main())
