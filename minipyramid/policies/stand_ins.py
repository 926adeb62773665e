"""Stand-ins: one slot of a layer stands for all the tokens that the layer does not hold.

Attention is a mean over all tokens. Where most of them are dropped, the few that are held get all of its
weight, and what a layer usually finds among the others is missing. Both can be made good by one more key and
value: a key whose product with a query is about the logarithm of the sum that the dropped tokens would have
had under the softmax, and a value that is about what they would have given,

    q . key / sqrt(D)  ~  log(sum over dropped i of exp(q . k_i / sqrt(D))).

Both are constants of a checkpoint, one pair for each layer, key/value head and level, fitted in closed form
to plain text (`minipyramid/calibrate/stand_ins.py`). So they also stand for tokens that the layer has never
computed, and cost a prompt nothing but the slot. The key is turned to where the prompt ends.
"""

import torch
from torch import Tensor

from minipyramid.errors import ConfigError
from minipyramid.policy import Seen
from minipyramid.rope import rotate_


def stand_in(seen: Seen, k: Tensor, v: Tensor, slot: Tensor, of_level: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer with its stand-in in one slot of each head.

    k and v [K, held, D], slot [K, held] bool, of_level [L, K, 2, D]  ->  two of [K, held, D]

    Raises:
        ConfigError: the stand-ins were fitted for another model.
    """
    of_layer = of_level[seen.layer].to(k)  # [K, 2, D]
    if of_layer.shape != (len(k), 2, k.shape[2]):
        raise ConfigError(f"the stand-ins are {list(of_level.shape)}, and were fitted for another model")
    key, value = of_layer.clone().unbind(1)  # two of [K, D]
    rotate_(key[None], *seen.rotation)
    at = slot[..., None]  # [K, held, 1]
    return torch.where(at, key[:, None], k), torch.where(at, value[:, None], v)
