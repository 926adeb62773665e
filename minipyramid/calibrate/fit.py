"""The score `fitted`: a straight line from what the cache holds of a token to how much it is looked up.

What is predicted is the logarithm of the score `repeat` (Kim et al., 2025, and NVIDIA's KVzap, 2026, which
fits a small network to hidden states; from keys and values a line does as well here, docs/settings.md). The
line is the least-squares one, in closed form, for each layer and key/value head, over all tokens of the
windows but the first 4 and the newest 32: most of these are sinks or among the newest, so their score seldom
decides.
"""

import torch
from torch import Tensor

from minipyramid.calibrate.least_squares import solved
from minipyramid.policies.scores import features
from minipyramid.policy import Seen

RIDGE = 1e-4  # of the mean square of a feature; keeps features that are nearly the same from fighting
LEAST = 1e-8  # a score below it is as good as nothing
FIRST, LAST = 4, 32  # tokens at either end that are not fitted to


class LineFit:
    """Sums over windows, so that none of them has to be kept."""

    def __init__(self) -> None:
        self.square: list[Tensor] = []  # [layer] of [K, F, F], where F = 2 * D + 4
        self.product: list[Tensor] = []  # [layer] of [K, F, 1]

    def add(self, recorded: list[Seen]) -> None:
        """Take one window, recorded with its repeated scores: [layer]."""
        for seen in recorded:
            if seen.looked_over is None:
                raise ValueError("the window was recorded without its repeated scores")
            # Of the T' tokens between the two ends.
            x = features(seen.keys, seen.values)[:, FIRST:-LAST].double()  # [K, T', F]
            y = seen.looked_over[:, FIRST:-LAST].double().clamp(min=LEAST).log()[..., None]
            if seen.layer == len(self.square):
                self.square.append(x.mT @ x)
                self.product.append(x.mT @ y)
            else:
                self.square[seen.layer] += x.mT @ x
                self.product[seen.layer] += x.mT @ y

    def lines(self) -> Tensor:
        """The lines of least squares.  [L, K, 2 * D + 4]"""
        sums = zip(self.square, self.product, strict=True)
        return torch.stack([solved(*of_layer, RIDGE)[..., 0].float() for of_layer in sums])
