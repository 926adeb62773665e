"""Scores: which tokens of a prompt a layer had better hold, one number per key/value head and token.

newest    a token's number: the later, the higher
votes     how much the prompt's newest tokens look at it (PyramidInfer, SnapKV): right for what the prompt
          itself asks, blind for what is asked later
keydiff   how little its key is like the other keys of its head (KeyDiff, Park et al., 2025): an unusual
          key is a fact, a usual one is filler. Needs no query, so it is right for what is asked later, too
repeat    how much it is looked at when the prompt is said once more behind itself (KVzip, Kim et al.,
          2025), times the size of its value: the best judge of all, and a second pass
fitted    the logarithm of `repeat`, predicted by a straight line from what the cache holds of the token.
          The line is fitted once per checkpoint (`python -m minipyramid.calibrate`)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minipyramid.errors import ConfigError
from minipyramid.policy import Seen
from minipyramid.voting import votes

VOTERS = 64  # newest tokens that vote; 32 and 128 did as well (KL within 3 %, embedded checkpoint)
Lines = Tensor | None  # [L, K, 2 * D + 4] of the score `fitted`: a weight for each of its `features`


def newest(seen: Seen, lines: Lines) -> Tensor:
    """All heads alike.  [T]"""
    return torch.arange(len(seen.q), device=seen.q.device)


def voted(seen: Seen, lines: Lines) -> Tensor:
    """The voters are voted on as well, by themselves and those that follow them.  [K, T]"""
    T, n = len(seen.q), seen.keys.shape[1]
    voters = min(VOTERS, T)
    logsumexp = None if seen.logsumexp is None else seen.logsumexp[:, T - voters :]
    return votes(seen.q[T - voters :], seen.keys, logsumexp, context=n).sum(1)[:, n - T :]


def keydiff(seen: Seen, lines: Lines) -> Tensor:
    """Minus the cosine between a key, as it stands rotated in the cache, and the mean direction.  [K, T]"""
    return -usualness(seen.keys[:, -len(seen.q) :])


def usualness(keys: Tensor) -> Tensor:
    """Cosine between each key and the mean direction of its head's keys.  [K, T, D] -> [K, T]"""
    directions = F.normalize(keys.float(), dim=-1)
    return F.cosine_similarity(directions, directions.mean(1, keepdim=True), dim=-1)


def repeated(seen: Seen, lines: Lines) -> Tensor:
    """What `repeat.py` has found before the prompt was computed.  [K, T]"""
    if seen.looked_over is None:
        raise ConfigError("the score repeat needs a second pass over the prompt, which only a profile takes")
    return seen.looked_over


def fitted(seen: Seen, lines: Lines) -> Tensor:
    """The line's value at each token.  [K, T]"""
    if lines is None:
        raise ConfigError("the score fitted has no lines; python -m minipyramid.calibrate fits them")
    T = len(seen.q)
    known = features(seen.keys[:, -T:], seen.values[:, -T:])  # [K, T, 2 * D + 4]
    return (known @ lines[seen.layer].to(known)[..., None])[..., 0]


def features(keys: Tensor, values: Tensor) -> Tensor:
    """What the line reads of a token: its key, its value, their sizes, how usual the key is, and 1.

    two of [K, T, D] -> [K, T, 2 * D + 4]
    """
    k, v = keys.float(), values.float()
    sizes = [k.norm(dim=-1), v.norm(dim=-1), usualness(k), torch.ones(k.shape[:2], device=k.device)]
    return torch.cat((k, v, torch.stack(sizes, -1)), -1)


SCORES: dict[str, Callable[[Seen, Lines], Tensor]] = {
    "newest": newest,
    "votes": voted,
    "keydiff": keydiff,
    "repeat": repeated,
    "fitted": fitted,
}
