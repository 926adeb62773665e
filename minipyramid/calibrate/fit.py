"""The score `fitted`: a straight line from what the cache holds of a token to how much it is looked up.

What is foretold is the logarithm of the score `repeat` (KVzip's). The line is the least-squares one, in
closed form, for each layer and key/value head, over all tokens of some windows but the first and newest,
which are held whatever their score (Kim et al., 2025, and NVIDIA's KVzap, 2026, which fits a small network to
hidden states; from keys and values a line does as well here, docs/settings.md).
"""

import torch
from torch import Tensor

from minipyramid.policies.scores import features
from minipyramid.policy import Seen

RIDGE = 1e-4  # of the mean square of a feature; keeps features that are nearly the same from fighting
LEAST = 1e-8  # a score below it is as good as nothing
FIRST, NEWEST = 4, 32  # tokens at either end that are not fitted to


def fit_lines(recorded: list[list[Seen]]) -> Tensor:
    """[window][layer] with their repeated scores  ->  [L, K, 2 * D + 4]"""
    return torch.stack([fit_layer(list(layer)) for layer in zip(*recorded, strict=True)])


def fit_layer(windows: list[Seen]) -> Tensor:
    """One layer's lines.  [K, 2 * D + 4]"""
    known, wanted = [], []
    for seen in windows:
        if seen.repeated is None:
            raise ValueError("the windows were recorded without their repeated scores")
        known.append(features(seen.keys, seen.values)[:, FIRST:-NEWEST].double())  # [K, T', F]
        wanted.append(seen.repeated[:, FIRST:-NEWEST].double().clamp(min=LEAST).log())  # [K, T']
    x, y = torch.cat(known, 1), torch.cat(wanted, 1)[..., None]
    square = x.mT @ x  # [K, F, F]
    ridge = (
        RIDGE
        * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        * torch.eye(x.shape[2], device=x.device)
    )
    lines: Tensor = torch.linalg.solve(square + ridge, x.mT @ y)[..., 0]
    return lines.float()
