"""`python -m minipyramid.eval`: what pruning costs, against the full cache and against other policies at equal bytes.

A context is put into the cache once by every policy and budget, and then asked in three ways. *Text*: the perplexity of
what follows it in a book, and how far each next token's probabilities are from the full cache's (KL divergence, and
how often both would choose the same). *Recall*: facts planted in a story and asked for, the question in the pruned
prompt (where it votes) and after it (where nothing knows of it yet). *Generation*: where a greedy text first differs
from the full cache's, and by how much its length does.

A budget is a share of the full cache's bytes: the pyramid's settings are solved for it, and the others are given as
many tokens as it holds. Intervals are 95 % by bootstrap over windows, questions and openings.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid import LLM, MiniPyramidError, RequestError
from minipyramid.baselines import POLICIES, Held, Policy, hold, hold_pyramid, observe
from minipyramid.cache import Span
from minipyramid.generate import DEFAULT_MODEL, Parser, ProgressLine, print_error, set_threads
from minipyramid.picture import load_matplotlib
from minipyramid.plan_table import readable
from minipyramid.stories import Story, story

DEFAULT_TEXT = DEFAULT_MODEL.parent / "books-sample.txt"
NAMES = ("full", "pyramid", *(name for name in POLICIES if name != "full"))
RESAMPLES = 1000
QUESTIONS = 4  # of a story, at most; each in the prompt costs a prompt of its own
PARTS = 3  # of a story, for recall by depth


# --- What is measured --------------------------------------------------------------------------------------------


# (a policy's cache, the full cache) -> figures by name, one of each or several
Ask = Callable[[Held, Held], dict[str, list[float]]]


@dataclass(frozen=True)
class Task:
    """One context, and what every policy's cache of it is asked."""

    context: list[int]
    ask: Ask
    room: int  # tokens that may follow
    new_tokens: int = 0  # of which are generated, and judged by the pyramid


@torch.inference_mode()
def follow(llm: LLM, held: Held, ids: list[int]) -> Tensor:
    """Log-probabilities of what each token of `ids` could be, given the cache; leaves it as it was.  [n, vocab_size]"""
    row = held.cache.rows[0]
    held.cache.rows[0] = replace(row, lengths=list(row.lengths), kept=list(row.kept))
    x = llm.model.extend(torch.tensor(ids, device=llm.device), [Span(held.cache, 0, len(ids))], every=True)
    held.cache.rows[0] = row
    return torch.cat((held.logits[None], llm.model.logits(x[:-1]))).log_softmax(-1)


def read_on(llm: LLM, continuation: list[int]) -> Ask:
    """Text: loss, KL divergence from the full cache and agreement with it, in nats and shares per token."""

    def ask(held: Held, full: Held) -> dict[str, list[float]]:
        ours, theirs = follow(llm, held, continuation), follow(llm, full, continuation)
        target = torch.tensor(continuation, device=llm.device)[:, None]
        return {
            "loss": [-float(ours.gather(1, target).mean())],
            "kl": [float((theirs.exp() * (theirs - ours)).sum(-1).mean())],
            "agreement": [float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())],
        }

    return ask


def answers(llm: LLM, held: Held, question: list[int], answer: list[int]) -> float:
    """1 if every token of the answer is the first choice, given those before it."""
    said = follow(llm, held, question + answer)[len(question) :].argmax(-1).tolist()
    return float(said == answer)


def generate(llm: LLM, held: Held, new_tokens: int) -> list[int]:
    """Greedy tokens, up to the end of text."""
    ids, logits = [], held.logits
    with torch.inference_mode():
        while True:
            ids.append(int(logits.argmax()))
            if len(ids) == new_tokens or ids[-1] in llm.config.eos_token_ids:
                return ids
            logits = llm.model.logits(llm.model.step(torch.tensor(ids[-1:], device=llm.device), [held.cache]))[0]


def write_on(llm: LLM, new_tokens: int) -> Ask:
    """Generation: tokens until the first difference from the full cache's text, and by how many it is longer."""
    full_text: list[int] = []

    def ask(held: Held, full: Held) -> dict[str, list[float]]:
        if not full_text:
            full_text.extend(generate(llm, full, new_tokens))
        ours = full_text if held is full else generate(llm, held, new_tokens)
        same = [a == b for a, b in zip(ours, full_text, strict=False)]
        return {
            "first_difference": [float((*same, False).index(False))],
            "length_drift": [float(len(ours) - len(full_text))],
        }

    return ask


# --- The tasks ---------------------------------------------------------------------------------------------------


def texts(llm: LLM, tokens: list[int], context: int, continuation: int, rng: random.Random) -> Iterator[list[Task]]:
    """Windows of the text, without end; each begins like a prompt."""
    begin = llm.tokenizer.encode("") if llm.tokenizer else []
    while True:
        start = rng.randrange(len(tokens) - context - continuation + len(begin) + 1)
        ids = begin + tokens[start : start + context + continuation - len(begin)]
        yield [Task(ids[:context], read_on(llm, ids[context:]), continuation)]


def planted(llm: LLM, context: int, rng: random.Random) -> Iterator[list[Task]]:
    """Of every story its questions after it, of one cache; then each in the prompt, with a cache of its own."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError("stories are text, and the checkpoint has no tokenizer.model; leave --recall out")

    def pieces(text: str) -> list[int]:
        return tokenizer.encode(text, continues=True)

    while True:
        tale = story(rng, context, lambda text: len(pieces(text)))
        asked = []
        for question, answer in tale.asked[:QUESTIONS]:
            # As one text, for their pieces are those of the whole.
            both, q = pieces(question + answer), len(pieces(question))
            asked.append(Asked(both[:q], both[q:], depth(tale, question, answer)))
        text = tokenizer.encode(tale.text)
        room = max(len(a.question) + len(a.answer) for a in asked)
        yield [Task(text, after(llm, asked), room)] + [
            Task(text + a.question, inside(llm, a), len(a.answer)) for a in asked
        ]


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and in which part of the story the fact stands."""

    question: list[int]
    answer: list[int]
    part: int


def after(llm: LLM, asked: list[Asked]) -> Ask:
    def ask(held: Held, _: Held) -> dict[str, list[float]]:
        figures: dict[str, list[float]] = defaultdict(list)
        for a in asked:
            hit = answers(llm, held, a.question, a.answer)
            figures["after"].append(hit)
            figures[f"after_part_{a.part + 1}"].append(hit)
        return figures

    return ask


def inside(llm: LLM, a: Asked) -> Ask:
    def ask(held: Held, _: Held) -> dict[str, list[float]]:
        hit = [answers(llm, held, [], a.answer)]
        return {"inside": hit, f"inside_part_{a.part + 1}": hit}

    return ask


def depth(tale: Story, question: str, answer: str) -> int:
    """In which part of the story the fact stands."""
    sentence = question.rpartition("Answer: ")[2] + answer.removesuffix(".")
    return PARTS * tale.text.index(sentence) // len(tale.text)


def openings(llm: LLM, tokens: list[int], context: int, new_tokens: int, rng: random.Random) -> Iterator[list[Task]]:
    """Windows of the text that are written on."""
    for (window,) in texts(llm, tokens, context, 0, rng):
        yield [replace(window, ask=write_on(llm, new_tokens), room=new_tokens, new_tokens=new_tokens)]


# --- The comparison ----------------------------------------------------------------------------------------------

Figures = dict[tuple[str, float], dict[str, list[float]]]  # by policy and budget: a figure's name -> one per sample


def no_figures() -> Figures:
    return defaultdict(lambda: defaultdict(list))


def compare(llm: LLM, task: Task, policies: list[str], budgets: list[float], figures: Figures) -> None:
    """Ask one task of every policy at every budget, and note what came back and what was held."""
    layers, n, new = llm.config.num_hidden_layers, len(task.context), task.new_tokens
    observed = observe(llm, task.context)

    def held_by(policy: Policy, total: int) -> Held:
        return hold(llm, observed, policy, total, task.room)

    def note(name: str, budget: float, held: Held) -> None:
        got = figures[name, budget]
        got["kv_bytes"].append(held.kv_bytes)
        got["kv_share"].append(held.kv_bytes / full_bytes)
        for key, values in task.ask(held, full).items():
            got[key] += values

    full = held_by(POLICIES["full"], n * layers)
    full_bytes = full.kv_bytes
    if "full" in policies:
        note("full", 1.0, full)
    for budget in budgets:
        settings = replace(llm.policy, kv_budget=budget).settings(n, new, layers)
        if settings is None:
            raise RequestError("the pyramid is off, and there is nothing to solve a budget with; give --pyramid")
        # What follows is kept by the others, so at the end all hold the same.
        total = sum(settings.kv_lengths(n, new, layers)) - new * layers
        for name in policies:
            if name == "pyramid":
                note(name, budget, hold_pyramid(llm, task.context, settings, task.room, new))
            elif name != "full" and total >= layers:
                note(name, budget, held_by(POLICIES[name], total))


def interval(values: list[float], seed: int, of: Callable[[float], float] = float) -> list[float]:
    """The mean, and between what 95 % of the means of as many values drawn with replacement lie; each through `of`."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [of(m) for m in (statistics.fmean(values), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)])]


def rows_of(figures: Figures, context: int, seed: int) -> list[dict[str, Any]]:
    """A row per policy and budget; every figure with its interval as [mean, low, high]."""
    rows = []
    full = figures.get(("full", 1.0), {})
    for (name, budget), got in figures.items():
        row: dict[str, Any] = {"policy": name, "budget": budget, "context": context}
        row |= {key: statistics.fmean(got[key]) for key in ("kv_bytes", "kv_share")}
        if "loss" in got:
            row["perplexity"] = interval(got["loss"], seed, math.exp)
            if full:  # of the same windows, so their spread cancels out
                pairs = zip(got["loss"], full["loss"], strict=True)
                row["perplexity_ratio"] = interval([ours - theirs for ours, theirs in pairs], seed, math.exp)
        for key, values in got.items():
            if key not in ("kv_bytes", "kv_share", "loss"):
                row[key] = interval(values, seed)
        rows.append(row)
    return rows


COLUMNS = {  # a row's figure -> the table's heading, and how it is shown
    "perplexity": ("perplexity", "{:.2f}"),
    "perplexity_ratio": ("of full", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "agreement": ("same top", "{:.3f}"),
    "inside": ("asked inside", "{:.3f}"),
    "after": ("asked after", "{:.3f}"),
    "first_difference": ("differs at", "{:.1f}"),
    "length_drift": ("longer by", "{:.1f}"),
}


def table(rows: list[dict[str, Any]]) -> str:
    """For people: every figure as mean [low, high]."""
    columns = {key: how for key, how in COLUMNS.items() if any(key in row for row in rows)}
    head = f"{'context':>7} {'policy':10} {'budget':>6} {'held':>10} {'share':>6}"
    lines = [head + "".join(f" {heading:>22}" for heading, _ in columns.values())]
    for row in rows:
        line = f"{row['context']:7} {row['policy']:10} {row['budget']:6.2f} {readable(row['kv_bytes']):>10}"
        line += f" {row['kv_share']:6.1%}"
        for key, (_, shown) in columns.items():
            parts = [shown.format(value) for value in row.get(key, ())]
            line += f" {f'{parts[0]} [{parts[1]}, {parts[2]}]' if parts else '-':>22}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Quality against bytes: a line per policy, a panel per figure, the intervals as bars."""
    wanted = [key for key in ("perplexity", "kl", "inside", "after") if any(key in row for row in rows)]
    figure = load_matplotlib().Figure(figsize=(4.5 * len(wanted), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        lines: dict[tuple[str, int], list[tuple[float, list[float]]]] = defaultdict(list)
        for row in rows:
            if key in row:
                lines[row["policy"], row["context"]].append((row["kv_share"], row[key]))
        several = len({context for _, context in lines}) > 1
        for (name, context), points in lines.items():
            shares = [share for share, _ in points]
            means, lows, highs = zip(*(values for _, values in points), strict=True)
            spread = [[m - low for m, low in zip(means, lows, strict=True)]]
            spread += [[high - m for m, high in zip(means, highs, strict=True)]]
            label = f"{name} {context}" if several else name
            axes.errorbar(shares, means, yerr=spread, marker="o", capsize=2, label=label)
        axes.set_xlabel("share of the full cache's bytes")
        axes.set_ylabel({"inside": "recall, asked inside", "after": "recall, asked after"}.get(key, key))
    figure.axes[0].legend()
    figure.savefig(file)


# --- The command -------------------------------------------------------------------------------------------------


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"  # what argparse calls it
    return read


def build_parser() -> Parser:
    parser = Parser(prog="minipyramid.eval", allow_abbrev=False, description="Measure what pruning costs.")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="PATH_OR_REPO")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--text", default=str(DEFAULT_TEXT), metavar="FILE", help="UTF-8 text to continue")
    parser.add_argument("--context", type=listed(int), default=[512], metavar="N,N", help="tokens of the prompt (512)")
    parser.add_argument("--continuation", type=int, default=128, metavar="N", help="tokens scored after it (128)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also compare N generated tokens")
    parser.add_argument("--recall", action="store_true", help="also ask for facts planted in stories of --context")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="windows, stories and openings (8)")
    parser.add_argument("--policies", type=listed(str), default=list(NAMES), metavar="NAME,NAME", help=", ".join(NAMES))
    parser.add_argument("--budgets", type=listed(float), default=[0.75, 0.5, 0.35], metavar="SHARE,SHARE")
    parser.add_argument("--pyramid", default="auto", metavar="NAME_OR_FILE", help="settings to solve budgets from")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE.png", help="draw quality against bytes (needs the extra plot)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    least = {"continuation": 1, "samples": 2, "generate": 0}
    for name, low in least.items():
        if vars(args)[name] < low:
            raise RequestError(f"--{name} is {vars(args)[name]}, expected {low} or more")
    if min(args.context) < 16:
        raise RequestError(f"--context is {min(args.context)}, expected 16 tokens or more")
    if args.recall and min(args.context) < 64:
        raise RequestError(f"--context is {min(args.context)}, expected 64 tokens or more for a story's facts")
    for name in args.policies:
        if name not in NAMES:
            raise RequestError(f"--policies has {name!r}, expected some of {', '.join(NAMES)}")
    if args.plot:
        load_matplotlib()
        file = Path(args.plot)
        if not file.parent.is_dir() or file.suffix not in (".png", ".svg", ".pdf"):
            raise RequestError(f"--plot is {file}, expected a .png, .svg or .pdf in a folder that exists")


def read_tokens(llm: LLM, args: argparse.Namespace) -> list[int]:
    """The text's tokens, enough of them for the longest window."""
    try:
        text = Path(args.text).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text {args.text} cannot be read as UTF-8 text: {error}") from error
    if llm.tokenizer is None:
        raise RequestError(f"{args.model} has no tokenizer.model, which --text needs; add it")
    tokens, longest = llm.tokenizer.encode(text, continues=True), max(args.context) + args.continuation
    if len(tokens) < longest:
        raise RequestError(f"--text {args.text} has {len(tokens)} tokens, expected {longest} or more")
    return tokens


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every context, task, policy and budget; returns what `--json` prints."""
    check(args)
    set_threads(args.threads)
    llm = LLM(
        args.model, pyramid=args.pyramid, dtype=args.dtype, device=args.device, revision=args.revision,
    )  # fmt: skip
    tokens = read_tokens(llm, args)
    llm.config.check_length(max(args.context), max(args.continuation, args.generate), "the longest context")
    rows: list[dict[str, Any]] = []
    with EvalLine(len(args.context) * args.samples, quiet=args.quiet) as line:
        for context in args.context:
            figures = no_figures()
            rng = random.Random(args.seed)
            streams = [texts(llm, tokens, context, args.continuation, rng)]
            streams += [planted(llm, context, rng)] if args.recall else []
            streams += [openings(llm, tokens, context, args.generate, rng)] if args.generate else []
            for _ in range(args.samples):
                for task in itertools.chain(*map(next, streams)):
                    compare(llm, task, args.policies, args.budgets, figures)
                line.update()
            rows += rows_of(figures, context, args.seed)
    return {"rows": rows, "settings": {name: value for name, value in vars(args).items() if name != "json"}}


class EvalLine(ProgressLine):
    """How many samples are done."""

    def __init__(self, samples: int, quiet: bool) -> None:
        super().__init__(quiet)
        self.done, self.samples = 0, samples

    def update(self) -> None:
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.samples - self.done)
        bar = "█" * (20 * self.done // self.samples)
        self.write(f"{bar:20} {self.done} of {self.samples} samples, {left:.0f} s left")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        result = run(args)
        if args.plot:
            plot(result["rows"], Path(args.plot))
        print(json.dumps(result) if args.json else table(result["rows"]))
    except MiniPyramidError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("\nminipyramid: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
