"""A control: the first four tokens and any others, drawn by each layer and head for itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.policies.held_share import HeldShare
from minipyramid.policies.streaming import SINKS
from minipyramid.policy import Seen, top_scored


@dataclass(frozen=True)
class Random(HeldShare):
    """The draw depends on the prompt's tokens and the layer, so it is the same in every batch."""

    def hold(self, seen: Seen, count: int) -> Tensor:
        """[K, count]"""
        drawn = torch.Generator().manual_seed(seen.seed)
        score = torch.rand(len(seen.keys), len(seen.q), generator=drawn)  # [K, T]
        return top_scored(score.to(seen.q.device), count, first=SINKS)
