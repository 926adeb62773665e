"""Which layer holds how much, and chooses how: from curves of single layers to the level of a budget.

1. *Curves.* One layer alone holds less, in some sizes and by some choices: what does that cost? The others
   hold all they compute, so a curve tells what a layer needs, and which choice is best for it.
2. *Depth.* Hidden states are cut behind one layer, to one share for all deeper ones. Every depth is
   measured. The cheapest is often where looking back is over, but not always, so a few of the cheapest
   (`DEPTHS` in `find.py`) go on.
3. *Allotment.* If costs just add up, the cheapest way to hold some tokens over all layers gives the next one
   to the layer where it saves most: the steepest piece of all curves' lower hulls comes first.
4. *Guesses.* Where there is room for more than the layers behind a cut compute, some of it may be for tokens
   that they do not (`minipyramid/policies/guesses.py`). So behind each of the cheapest cuts the room is
   allotted without guesses and with each share in `GUESSED`, and the level that costs least is taken.
5. *Exchange.* Costs do not just add up. So every layer chooses anew now that the others hold less, and room
   is moved from the layer that misses it least to the layer that gains most, where the measured loss of the
   whole level falls by it: at most `ROUNDS` times for each size in `MOVES`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from minipyramid.policies.levels import Level

SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # shares of a context that a layer alone holds
MOVES = (0.4, 0.2)  # of the mean room of a layer that an exchange moves at a time
TRIED = 3  # pairs of layers that are measured together, of a round's best by the sum of their losses
ROUNDS = 3  # of exchanges of one size, at most
GUESSED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)  # shares that every layer behind the cut may guess
LEAST_LOSS = 1e-4  # nats; where the newest tokens cost no more, no other choice is tried
Choice = tuple[str, float]  # a score, and the newest tokens' share of the room
ONLY_NEWEST: Choice = ("newest", 1.0)
CHOICES: tuple[Choice, ...] = (
    ("votes", 0.5), ("votes", 0.25), ("keydiff", 0.5), ("keydiff", 0.25), ("fitted", 0.5), ("fitted", 0.25),
)  # fmt: skip
REPEAT: tuple[Choice, ...] = (("repeat", 0.5), ("repeat", 0.25))  # these take a second pass over a prompt
LossOf = Callable[[Level], float]  # what a level costs, in nats


def choices_of(repeats: bool) -> tuple[Choice, ...]:
    """What a layer may choose by, beside the newest alone."""
    return CHOICES + (REPEAT if repeats else ())


@dataclass(frozen=True)
class Point:
    """A size that a layer may have, what it costs, and by which choice."""

    share: float
    loss: float
    choice: Choice


def cut_level(layers: int, depth: int, share: float) -> Level:
    """So many layers compute all, the others a share; all hold what they compute."""
    computed = (1.0,) * depth + (share,) * (layers - depth)
    return Level(computed, computed, ("newest",) * layers, (1.0,) * layers)


def whole_level(layers: int) -> Level:
    """All layers compute and hold everything."""
    return cut_level(layers, layers, 1.0)


def cuts(layers: int, computed: float) -> list[Level]:
    """All cuts that compute this share of the token-layers, one for each depth."""
    found = []
    for depth in range(1, layers):
        share = (computed * layers - depth) / (layers - depth)
        if share > 0:
            found.append(cut_level(layers, depth, share))
    return found


def with_layer(level: Level, layer: int, share: float, choice: Choice | None = None) -> Level:
    """Another size, and perhaps another choice, of one layer.

    It holds no more than it computes, or than it holds already, with guesses.
    """
    held, scores, newest = list(level.held), list(level.scores), list(level.newest)
    held[layer] = min(share, max(level.computed[layer], held[layer]))
    if choice is not None:
        scores[layer], newest[layer] = choice
    return replace(level, held=tuple(held), scores=tuple(scores), newest=tuple(newest))


def curve(level: Level, layer: int, choices: Iterable[Choice], loss_of: LossOf) -> list[Point]:
    """What a layer costs by its size, where the others hold all; each size by the choice that is best."""
    most = level.computed[layer]
    points = [Point(most, 0.0, ONLY_NEWEST)]
    for share in sorted((size for size in SIZES if size < most), reverse=True):
        tried = [(loss_of(with_layer(level, layer, share, ONLY_NEWEST)), ONLY_NEWEST)]
        if tried[0][0] > LEAST_LOSS:
            tried += [(loss_of(with_layer(level, layer, share, choice)), choice) for choice in choices]
        points.append(Point(share, *min(tried)))
    return points


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The points of the lower convex hull, by ascending share."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p.share):
        while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def slope(a: Point, b: Point) -> float:
    """How the loss changes with the share."""
    return (b.loss - a.loss) / (b.share - a.share)


def hull_below(points: list[Point], most: float) -> list[Point]:
    """The lower hull of a curve, for a layer that computes `most`; to hold all of that costs nothing."""
    return lower_hull([p for p in points if p.share < most] + [Point(most, 0.0, ONLY_NEWEST)])


def allot(level: Level, curves: list[list[Point]], share: float) -> Level:
    """The level whose layers hold `share` on average, or all they compute, at the lowest sum of losses.

    Where the smallest sizes are too much together, all are scaled down alike.
    """
    hulls = [hull_below(points, most) for points, most in zip(curves, level.computed, strict=True)]
    sizes = [points[0].share for points in hulls]
    choices = [points[0].choice for points in hulls]
    left = share * len(hulls) - sum(sizes)
    if left < 0:
        sizes = [size * share * len(hulls) / sum(sizes) for size in sizes]
    pieces = [(slope(a, b), layer, a, b) for layer, points in enumerate(hulls) for a, b in pairwise(points)]
    # A hull's slopes ascend, so the pieces of a layer come in order.
    for _, layer, a, b in sorted(pieces, key=lambda piece: (*piece[:2], piece[2].share)):
        if left <= 0:
            break
        taken = min(left, b.share - a.share)
        left -= taken
        sizes[layer] += taken
        # What holds all it computes has no choice to make.
        is_nearer = taken > (b.share - a.share) / 2 and b is not hulls[layer][-1]
        choices[layer] = b.choice if is_nearer else a.choice
    for layer, (size, choice) in enumerate(zip(sizes, choices, strict=True)):
        level = with_layer(level, layer, size, choice)
    return level


def with_guesses(cut: Level, more: float) -> Level:
    """A cut behind which every layer holds a share more than it computes, or everything."""
    return replace(cut, held=tuple(min(1.0, share + more) for share in cut.computed))


def allot_beside_guesses(guessing: Level, curves: list[list[Point]], share: float) -> Level | None:
    """The level that holds `share` on average, and behind the cut what `guessing` does.

    The layers in front of the cut share what room is left; None where it is too little for them.
    """
    depth, layers = guessing.depth, len(guessing.held)
    guessed = sum(held - own for held, own in zip(guessing.held, guessing.computed, strict=True))
    # Without a curve a layer has one size, all that it computes. If that is too much, `allot` scales it down.
    in_front = [points if layer < depth else [] for layer, points in enumerate(curves)]
    level = allot(replace(guessing, held=guessing.computed), in_front, share - guessed / layers)
    if level.held[depth:] != guessing.computed[depth:]:
        return None
    return replace(level, held=level.held[:depth] + guessing.held[depth:])


def choose_anew(level: Level, choices: Iterable[Choice], loss_of: LossOf) -> Level:
    """Let each layer in turn choose by what makes the loss of the whole level smallest."""
    best, listed = loss_of(level), [ONLY_NEWEST, *choices]
    for layer, held in enumerate(level.held):
        if held >= level.computed[layer]:
            continue
        for choice in listed:
            if choice != (level.scores[layer], level.newest[layer]):
                changed = with_layer(level, layer, held, choice)
                measured = loss_of(changed)
                if measured < best:
                    level, best = changed, measured
    return level


def exchange(level: Level, loss_of: LossOf) -> Level:
    """Move room between layers where the loss falls by it, `ROUNDS` times for each size at most."""
    best, mean = loss_of(level), level.share
    for move in (part * mean for part in MOVES):
        for _ in range(ROUNDS):
            moved = improved(level, best, move, loss_of)
            if moved is None:
                break
            level, best = moved
    return level


def improved(level: Level, best: float, move: float, loss_of: LossOf) -> tuple[Level, float] | None:
    """The level after the first exchange that lowers the loss, of the `TRIED` best, and its loss."""
    larger, smaller = [], []  # (loss of the level, layer) with more room in one layer, and with less
    for layer, (held, most) in enumerate(zip(level.held, level.computed, strict=True)):
        if held + move <= most:
            larger.append((loss_of(with_layer(level, layer, held + move)), layer))
        if held - move > 0:
            smaller.append((loss_of(with_layer(level, layer, held - move)), layer))
    pairs = sorted((more + less, to, of) for more, to in larger for less, of in smaller if to != of)
    for _, to, of in pairs[:TRIED]:
        moved = with_layer(level, to, level.held[to] + move)
        moved = with_layer(moved, of, moved.held[of] - move)
        measured = loss_of(moved)
        if measured < best:
            return moved, measured
    return None
