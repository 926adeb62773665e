"""What one sequence will need of the cache, known before anything is computed.

The cache is allotted from it, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, le
from typing import Any

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError
from minipyramid.policy import FULL, Generation, Policy, check_share

VOTE_BYTES = 4  # of one pending token in one layer


@dataclass(frozen=True)
class Need:
    """What a row of the cache has to have room for."""

    slots: tuple[int, ...]  # [layer] tokens held at most
    pending: int = 0  # generated tokens that wait for a compaction, at most
    group: int = 1  # how many of them a compaction is of

    def bytes(self, per_token: int) -> int:
        """Keys, values and votes; `per_token` is the bytes of one token in one layer."""
        return per_token * sum(self.slots) + VOTE_BYTES * self.pending * len(self.slots)

    def plus(self, held: Sequence[int]) -> "Need":
        """Room for so many further tokens in each layer."""
        return Need(tuple(map(add, self.slots, held)), self.pending, self.group)


def need_of(policy: Policy, prompt_tokens: int, new_tokens: int, layers: int) -> Need:
    """What one sequence needs at its longest. Raises `ConfigError` for lists of a policy that cannot be."""
    prompt = checked_held(policy, prompt_tokens, layers)
    generation = checked_generation(policy, prompt_tokens, layers)
    if generation is None:
        return Need(tuple(n + new_tokens for n in prompt))
    group, done = generation.group, generation.compactions(new_tokens)
    # (generated tokens, compactions) where most is held: at the end, or just before the last compaction.
    longest = [(new_tokens, done)]
    if done:
        longest.append((generation.compacts_at(done - 1, new_tokens), done - 1))
    slots = [
        max(n + generated - compactions * (group - stay) for generated, compactions in longest)
        for n, stay in zip(prompt, generation.stay, strict=True)
    ]
    pending = max(generated - compactions * group for generated, compactions in longest)
    return Need(tuple(slots), pending, group)


def checked_held(policy: Policy, prompt_tokens: int, layers: int) -> list[int]:
    """The policy's `held`, if its two lists are what they must be, for a policy may be the user's own."""
    computed, held = policy.computed(prompt_tokens, layers), policy.held(prompt_tokens, layers)
    if are_counts(computed, layers, 1) and are_counts(held, layers, 0):
        falls = computed[0] == prompt_tokens and sorted(computed, reverse=True) == computed
        if falls and all(map(le, held, computed)):
            return held
    lists = f"{type(policy).__name__} computes {computed!r:.80} and holds {held!r:.80}"
    rule = f"all {prompt_tokens} tokens computed first, then never more, and no layer to hold more than that"
    raise ConfigError(f"{lists} in {layers} layers; expected {rule}")


def are_counts(numbers: Any, layers: int, lowest: int) -> bool:
    """Whether it is a list of whole numbers, one for each layer and none below the lowest."""
    listed = isinstance(numbers, (list, tuple)) and len(numbers) == layers
    return listed and all(isinstance(n, int) and n >= lowest for n in numbers)


def checked_generation(policy: Policy, prompt_tokens: int, layers: int) -> Generation | None:
    """The policy's `generation`, if it is what it must be."""
    given = policy.generation(prompt_tokens, layers)
    if given is None:
        return None
    fits = isinstance(given, Generation) and are_counts([given.group], 1, 1)
    if fits and are_counts(given.stay, layers, 0) and max(given.stay) <= given.group:
        return given
    expected = f"a Generation with a group of 1 or more, of which 0 to all stay in each of {layers} layers"
    raise ConfigError(f"{type(policy).__name__} drops by {given!r:.120}; expected {expected}")


@dataclass(frozen=True)
class Planner:
    """Plans requests of one model by one policy, or by what a budget makes of it."""

    config: ModelConfig
    policy: Policy
    kv_budget: float | None  # share of the full cache that a request may hold at its end
    bytes_per_token: int  # of one token in one layer

    def __post_init__(self) -> None:
        if self.kv_budget is not None:
            check_share(self.kv_budget)
            if self.policy == FULL:
                problem = f"kv_budget is {self.kv_budget}, but policy full holds everything"
                raise ConfigError(f"{problem}; leave one of them out")

    def policy_for(self, prompt_tokens: int, new_tokens: int) -> Policy:
        """The policy of one request; raises `BudgetError`."""
        if self.kv_budget is None:
            return self.policy
        return self.policy.within(self.kv_budget, prompt_tokens, new_tokens, self.config.num_hidden_layers)
