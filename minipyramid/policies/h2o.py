"""H2O (Zhang et al., 2023): half of the room for the newest tokens, half for those that all queries together
looked at most (the heavy hitters). It does not evict while it generates.
"""

from dataclasses import dataclass

from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policy import Seen, top_scored
from minipyramid.voting import votes


@dataclass(frozen=True)
class H2O(HeldShare):
    """Every token of the prompt votes; votes of query heads that share a key/value head are added up."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """[K, count]"""
        T, n = len(seen.q), seen.keys.shape[1]
        looked = votes(seen.q, seen.keys, seen.logsumexp, context=n).sum(1)  # [K, n]
        return top_scored(looked[:, n - T :], count, newest=count // 2)
