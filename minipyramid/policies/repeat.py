"""The score `repeat`: how much a token is looked at when the prompt is said once more behind itself.

Whoever asks about a prompt later makes the model look up parts of it. Saying it again looks up all of them,
so it is the field's best judge of a token nobody has asked for yet (KVzip, Kim et al., 2025). It is one more
pass over a prompt of twice the length, before the prompt itself is computed, and nothing of it is held.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minipyramid.policy import Compute, Policy, Seen
from minipyramid.voting import looks


@dataclass(frozen=True)
class Listener(Policy):
    """Computes a prompt that is said twice, holds nothing, and notes how much the first half is looked at.

    Attributes:
        until: the last layer whose score is wanted; deeper ones compute next to nothing.
    """

    until: int
    scores: list[Tensor] = field(default_factory=list, compare=False)  # [layer] of [K, N], as they come

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """All as far as scores are wanted, then one token."""
        return [prompt_tokens if layer <= self.until else 1 for layer in range(layers)]

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """Nothing."""
        return [0] * layers

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """The newest, for nobody reads what becomes of it."""
        T = len(seen.q)
        return torch.arange(T - count, T, device=seen.q.device)

    def hold(self, seen: Seen, count: int) -> Tensor:
        """Nothing, but on the way the scores are noted.  [0]"""
        if seen.layer <= self.until:
            self.scores.append(looked_up(seen))
        return torch.arange(0, device=seen.q.device)


def looked_up(seen: Seen) -> Tensor:
    """Highest attention that any repeated token pays to each token of the prompt, times its value's size.

    Returns [K, N], where the layer computes 2 * N tokens.
    """
    T, n = len(seen.q), seen.keys.shape[1]
    prompt = T // 2
    logsumexp = None if seen.logsumexp is None else seen.logsumexp[:, prompt:]
    blocks = looks(seen.q[prompt:], seen.keys, logsumexp, context=n - prompt)
    highest = torch.stack([probs.amax((1, 2)) for _, probs in blocks]).amax(0)  # [K, n - N]
    sizes: Tensor = seen.values[:, n - T : n - prompt].float().norm(dim=-1)
    return highest[:, n - T :] * sizes


def say_again(ids: list[int], compute: Compute, until: int) -> list[Tensor]:
    """Scores of a prompt's tokens in the layers up to `until`.  [layer] of [K, N]"""
    listener = Listener(until)
    compute(ids + ids, listener)
    return listener.scores
