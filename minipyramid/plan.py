"""How many tokens each layer will hold of requests, and their bytes, before anything is computed."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

from minipyramid.errors import RequestError
from minipyramid.need import VOTE_BYTES, Need, Planner, need_of
from minipyramid.policy import Policy
from minipyramid.sampling import SamplingParams


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
        return max(0, index(memory)) // max(need.bytes(self.bytes_per_token) for need in self.needs)

    @classmethod
    def of(cls, planner: Planner, prompt_lengths: Iterable[int], max_new_tokens: int) -> "Plan":
        """Plan prompts of these lengths (tokens), each by the policy that it would run with."""
        lengths = [index(length) for length in prompt_lengths]
        new = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
        if not lengths:
            raise RequestError("no prompt lengths are given; give at least one")
        for i, length in enumerate(lengths):
            planner.config.check_length(length, new, f"prompt {i}")
        requests = [(planner.policy_for(length, new), length, new) for length in lengths]
        return cls(requests, planner.config.num_hidden_layers, planner.bytes_per_token)
