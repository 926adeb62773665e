"""The stand-ins of a level: one key and value for what a layer does not hold, fitted in closed form.

Everything is computed for some windows of plain text, and the text that follows looks back. Of each of its
queries it is known what it finds among the tokens that the level would drop, and the logarithm of the sum
that these have under the softmax. A stand-in (`minipyramid/policies/stand_ins.py`) has to give both again:

- its key is the straight line of least squares from the queries to these logarithms,
- its value is what makes the smallest squared error of the layer's output then, over all queries.

A constant value is not what every query would have found, so a stand-in does better with a little less
weight. A few such shifts of the logarithm are tried for each head, and the best one is taken.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minipyramid import LLM
from minipyramid.calibrate.contexts import Window, profile_of, recorded
from minipyramid.calibrate.search import cut_level
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policy import Seen
from minipyramid.rope import rotate_, rotations

RIDGE = 0.01  # of the mean square of a query's component
SHIFTS = (0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
# Where a level holds all of a layer it is fitted as if it held so much, for budgets between two levels.
MOST = 0.95


@dataclass(frozen=True)
class Found:
    """What queries find among the tokens that are dropped, and among the others.

    Of Q queries of each key/value head: those of all query heads that share it, at all tokens that follow.
    """

    q: Tensor  # [K, Q, D] divided by sqrt(D), and turned back by the position where the context ends
    dropped_logsumexp: Tensor  # [K, Q]
    dropped_mean: Tensor  # [K, Q, D]
    held_logsumexp: Tensor  # [K, Q]
    held_mean: Tensor  # [K, Q, D]


def fit_stand_ins(llm: LLM, windows: list[Window], level: Level, lines: Tensor | None) -> Tensor:
    """One key and value for each layer and head of a level, from some windows.  [L, K, 2, D]"""
    layers, profile = llm.config.num_hidden_layers, profile_of(replace(level, stand_ins=None), lines)
    whole = profile_of(cut_level(layers, layers, 1.0))
    found: list[list[Found]] = [[] for _ in range(layers)]  # [layer][window]
    for window in windows:
        tokens = len(window.context)
        end = torch.tensor([tokens - 1], device=llm.device)
        rotation = rotations(end, llm.model.inv_freq, torch.float32)
        for seen in recorded(llm, whole, window.context + window.following):
            held = held_of(seen, tokens, profile)
            found[seen.layer].append(looked_at(seen, held, rotation))
    return torch.stack([fitted(joined(of_layer)) for of_layer in found])


def held_of(seen: Seen, tokens: int, profile: Profile) -> Tensor:
    """Which of a context's tokens a layer holds under a profile.  [K, tokens] bool"""
    layer, layers = seen.layer, len(profile.levels[0].held)
    computed, held = (counts[layer] for counts in profile.counts(tokens, layers))
    of_context = only(seen, torch.arange(tokens, device=seen.q.device))
    passed = profile.pass_on(of_context, computed)
    count = min(held, int(MOST * tokens)) - 1  # one slot is the stand-in's
    chosen = profile.hold(only(of_context, passed), count)
    is_held = torch.zeros(len(seen.keys), tokens, dtype=torch.bool, device=seen.q.device)
    return is_held.scatter(1, passed[chosen].expand(len(seen.keys), -1), True)


def only(seen: Seen, which: Tensor) -> Seen:
    """The same of some of the tokens alone."""
    logsumexp = None if seen.logsumexp is None else seen.logsumexp[:, which]
    q, keys, values = seen.q[which], seen.keys[:, which], seen.values[:, which]
    return replace(seen, q=q, keys=keys, values=values, logsumexp=logsumexp)


def looked_at(seen: Seen, held: Tensor, rotation: tuple[Tensor, Tensor]) -> Found:
    """What the tokens behind a context find in it; held [K, tokens] says what the layer holds of that."""
    (n, H, D), (K, tokens) = seen.q.shape, held.shape
    following = n - tokens
    q = seen.q[tokens:].float() / math.sqrt(D)  # [F, H, D]
    grouped = q.view(following, K, H // K, D).permute(1, 0, 2, 3).flatten(1, 2)  # [K, F * G, D]
    keys, values = seen.keys.float(), seen.values.float()
    scores = (grouped @ keys.mT).view(K, following, -1, n)
    visible = torch.ones(following, n, dtype=torch.bool, device=q.device).tril(tokens)[:, None]
    scores = scores.masked_fill(~visible, -math.inf).flatten(1, 2)  # [K, F * G, n]
    # What follows the context is held.
    is_held = torch.cat((held, held.new_ones(K, following)), 1)[:, None]
    dropped, rest = scores.masked_fill(is_held, -math.inf), scores.masked_fill(~is_held, -math.inf)
    cos, sin = rotation
    turned = q.clone()
    rotate_(turned, cos, -sin)
    turned = turned.view(following, K, H // K, D).permute(1, 0, 2, 3).flatten(1, 2)
    means = (part.softmax(-1) @ values for part in (dropped, rest))
    return Found(turned, dropped.logsumexp(-1), next(means), rest.logsumexp(-1), next(means))


def joined(found: list[Found]) -> Found:
    """The queries of all windows."""
    parts = zip(*(vars(one).values() for one in found), strict=True)
    return Found(*(torch.cat(part, 1) for part in parts))


def fitted(found: Found) -> Tensor:
    """The stand-in of every head of a layer.  [K, 2, D]"""
    q = found.q
    square = q.mT @ q  # [K, D, D]
    ridge = RIDGE * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    aims = torch.stack((found.dropped_logsumexp, torch.ones_like(found.dropped_logsumexp)), -1)  # [K, Q, 2]
    lines = torch.linalg.solve(square + ridge * torch.eye(q.shape[2], device=q.device), q.mT @ aims)
    key, unit = lines.unbind(-1)  # two of [K, D]; the second raises every logarithm by about 1
    weight = (found.dropped_logsumexp - found.held_logsumexp).sigmoid()[..., None]  # [K, Q, 1]
    full = weight * found.dropped_mean + (1 - weight) * found.held_mean
    tried, errors = [], []
    for shift in SHIFTS:
        shifted = key + shift * unit
        part = ((q @ shifted[..., None])[..., 0] - found.held_logsumexp).sigmoid()[..., None]  # [K, Q, 1]
        missing = full - (1 - part) * found.held_mean
        value = (part * missing).sum(1) / part.square().sum(1)  # [K, D]
        errors.append((missing - part * value[:, None]).square().sum((1, 2)))  # [K]
        tried.append(torch.stack((shifted, value), 1))  # [K, 2, D]
    best = torch.stack(errors).argmin(0)  # [K]
    return torch.stack(tried)[best, torch.arange(len(best), device=best.device)]
