"""What one sequence will need of the cache, known before anything is computed.

The cache is allotted from it, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError
from minipyramid.policy import FULL, Policy, check_share

VOTE_BYTES = 4  # of one pending token in one layer


@dataclass(frozen=True)
class Need:
    """What a row of the cache has to have room for."""

    slots: tuple[int, ...]  # [layer] tokens held at most
    pending: int = 0  # generated tokens that wait for a compaction, at most
    group: int = 0  # how many of them a compaction is of; 0 where none waits

    def bytes(self, per_token: int) -> int:
        """Keys, values and votes; `per_token` is the bytes of one token in one layer."""
        return per_token * sum(self.slots) + VOTE_BYTES * self.pending * len(self.slots)

    def plus(self, held: Sequence[int]) -> "Need":
        """Room for so many further tokens in each layer."""
        return Need(tuple(map(add, self.slots, held)), self.pending, self.group)


def need_of(policy: Policy, prompt_tokens: int, new_tokens: int, layers: int) -> Need:
    """What one sequence needs at its longest."""
    prompt, generation = policy.held(prompt_tokens, layers), policy.generation(prompt_tokens, layers)
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
    return Need(tuple(slots), pending, group if pending else 0)


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
