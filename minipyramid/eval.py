"""`python -m minipyramid.eval`: what pruning costs, against the full cache and against other policies at equal bytes.

Every policy and budget puts the same context into a cache and is then asked about it, in three tasks. *Text*: the
perplexity of what follows in a book, and how far each next token's probabilities are from the full cache's (KL
divergence, and how often both would choose the same). *Recall*: facts planted in a story and asked for, the question in
the pruned prompt (where it votes) and after it (where nothing knows of it yet). *Generation*: where a greedy text first
differs from the full cache's, and by how much its length does.

The last token before what is scored is never part of the context, so that every figure went through the pruned cache. A
budget is a share of the full cache's bytes of the context: the pyramid's settings are solved for it, and the others are
given as many tokens as it holds (of several pyramids the first). Of generated tokens the others keep all, the pyramid
judges its own. The bytes that are reported are those of the text's contexts.

Recall is a mean over stories of a story's share of right answers; perplexity is exp of the mean loss, and its ratio to
the full cache's exp of the mean difference of the same windows. Intervals are 95 % by bootstrap over windows, stories
and openings; where all samples agree they have no width, which proves nothing.
"""

import argparse
import itertools
import json
import lzma
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minipyramid import LLM, PyramidConfig, RequestError
from minipyramid.baselines import BASELINES, Seen, evenly, hold, hold_pyramid, kv_bytes, observe
from minipyramid.budget import check_share
from minipyramid.cache import KVCache, Span
from minipyramid.demo import check_writable
from minipyramid.generate import DEFAULT_MODEL, DEFAULT_TEXT, Parser, ProgressLine, exit_status, set_threads
from minipyramid.hub import locate
from minipyramid.picture import load_matplotlib
from minipyramid.plan import Policy, pick_pyramid
from minipyramid.plan_table import readable
from minipyramid.stories import Story, story

NAMES = ("full", "pyramid", *(name for name in BASELINES if name != "full"))
RESAMPLES = 1000
QUESTIONS = 4  # of a story, at most; each in the prompt costs a prompt of its own
PARTS = 3  # of a story, for recall by where a fact stands
QUESTION = 40  # tokens that are left for a question and its answer at first
LEAST_STORY = 64  # tokens


# --- What is measured --------------------------------------------------------------------------------------------


Figures = dict[str, float]
Ask = Callable[[KVCache, KVCache], Figures]  # (a policy's cache, the full cache) -> figures by name


@dataclass(frozen=True)
class Task:
    """One context, and what every policy's cache of it is asked."""

    context: list[int]
    ask: Ask
    room: int  # tokens that are given behind the context
    new_tokens: int = 0  # tokens that are generated after these, and judged by the pyramid


@torch.inference_mode()
def follow(llm: LLM, cache: KVCache, ids: list[int]) -> Tensor:
    """Log-probabilities of what may follow each of `ids` behind a context; leaves its cache as it was.

    [n] -> [n, vocab_size]
    """
    row = cache.rows[0]
    cache.rows[0] = replace(row, lengths=list(row.lengths), kept=list(row.kept))
    x = llm.model.extend(torch.tensor(ids, device=llm.device), [Span(cache, 0, len(ids))], every=True)
    cache.rows[0] = row
    return llm.model.logits(x).log_softmax(-1)


def read_on(llm: LLM, ids: list[int]) -> Ask:
    """Text: of all `ids` but the first the loss, KL divergence from the full cache (nats) and agreement with it.

    Also what is held, so that a row tells the bytes of contexts of one length.
    """

    def ask(cache: KVCache, full: KVCache) -> Figures:
        ours, theirs = follow(llm, cache, ids[:-1]), follow(llm, full, ids[:-1])
        target = torch.tensor(ids[1:], device=llm.device)[:, None]
        return {
            "loss": -float(ours.gather(1, target).mean()),
            "kl": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
            "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
            "kv_bytes": kv_bytes(cache),
            "kv_share": kv_bytes(cache) / kv_bytes(full),
        }

    return ask


def write(llm: LLM, cache: KVCache, last: int, new_tokens: int) -> list[int]:
    """Greedy tokens after `last`, up to the end of text."""
    ids = [last]
    with torch.inference_mode():
        while len(ids) <= new_tokens and (len(ids) == 1 or ids[-1] not in llm.config.eos_token_ids):
            x = llm.model.step(torch.tensor(ids[-1:], device=llm.device), [cache])
            ids.append(int(llm.model.logits(x)[0].argmax()))
    return ids[1:]


def write_on(llm: LLM, last: int, new_tokens: int) -> Ask:
    """Generation: how many tokens are the full cache's (of an equal text all), and by how many it is longer."""
    full_text: list[int] = []

    def ask(cache: KVCache, full: KVCache) -> Figures:
        if not full_text:
            full_text.extend(write(llm, full, last, new_tokens))
        ours = full_text if cache is full else write(llm, cache, last, new_tokens)
        same = [a == b for a, b in zip(ours, full_text, strict=False)]
        return {
            "first_difference": new_tokens if ours == full_text else (*same, False).index(False),
            "identical": float(ours == full_text),
            "length_drift": len(ours) - len(full_text),
        }

    return ask


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and in which part of the planted stretch the fact stands."""

    question: list[int]
    answer: list[int]
    part: int

    def hit(self, llm: LLM, cache: KVCache, question: list[int]) -> float:
        """1 if every token of the answer is the first choice, given those before it."""
        said = follow(llm, cache, question + self.answer[:-1])[len(question) - 1 :].argmax(-1).tolist()
        return float(said == self.answer)


def after(llm: LLM, asked: list[Asked], tokens: int) -> Ask:
    """All questions of a story, each behind its pruned cache; and the story's length."""

    def ask(cache: KVCache, _: KVCache) -> Figures:
        hits = [(a.hit(llm, cache, a.question), a.part) for a in asked]
        parts = {part: [hit for hit, p in hits if p == part] for _, part in hits}
        by_part = {f"after_part_{part + 1}": statistics.fmean(some) for part, some in parts.items()}
        return {"after": statistics.fmean(hit for hit, _ in hits), **by_part, "story_tokens": tokens}

    return ask


def inside(llm: LLM, a: Asked) -> Ask:
    """One question, whose last token alone is behind the pruned cache."""

    def ask(cache: KVCache, _: KVCache) -> Figures:
        hit = a.hit(llm, cache, a.question[-1:])
        return {"inside": hit, f"inside_part_{a.part + 1}": hit}

    return ask


# --- The tasks, each without end; what is yielded together is one sample -----------------------------------------


def texts(llm: LLM, tokens: list[int], context: int, continuation: int, rng: random.Random) -> Iterator[list[Task]]:
    """Windows of the text; each begins like a prompt."""
    begin = llm.tokenizer.encode("") if llm.tokenizer else []
    while True:
        start = rng.randrange(len(tokens) - context - continuation + len(begin) + 1)
        ids = begin + tokens[start : start + context + continuation - len(begin)]
        yield [Task(ids[: context - 1], read_on(llm, ids[context - 1 :]), continuation)]


def openings(llm: LLM, tokens: list[int], context: int, new_tokens: int, rng: random.Random) -> Iterator[list[Task]]:
    """Windows of the text that are written on."""
    for (window,) in texts(llm, tokens, context + 1, 0, rng):
        *ids, last = window.context
        yield [Task(ids, write_on(llm, last, new_tokens), 1, new_tokens)]


def planted(llm: LLM, context: int, rng: random.Random) -> Iterator[list[Task]]:
    """Of every story its questions after it, of one cache; then each in the prompt, with a cache of its own."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError("stories are text, and the checkpoint has no tokenizer.model; leave --recall out")

    def pieces(text: str) -> list[int]:
        return tokenizer.encode(text, continues=True)

    while True:
        room = QUESTION
        while True:  # until the longest question and its answer fit behind the story
            if context - room < LEAST_STORY:
                raise RequestError(f"--context {context} is too short for a story and its question in these tokens")
            tale = story(rng, context - room, lambda text: len(pieces(" " + text)), asked_within=False)
            text, asked = tokenizer.encode(tale.text), []
            for question, answer in tale.asked[:QUESTIONS]:
                # As one text, for their pieces are those of the whole.
                both, q = pieces(question + answer), len(pieces(question))
                asked.append(Asked(both[:q], both[q:], part_of(tale, question, answer)))
            longest = max(len(a.question) + len(a.answer) for a in asked)
            if len(text) + longest <= context:
                break
            room += len(text) + longest - context
        each = [Task(text + a.question[:-1], inside(llm, a), len(a.answer)) for a in asked]
        yield [Task(text, after(llm, asked, len(text)), longest), *each]


def part_of(tale: Story, question: str, answer: str) -> int:
    """In which part the fact stands, of the three quarters in which facts are planted."""
    sentence = question.rpartition("Answer: ")[2] + answer.removesuffix(".")
    return min(PARTS - 1, int(PARTS * tale.text.index(sentence) / (0.75 * len(tale.text))))


# --- The comparison ----------------------------------------------------------------------------------------------

Samples = dict[tuple[str, float], dict[str, list[float]]]  # by policy and budget: a figure's name -> one per sample


def no_samples() -> Samples:
    return defaultdict(lambda: defaultdict(list))


@dataclass(frozen=True)
class Comparison:
    """What is compared: policies by name, and the settings that the pyramid's budgets are solved from."""

    policies: list[str]
    budgets: list[float]
    pyramids: dict[str, Policy]  # by the name of their rows


def compare(llm: LLM, tasks: list[Task], comparison: Comparison, samples: Samples) -> None:
    """Ask one sample's tasks of every policy at every budget; a figure of several tasks counts once, by its mean."""
    got = no_samples()
    for task in tasks:
        seen = observe(llm, task.context, seed=sum(task.context))
        everything, room = [len(task.context)] * len(seen), task.room + task.new_tokens
        full = hold(llm, seen, BASELINES["full"], everything, room)
        for name, budget, cache in caches(llm, task, seen, comparison):
            for key, value in task.ask(cache or full, full).items():
                got[name, budget][key].append(value)
    for method, figures in got.items():
        for key, values in figures.items():
            samples[method][key].append(statistics.fmean(values))


def solved(policy: Policy, budget: float, tokens: int, layers: int) -> PyramidConfig:
    """The settings that hold such a share of a context; raises `BudgetError`, or `ConfigError` where there are none."""
    return cast("PyramidConfig", replace(policy, kv_budget=budget).settings(tokens, 0, layers))


def caches(
    llm: LLM, task: Task, seen: list[Seen], comparison: Comparison
) -> Iterator[tuple[str, float, KVCache | None]]:
    """Every policy's cache of a task's context, with its name and budget; None for the full one."""
    layers, n, room = len(seen), len(task.context), task.room + task.new_tokens
    if "full" in comparison.policies:
        yield "full", 1.0, None
    for budget in comparison.budgets:
        settings = {name: solved(policy, budget, n, layers) for name, policy in comparison.pyramids.items()}
        # What the others hold: as much as the first pyramid.
        held = [config.prompt_lengths(n, layers) for config in settings.values()]
        held = held or [evenly(int(budget * n * layers), layers, n)]
        for name, config in settings.items():
            yield name, budget, hold_pyramid(llm, task.context, config, task.room, task.new_tokens)
        for name in comparison.policies:
            if name not in ("full", "pyramid"):
                yield name, budget, hold(llm, seen, BASELINES[name], held[0], room)


def interval(values: list[float], seed: int, of: Callable[[float], float] = float) -> list[float]:
    """Their mean, and its 95 % interval by bootstrap; each through `of`."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [of(m) for m in (statistics.fmean(values), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)])]


def perplexity(loss: float) -> float:
    """Of a loss in nats; what a float cannot hold is cut off."""
    return math.exp(min(loss, 700.0))


def rows_of(samples: Samples, context: int, seed: int) -> list[dict[str, Any]]:
    """A row per policy and budget; every figure with its interval as [mean, low, high], and how many it is of."""
    rows = []
    full = samples.get(("full", 1.0), {})
    for (name, budget), got in samples.items():
        row: dict[str, Any] = {"policy": name, "budget": budget, "context": context}
        row |= {key: statistics.fmean(got[key]) for key in ("kv_bytes", "kv_share")}
        row["perplexity"] = interval(got["loss"], seed, perplexity)
        if full:  # of the same windows, so their spread cancels out
            pairs = zip(got["loss"], full["loss"], strict=True)
            row["perplexity_ratio"] = interval([ours - theirs for ours, theirs in pairs], seed, perplexity)
        measured = {key: values for key, values in got.items() if key not in ("kv_bytes", "kv_share", "loss")}
        row |= {key: interval(values, seed) for key, values in measured.items()}
        row["samples"] = {key: len(values) for key, values in measured.items()}
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
    "identical": ("identical", "{:.2f}"),
    "length_drift": ("longer by", "{:.1f}"),
}


BY_PART = {"story_tokens": ("story tokens", "{:.0f}")} | {  # the same for recall by where in the story the fact stands
    f"{when}_part_{part + 1}": (f"{when}, {where}", "{:.3f}")
    for when in ("inside", "after")
    for part, where in enumerate(("early", "middle", "late"))
}


def table(rows: list[dict[str, Any]], wanted: dict[str, tuple[str, str]]) -> str:
    """For people: every figure as mean [low, high]."""
    columns = {key: how for key, how in wanted.items() if any(key in row for row in rows)}
    head = f"{'context':>7} {'policy':15} {'budget':>6} {'held':>10} {'share':>6}"
    lines = [head + "".join(f" {heading:>22}" for heading, _ in columns.values())]
    for row in rows:
        line = f"{row['context']:7} {row['policy']:15} {row['budget']:6.4g} {readable(row['kv_bytes']):>10}"
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
        for (name, context), unordered in lines.items():
            points = sorted(unordered)
            shares = [share for share, _ in points]
            means, lows, highs = zip(*(values for _, values in points), strict=True)
            spread = [[m - low for m, low in zip(means, lows, strict=True)]]
            spread += [[high - m for m, high in zip(means, highs, strict=True)]]
            label = (f"{name} {context}" if several else name).replace("$", r"\$")  # no formula
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
    parser.add_argument("--text", default=str(DEFAULT_TEXT), metavar="FILE", help="UTF-8 text to continue, or its .xz")
    parser.add_argument("--context", type=listed(int), default=[512], metavar="N,N", help="tokens of the prompt (512)")
    parser.add_argument("--continuation", type=int, default=128, metavar="N", help="tokens scored after it (128)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also compare N generated tokens")
    parser.add_argument("--recall", action="store_true", help="also ask for facts planted in stories of --context")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="windows, stories and openings (8)")
    parser.add_argument("--policies", type=listed(str), default=list(NAMES), metavar="NAME,NAME", help=", ".join(NAMES))
    parser.add_argument("--budgets", type=listed(float), default=[0.75, 0.5, 0.35], metavar="SHARE,SHARE")
    parser.add_argument(
        "--pyramid", type=listed(str), default=["auto"], metavar="NAME,FILE", help="settings to solve budgets from"
    )
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
    if args.recall and min(args.context) < 128:
        raise RequestError(f"--context is {min(args.context)}, expected 128 tokens or more for a story's facts")
    for name in args.policies:
        if name not in NAMES:
            raise RequestError(f"--policies has {name!r}, expected some of {', '.join(NAMES)}")
    alone = [name for name in args.policies if name in BASELINES and BASELINES[name].split is None]
    if alone and "pyramid" not in args.policies:
        raise RequestError(f"--policies has {alone[0]}, which holds what the pyramid does in each layer; add pyramid")
    if args.pyramid != ["auto"] and "pyramid" not in args.policies:
        raise RequestError(f"--pyramid is {args.pyramid[0]}, but --policies has no pyramid; add it")
    for budget in args.budgets:
        check_share(budget)
    if args.plot is not None:
        load_matplotlib()
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise RequestError(f"--plot is {args.plot}, expected a name that ends with .png, .svg or .pdf")
        check_writable("--plot", Path(args.plot))


def read_tokens(llm: LLM, args: argparse.Namespace) -> list[int]:
    """The text's tokens, enough of them for the longest window."""
    try:
        raw = Path(args.text).read_bytes()
        text = (lzma.decompress(raw) if args.text.endswith(".xz") else raw).decode("utf-8")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise RequestError(f"--text {args.text} cannot be read as UTF-8 text: {error}") from error
    if llm.tokenizer is None:
        raise RequestError(f"{args.model} has no tokenizer.model, which --text needs; add it")
    tokens, longest = llm.tokenizer.encode(text, continues=True), max(args.context) + args.continuation
    if len(tokens) < longest:
        raise RequestError(f"--text {args.text} has {len(tokens)} tokens, expected {longest} or more")
    return tokens


def what_to_compare(args: argparse.Namespace, layers: int) -> Comparison:
    """Policies and settings by name; refuses what cannot be, before anything is computed."""
    pyramids: dict[str, Policy] = {}
    if "pyramid" in args.policies:
        directory = locate(args.model, args.revision)
        for name in dict.fromkeys(args.pyramid):
            label = "pyramid" if len(args.pyramid) == 1 else Path(name).stem
            if label in pyramids or (label in NAMES and label != "pyramid"):
                raise RequestError(
                    f"--pyramid {name} would be shown as {label!r}, which another row is; rename the file"
                )
            pyramids[label] = Policy(pick_pyramid(name, directory, layers))
    lengths = [context - 1 for context in args.context]
    lengths += [context - 2 * QUESTION for context in args.context] if args.recall else []  # a story may be as short
    for policy, budget, tokens in itertools.product(pyramids.values(), args.budgets, lengths):
        solved(policy, budget, tokens, layers)
    for budget in args.budgets:
        if int(budget * min(lengths) * layers) < layers:
            raise RequestError(
                f"--budgets has {budget}, which is less than a token in each of {layers} layers; give more"
            )
    return Comparison(list(dict.fromkeys(args.policies)), list(dict.fromkeys(args.budgets)), pyramids)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every context, task, policy and budget; returns what `--json` prints."""
    args.context = list(dict.fromkeys(args.context))
    check(args)
    set_threads(args.threads)
    llm = LLM(args.model, pyramid="off", dtype=args.dtype, device=args.device, revision=args.revision)
    tokens = read_tokens(llm, args)
    llm.config.check_length(max(args.context), max(args.continuation, args.generate), "the longest context")
    comparison = what_to_compare(args, llm.config.num_hidden_layers)
    rows: list[dict[str, Any]] = []
    with EvalLine(len(args.context) * args.samples, quiet=args.quiet) as line:
        for context in args.context:
            samples = no_samples()
            # Each task draws from its own source, so that it draws the same whatever else is asked for.
            reading, telling, writing = (random.Random(f"{args.seed} {task}") for task in range(3))
            streams = [texts(llm, tokens, context, args.continuation, reading)]
            streams += [planted(llm, context, telling)] if args.recall else []
            streams += [openings(llm, tokens, context, args.generate, writing)] if args.generate else []
            for _ in range(args.samples):
                for tasks in map(next, streams):
                    compare(llm, tasks, comparison, samples)
                line.update()
            rows += rows_of(samples, context, args.seed)
    ran = {"dtype": str(llm.dtype).removeprefix("torch."), "device": str(llm.device), "torch": torch.__version__}
    return {"rows": rows, "settings": {name: value for name, value in vars(args).items() if name != "json"} | ran}


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
    return exit_status(lambda: report(run(args), args))


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
    finally:  # nor a reader that leaves early the plot
        if args.plot is not None:
            plot(result["rows"], Path(args.plot))


if __name__ == "__main__":
    sys.exit(main())
