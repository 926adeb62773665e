"""The stand-ins of a level: one key and value for what a layer does not hold, fitted in closed form.

Windows of plain text are computed and held whole, and the text that follows each context looks at it. For
each of its queries two things are known of the tokens that the level would drop: what attention over them
alone puts out, and the logarithm of the sum that they have under the softmax. A stand-in
(`minipyramid/policies/stand_ins.py`) has to reproduce both:

- its key is the linear function of the queries, without a constant, that is nearest to these logarithms in
  the mean square,
- its value is what makes the smallest squared error in what attention gives then.

One value is not what every query would have found, so a stand-in may do better with less weight, or with
more: each of `SHIFTS` is added to the logarithms, and for each head the best one is taken.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minipyramid.calibrate.contexts import Contexts, profile_of, recorded
from minipyramid.calibrate.least_squares import solved
from minipyramid.calibrate.search import whole_level
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policy import Seen
from minipyramid.rope import rotate_, rotations

RIDGE = 0.01  # of the mean square of a query's component
SHIFTS = (0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
# A layer that holds so much of a prompt has no stand-in: it looks for single tokens, and finds them less
# exactly beside a slot that stands for many. With one in layer 3 of the embedded checkpoint, which holds 94 %
# at 15 %, two of 128 answers among prose were lost (512 tokens), and none without.
NONE_FROM = 0.5


@dataclass(frozen=True)
class Targets:
    """What a stand-in has to reproduce: what queries find among the tokens that are dropped; and all others.

    Of Q queries of each key/value head: those of all query heads that share it, at all tokens that follow.
    """

    q: Tensor  # [K, Q, D] divided by sqrt(D), and rotated back by the position of the context's newest token
    dropped_logsumexp: Tensor  # [K, Q]
    dropped_mean: Tensor  # [K, Q, D]
    held_logsumexp: Tensor  # [K, Q] of what is held of the context, and of what follows it
    held_mean: Tensor  # [K, Q, D]


def fit_stand_ins(contexts: Contexts, level: Level) -> Tensor:
    """One key and value for each layer and head, on contexts computed as the level does.  [L, K, 2, D]

    They are 0 in layers that get no stand-in.
    """
    llm, layers = contexts.llm, contexts.llm.config.num_hidden_layers
    whole, profile = profile_of(whole_level(layers)), contexts.holding(level)
    targets: list[list[Targets]] = [[] for _ in range(layers)]  # [layer][window]
    for window, computed in zip(contexts.windows, contexts.seen, strict=True):
        end = torch.tensor([len(window.context) - 1], device=llm.device)
        rotation = rotations(end, llm.model.inv_freq, torch.float32)
        exact = recorded(llm, whole, window.context + window.following)
        for layer, (whole_seen, level_seen) in enumerate(zip(exact, computed, strict=True)):
            if level.held[layer] < NONE_FROM:
                targets[layer].append(targets_of(whole_seen, held_of(level_seen, profile), rotation))
    K, D = llm.config.num_key_value_heads, llm.config.head_dim
    none = torch.zeros(K, 2, D, device=llm.device)
    return torch.stack([fit_heads(joined(windows)) if windows else none for windows in targets])


def held_of(seen: Seen, profile: Profile) -> Tensor:
    """Which tokens of a context a layer holds under a profile, beside its stand-in.  [K, N] bool"""
    (T, _, D), N, layers = seen.q.shape, seen.prompt_tokens, len(profile.levels[0].held)
    count = profile.held(N, layers)[seen.layer]
    # Ones in place of stand-ins that are yet to be fitted, so that `hold` leaves their slot.
    placeholder = torch.ones(layers, len(seen.keys), 2, D, device=seen.q.device)
    filled = replace(profile, levels=(replace(profile.levels[0], stand_ins=placeholder),))
    chosen = filled.hold(seen, min(count, T)).expand(len(seen.keys), -1)  # [K, count]
    if filled.stand_ins_for(seen.layer, N) is not None:
        chosen = chosen[chosen != filled.replaced(T)].view(len(seen.keys), -1)
    positions = profile.sinks_and_newest(N, T, chosen.device)
    is_held = torch.zeros(len(seen.keys), N, dtype=torch.bool, device=chosen.device)
    if count > T:  # what is guessed counts as held
        left = torch.ones(N, dtype=torch.bool, device=chosen.device).scatter(0, positions, False)
        is_held[:, left.nonzero()[-(count - T) :, 0]] = True  # the newest of those that left
    return is_held.scatter(1, positions[chosen], True)


def targets_of(seen: Seen, held: Tensor, rotation: tuple[Tensor, Tensor]) -> Targets:
    """What the F tokens behind a context find; held [K, N] says which of its tokens are not dropped.

    `seen` is of all N + F tokens, rotation that of the context's newest.
    """
    (n, _, D), (K, N) = seen.q.shape, held.shape
    q, keys, values = seen.q[N:].float() / math.sqrt(D), seen.keys.float(), seen.values.float()
    scores = by_head(q, K) @ keys.mT  # [K, F * G, n]
    visible = torch.ones(n - N, n, dtype=torch.bool, device=q.device).tril(N)  # [F, n]
    scores.masked_fill_(~visible.repeat_interleave(q.shape[1] // K, 0), -math.inf)
    # What follows the context is held.
    is_held = torch.cat((held, held.new_ones(K, n - N)), 1)[:, None]  # [K, 1, n]
    dropped, rest = scores.masked_fill(is_held, -math.inf), scores.masked_fill(~is_held, -math.inf)
    cos, sin = rotation
    rotated_back = q.clone()
    rotate_(rotated_back, cos, -sin)
    dropped_mean, held_mean = (part.softmax(-1) @ values for part in (dropped, rest))
    return Targets(
        by_head(rotated_back, K), dropped.logsumexp(-1), dropped_mean, rest.logsumexp(-1), held_mean
    )


def by_head(q: Tensor, kv_heads: int) -> Tensor:
    """Queries beside each other that share a key/value head.  [F, H, D] -> [K, F * G, D]"""
    return q.view(len(q), kv_heads, -1, q.shape[2]).transpose(0, 1).flatten(1, 2)


def joined(targets: list[Targets]) -> Targets:
    """The queries of all windows."""
    parts = zip(*(vars(one).values() for one in targets), strict=True)
    return Targets(*(torch.cat(part, 1) for part in parts))


def fit_heads(targets: Targets) -> Tensor:
    """The stand-in of every head of a layer.  [K, 2, D]"""
    q, held_mean = targets.q, targets.held_mean
    products = torch.stack((targets.dropped_logsumexp, torch.ones_like(targets.dropped_logsumexp)), -1)
    # The second, added to a key, adds about 1 to its product with every query.
    key, raises_by_one = solved(q.mT @ q, q.mT @ products, RIDGE).unbind(-1)  # two of [K, D]
    weight = (targets.dropped_logsumexp - targets.held_logsumexp).sigmoid()[..., None]  # [K, Q, 1]
    exact = weight * targets.dropped_mean + (1 - weight) * held_mean
    tried, errors = [], []
    for shift in SHIFTS:
        shifted = key + shift * raises_by_one
        weight = ((q @ shifted[..., None])[..., 0] - targets.held_logsumexp).sigmoid()[..., None]
        missing = exact - (1 - weight) * held_mean  # [K, Q, D]
        # Where the stand-in weighs nothing its value is 0.
        square_sum = weight.square().sum(1).clamp(min=torch.finfo(weight.dtype).tiny)
        value = (weight * missing).sum(1) / square_sum  # [K, D]
        errors.append((missing - weight * value[:, None]).square().sum((1, 2)))  # [K]
        tried.append(torch.stack((shifted, value), 1))  # [K, 2, D]
    best = torch.stack(errors).argmin(0)  # [K]
    return torch.stack(tried)[best, torch.arange(len(best), device=best.device)]
