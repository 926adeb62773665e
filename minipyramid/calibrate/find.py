"""The levels of a checkpoint: for every budget the depth of the cut, the layers' shares and their choices."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from minipyramid import LLM
from minipyramid.calibrate.contexts import Contexts, Window, divergence, profile_of
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

# If the best level's loss is at least twice that of a level which holds as little and computes everything (as
# the curves tell it), and at least `CHEAP` nats more, layers behind the cut still look back, and all is tried
# again with `STEP` more of the token-layers computed. (With twice as much allowed, and no guesses, a model of
# 18 layers that looks back in layer 6 was cut behind layer 0, and recall was 0.14 at 8 %.)
STEP, CHEAP = 0.05, 0.02
# At most `DEPTHS` cuts are tried, none that costs more than `NEARLY` times the cheapest: the cheapest cut
# without guesses is not always so with them. In that model, where 40 % is computed, a cut behind layer 0
# costs 0.027 nats, with guesses and without, and one behind layer 6 costs 0.040 and, with guesses of a
# twentieth of the tokens, 0.018.
DEPTHS, NEARLY = 3, 2.0
ROUNDING = 1e-9  # shares that differ by less are equal
Notice = Callable[[str], None]  # called after each measurement with what was measured


@dataclass
class Found:
    """A checkpoint's levels, and what they were found by."""

    curves: list[list[Point]] = field(default_factory=list)  # [layer]
    depths: dict[float, list[tuple[int, float]]] = field(default_factory=dict)  # computed: (depth, its loss)
    levels: list[Level] = field(default_factory=list)  # by ascending share

    @property
    def cut_depths(self) -> set[int]:
        """Layers in front of the levels' cuts; a level that computes everything has none."""
        return {level.depth for level in self.levels if level.depth < len(level.held)}

    def as_dict(self) -> dict[str, Any]:
        """The curves and the depths, as `--json` prints them."""
        curves = [
            [{"held": p.share, "loss": p.loss, "score": p.choice[0], "newest": p.choice[1]} for p in points]
            for points in self.curves
        ]
        depths = [
            {"computed": round(computed, 4), "layers": depth, "loss": loss}
            for computed, tried in self.depths.items()
            for depth, loss in tried
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
        guess_weights: of what is guessed, by the depth of the cut; what is missing is fitted, and put there.
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
        guess_weights: dict[int, Tensor] | None = None,
    ) -> None:
        self.llm, self.windows, self.lines, self.repeats, self.notice = llm, windows, lines, repeats, notice
        self.pieces = [window.context for window in windows] if pieces is None else pieces
        self.guess_weights = {} if guess_weights is None else guess_weights
        self.choices = choices_of(repeats)
        self.layers = llm.config.num_hidden_layers
        self.whole = whole_level(self.layers)
        self.full = self.contexts_of(self.whole)
        self.expected = self.full.logprobs(self.whole)

    def contexts_of(self, level: Level) -> Contexts:
        """The windows' contexts as a level computes them."""
        guesses, depth = None, level.depth
        if level.is_guessing:
            if depth not in self.guess_weights:
                self.guess_weights[depth] = fit_guesses(self.llm, self.pieces, depth)
                self.notice("fits guesses")
            guesses = self.guess_weights[depth]
        return Contexts(self.llm, self.windows, profile_of(level, self.lines, guesses), self.repeats)

    def loss(self, contexts: Contexts, level: Level) -> float:
        """What the search makes small: a level's `Loss.total`, on contexts that were computed with its cut.

        (And with its guesses, but an exchange may take some away, and the contexts stay. Computing them anew
        changed the loss by -0.4 % in one level and by 2 % in another. `check_levels` does compute them anew.)
        """
        measured = divergence(self.expected, contexts.logprobs(level), self.windows)
        self.notice(f"computes {level.computed_share:.0%}, holds {level.share:.0%}")
        return measured.total

    def find(self, budgets: list[tuple[float, float]]) -> Found:
        """Levels that hold these shares and compute these, or more where that would cost too much."""
        found = Found()
        for layer in range(self.layers):
            found.curves.append(curve(self.whole, layer, self.choices, partial(self.loss, self.full)))
        for share, computed in sorted(budgets):
            level, contexts = self.first_level(found, share, round(computed, 4))
            loss_of = partial(self.loss, contexts)
            level = exchange(choose_anew(level, self.choices, loss_of), loss_of)
            self.notice("fits stand-ins")
            found.levels.append(replace(level, stand_ins=fit_stand_ins(contexts, level)))
        return found

    def first_level(self, found: Found, share: float, computed: float) -> tuple[Level, Contexts]:
        """The level that costs least behind the cuts that cost least, and its contexts.

        More is computed while that costs too much (`CHEAP`).
        """
        uncut = allot(self.whole, found.curves, share)
        loss_of_holding = sum(
            loss_at(hull_below(points, 1.0), size)
            for points, size in zip(found.curves, uncut.held, strict=True)
        )
        while computed < 1 - STEP / 2:
            best = self.best_behind(self.cheapest_cuts(found, computed), share, found)
            if best is not None and best[0] < max(2 * loss_of_holding, loss_of_holding + CHEAP):
                return best[1:]
            computed = round(computed + STEP, 4)
        return uncut, self.full

    def cheapest_cuts(self, found: Found, computed: float) -> list[Level]:
        """The cuts that cost least by themselves.

        Where a level guesses, all are cut alike: a file has guesses of one depth, and none could be used
        between levels of two. There is no cut where `computed` is too little for the layers in front of it.
        """
        possible = cuts(self.layers, computed)
        if computed not in found.depths and possible:  # of all, for the picture
            found.depths[computed] = [(cut.depth, self.loss(self.contexts_of(cut), cut)) for cut in possible]
        losses = dict(found.depths.get(computed, ()))
        if any(level.is_guessing for level in found.levels):
            return [cut for cut in possible if found.cut_depths == {cut.depth}]
        near = [cut for cut in possible if losses[cut.depth] <= NEARLY * min(losses.values())]
        return sorted(near, key=lambda cut: losses[cut.depth])[:DEPTHS]

    def best_behind(
        self, possible: list[Level], share: float, found: Found
    ) -> tuple[float, Level, Contexts] | None:
        """Of all levels that hold `share` behind these cuts the one that costs least: its loss, the level
        and its contexts. None where none can hold as much.
        """
        best = None
        for cut in possible:
            tried: list[tuple[Level, Level | None]] = [(cut, allot(cut, found.curves, share))]
            # A file has guesses of one depth, so they are tried only if all levels so far are cut here.
            if found.cut_depths <= {cut.depth}:
                # Each once: where much is computed, the largest shares all guess everything.
                for guessing in dict.fromkeys(with_guesses(cut, more) for more in GUESSED):
                    tried.append((guessing, allot_beside_guesses(guessing, found.curves, share)))
            for computed_as, level in tried:
                if level is not None and level.share > share - ROUNDING:
                    contexts = self.contexts_of(computed_as)
                    loss = self.loss(contexts, level)
                    if best is None or loss < best[0]:
                        best = loss, level, contexts
        return best


def loss_at(hull: list[Point], share: float) -> float:
    """What a size costs on a hull."""
    for a, b in pairwise(hull):
        if share <= b.share:
            return a.loss + (b.loss - a.loss) * max(0.0, share - a.share) / (b.share - a.share)
    return 0.0
