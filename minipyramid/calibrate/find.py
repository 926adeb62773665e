"""The levels of a checkpoint: for every budget the depth of the cut, the layers' shares and their choices."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from minipyramid import LLM
from minipyramid.calibrate.contexts import Contexts, Window, loss, profile_of
from minipyramid.calibrate.guesses import fit_guesses
from minipyramid.calibrate.search import (
    GUESSED,
    Point,
    allot,
    allot_beside_guesses,
    choices_of,
    choose_anew,
    curve,
    cuts,
    exchange,
    hull_below,
    whole_level,
    with_guesses,
)
from minipyramid.calibrate.stand_ins import fit_stand_ins
from minipyramid.policies.levels import Level

# A budget's share of token-layers that are computed rises by a step at a time while the cut costs more than
# holding less does, and more than so many nats: looking back is then not over. (With four times as much
# allowed, a model of 18 layers that looks back in layer 6 was cut behind layer 0, and kept 0.14 of the
# answers at 8 %.)
STEP, CHEAP = 0.05, 0.01
Notice = Callable[[str], None]  # called after each measurement with what was measured


@dataclass
class Found:
    """A checkpoint's levels, and what they were found by."""

    curves: list[list[Point]] = field(default_factory=list)  # [layer]
    depths: dict[float, list[tuple[int, float]]] = field(default_factory=dict)  # computed: (depth, its loss)
    levels: list[Level] = field(default_factory=list)  # by ascending share

    def as_dict(self) -> dict[str, Any]:
        """The curves and the depths, as `--json` prints them."""
        curves = [
            [{"held": p.share, "loss": p.cost, "score": p.choice[0], "newest": p.choice[1]} for p in points]
            for points in self.curves
        ]
        depths = [
            {"computed": round(computed, 4), "layers": depth, "loss": cost}
            for computed, tried in self.depths.items()
            for depth, cost in tried
        ]
        return {"curves": curves, "depths": depths}


class Search:
    """Measures levels over some windows.

    Args:
        llm: under the policy `full`.
        windows: what levels are measured on.
        lines: of the score `fitted`.
        repeats: whether layers may choose by the score `repeat`.
        notice: called after each measurement.
        pieces: of text, which guesses are fitted to; None for the windows' contexts.
        guesses: weights by the depth of the cut; what is missing is fitted, and put there.
    """

    def __init__(
        self,
        llm: LLM,
        windows: list[Window],
        lines: Tensor,
        repeats: bool,
        notice: Notice,
        *,
        pieces: list[list[int]] | None = None,
        guesses: dict[int, Tensor] | None = None,
    ) -> None:
        self.llm, self.windows, self.lines, self.repeats, self.notice = llm, windows, lines, repeats, notice
        self.pieces = [window.context for window in windows] if pieces is None else pieces
        self.guesses = {} if guesses is None else guesses
        self.choices = choices_of(repeats)
        self.layers = llm.config.num_hidden_layers
        self.full = self.computing(whole_level(self.layers))
        self.expected = self.full.logprobs(self.full.profile.levels[0])

    def computing(self, level: Level) -> Contexts:
        """The windows' contexts as a level computes them."""
        guesses, depth = None, level.depth
        if level.guesses:
            if depth not in self.guesses:
                self.guesses[depth] = fit_guesses(self.llm, self.pieces, depth)
                self.notice("fits guesses")
            guesses = self.guesses[depth]
        return Contexts(self.llm, self.windows, profile_of(level, self.lines, guesses), self.repeats)

    def cost(self, contexts: Contexts, level: Level) -> float:
        """What the search makes small: a level's loss on contexts that are computed as it computes them."""
        measured = loss(self.expected, contexts.logprobs(level), self.windows)
        self.notice(f"computes {sum(level.computed) / self.layers:.0%}, holds {level.share:.0%}")
        return measured.total

    def find(self, budgets: list[tuple[float, float]]) -> Found:
        """Levels that hold these shares and compute these, or more where that would cost too much."""
        found = Found()
        whole = self.full.profile.levels[0]
        for layer in range(self.layers):
            found.curves.append(curve(whole, layer, self.choices, partial(self.cost, self.full)))
        for share, computed in sorted(budgets):
            cut = self.cut(found, share, max(share, computed))
            level, contexts = self.with_guesses(cut, allot(cut, found.curves, share), found)
            cost = partial(self.cost, contexts)
            level = exchange(choose_anew(level, self.choices, cost), cost)
            self.notice("fits stand-ins")
            found.levels.append(replace(level, stand_ins=fit_stand_ins(contexts, level)))
        return found

    def guessing(self, cut: Level, share: float, found: Found) -> list[tuple[Level, Level]]:
        """The cuts that guess so much more that there is room for it, each with a level that holds `share`.

        All levels that guess are cut alike, for a file has guesses of one depth.
        """
        depths = {level.depth for level in found.levels if level.guesses}
        pairs = []
        for more in GUESSED if depths <= {cut.depth} else ():
            guessing = with_guesses(cut, more)
            level = allot_beside_guesses(guessing, found.curves, share)
            if level is not None and level.guesses:
                pairs.append((guessing, level))
        return pairs

    def with_guesses(self, cut: Level, level: Level, found: Found) -> tuple[Level, Contexts]:
        """A level of a cut, or one that holds as much and guesses, whichever costs less; and its contexts."""
        tried: list[tuple[float, int, Level, Contexts]] = []
        for computing, allotted in [(cut, level), *self.guessing(cut, level.share, found)]:
            contexts = self.computing(computing)
            tried.append((self.cost(contexts, allotted), len(tried), allotted, contexts))
        return min(tried)[2:]

    def cut(self, found: Found, share: float, computed: float) -> Level:
        """The best depth for a share of token-layers to compute; the share rises while all cost too much.

        Too much is more than `CHEAP`, and than it costs to hold `share` with everything computed, as the
        curves say. A cut that alone costs too much may cost less with the guesses that there is room for.
        """
        uncut = allot(self.full.profile.levels[0], found.curves, share)
        cost_of_holding = sum(
            cost_at(hull_below(points, 1.0), size)
            for points, size in zip(found.curves, uncut.held, strict=True)
        )
        while computed < 1 - STEP / 2:
            if not cuts(self.layers, computed):  # so little that not even the first layer computes all
                computed += STEP
                continue
            if computed not in found.depths:
                found.depths[computed] = []
                for level in cuts(self.layers, computed):
                    cost = self.cost(self.computing(level), level)
                    found.depths[computed].append((level.depth, cost))
            depth, cost = min(found.depths[computed], key=lambda measured: measured[1])
            best = next(x for x in cuts(self.layers, computed) if x.depth == depth)
            limit = max(cost_of_holding, CHEAP)
            guessing = (x for x, _ in self.guessing(best, share, found))
            if cost < limit or any(self.cost(self.computing(x), x) < limit for x in guessing):
                return best
            computed += STEP
        return self.full.profile.levels[0]


def cost_at(hull: list[Point], share: float) -> float:
    """What a size costs on a hull."""
    for a, b in pairwise(hull):
        if share <= b.share:
            return a.cost + (b.cost - a.cost) * max(0.0, share - a.share) / (b.share - a.share)
    return 0.0
