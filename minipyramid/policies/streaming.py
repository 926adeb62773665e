"""StreamingLLM (Xiao et al., 2023): the first four tokens and the newest.

Positions stay as they are. The window does not roll on while tokens are generated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policy import Seen, top_scored

SINKS = 4


@dataclass(frozen=True)
class Streaming(HeldShare):
    """The later a token, the higher its score."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """The first four and the newest.  [count]"""
        return top_scored(torch.arange(len(seen.q), device=seen.q.device), count, first=SINKS)
