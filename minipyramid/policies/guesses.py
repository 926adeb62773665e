"""Guesses: a layer holds keys and values of tokens that it has never computed.

What a layer does not pass on, no deeper layer computes, so behind a cut deep layers would know the newest
tokens alone. But much of a key and a value can be foretold where a token leaves. They are nearly linear in
two things: the hidden state x that the last layer in front of the cut received for the token, and what this
layer's attention found for it,

    (key, value)  ~  (x / rms(x), attended, 1) W,    rms(x) the root of the mean square of x.

Keys are guessed before they are rotated. W is a constant of a checkpoint, one for each deeper layer, fitted
in closed form to plain text (`minipyramid/calibrate/guesses.py`). A guess costs one product in place of a
layer: an eighth of its multiplications in the embedded checkpoint. In 24 windows of 512 tokens of a book that
nothing was fitted to, half of the token-layers computed and nothing else dropped, KL to the full cache fell
by 47 % with a guess of every token that left, and by 24 % with guesses of a tenth of the prompt, the newest
that left.
"""

import torch
from torch import Tensor

from minipyramid.errors import ConfigError
from minipyramid.policies.levels import Level
from minipyramid.policy import Seen
from minipyramid.rope import rotate_

EPSILON = 1e-6  # beside the mean square of a hidden state, as in a norm


def check_guesses(levels: tuple[Level, ...], guesses: Tensor | None) -> None:
    """Raise `ConfigError` for levels that guess what was not fitted, or that are not all cut alike.

    All are cut behind the layer that guesses were fitted for, or compute everything. On the line between two
    different cuts nothing can be guessed, so a share there could hold less than the lower level.
    """
    layers = len(levels[0].held)
    if guesses is not None and not (guesses.dim() == 3 and 1 <= len(guesses) < layers):
        told = f"guesses are {list(guesses.shape)}, expected three axes, and 1 to {layers - 1} layers"
        raise ConfigError(f"{told}; they were fitted for another model")
    depth = None if guesses is None else layers - len(guesses)
    unlike = [level for level in levels if not (level.is_one_cut and level.depth == depth)]
    for level in unlike:
        for layer, (held, computed) in enumerate(zip(level.held, level.computed, strict=True)):
            if held > computed:
                told = f"layer {layer} holds {held} and computes {computed}, and guesses of the rest"
                raise ConfigError(f"{told} were not fitted behind layer {level.depth - 1}; hold no more")
    for level in unlike:
        if level.depth < layers and any(other.is_guessing for other in levels):
            told = (
                f"the level of share {level.share:.4g} does not compute all in {depth} layers and then less"
            )
            raise ConfigError(f"{told}, as those do that guess; cut all alike, or compute everything")


def left_with(seen: Seen) -> Tensor:
    """What guesses are made from. For each token of the last layer in front of the cut: x / rms(x), what
    attention found, and 1.  [T, hidden_size + H * D + 1] float32
    """
    x, attended = seen.x.float(), seen.attended.float()
    scale = (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return torch.cat((x * scale, attended, torch.ones_like(scale)), -1)


def guessed(seen: Seen, known: Tensor, weights: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in a deeper layer of some of the T tokens of the layer that they leave behind.

    known [g, features] is what they left with, weights [features, 2 * K * D] are those of the deeper layer,
    which [g] of the T they are  ->  two of [K, g, D]
    """
    K, _, D = seen.keys.shape
    both = (known @ weights.to(known)).to(seen.keys.dtype).view(len(which), 2 * K, D)
    keys, values = both.chunk(2, dim=1)  # two of [g, K, D]
    cos, sin = seen.rotation
    rotate_(keys, cos[which], sin[which])
    return keys.transpose(0, 1), values.transpose(0, 1)
