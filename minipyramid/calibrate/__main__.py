"""`python -m minipyramid.calibrate`: a checkpoint's profile, from plain text.

The text's first three quarters are fitted to, its last quarter is what the profile is checked on before it is
written. What is measured: `contexts.py`. How levels are found: `find.py` and `search.py`. The score `fitted`:
`fit.py`. What stands for the tokens that are not held: `stand_ins.py`. What a layer holds and does not
compute: `guesses.py`.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from minipyramid import LLM, RequestError
from minipyramid.calibrate.check import check_levels
from minipyramid.calibrate.contexts import Contexts, Window, cut_windows, profile_of
from minipyramid.calibrate.find import DEPTHS, Search
from minipyramid.calibrate.fit import FIRST, LAST, LineFit
from minipyramid.calibrate.guesses import pieces_of
from minipyramid.calibrate.picture import plot
from minipyramid.calibrate.search import GUESSED, SIZES, choices_of, whole_level
from minipyramid.calibrate.settings import check_replaced, write_profile
from minipyramid.cli.loading import load_full
from minipyramid.cli.plotting import check_plot
from minipyramid.cli.terminal import (
    DEFAULT_MODEL,
    Parser,
    ProgressLine,
    check_writable,
    exit_status,
    listed,
    set_quiet,
    set_threads,
    unfinished,
)
from minipyramid.cli.texts import read_text, read_tokens
from minipyramid.config import ModelConfig
from minipyramid.formats.huggingface import read_config
from minipyramid.hub import locate
from minipyramid.policies import SETTINGS
from minipyramid.policy import check_share

# By share of the cache, the share of a prompt's token-layers that is computed, if that does for the model.
COMPUTED = ((0.0, 0.4), (0.08, 0.4), (0.15, 0.45), (0.25, 0.5), (0.5, 0.75), (1.0, 1.0))
FITTED_TO = 0.75  # of the text
LEAST_APART = 0.0002  # of budgets; those that are closer may become one as they are written
SHORTEST = 4 * (FIRST + LAST)  # tokens of a context


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="minipyramid.calibrate", allow_abbrev=False, description="Find a model's profile.")
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    add("--revision", help="branch, tag or commit of a hub repository")
    add("--text", required=True, metavar="FILE", help="any UTF-8 text of a book's size, or its .xz")
    add("--out", metavar="FILE.json", help=f"where to write ({SETTINGS} in the model's directory)")
    add(
        "--budget",
        type=listed(float),
        default=[0.5, 0.25, 0.15, 0.08, 0.05],
        metavar="SHARE,SHARE",
        help="shares of the full cache to find levels for (0.5,0.25,0.15,0.08,0.05)",
    )
    add(
        "--computed",
        type=listed(float),
        metavar="SHARE,SHARE",
        help="token-layers to compute at each of them (0.75 at 0.5, 0.4 at 0.05); more where it costs much",
    )
    add(
        "--context",
        type=listed(int),
        default=[512, 1024],
        metavar="N,N",
        help=f"tokens, {SHORTEST} or more, and more than twice --following (512,1024)",
    )
    add("--following", type=int, default=96, metavar="N", help="tokens read after each context (96)")
    add("--samples", type=int, default=8, metavar="N", help="windows of each context (8)")
    add("--repeat", action="store_true", help="let layers choose by a second pass over the prompt")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0)
    add("--plot", metavar="FILE.png", help="draw the curves and both lists (needs the extra plot)")
    add("--json", action="store_true", help="what was measured as one JSON object on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Find, check, write, and tell."""
    args.context = list(dict.fromkeys(args.context))
    budgets = check(args)
    set_threads(args.threads)
    set_quiet(args.quiet)
    text, directory = read_text(args.text), locate(args.model, args.revision)
    out = out_file(args, directory)
    config = read_config(directory, args.quantize)
    check_contexts(args, config)
    # The last quarter has to have a window, too.
    least = 4 * (max(args.context) + args.following)
    tokens = read_tokens(directory, config.vocab_size, text, args.text, least)
    llm = load_full(args)
    end = int(FITTED_TO * len(tokens))
    to_fit, to_check = (
        windows(llm, part, args, which) for which, part in enumerate((tokens[:end], tokens[end:]))
    )
    begin = llm.engine.need_tokenizer().encode("")
    pieces = pieces_of(tokens[:end], begin, max(args.context))
    expected = measurements(config.num_hidden_layers, len(budgets), args.repeat)
    with CalibrationLine(expected, quiet=args.quiet) as progress:
        lines = fitted_lines(llm, to_fit, progress)
        search = Search(llm, to_fit, lines, args.repeat, progress.update, pieces=pieces)
        found, guess_weights = search.find(budgets), search.guess_weights
        del search  # its record of the windows is as large as that of the others will be
        held_out = Search(llm, to_check, lines, args.repeat, progress.update, guess_weights=guess_weights)
        rows = check_levels(held_out, found.levels)
    asked = {"budget": [share for share, _ in budgets], "computed": [computed for _, computed in budgets]}
    measured = {"model": Path(args.model).name or args.model, "dtype": str(llm.dtype).removeprefix("torch.")}
    measured |= {"quantize": args.quantize, "text": Path(args.text).name, "context": args.context}
    measured |= {"following": args.following, "samples": args.samples, "seed": args.seed}
    measured |= {"repeat": args.repeat, "asked": asked, "levels": rows}
    levels = [level for level, row in zip(found.levels, rows, strict=True) if row["better"]]
    if not levels:
        raise RequestError(
            "no level does better than an even split on the windows that it was not fitted to; "
            "give a longer --text or more --samples"
        )
    write_profile(out, levels, lines, measured, guess_weights=guess_weights)
    if args.plot is not None:
        plot(found, Path(args.plot))
    told = measured | found.as_dict() | {"out": str(out)}
    print(json.dumps(told) if args.json else table(rows, out))


def check(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Budgets with what is computed at each, if the flags are what they must be."""
    check_shares(args)
    for name, least in (("following", 2), ("samples", 1)):
        if vars(args)[name] < least:
            raise RequestError(f"--{name} is {vars(args)[name]}, expected {least} or more")
    if min(args.context) < SHORTEST:
        raise RequestError(f"--context is {min(args.context)}, expected {SHORTEST} tokens or more")
    if 2 * args.following >= min(args.context):
        raise RequestError(
            f"--following is {args.following}, expected less than half of the shortest context"
        )
    if min(args.budget) * min(args.context) < 1:
        raise RequestError(
            f"--budget has {min(args.budget)}, less than a token of {min(args.context)}; give more"
        )
    check_plot(args.plot)
    computed = args.computed or [computed_at(share) for share in args.budget]
    if len(computed) != len(args.budget):
        told = f"--computed has {len(computed)} shares for {len(args.budget)} budgets"
        raise RequestError(f"{told}; give as many")
    budgets = list(dict.fromkeys(zip(args.budget, computed, strict=True)))
    for share, times in Counter(share for share, _ in budgets).items():
        if times > 1:
            raise RequestError(f"--budget has {share} with more than one share of --computed; give it once")
    return budgets


def check_shares(args: argparse.Namespace) -> None:
    """Refuse shares of which no file could be written that is read again."""
    for flag, shares in (("--budget", args.budget), ("--computed", args.computed or [])):
        for share in shares:
            check_share(share, flag)
    if max(args.budget) > 1 - LEAST_APART:
        told = f"--budget has {max(args.budget)}, where no layer holds less than another"
        raise RequestError(f"{told}; give shares of {1 - LEAST_APART} or less")
    for low, high in pairwise(sorted(set(args.budget))):
        if high - low < LEAST_APART:
            raise RequestError(
                f"--budget has {low} and {high}, expected shares that are {LEAST_APART} apart or more"
            )


def computed_at(share: float) -> float:
    """On the line between two of `COMPUTED`."""
    for (low, a), (high, b) in pairwise(COMPUTED):
        if share <= high:
            return a + (b - a) * (share - low) / (high - low)
    return 1.0


def check_contexts(args: argparse.Namespace, config: ModelConfig) -> None:
    """Refuse contexts that the model does not reach."""
    for context in args.context:
        config.check_length(context, args.following, "--context")
        if args.repeat and 2 * context > config.max_position_embeddings:
            most = config.max_position_embeddings // 2
            raise RequestError(
                f"--context is {context}, expected {most} or less where --repeat says it twice"
            )


def out_file(args: argparse.Namespace, directory: Path) -> Path:
    """Where the profile of the model in this directory goes, if it can be written there."""
    if args.out is None and directory != Path(args.model).expanduser():
        raise RequestError(f"--model {args.model} is no directory of yours to write to; give --out FILE.json")
    try:
        out = directory / SETTINGS if args.out is None else Path(args.out).expanduser()
        str(out).encode()  # what reads it asks for a name in UTF-8
    except (RuntimeError, UnicodeError) as error:  # there may be no such home
        raise RequestError(f"--out {args.out} cannot be written: {error}") from error
    if not (args.out or out.name).endswith(".json"):
        raise RequestError(f"--out is {args.out}, expected a file's name that ends with .json")
    beside = out.with_suffix(".safetensors")
    if beside.name == "model.safetensors":
        raise RequestError(f"--out {out} would write what is fitted over the weights; give another name")
    for path in (out, beside):
        check_writable("--out", path)
        check_writable("--out", unfinished(path))
        # The settings name the file beside them, and would not find it by a link from elsewhere.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RequestError(
                f"{path} is no plain file, so no profile is written over it; give another --out"
            )
    check_replaced(out)
    return out


def windows(llm: LLM, tokens: list[int], args: argparse.Namespace, which: int) -> list[Window]:
    """`--samples` of each `--context`; `which` gives the two parts of a text draws of their own."""
    rng = random.Random(f"{args.seed} {which}")
    begin = llm.engine.need_tokenizer().encode("")
    found = []
    for context in args.context:
        found += cut_windows(tokens, begin, (context, args.following), args.samples, rng)
    return found


def fitted_lines(llm: LLM, to_fit: list[Window], progress: "CalibrationLine") -> Any:
    """The lines of the score `fitted`, from all windows, said again as far as the model's positions reach."""
    layers, fit = llm.config.num_hidden_layers, LineFit()
    whole = profile_of(whole_level(layers))
    longest = llm.config.max_position_embeddings // 2
    for window in to_fit:
        part = Window(window.context[:longest], window.following, window.again)
        (seen,) = Contexts(llm, [part], whole, repeats=True).seen
        fit.add(seen)
        progress.update("fits lines to the prompt said again")
    return fit.lines()


def measurements(layers: int, budgets: int, repeats: bool) -> int:
    """About how many there will be: half of a curve's points need all choices."""
    choices = 1 + len(choices_of(repeats))
    # To choose anew, and exchanges, which took 7 for each layer of the embedded model.
    of_budget = layers * (7 + choices) + DEPTHS * len(GUESSED)
    return len(SIZES) * layers * (1 + choices) // 2 + budgets * of_budget


class CalibrationLine(ProgressLine):
    """What is being measured, and how long it may take yet."""

    def __init__(self, expected: int, quiet: bool) -> None:
        super().__init__(quiet)
        self.done, self.expected = 0, expected

    def update(self, what: str) -> None:
        """Called after each measurement."""
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * max(0, self.expected - self.done)
        self.write(f"{self.done} measurements, about {left:.0f} s left; {what}")


def table(rows: list[dict[str, Any]], out: Path) -> str:
    """For people: what every level costs on windows that it was not fitted to."""
    lines = [f"{'':16}{'level':>29}   {'even split':>29}"]
    # KL of the text and of what is said again, and perplexity over the full cache's.
    lines.append(f"{'held':>6} {'computed':>9}" + 2 * f" {'KL, text':>9} {'KL, again':>10} {'perpl.':>8}  ")
    for row in rows:
        line = f"{row['held']:6.1%} {row['computed']:9.1%}"
        for which in ("", "even_"):
            kl, again, ratio = (row[which + name] for name in ("kl", "kl_again", "perplexity_ratio"))
            line += f" {kl:9.4f} {again:10.4f} {ratio:8.4f}  "
        lines.append(line.rstrip() + ("" if row["better"] else "  (left out: no better)"))
    return "\n".join([*lines, f"written to {out}"])


if __name__ == "__main__":
    sys.exit(main())
