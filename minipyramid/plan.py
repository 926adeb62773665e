"""How many tokens each layer will hold of each sequence, and their bytes, before anything is computed.

The cache is allotted from a plan, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add, index, le
from typing import Any

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, RequestError
from minipyramid.policy import FULL, Generation, Policy, check_share
from minipyramid.sampling import SamplingParams

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
class Plan:
    """What sequences hold, if all of them run to their last token."""

    requests: list[tuple[Policy, int, int]]  # policy, prompt tokens and new tokens of each
    layers: int
    bytes_per_token: int  # of one token in one layer

    def at(self, generated: int) -> list[list[int]]:
        """Tokens that each layer holds of each sequence after so many generated tokens.  [sequence][layer]"""
        each = [(policy, prompt, max(0, min(generated, new))) for policy, prompt, new in self.requests]
        return [policy.kv_lengths(prompt, so_far, self.layers) for policy, prompt, so_far in each]

    @property
    def computed(self) -> list[list[int]]:
        """Tokens of each prompt that each layer computes.  [sequence][layer]"""
        return [policy.computed(prompt, self.layers) for policy, prompt, _ in self.requests]

    @property
    def kv_lengths(self) -> list[list[int]]:
        """Tokens that each layer holds of each sequence at the end.  [sequence][layer]"""
        return self.at(max(new for _, _, new in self.requests))

    @property
    def kv_bytes(self) -> int:
        """Keys and values that are held at the end."""
        return self.bytes_per_token * sum(map(sum, self.kv_lengths))

    @property
    def kv_bytes_full(self) -> int:
        """The same if nothing were pruned."""
        return self.bytes_per_token * self.layers * sum(prompt + new for _, prompt, new in self.requests)

    @property
    def kv_share(self) -> float:
        """Bytes held over the bytes of the full cache."""
        return self.kv_bytes / self.kv_bytes_full

    @property
    def needs(self) -> list[Need]:
        """What is allotted for each sequence."""
        return [need_of(*request, self.layers) for request in self.requests]

    @property
    def votes_bytes(self) -> int:
        """The running votes on pending tokens."""
        return VOTE_BYTES * self.layers * sum(need.pending for need in self.needs)

    @property
    def slack_bytes(self) -> int:
        """Allotted for what a layer holds just before a compaction, and free at the end."""
        return sum(self.bytes_per_token * sum(need.slots) for need in self.needs) - self.kv_bytes

    def max_batch(self, memory: int) -> int:
        """How many sequences like the largest of these fit into `memory` bytes."""
        return max(0, memory) // max(need.bytes(self.bytes_per_token) for need in self.needs)


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

    def plan(self, prompt_lengths: Iterable[int], max_new_tokens: int) -> Plan:
        """Plan prompts of these lengths (tokens), each by the policy that it would run with."""
        lengths = [index(length) for length in prompt_lengths]
        new = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
        if not lengths:
            raise RequestError("no prompt lengths are given; give at least one")
        for i, length in enumerate(lengths):
            self.config.check_length(length, new, f"prompt {i}")
        requests = [(self.policy_for(length, new), length, new) for length in lengths]
        return Plan(requests, self.config.num_hidden_layers, self.bytes_per_token)
