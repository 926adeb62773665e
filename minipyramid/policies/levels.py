"""Levels: what each layer computes and holds of a prompt, and how it chooses, for one share of the cache."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from minipyramid.errors import ConfigError, check_number, nearest
from minipyramid.policies.scores import SCORES

LISTS = ("computed", "held", "scores", "newest")  # of a level, in a settings file


@dataclass(frozen=True)
class Level:
    """What the layers compute and hold of a prompt, as shares of its tokens, and how they choose.

    Attributes:
        computed: per layer; 1 in the first, then never more than before.
        held: per layer; beyond what is computed it holds guesses (`guesses.py`).
        scores: per layer, a name of `SCORES`, or two with a + between them, which share the room.
        newest: per layer, the share of what it holds that is set aside for the newest tokens.
        stand_ins: per layer and head a key, not rotated, and a value, which stand for what the layer does not
            hold (`stand_ins.py`), or zeros where it has none; they lie in the file `fitted`.  [L, K, 2, D]
    """

    computed: tuple[float, ...]
    held: tuple[float, ...]
    scores: tuple[str, ...]
    newest: tuple[float, ...]
    stand_ins: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, given: Any) -> "Level":
        """From a settings file, where one score or one `newest` may stand for all layers.

        Raises:
            ConfigError: a list is missing, of another length, or has values that cannot be.
        """
        if not isinstance(given, dict) or not {"computed", "held"} <= given.keys() <= set(LISTS):
            told = f"a level is {given!r:.60}, expected an object with computed and held"
            raise ConfigError(f"{told}, and scores and newest where they differ from keydiff and 0.5")
        layers = len(given["held"]) if isinstance(given["held"], list) else 1
        spread = {"scores": "keydiff", "newest": 0.5} | given
        lists = {}
        for name, value in spread.items():
            lists[name] = value if isinstance(value, list) else [value] * layers
            if len(lists[name]) != layers:
                raise ConfigError(f"a level has {len(lists[name])} {name}, but {layers} held; give as many")
        computed, held, scores, newest = (tuple(lists[name]) for name in LISTS)
        level = cls(computed, held, scores, newest)
        level.check()
        return level

    def check(self) -> None:
        """Raise `ConfigError` for lists that no layers could follow, and for unknown scores."""
        given = self.stand_ins
        if given is not None and not (isinstance(given, Tensor) and given.dim() == 4):
            raise ConfigError(f"stand_ins are {given!r:.60}, expected a tensor by layer and head, or None")
        for name in LISTS:
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != len(self.computed):
                told = f"{name} is {values!r:.60}, and computed has {len(self.computed)} layers"
                raise ConfigError(f"{told}; give a tuple with something for each")
            for value in values if name != "scores" else ():
                check_number(name, value, (float, 0.0, 1.0), ConfigError, ConfigError)
        if self.computed[:1] != (1.0,) or any(b > a for a, b in pairwise(self.computed)):
            raise ConfigError(f"computed is {self.computed!r:.80}, expected 1.0 first and then never a rise")
        for score in self.scores:
            parts = score.split("+") if isinstance(score, str) else [repr(score)]
            for part in parts[:2]:
                if part not in SCORES:
                    raise ConfigError(f"there is no score {part!r:.60}; {nearest(part, SCORES)}")
            if len(parts) > 2:
                raise ConfigError(f"the score {score!r:.60} joins more than two; join two")

    @property
    def depth(self) -> int:
        """Layers that compute everything."""
        return self.computed.count(1.0)

    @property
    def is_one_cut(self) -> bool:
        """Whether all layers behind the first `depth` compute one share."""
        return len(set(self.computed[self.depth :])) <= 1

    @property
    def is_guessing(self) -> bool:
        """Whether a layer holds more than it computes."""
        return any(a > b for a, b in zip(self.held, self.computed, strict=True))

    @property
    def share(self) -> float:
        """Of the full cache that is held."""
        return sum(self.held) / len(self.held)

    @property
    def computed_share(self) -> float:
        """Of a prompt's token-layers that are computed."""
        return sum(self.computed) / len(self.computed)


def between(low: Level, high: Level, share: float) -> Level:
    """The level on the line between two that holds `share`.

    Each layer chooses as in `low`; what stands for tokens that are not held is that of the nearer level.
    """
    t = (share - low.share) / (high.share - low.share)
    computed, held = (
        tuple(a + (b - a) * t for a, b in zip(*ends, strict=True))
        for ends in ((low.computed, high.computed), (low.held, high.held))
    )
    stand_ins = (low if t < 0.5 else high).stand_ins
    return replace(low, computed=computed, held=held, stand_ins=stand_ins)
