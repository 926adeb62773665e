"""KeyDiff (Park et al., 2025): the newest tokens, and those whose keys are least like the others."""

from dataclasses import dataclass

from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policies.scores import keydiff
from minipyramid.policy import Seen, top_scored

NEWEST = 8  # of so many tokens one is set aside for the newest


@dataclass(frozen=True)
class KeyDiff(HeldShare):
    """Every head chooses by its own keys, and no query is asked."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """[K, count]"""
        return top_scored(keydiff(seen, None), count, first=4, newest=max(1, count // NEWEST))
