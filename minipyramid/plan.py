"""How many tokens each layer will hold of each sequence, and their bytes, before anything is computed.

The cache is allotted from a plan, once. With nothing pruned it is flat: prompt plus new tokens everywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add, index
from pathlib import Path

import torch

from minipyramid.budget import check_share, solve
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, RequestError
from minipyramid.pyramid import PyramidConfig
from minipyramid.sampling import SamplingParams

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


def need(pyramid: PyramidConfig | None, prompt_tokens: int, new_tokens: int, layers: int) -> "Need":
    """Of one sequence."""
    if pyramid is None:
        return Need((prompt_tokens + new_tokens,) * layers)
    peaks, unjudged = pyramid.peaks(prompt_tokens, new_tokens, layers)
    return Need(tuple(peaks), unjudged)


@dataclass(frozen=True)
class Policy:
    """How much is kept: by fixed settings (None: everything), or by those that a budget makes of them.

    Raises:
        ConfigError: there is a budget and nothing to prune by, or it is no share.
    """

    pyramid: PyramidConfig | None
    kv_budget: float | None = None

    def __post_init__(self) -> None:
        if self.kv_budget is not None and self.pyramid is None:
            raise ConfigError(f"kv_budget is {self.kv_budget}, but the pyramid is off; leave one of them out")
        if self.kv_budget is not None:
            check_share(self.kv_budget)

    def settings(self, prompt_tokens: int, new_tokens: int, layers: int) -> PyramidConfig | None:
        """Those of one request; raises `BudgetError`."""
        if self.pyramid is None or self.kv_budget is None:
            return self.pyramid
        return solve(self.pyramid, self.kv_budget, prompt_tokens, new_tokens, layers)


@dataclass(frozen=True)
class Plan:
    """What sequences hold, if all of them run to their last token."""

    requests: list[tuple[PyramidConfig | None, int, int]]  # settings, prompt tokens and new tokens of each
    layers: int
    bytes_per_token: int  # of one token in one layer

    def at(self, generated: int) -> list[list[int]]:
        """Tokens that each layer holds of each sequence after so many generated tokens.  [sequence][layer]"""
        cut = [(pyramid, prompt, max(0, min(generated, new))) for pyramid, prompt, new in self.requests]
        return [c.kv_lengths(p, n, self.layers) if c else [p + n] * self.layers for c, p, n in cut]

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
        return [need(*request, self.layers) for request in self.requests]

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
        return max(0, memory) // max(need.bytes(self.bytes_per_token) for need in self.needs)


def make_plan(
    config: ModelConfig, policy: Policy, prompt_lengths: Iterable[int], max_new_tokens: int, dtype: torch.dtype
) -> Plan:
    """Plan prompts of these lengths (tokens), each by the settings that it would run with."""
    lengths, layers = [index(length) for length in prompt_lengths], config.num_hidden_layers
    new = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
    if not lengths:
        raise RequestError("no prompt lengths are given; give at least one")
    for i, length in enumerate(lengths):
        config.check_length(length, new, f"prompt {i}")
    requests = [(policy.settings(length, new, layers), length, new) for length in lengths]
    return Plan(requests, layers, config.kv_bytes_per_token(dtype.itemsize))


def pick_pyramid(pyramid: str | Path | PyramidConfig, directory: Path, layers: int) -> PyramidConfig | None:
    """The settings that a name, a file or a configuration stands for; None for `off`."""
    if isinstance(pyramid, PyramidConfig):
        return pyramid
    if not isinstance(pyramid, (str, Path)):
        raise TypeError(f"pyramid is {pyramid!r}, expected off, auto, a preset's name, a path or a PyramidConfig")
    if pyramid == "off":
        return None
    if pyramid == "auto":
        beside = directory / "pyramid.json"
        there = beside.exists() or beside.is_symlink()  # one that leads nowhere is an error and not absent
        return PyramidConfig.load(beside) if there else PyramidConfig.for_layers(layers)
    if isinstance(pyramid, Path) or pyramid.endswith(".json"):
        return PyramidConfig.load(pyramid)
    return PyramidConfig.preset(pyramid)
