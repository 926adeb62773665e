"""KeyDiff (Park et al., 2025): the first 4 tokens, the newest, and those with the keys least like others'."""

from dataclasses import dataclass

from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policies.scores import keydiff
from minipyramid.policy import Seen, top_scored

ONE_IN = 8  # tokens that are held is set aside for the newest


@dataclass(frozen=True)
class KeyDiff(HeldShare):
    """Every head chooses by its own keys, and no query is asked."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """[K, count]"""
        return top_scored(keydiff(seen, None), count, first=4, newest=max(1, count // ONE_IN))
