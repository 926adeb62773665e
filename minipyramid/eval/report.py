"""From samples to rows with their intervals, to a table, and to a plot.

Recall is a mean over stories of a story's share of right answers. Perplexity is exp of the mean loss, and its
ratio to the full cache's exp of the mean difference of the same windows, whose own spread cancels out.
Intervals are 95 % by bootstrap over windows, stories and openings; where all samples agree they have no
width, which proves nothing.
"""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipyramid.cli.plotting import load_matplotlib, save_plot
from minipyramid.cli.terminal import readable
from minipyramid.eval.compare import Samples

RESAMPLES = 1000
COSTS = ("kv_bytes", "kv_share", "computed")  # the same in every sample, so they have no interval
COLUMNS = {  # a row's figure -> the table's heading, and how it is shown
    "perplexity": ("perplexity", "{:.2f}"),
    "perplexity_ratio": ("of full", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "agreement": ("same top", "{:.3f}"),
    "inside": ("asked inside", "{:.3f}"),
    "after": ("asked after", "{:.3f}"),
    "prose_inside": ("prose, asked inside", "{:.3f}"),
    "prose_after": ("prose, asked after", "{:.3f}"),
    "first_difference": ("differs at", "{:.1f}"),
    "identical": ("identical", "{:.2f}"),
    "length_drift": ("longer by", "{:.1f}"),
}
_BY_PART = {"story_tokens": ("story tokens", "{:.0f}")} | {
    f"{when}_part_{part + 1}": (f"{when}, {where}", "{:.3f}")
    for when in ("inside", "after")
    for part, where in enumerate(("early", "middle", "late"))
}
BY_PART = _BY_PART | {  # recall by where in the story, or in the stretch of a book, the fact stands
    f"prose_{key}": (f"prose {heading}", shown) for key, (heading, shown) in _BY_PART.items()
}


def interval(values: list[float], seed: int, of: Callable[[float], float] = float) -> list[float]:
    """Their mean, and its 95 % interval by bootstrap; each through `of`."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]
    return [of(mean) for mean in (statistics.fmean(values), low, high)]


def perplexity(loss: float) -> float:
    """Of a loss in nats; what a float cannot hold is cut off."""
    return math.exp(min(loss, 700.0))


def rows_of(samples: Samples, context: int, seed: int) -> list[dict[str, Any]]:
    """A row per policy and budget; every figure as [mean, low, high], and how many samples it has."""
    rows = []
    for (name, budget), figures in samples.items():
        row: dict[str, Any] = {"policy": name, "budget": budget, "context": context}
        row |= {key: statistics.fmean(figures[key]) for key in COSTS}
        row["perplexity"] = interval(figures["loss"], seed, perplexity)
        row["perplexity_ratio"] = interval(figures["loss_above_full"], seed, perplexity)
        told = (*COSTS, "loss", "loss_above_full")
        others = {key: values for key, values in figures.items() if key not in told}
        row |= {key: interval(values, seed) for key, values in others.items()}
        row["samples"] = {key: len(values) for key, values in others.items()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], wanted: dict[str, tuple[str, str]]) -> str:
    """For people: every figure as mean [low, high]."""
    columns = {key: how for key, how in wanted.items() if any(key in row for row in rows)}
    width = max([15, *(len(row["policy"]) for row in rows)])
    head = f"{'context':>7} {'policy':{width}} {'budget':>6} {'held':>10} {'share':>6} {'computed':>8}"
    lines = [head + "".join(f" {heading:>22}" for heading, _ in columns.values())]
    for row in rows:
        size = readable(row["kv_bytes"])
        line = f"{row['context']:7} {row['policy']:{width}} {row['budget']:6.4g} {size:>10}"
        line += f" {row['kv_share']:6.1%} {row['computed']:8.1%}"
        for key, (_, shown) in columns.items():
            parts = [shown.format(value) for value in row.get(key, ())]
            line += f" {f'{parts[0]} [{parts[1]}, {parts[2]}]' if parts else '-':>22}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Quality against bytes: a line per policy, a panel per figure, the intervals as bars."""
    recalls = {key: COLUMNS[key][0] for key in ("inside", "after", "prose_inside", "prose_after")}
    wanted = [key for key in ("perplexity", "kl", *recalls) if any(key in row for row in rows)]
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
        axes.set_ylabel(f"recall, {recalls[key]}" if key in recalls else key)
    figure.axes[0].legend()
    save_plot(figure, file)
