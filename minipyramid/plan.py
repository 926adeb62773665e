"""How many tokens each layer will hold of each sequence, and their bytes, before anything is computed.

The cache is allotted from a plan, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from dataclasses import dataclass
from operator import add

from minipyramid.pyramid import PyramidConfig

VOTE_BYTES = 4  # of one waiting token in one layer


@dataclass(frozen=True)
class Need:
    """What a row of the cache has to have room for."""

    slots: tuple[int, ...]  # [layer] tokens held at most
    unjudged: int = 0  # generated tokens that wait for their judgement, at most

    def bytes(self, per_token: int) -> int:
        """Keys, values and votes; `per_token` is the bytes of one token in one layer."""
        return per_token * sum(self.slots) + VOTE_BYTES * self.unjudged * len(self.slots)

    def beside(self, held: list[int]) -> "Need":
        """Room for what former turns left as well."""
        return Need(tuple(map(add, self.slots, held)), self.unjudged)

    def join(self, other: "Need") -> "Need":
        """Room for either."""
        slots = tuple(max(pair) for pair in zip(self.slots, other.slots, strict=True))
        return Need(slots, max(self.unjudged, other.unjudged))


def need(pyramid: PyramidConfig | None, prompt_tokens: int, new_tokens: int, layers: int) -> "Need":
    """Of one sequence."""
    if pyramid is None:
        return Need((prompt_tokens + new_tokens,) * layers)
    peaks, unjudged = pyramid.peaks(prompt_tokens, new_tokens, layers)
    return Need(tuple(peaks), unjudged)


@dataclass(frozen=True)
class Plan:
    """What sequences hold, if all of them run to their last token."""

    prompt_lengths: list[int]
    new_tokens: list[int]
    pyramids: list[PyramidConfig | None]
    layers: int
    bytes_per_token: int  # of one token in one layer

    def at(self, generated: int) -> list[list[int]]:
        """Tokens that each layer holds of each sequence after so many generated tokens.  [sequence][layer]"""
        return [
            pyramid.kv_lengths(prompt, min(generated, new), self.layers)
            if pyramid
            else [prompt + min(generated, new)] * self.layers
            for pyramid, prompt, new in zip(self.pyramids, self.prompt_lengths, self.new_tokens, strict=True)
        ]

    @property
    def kv_lengths(self) -> list[list[int]]:
        """Tokens that each layer holds of each sequence at the end.  [sequence][layer]"""
        return self.at(max(self.new_tokens))

    @property
    def kv_bytes(self) -> int:
        """Keys and values that are held at the end."""
        return self.bytes_per_token * sum(map(sum, self.kv_lengths))

    @property
    def kv_bytes_full(self) -> int:
        """The same if nothing were pruned."""
        return self.bytes_per_token * self.layers * (sum(self.prompt_lengths) + sum(self.new_tokens))

    @property
    def kv_share(self) -> float:
        """Bytes held over the bytes of the full cache."""
        return self.kv_bytes / self.kv_bytes_full

    @property
    def needs(self) -> list[Need]:
        """What is allotted for each sequence."""
        each = zip(self.pyramids, self.prompt_lengths, self.new_tokens, strict=True)
        return [need(pyramid, prompt, new, self.layers) for pyramid, prompt, new in each]

    @property
    def votes_bytes(self) -> int:
        """The running votes of the generated tokens that wait for their judgement."""
        return VOTE_BYTES * self.layers * sum(need.unjudged for need in self.needs)

    @property
    def slack_bytes(self) -> int:
        """Allotted for a layer's longest moment, just before a compaction, and free at the end."""
        return sum(self.bytes_per_token * sum(need.slots) for need in self.needs) - self.kv_bytes

    def max_batch(self, memory: int) -> int:
        """How many sequences like the largest of these fit into `memory` bytes."""
        return memory // max(need.bytes(self.bytes_per_token) for need in self.needs)
