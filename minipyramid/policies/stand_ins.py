"""Stand-ins: one slot of a layer stands for all the tokens that the layer does not hold.

Attention is a mean over all tokens. Where most of them are dropped, the few that are held get all of its
weight, and what a layer usually finds among the others is missing. Both can be made up for by one more key
and value: a key whose product with a query is about the logarithm of the sum that the dropped tokens would
have had under the softmax, and a value that is about what they would have given,

    q . key / sqrt(D)  ~  log(sum over dropped i of exp(q . k_i / sqrt(D))).

Both are constants of a checkpoint, one pair for each layer, key/value head and level, fitted in closed form
to plain text (`minipyramid/calibrate/stand_ins.py`). So they also stand for tokens that the layer has never
computed, and cost a prompt nothing but the slot. The key is rotated by the position of the prompt's newest
token.
"""

import torch
from torch import Tensor

from minipyramid.policy import Seen
from minipyramid.rope import rotate_


def with_stand_in(
    seen: Seen, k: Tensor, v: Tensor, is_slot: Tensor, stand_ins: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values that a layer holds, with its stand-in in one slot of each head.

    k and v [K, held, D], is_slot [K, held] bool, stand_ins [L, K, 2, D]  ->  two of [K, held, D]
    """
    key, value = stand_ins[seen.layer].to(k).clone().unbind(1)  # two of [K, D]
    cos, sin = seen.rotation  # two of [T, 1, D / 2]
    rotate_(key[None], cos[-1:], sin[-1:])
    here = is_slot[..., None]  # [K, held, 1]
    return torch.where(here, key[:, None], k), torch.where(here, value[:, None], v)
