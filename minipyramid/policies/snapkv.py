"""SnapKV (Li et al., 2024): the newest tokens, and what they look at, votes averaged over neighbours."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policy import Seen, top_scored

# The newest that vote, and over how many tokens a vote is averaged, as in its public code.
WINDOW, POOL = 32, 5


@dataclass(frozen=True)
class SnapKV(HeldShare):
    """The votes of query heads that share a key/value head are added up."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """The newest 32, or all but a 20th of a smaller count, and what they look at most.  [K, count]"""
        window = min(WINDOW, count - count // 20)
        vote = seen.votes(window).sum(1)  # [K, T - window]
        if vote.shape[1]:
            vote = F.avg_pool1d(vote, POOL, 1, POOL // 2, count_include_pad=False)
        return top_scored(F.pad(vote, (0, window)), count, newest=window)
