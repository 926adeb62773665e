"""How many tokens each layer will hold of each sequence, and their bytes, before anything is computed.

The cache is allotted from a plan, once. With nothing pruned the plan is flat: prompt plus new tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipyramid.config import ModelConfig


@dataclass(frozen=True)
class Plan:
    """Lengths at the end of generation, for sequences that all run to their last token."""

    kv_lengths: list[list[int]]  # [sequence][layer]
    kv_bytes: int  # held keys and values of all sequences; shorter rows of a slab leave slots unused
    kv_bytes_full: int  # the same if nothing were pruned

    @property
    def kv_share(self) -> float:
        """Bytes held over the bytes of the full cache."""
        return self.kv_bytes / self.kv_bytes_full

    @property
    def slots(self) -> list[int]:
        """Slots per layer that hold the longest sequence."""
        return [max(lengths) for lengths in zip(*self.kv_lengths, strict=True)]

    def max_batch(self, memory: int) -> int:
        """How many sequences like the largest of these fit into `memory` bytes."""
        per_token = self.kv_bytes // sum(map(sum, self.kv_lengths))
        return memory // (per_token * max(map(sum, self.kv_lengths)))


def make_plan(config: ModelConfig, prompt_lengths: Sequence[int], new_tokens: Sequence[int], itemsize: int) -> Plan:
    """Plan a batch; `itemsize` is the bytes of one number of the cache."""
    totals = [prompt + new for prompt, new in zip(prompt_lengths, new_tokens, strict=True)]
    lengths = [[total] * config.num_hidden_layers for total in totals]
    per_token = config.kv_bytes_per_token(itemsize)
    full = per_token * config.num_hidden_layers * sum(totals)
    return Plan(lengths, per_token * sum(map(sum, lengths)), full)
