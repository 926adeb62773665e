"""The decoupled pyramid: what each layer computes and what it holds are two lists, found by a calibration.

PyramidInfer has one list for both, so a layer that looks back is starved by what shallower layers have
dropped (docs/method.md). Here the hidden states of a prompt are cut where looking back is over, and each
layer holds its own share of the prompt: much where it looks back, next to nothing where it looks at its
neighbours only. That is of what it computes; a layer behind the cut may hold more, which is guessed
(`guesses.py`).
`python -m minipyramid.calibrate` finds both lists for a checkpoint, from plain text.

A *level* (`levels.py`) is one such pair of lists, with the scores by which each layer chooses. A file has
several, each for a share of the full cache; between two levels the lists are interpolated, below the smallest
what is held is scaled down, and above the largest both lists go up to the whole prompt.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from minipyramid.budget import most_tokens, refusal
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, check_fields, expect_type, number
from minipyramid.policies.fitted import check_shapes
from minipyramid.policies.generated import split_between
from minipyramid.policies.guesses import check_guesses, guessed, left_with
from minipyramid.policies.levels import Level, between
from minipyramid.policies.repeat import say_again
from minipyramid.policies.scores import SCORES
from minipyramid.policies.stand_ins import with_stand_in
from minipyramid.policy import Compute, Generation, Guess, Policy, Seen, top_scored

GROUP = 16  # generated tokens of one compaction, as PyramidInfer publishes it
# A layer protects so many of the newest tokens at least, if it has room for them. Layer 0 of the embedded
# checkpoint, which tells what stood just before, had room for 10 of 512 at a share of 0.085, kept 2 of the
# newest, and recall was 0.77 where the question ends the prompt. With 4 it is 1.00; with 8 or 16 perplexity
# at 5 % is 1.0242 or 1.0253 of the full cache's in place of 1.0237.
LEAST_NEWEST = 4


@dataclass(frozen=True)
class Profile(Policy):
    """Levels, and the share of a prompt that is held.

    Attributes:
        levels: what the layers compute and hold, by ascending share.
        share: of a prompt that is held, over all layers.
        generated_share: share of generated tokens that is held; None for `share`. A budget sets it to its own
            share, or to another (`generated.py`). Votes choose, as in PyramidInfer; of each group a layer
            keeps what the level of this share holds.
        sinks: first tokens of a prompt that are passed on, and held as far as the newest leave room.
        fewest: no layer computes or holds fewer tokens of a prompt; 0 under a budget, which counts as 1.
        fewest_recent: so many of the newest tokens are protected at least, beside the newest one; a budget
            lowers it where it must.
        lines: of the score `fitted`, a weight for each of its features.  [L, K, 2 * D + 4]
        guesses: weights of keys and values, of the layers behind the cut, for what `left_with` returns.
            [L - depth, hidden_size + H * D + 1, 2 * K * D]
        measured: what the calibration has noted, for whoever reads the file.
        source: where it comes from, as errors name it.
    """

    levels: tuple[Level, ...]
    share: float = number(0.25, 0, 1)
    generated_share: float | None = number(None, 0, 1, kind=float)
    sinks: int = number(1, 0, 10**9)
    fewest: int = number(64, 0, 10**9)
    fewest_recent: int = number(64, 0, 10**9)
    lines: Tensor | None = field(default=None, compare=False, repr=False)
    guesses: Tensor | None = field(default=None, compare=False, repr=False)
    measured: Any = field(default=None, compare=False, repr=False)
    source: str = field(default="the profile", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("lines", "guesses"):
            expect_type(name, getattr(self, name), (Tensor, NoneType), "a tensor or None")
        for level in self.levels:
            expect_type("a level", level, Level, "a Level")
            level.check()
        shares = [level.share for level in self.levels]
        layers = {len(level.held) for level in self.levels}
        if not shares or sorted(set(shares)) != shares or len(layers) != 1:
            raise ConfigError(
                f"levels hold the shares {shares!r:.80}, expected one or more, ascending, of equal layers"
            )
        check_guesses(self.levels, self.guesses)

    def check_model(self, config: ModelConfig) -> None:
        """Its layers, and the shapes of what was fitted."""
        self.check_layers(config.num_hidden_layers)
        if self.lines is None and any("fitted" in by for level in self.levels for by in level.scores):
            told = f"{self.source}: a layer chooses by the score fitted, and no lines were fitted for it"
            raise ConfigError(f"{told}; python -m minipyramid.calibrate fits them")
        stand_ins = [("stand_ins", level.stand_ins) for level in self.levels]
        fitted = [("lines", self.lines), *stand_ins, ("guesses", self.guesses)]
        check_shapes(self.source, fitted, config, self.depth)

    # --- how many ---

    @property
    def depth(self) -> int | None:
        """Layers in front of the cut that guesses are fitted for; None without guesses."""
        return None if self.guesses is None else len(self.levels[0].held) - len(self.guesses)

    def can_guess(self, level: Level) -> bool:
        """Whether weights were fitted for the level's cut."""
        return level.is_one_cut and level.depth == self.depth

    @cached_property
    def current(self) -> Level:
        """The level of its share; asked for in every layer of a prompt."""
        return self.level(self.share)

    def level(self, share: float) -> Level:
        """The level that holds this share of a prompt."""
        level = self.interpolated(share)
        if self.can_guess(level):
            return level
        # `check_guesses` has refused levels that hold more than they compute without weights for it. Between
        # two levels the last bit of a share may still say so, and `counts` would take it for a guess.
        return replace(level, held=tuple(map(min, level.held, level.computed)))

    def interpolated(self, share: float) -> Level:
        """On the line between two levels, to the last bit."""
        first, last = self.levels[0], self.levels[-1]
        nothing = replace(first, held=(0.0,) * len(first.held))
        ones = (1.0,) * len(last.held)
        whole = replace(last, computed=ones, held=ones, stand_ins=None)
        path = [nothing, *self.levels, *([whole] if last.share < 1 else [])]
        for low, high in pairwise(path):
            if share < high.share:
                return between(low, high, share)
        return path[-1]

    def counts(self, prompt_tokens: int, layers: int) -> tuple[list[int], list[int]]:
        """Tokens of a prompt that each layer computes, and holds."""
        self.check_layers(layers)
        level = self.current
        least = min(prompt_tokens, max(1, self.fewest))
        held = [max(least, count) for count in rounded(level.held, prompt_tokens)]
        computed = [max(least, round(share * prompt_tokens)) for share in level.computed]
        # A layer computes the tokens that it holds, but for guesses, and no fewer than any deeper layer.
        lists = zip(level.held, level.computed, held, strict=True)
        of_its_own = [0 if held_share > its_own else count for held_share, its_own, count in lists]
        computed = list(accumulate(map(max, computed[::-1], of_its_own[::-1]), max))[::-1]
        if self.can_guess(level):  # all layers behind the cut compute the same tokens, whatever was rounded
            computed[level.depth :] = [computed[level.depth]] * (layers - level.depth)
        return computed, held

    def check_layers(self, layers: int) -> None:
        """Raise `ConfigError` for a model of another number of layers."""
        if len(self.levels[0].held) != layers:
            told = f"{self.source} is of {len(self.levels[0].held)} layers"
            raise ConfigError(f"{told}, and the model has {layers}")

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """All in layer 0, then the level's shares."""
        return self.counts(prompt_tokens, layers)[0]

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """The level's shares."""
        return self.counts(prompt_tokens, layers)[1]

    def generation(self, prompt_tokens: int, layers: int) -> Generation:
        """By its own settings."""
        share = self.share if self.generated_share is None else self.generated_share
        return self.generation_by(share, self.fewest_recent, prompt_tokens)

    def generation_by(self, share: float, fewest_recent: int, prompt_tokens: int) -> Generation:
        """Of each group a layer keeps what that share's level holds; half as large a share is recent."""
        stay = tuple(rounded(self.level(share).held, GROUP))
        return Generation(
            prompt_tokens, share / 2, GROUP, stay, distance_weight=1.0, fewest_recent=fewest_recent
        )

    def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> "Profile":
        """Generated tokens get about the budget's share (`generated.py`), and the prompt what they leave."""
        self.check_layers(layers)
        most, whole = int(most_tokens(share, prompt_tokens, new_tokens, layers)), prompt_tokens * layers

        def room_left(recent: int, part: float) -> int:
            dropped = self.generation_by(part, recent, prompt_tokens).dropped(new_tokens)
            return most - new_tokens * layers + sum(dropped)

        left, recent, part = split_between(room_left, self.fewest_recent, share, whole, layers)
        if left < layers:
            raise refusal(share, most - left + layers, prompt_tokens, new_tokens, layers)
        settings = replace(self, generated_share=part, fewest=0, fewest_recent=recent)
        room = left
        while True:  # a layer holds one token or more, which may exceed what its share is rounded to
            settings = replace(settings, share=min(1.0, room / whole))
            excess = sum(settings.held(prompt_tokens, layers)) - left
            if excess <= 0:
                return settings
            room -= excess

    # --- which ---

    def look_over(self, ids: list[int], compute: Compute) -> list[Tensor] | None:
        """The prompt is said again where a layer chooses by that."""
        last = self.last_that_repeats
        return None if last is None else say_again(ids, compute, last)

    @property
    def last_that_repeats(self) -> int | None:
        """The deepest layer that chooses by the score `repeat`."""
        scores = self.current.scores
        return max((layer for layer, by in enumerate(scores) if "repeat" in by.split("+")), default=None)

    def computed_by_look_over(self, prompt_tokens: int, layers: int) -> int:
        """All of twice the prompt, up to the last layer that needs it."""
        last = self.last_that_repeats
        return 0 if last is None else 2 * prompt_tokens * (last + 1)

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """The newest and the sinks: tokens chosen by votes or keys cost perplexity (docs/settings.md)."""
        return self.sinks_and_newest(len(seen.q), count, seen.q.device)

    def sinks_and_newest(self, tokens: int, count: int, device: torch.device | None = None) -> Tensor:
        """So many of them: the sinks, as far as there is room beside the newest token, and the newest.

        Returns [count], ascending.
        """
        sinks = min(self.sinks, count - 1)
        all_tokens = torch.arange(tokens, device=device)
        return torch.cat((all_tokens[:sinks], all_tokens[tokens - count + sinks :]))

    def hold(self, seen: Seen, count: int) -> Tensor:
        """By the layer's score, beside the newest, the sinks, and the token whose slot the stand-in takes.

        Returns [K, count], or [count] for all heads.
        """
        level, first = self.current, self.sinks
        newest = max(min(LEAST_NEWEST, count), int(level.newest[seen.layer] * count))
        by, *other = level.scores[seen.layer].split("+")
        score = SCORES[by](seen, self.lines).float().clone()  # [K, T], or [T] for all heads alike
        has_stand_in = self.stand_ins_for(seen.layer, seen.prompt_tokens) is not None
        if has_stand_in:
            slot = self.replaced(len(seen.q))
            score[..., slot] = math.inf
            first, newest = min(first, slot), min(newest, count - 1)
        if not other:
            return top_scored(score, count, first, newest)
        # Half of the room that is left is for what the first score puts first.
        protected = min(newest + first + has_stand_in, count)
        half = protected + (count - protected) // 2
        chosen = top_scored(score, half, first, newest)
        second = SCORES[other[0]](seen, self.lines).float()
        both = second.expand(len(seen.keys), -1).scatter(1, chosen.expand(len(seen.keys), -1), math.inf)
        return top_scored(both, count)

    def entries(self, seen: Seen, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen tokens' own keys and values, except in the stand-in's slot."""
        k, v = super().entries(seen, chosen)  # two of [K, held, D]
        stand_ins = self.stand_ins_for(seen.layer, seen.prompt_tokens)
        if stand_ins is None:
            return k, v
        is_slot = (chosen == self.replaced(len(seen.q))).expand(len(k), -1)  # [K, held]
        return with_stand_in(seen, k, v, is_slot, stand_ins)

    def guess(self, seen: Seen, passed_on: Tensor) -> list[Guess]:
        """In every layer that holds more than it computes, the newest of what leaves."""
        if self.guesses is None or seen.layer + 1 != self.depth:
            return []
        left = torch.ones(len(seen.q), dtype=torch.bool, device=passed_on.device)
        left[passed_on] = False
        which, found = left.nonzero()[:, 0], []
        known = left_with(seen)[which]
        for layer, count in enumerate(self.guessed_counts(seen.prompt_tokens)):
            if count:
                newest, weights = which[-count:], self.guesses[layer - self.depth]
                found.append((layer, *guessed(seen, known[-count:], weights, newest), newest))
        return found

    def guessed_counts(self, prompt_tokens: int) -> list[int]:
        """Tokens of a prompt that each layer holds and does not compute.  [layer]"""
        computed, held = self.counts(prompt_tokens, len(self.levels[0].held))
        return [max(0, b - a) for a, b in zip(computed, held, strict=True)]

    def stand_ins_for(self, layer: int, prompt_tokens: int) -> Tensor | None:
        """The level's stand-ins, where one slot of a layer stands for all tokens that it does not hold.

        None does
        - if the layer holds the whole prompt, for there is nothing to stand for,
        - if it computes or holds a single token, which is the newest,
        - if it computes or holds no more than `fewest`, which may be a far larger share than the stand-in was
          fitted for,
        - if none was fitted.
        """
        stand_ins = self.current.stand_ins
        computed, held = (counts[layer] for counts in self.counts(prompt_tokens, len(self.levels[0].held)))
        is_pruned = max(1, self.fewest) < min(computed, held) and held < prompt_tokens
        return stand_ins if is_pruned and stand_ins is not None and stand_ins[layer].any() else None

    def replaced(self, tokens: int) -> int:
        """Which of so many tokens that a layer computes gives its slot to the stand-in: the first behind the
        sinks, but not the newest.
        """
        return min(self.sinks, tokens - 2)

    def replaced_positions(self, prompt_tokens: int, layers: int) -> list[int | None]:
        """Of each layer the position of that token in the prompt, None for a layer without a stand-in."""
        positions: list[int | None] = [None] * layers
        for layer, computed in enumerate(self.computed(prompt_tokens, layers)):
            if self.stand_ins_for(layer, prompt_tokens) is not None:
                which = self.sinks_and_newest(prompt_tokens, computed)
                positions[layer] = int(which[self.replaced(computed)])
        return positions


def rounded(shares: tuple[float, ...], tokens: int) -> list[int]:
    """How many of some tokens each layer holds that is to hold such a share of them.  [layer]

    Sums up to each layer are rounded, and not each layer's share. So all layers together come to the whole
    share, alike layers do not round alike, and a larger share holds no fewer.
    """
    ends = [round(end) for end in accumulate(share * tokens for share in shares)]
    # A whole share may be rounded to a token more than there is.
    return [min(tokens, end - start) for start, end in pairwise([0, *ends])]


def replaced_positions(policy: Policy, prompt_tokens: int, layers: int) -> list[int | None]:
    """Of any policy's layers the positions of a prompt whose slot a stand-in has, or None.  [layer]"""
    if isinstance(policy, Profile):
        return policy.replaced_positions(prompt_tokens, layers)
    return [None] * layers
