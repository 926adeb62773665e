"""How many tokens each layer will hold of each sequence, and their bytes, before anything is computed.

The cache is allotted from a plan, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipyramid.config import ModelConfig
from minipyramid.pyramid import PyramidConfig


@dataclass(frozen=True)
class Plan:
    """Lengths at the end of generation, for sequences that all run to their last token."""

    kv_lengths: list[list[int]]  # [sequence][layer]
    kv_bytes: int  # held keys and values of all sequences; shorter rows of a slab leave slots unused
    kv_bytes_full: int  # the same if nothing were pruned
    slots: list[int]  # [layer] of the longest sequence, at its longest
    unjudged: int  # generated tokens that wait for their judgement, at most

    @property
    def kv_share(self) -> float:
        """Bytes held over the bytes of the full cache."""
        return self.kv_bytes / self.kv_bytes_full

    def max_batch(self, memory: int) -> int:
        """How many sequences like the largest of these fit into `memory` bytes."""
        per_token = self.kv_bytes // sum(map(sum, self.kv_lengths))
        return memory // (per_token * max(map(sum, self.kv_lengths)))


def make_plan(
    config: ModelConfig,
    pyramid: PyramidConfig | None,
    prompt_lengths: Sequence[int],
    new_tokens: Sequence[int],
    itemsize: int,
) -> Plan:
    """Plan a batch; `itemsize` is the bytes of one number of the cache."""
    layers, per_token = config.num_hidden_layers, config.kv_bytes_per_token(itemsize)
    pairs = list(zip(prompt_lengths, new_tokens, strict=True))
    full = per_token * layers * sum(prompt + new for prompt, new in pairs)
    if pyramid is None:
        lengths = peaks = [[prompt + new] * layers for prompt, new in pairs]
        unjudged = 0
    else:
        futures = [pyramid.future(prompt, new, layers) for prompt, new in pairs]
        lengths, peaks = [future.lengths for future in futures], [future.peaks for future in futures]
        unjudged = max(future.unjudged for future in futures)
    slots = [max(peak) for peak in zip(*peaks, strict=True)]
    return Plan(lengths, per_token * sum(map(sum, lengths)), full, slots, unjudged)
