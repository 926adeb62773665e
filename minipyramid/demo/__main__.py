"""The command behind `train_free_demo.py`: the same prompts with the full cache and with another policy.

Without flags the other policy is the checkpoint's own at half of the full cache. One prompt asks for a fact
that stands in a stretch of a book, the other is a stretch of that book as it stands, which is continued.
"""

import argparse
import os
import sys
from pathlib import Path

from minipyramid import RequestError, SamplingParams
from minipyramid.cli.plotting import load_matplotlib
from minipyramid.cli.prompts import read_prompts
from minipyramid.cli.terminal import DEFAULT_MODEL, Parser, check_writable, exit_status, write_whole
from minipyramid.demo.cases import PROMPT_TOKENS, names
from minipyramid.demo.page import page
from minipyramid.demo.picture import Picture
from minipyramid.demo.plot import plot
from minipyramid.demo.screen import screen, style_of_stdout
from minipyramid.demo.sides import KV_BUDGET, compare
from minipyramid.errors import check_number
from minipyramid.policies import POLICIES

NEW_TOKENS = 64
# Flags of prompts that are not given, and their limits.
OF_BOOK = {"batch_size": (1, 1024), "prompt_tokens": (64, 10**7), "seed": (0, 2**63 - 1)}


def build_parser() -> Parser:
    """A flag that `generate` has by the same name means the same."""
    parser = Parser(
        prog="train_free_demo.py",
        allow_abbrev=False,
        description="Run the full cache and another policy on the same prompts, and show what was kept "
        "and what it costs.",
    )
    parser.set_defaults(prompt=None)  # no positional one, for `read_prompts`
    add = parser.add_argument
    add(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        default=[],
        help="may be given several times, the first is drawn (default: a question about a fact that stands "
        "among a book's sentences, and a stretch of that book)",
    )
    add("--prompt-file", metavar="FILE", help="read a prompt from a file; - is stdin")
    add("--batch-size", type=int, metavar="N", help="so many questions (1), and one prompt more")
    add("--prompt-tokens", type=int, metavar="N", help=f"length of each of these ({PROMPT_TOKENS})")
    add("--seed", type=int, metavar="N", help="which facts and stretches they are (0)")
    add("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"({NEW_TOKENS})")
    add(
        "--model",
        default=str(DEFAULT_MODEL),
        metavar="PATH_OR_REPO",
        help="checkpoint directory or hub repository (default: the embedded checkpoint)",
    )
    add(
        "--policy",
        metavar="NAME_OR_FILE",
        help=f"auto, {', '.join(name for name in POLICIES if name != 'full')}, a preset, a JSON file, or "
        "package.module:Name; as it is, unless --kv-budget is given as well",
    )
    add(
        "--kv-budget",
        type=float,
        metavar="SHARE",
        help=f"hold at most this share of the full cache (default without --policy: {KV_BUDGET})",
    )
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--html", metavar="FILE", help="write a page on which each token of the prompt can be looked at")
    add("--plot", metavar="FILE.png", help="draw what was kept (needs the extra plot)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Compare, then print and write what was asked for."""
    given = check(args)
    picture = compare(args, given)
    write(args, picture)  # first, for whoever reads the screen may leave before its end
    print("\n".join(screen(picture, style_of_stdout())))


def check(args: argparse.Namespace) -> list[str]:
    """Refuse what can be refused before anything is loaded; returns the prompts that were given, if any."""
    for flag, (lowest, highest) in OF_BOOK.items():
        if vars(args)[flag] is not None:
            check_number(option(flag), vars(args)[flag], (int, lowest, highest), RequestError, TypeError)
    SamplingParams(max_new_tokens=args.max_new_tokens)
    if args.policy == "full":
        raise RequestError(
            "--policy is full, which is the other side of the comparison; leave it out, or name another"
        )
    check_files(args)
    prompts = read_prompts(args, needed=False)
    for name, prompt in zip(names(len(prompts)), prompts, strict=True):
        if not prompt:
            raise RequestError(f"{name} is empty; give at least one token")
        if "\0" in prompt:
            raise RequestError(f"{name} holds a NUL character, as binary files do; give a text")
    for flag in OF_BOOK:
        if prompts and vars(args)[flag] is not None:
            raise RequestError(
                f"{option(flag)} is for prompts from the book, and others are given; leave it out, or them"
            )
    return prompts


def check_files(args: argparse.Namespace) -> None:
    """What is to be written can be, and over nothing else that was named."""
    taken: dict[Path, str] = {}
    for flag in ("prompt_file", "policy", "html", "plot"):
        path = Path(vars(args)[flag] or "-")
        if path != Path("-"):
            other = taken.setdefault(Path(os.path.realpath(path)), flag)
            if other != flag:
                raise RequestError(f"{option(other)} and {option(flag)} are both {path}; give two names")
    if args.plot is not None:
        if Path(args.plot).suffix != ".png":
            raise RequestError(f"--plot is {args.plot}, expected a name that ends with .png")
        load_matplotlib()
    for flag in ("html", "plot"):
        if vars(args)[flag] is not None:
            check_writable(option(flag), Path(vars(args)[flag]))


def option(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def write(args: argparse.Namespace, picture: Picture) -> None:
    """The files that were asked for."""
    if args.html is not None:
        write_whole("--html", Path(args.html), page(picture).encode())
    if args.plot is not None:
        plot(picture, Path(args.plot))


if __name__ == "__main__":
    sys.exit(main())
