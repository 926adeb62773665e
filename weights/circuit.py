"""First weights that can look back: the circuit that a small model takes longest to find, roughly put in
place.

Looking back takes two kinds of heads that are worth nothing without each other: one that tells every token
what stood before it, and a later one that looks for tokens behind which the same stood (Olsson et al., 2022,
"In-context Learning and Induction Heads"). From random weights this model found neither in millions of
tokens. Here both are there from the start, as good as random vectors allow (it repeats three quarters of
random tokens said twice, and answers four of ten questions about 128 tokens), all weights are trained from
there on, and what is of no use is unlearnt.

The hidden state has three parts and a constant: an embedding's first part e, a second that is empty at first,
and the embedding's other part, by which the circuit tells the next token. With R a random rotation and d up
to DISTANCES:

    layers 0, 1   the second part becomes  s(t) = sum over d of R^d e(t - d)
    layer 3       query R (e(t) + s(t)), key s(j): their product counts the d for which
                  e(j - d) = e(t + 1 - d), which is how much of what stood before j is what stands at t
                  and before it; its value is the other part of the token at j, which becomes the next token

"d tokens before" is a matter of rotary positions: the constant, in fast components of key and query, matches
best at distance 0, and at distance d where the query is turned back by d. Matching at any distance needs slow
components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DISTANCES, MATCHING = 4, 3  # how many tokens before are told, and the layer that matches
HEAD, HIDDEN = 64, 192
OWN, BEFORE, ANSWER, LAST = slice(0, 64), slice(64, 128), slice(128, 191), 191  # the parts of a hidden state
SIZE = 0.06  # of an embedding's components
CONSTANT = 0.25  # what the last component of every embedding is
FAST = (1, 1, 1, 1, 0.8, 0.6, 0.5, 0.4)  # how much each of the fastest pairs counts in telling distances
SHARPNESS = 10.0  # logit that the fastest pair adds at the right distance
MATCH = 16.0  # logit of one token before that matches
GAIN = 9.0  # how much larger than in its embedding the answer is written
SLOWEST = 15  # pairs of components that match
QUIET = 0.05  # what is left of the random weights where the circuit is


@torch.no_grad()
def wire(layers: Sequence[Any], embedding: Tensor, rope_theta: float) -> None:
    """Overwrite the weights of 12 layers, hidden size 192, 3 query heads of 64 on one key/value head."""
    g = torch.Generator().manual_seed(0)
    embedding.normal_(0, SIZE, generator=g)
    embedding[:, BEFORE].normal_(0, 0.005, generator=g)
    embedding[:, LAST] = CONSTANT
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    for layer in layers:
        a = layer.self_attn
        for p in (a.q_proj, a.k_proj, a.v_proj):
            nn.init.normal_(p.weight, std=0.04, generator=g)
        nn.init.normal_(a.o_proj.weight, std=0.01, generator=g)
        for p in layer.mlp.parameters():
            nn.init.normal_(p, std=0.04, generator=g)
        layer.mlp.down_proj.weight.mul_(0.2)
    tell_before(layers, rotation, rope_theta)
    match(layers[MATCHING].self_attn, rotation, g)


def norm_factor(told: int) -> float:
    """What the norm before a layer multiplies by, where `told` tokens before have been added."""
    size = math.sqrt((HIDDEN - HEAD - 1) * SIZE**2 + CONSTANT**2 + told * HEAD * SIZE**2)
    return math.sqrt(HIDDEN) / size


def tell_before(layers: Sequence[Any], rotation: Tensor, rope_theta: float) -> None:
    """A head for each distance; their keys are one, their queries turned back by it. (The last two heads stay
    idle.)
    """
    frequencies = rope_theta ** (-torch.arange(0, 64, 2).float() / 64)
    for i in range(2):
        a = layers[i].self_attn
        factor = norm_factor(3 * i)
        fast = torch.zeros(32)
        fast[: len(FAST)] = torch.tensor(FAST)
        fast = fast * math.sqrt(8 * SHARPNESS) / (CONSTANT * factor)
        a.k_proj.weight.mul_(QUIET)[:32, LAST] = fast
        a.v_proj.weight.mul_(QUIET)[:, OWN] += 2 / factor * torch.eye(64)
        for h in range(3):
            d = 3 * i + h + 1
            q = a.q_proj.weight[64 * h : 64 * (h + 1)].mul_(QUIET)
            q[:32, LAST] += fast * torch.cos(d * frequencies)
            q[32:, LAST] -= fast * torch.sin(d * frequencies)
            if d <= DISTANCES:
                a.o_proj.weight[BEFORE, 64 * h : 64 * (h + 1)] += torch.linalg.matrix_power(rotation, d) / 2


def match(a: Any, rotation: Tensor, g: torch.Generator) -> None:
    """By the first head, which writes the other part of what it finds; the layer's other heads are left to be
    found.
    """
    slow = [*range(32 - SLOWEST, 32), *range(64 - SLOWEST, 64)]
    some = torch.linalg.qr(torch.randn(64, 64, generator=g))[0][: len(slow)] * math.sqrt(64 / len(slow))
    factor = norm_factor(DISTANCES)
    strength = math.sqrt(8 * MATCH) / (8 * SIZE * factor)
    a.k_proj.weight.mul_(QUIET)[slow, BEFORE] += strength * some
    q = a.q_proj.weight[:64].mul_(QUIET)
    q[slow, OWN] += strength * some @ rotation
    q[slow, BEFORE] += strength * some @ rotation
    a.v_proj.weight.mul_(0.02)[:63, ANSWER] += 2 / factor * torch.eye(63)
    a.o_proj.weight[ANSWER, :63] += GAIN / 2 * torch.eye(63)
