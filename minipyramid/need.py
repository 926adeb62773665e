"""What one sequence will need of the cache, known before anything is computed.

The cache is allotted from it, once. With nothing pruned each layer gets prompt plus new tokens.
"""

from dataclasses import dataclass

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError
from minipyramid.policy import FULL, Policy, check_share

VOTE_BYTES = 4  # of one pending token in one layer


@dataclass(frozen=True)
class Need:
    """What a row of the cache has to have room for."""

    slots: tuple[int, ...]  # [layer] tokens held at most
    pending: int = 0  # generated tokens that wait for a compaction, at most
    group: int = 0  # tokens of one compaction; 0 where none waits

    def bytes(self, bytes_per_token: int) -> int:
        """Keys, values and votes; `bytes_per_token` is the bytes of one token in one layer."""
        return bytes_per_token * sum(self.slots) + VOTE_BYTES * self.pending * len(self.slots)

    def plus(self, held: list[int]) -> "Need":
        """Room for so many further tokens in each layer."""
        slots = tuple(a + b for a, b in zip(self.slots, held, strict=True))
        return Need(slots, self.pending, self.group)


def need_of(policy: Policy, prompt_tokens: int, new_tokens: int, layers: int) -> Need:
    """What one sequence needs at its longest."""
    slots = policy.kv_lengths(prompt_tokens, new_tokens, layers)
    generation = policy.generation(prompt_tokens, layers)
    if generation is None:
        return Need(tuple(slots))
    group, done = generation.group, generation.compactions(new_tokens)
    pending = new_tokens - done * group
    if done:  # just before its last compaction a layer may hold more: what it held a token ago, and one more
        last = generation.compacts_at(done - 1, new_tokens)
        before = policy.kv_lengths(prompt_tokens, last - 1, layers)
        slots = [max(at_end, n + 1) for at_end, n in zip(slots, before, strict=True)]
        pending = max(pending, last - (done - 1) * group)
    return Need(tuple(slots), pending, group if pending else 0)


@dataclass(frozen=True)
class Planner:
    """Which policy each request of a model runs by: the given one, or what a budget makes of it."""

    config: ModelConfig
    policy: Policy
    kv_budget: float | None  # share of the full cache that a request may hold at its end
    bytes_per_token: int  # of one token in one layer

    def __post_init__(self) -> None:
        self.policy.check_model(self.config)
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
