"""The weights of guesses: what deeper layers would have computed of a token, from what it leaves with.

Linear functions in closed form (`minipyramid/policies/guesses.py`): of all tokens of some windows, computed
whole, the hidden states and what attention found at the cut are known, and the keys and values of every
deeper layer. The least squares, with a small ridge, are the guesses.
"""

import torch
from torch import Tensor

from minipyramid import LLM
from minipyramid.calibrate.contexts import Window, profile_of, recorded
from minipyramid.calibrate.search import whole_level
from minipyramid.policies.guesses import left_with
from minipyramid.rope import rotate_

RIDGE = 1e-3  # of the mean square of a feature
FIRST = 4  # tokens at the beginning that are not fitted to; a model may use them as sinks, unlike all others


def fit_guesses(llm: LLM, windows: list[Window], depth: int) -> Tensor:
    """Weights of all layers behind the first `depth`.  [L - depth, features, 2 * K * D] float32"""
    layers = llm.config.num_hidden_layers
    whole = profile_of(whole_level(layers))
    square: Tensor | float = 0.0  # [features, features]
    products: list[Tensor | float] = [0.0] * (layers - depth)  # of [features, 2 * K * D]
    for window in windows:
        seen = recorded(llm, whole, window.context)
        known = left_with(seen[depth - 1])[FIRST:].double()  # [T, features]
        square = square + known.T @ known
        for i, deeper in enumerate(seen[depth:]):
            keys, values = (t.transpose(0, 1).float() for t in (deeper.keys, deeper.values))  # [T, K, D]
            cos, sin = deeper.rotation
            keys = keys.clone()
            rotate_(keys, cos, -sin)
            products[i] = products[i] + known.T @ torch.cat((keys, values), 1)[FIRST:].flatten(1).double()
    square = torch.as_tensor(square)
    ridge = (
        RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    )
    weights: Tensor = torch.linalg.solve(square + ridge, torch.stack([torch.as_tensor(p) for p in products]))
    return weights.float()
