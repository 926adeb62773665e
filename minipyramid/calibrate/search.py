"""Which layer holds how much, and chooses how: from curves of single layers to the profile of a budget.

1. *Depth.* Hidden states are cut behind one layer, to one share for all that follow. Every depth is tried;
   the best one is where looking back is over.
2. *Curves.* One layer alone holds less, in some sizes and by some choices: what does that cost? The others
   hold all they compute, so a curve tells what a layer needs, and which choice is best for it.
3. *Allotment.* If costs just add up, the cheapest way to hold some tokens over all layers gives the next one
   to the layer where it saves most: the steepest piece of all curves' lower hulls comes first.
4. *Exchange.* They do not just add up. So room is moved from the layer that misses it least to the layer that
   gains most, as long as the measured loss of the whole profile falls.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from minipyramid.policies.profile import Level

SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # shares of a context that a layer alone holds
MOVES = (0.4, 0.2, 0.1)  # of the mean room of a layer that an exchange moves at a time
TRIED = 3  # pairs of layers whose exchange is measured, of a round's best
ROUNDS = 4  # of exchanges of one size, at most
Choice = tuple[str, float]  # a score, and the newest tokens' share of the room
CHOICES: tuple[Choice, ...] = (
    ("newest", 1.0), ("votes", 0.5), ("votes", 0.25), ("keydiff", 0.5), ("keydiff", 0.25), ("fitted", 0.5),
    ("fitted", 0.25), ("repeat", 0.25),
)  # fmt: skip
Cost = Callable[[Level], float]  # a level's loss


@dataclass(frozen=True)
class Point:
    """A size that a layer may have, what it costs, and by which choice."""

    share: float
    cost: float
    choice: Choice


def cut_level(layers: int, depth: int, share: float) -> Level:
    """So many layers compute all, the others a share; all hold what they compute."""
    computed = (1.0,) * depth + (share,) * (layers - depth)
    return Level(computed, computed, ("newest",) * layers, (1.0,) * layers)


def with_layer(level: Level, layer: int, share: float, choice: Choice | None = None) -> Level:
    """Another size, and perhaps another choice, of one layer."""
    held, scores, newest = list(level.held), list(level.scores), list(level.newest)
    held[layer] = min(share, level.computed[layer])
    if choice is not None:
        scores[layer], newest[layer] = choice
    return replace(level, held=tuple(held), scores=tuple(scores), newest=tuple(newest))


def curve(level: Level, layer: int, choices: Iterable[Choice], cost: Cost, least: float) -> list[Point]:
    """The lower hull of what a layer costs by its size; `least` is the loss where it holds all."""
    most = level.computed[layer]
    points = [Point(most, least, ("newest", 1.0))]
    for share in (size for size in SIZES if size < most):
        lowest, choice = min((cost(with_layer(level, layer, share, c)), c) for c in choices)
        points.append(Point(share, max(lowest, least), choice))
    return lower_hull(points)


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The points of the lower convex hull, by ascending share."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p.share):
        while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def slope(a: Point, b: Point) -> float:
    """How the cost changes with the share."""
    return (b.cost - a.cost) / (b.share - a.share)


def allot(level: Level, hulls: list[list[Point]], share: float) -> Level:
    """The level whose layers hold `share` on average at the lowest sum of costs.

    Where the smallest sizes are too much together, all are scaled down alike.
    """
    layers = len(hulls)
    sizes = [points[0].share for points in hulls]
    choices = [points[0].choice for points in hulls]
    left = share * layers - sum(sizes)
    if left < 0:
        sizes = [size * share * layers / sum(sizes) for size in sizes]
    pieces = [(slope(a, b), layer, a, b) for layer, points in enumerate(hulls) for a, b in pairwise(points)]
    for _, layer, a, b in sorted(pieces, key=lambda piece: (*piece[:2], piece[2].share)):
        if left <= 0:
            break
        taken = min(left, b.share - a.share)
        left -= taken
        sizes[layer] += taken
        choices[layer] = (
            b.choice if taken > (b.share - a.share) / 2 and b.cost > hulls[layer][-1].cost else a.choice
        )
    for layer, (size, choice) in enumerate(zip(sizes, choices, strict=True)):
        level = with_layer(level, layer, size, choice)
    return level


def exchange(level: Level, cost: Cost) -> tuple[Level, float]:
    """Move room between layers as long as the loss falls; returns the level and its loss."""
    best, mean = cost(level), level.share
    for move in (part * mean for part in MOVES):
        for _ in range(ROUNDS):
            moved = improved(level, best, move, cost)
            if moved is None:
                break
            level, best = moved
    return level, best


def improved(level: Level, best: float, move: float, cost: Cost) -> tuple[Level, float] | None:
    """The first of the most promising pairs of layers whose exchange lowers the loss."""
    layers = range(len(level.held))
    gains, losses = [], []
    for layer in layers:
        held, most = level.held[layer], level.computed[layer]
        if held + move <= most:
            gains.append((cost(with_layer(level, layer, held + move)), layer))
        if held - move > 0:
            losses.append((cost(with_layer(level, layer, held - move)), layer))
    pairs = sorted((g + x, to, of) for g, to in gains for x, of in losses if to != of)
    for _, to, of in pairs[:TRIED]:
        moved = with_layer(level, to, level.held[to] + move)
        moved = with_layer(moved, of, moved.held[of] - move)
        measured = cost(moved)
        if measured < best:
            return moved, measured
    return None
