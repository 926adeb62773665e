"""What a user asks to keep, by a name, a file, settings or a share of memory, and what that means for a request."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from pathlib import Path

import torch

from minipyramid.budget import check_share, solve
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, RequestError
from minipyramid.plan import Plan
from minipyramid.pyramid import PyramidConfig
from minipyramid.request import check_length
from minipyramid.sampling import SamplingParams


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


def make_plan(
    config: ModelConfig, policy: Policy, prompt_lengths: Iterable[int], max_new_tokens: int, dtype: torch.dtype
) -> Plan:
    """Plan prompts of these lengths (tokens), each by the settings that it would run with."""
    lengths, layers = [index(length) for length in prompt_lengths], config.num_hidden_layers
    new = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
    if not lengths:
        raise RequestError("no prompt lengths are given; give at least one")
    for i, length in enumerate(lengths):
        check_length(length, new, f"prompt {i}", config)
    pyramids = [policy.settings(length, new, layers) for length in lengths]
    return Plan(lengths, [new] * len(lengths), pyramids, layers, config.kv_bytes_per_token(dtype.itemsize))


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
        return PyramidConfig.load(beside) if beside.exists() else PyramidConfig.for_layers(layers)
    if isinstance(pyramid, Path) or pyramid.endswith(".json"):
        return PyramidConfig.load(pyramid)
    return PyramidConfig.preset(pyramid)
