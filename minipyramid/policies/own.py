"""A policy of a user's own, each of whose answers is checked before the engine relies on it.

The policies of this package answer what they must, which the tests see to. What somebody is trying out may
not: a layer with one token too many would write over another sequence's, and an index that is no token's
would read what nobody has put there.
"""

import math
from dataclasses import dataclass
from operator import le
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipyramid.budget import most_tokens
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError
from minipyramid.policy import Compute, Generation, Policy, Seen


def checked(policy: Policy) -> Policy:
    """The policy itself if it is of this package, else with its answers checked.

    Raises `ConfigError` for one that guesses, for what it guesses could not be checked.
    """
    if type(policy).__module__.partition(".")[0] == "minipyramid":
        return policy
    if type(policy).guess is not Policy.guess:
        name = type(policy).__name__
        raise ConfigError(f"{name} has a `guess`, which only a profile of this package can; leave it out")
    return Own(policy)


@dataclass(frozen=True)
class Own(Policy):
    """Answers as `policy` does; raises `ConfigError` where that is no answer."""

    policy: Policy

    def check_model(self, config: ModelConfig) -> None:
        """See `Policy`."""
        self.policy.check_model(config)

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """See `Policy`."""
        return self._lists(prompt_tokens, layers)[0]

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """See `Policy`."""
        return self._lists(prompt_tokens, layers)[1]

    def _lists(self, prompt_tokens: int, layers: int) -> tuple[list[int], list[int]]:
        computed = self.policy.computed(prompt_tokens, layers)
        held = self.policy.held(prompt_tokens, layers)
        if are_counts(computed, layers, 1) and are_counts(held, layers, 0):
            falls = computed[0] == prompt_tokens and sorted(computed, reverse=True) == list(computed)
            if falls and all(map(le, held, computed)):
                return list(computed), list(held)
        lists = f"{self._name} computes {computed!r:.80} and holds {held!r:.80}"
        rule = (
            f"all {prompt_tokens} tokens computed first, then never more, and never more held than computed"
        )
        raise ConfigError(f"{lists} in {layers} layers; expected {rule}")

    def look_over(self, ids: list[int], compute: Compute) -> list[Tensor] | None:
        """See `Policy`."""
        given = self.policy.look_over(ids, compute)
        if given is None or (isinstance(given, list) and all(is_scores(part, len(ids)) for part in given)):
            return given
        told = f"{self._name} has looked over {len(ids)} tokens and found {given!r:.60}"
        raise ConfigError(f"{told}; expected None, or a tensor [heads, {len(ids)}] for each layer in a list")

    def computed_by_look_over(self, prompt_tokens: int, layers: int) -> int:
        """See `Policy`."""
        return self.policy.computed_by_look_over(prompt_tokens, layers)

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """See `Policy`."""
        return self._indices(self.policy.pass_on(seen, count), [(count,)], seen)

    def hold(self, seen: Seen, count: int) -> Tensor:
        """See `Policy`."""
        return self._indices(self.policy.hold(seen, count), [(count,), (len(seen.keys), count)], seen)

    def entries(self, seen: Seen, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy`."""
        given, own = self.policy.entries(seen, chosen), super().entries(seen, chosen)
        if isinstance(given, tuple) and len(given) == 2 and all(map(is_like, given, own)):
            return given
        expected = f"two tensors {list(own[0].shape)}, keys and values, in {own[0].dtype}"
        raise ConfigError(f"{self._name} has entries {given!r:.60}; expected {expected}")

    def _indices(self, chosen: Tensor, shapes: list[tuple[int, ...]], seen: Seen) -> Tensor:
        """What was chosen of the T tokens, if it is ascending indices of one of these shapes."""
        T, device = len(seen.q), seen.q.device
        is_index = isinstance(chosen, Tensor) and chosen.dtype == torch.int64 and chosen.device == device
        if is_index and chosen.shape in shapes:
            around = F.pad(F.pad(chosen, (1, 0), value=-1), (0, 1), value=T)
            # Values are looked at on a CPU only, for that would wait for another device in every layer.
            if device.type != "cpu" or (around.diff() > 0).all():
                return chosen
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        expected = f"ascending indices of {T} tokens in a tensor of shape {allowed}, torch.int64, on {device}"
        shown = " ".join(repr(chosen).split())  # a tensor's has line breaks
        raise ConfigError(f"{self._name} has chosen {shown:.60}, expected {expected}")

    def generation(self, prompt_tokens: int, layers: int) -> Generation | None:
        """See `Policy`."""
        given = self.policy.generation(prompt_tokens, layers)
        if given is None:
            return None
        fits = isinstance(given, Generation) and are_counts([given.group], 1, 1)
        if fits and are_counts(given.stay, layers, 0) and max(given.stay) <= given.group:
            numbers = is_number(given.recent_ratio, 1.0) and is_number(given.distance_weight, math.inf)
            if numbers and are_counts([given.fewest_recent], 1, 0):
                return given
        expected = (
            f"a Generation with a group of 1 or more, of which 0 to all stay in each of {layers} layers, and "
            "recent tokens by a ratio of 0 to 1, a number and a finite weight"
        )
        raise ConfigError(f"{self._name} drops by {given!r:.120}; expected {expected}")

    def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> Policy:
        """See `Policy`."""
        given = self.policy.within(share, prompt_tokens, new_tokens, layers)
        if not isinstance(given, Policy):
            raise ConfigError(f"{self._name} has within {given!r:.60}; expected a Policy")
        solved, most = checked(given), most_tokens(share, prompt_tokens, new_tokens, layers)
        held = sum(solved.kv_lengths(prompt_tokens, new_tokens, layers))
        if held > most:
            told = f"{self._name} holds {held} tokens within a budget of {share}, which are {int(most)}"
            raise ConfigError(f"{told}; its `within` must hold no more")
        return solved

    @property
    def _name(self) -> str:
        return type(self.policy).__name__


def are_counts(numbers: Any, layers: int, lowest: int) -> bool:
    """Whether it is a list of whole numbers, one for each layer and none below the lowest."""
    listed = isinstance(numbers, (list, tuple)) and len(numbers) == layers
    return listed and all(isinstance(n, int) and not isinstance(n, bool) and n >= lowest for n in numbers)


def is_number(value: Any, most: float) -> bool:
    """Whether it is a finite number from 0 to `most`."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and 0 <= value <= most and math.isfinite(value)


def is_scores(part: Any, tokens: int) -> bool:
    """Whether it is a score for each head and token."""
    return isinstance(part, Tensor) and part.dim() == 2 and part.shape[1] == tokens


def is_like(given: Any, own: Tensor) -> bool:
    """Whether it is a tensor of the same shape, in the same number format, at the same place."""
    if not isinstance(given, Tensor):
        return False
    return (given.shape, given.dtype, given.device) == (own.shape, own.dtype, own.device)
