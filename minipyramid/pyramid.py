"""PyramidInfer: which tokens the layers hold, and why (Yang et al., Findings of ACL 2024, arXiv 2405.12532).

Two findings carry the method. Inference context redundancy: how many keys and values the next tokens need
falls with depth. Recent attention consistency: the newest tokens agree on which context matters, so they can
vote for the tokens to come. What they vote for is the *pivotal context*. A token that is dropped after a
layer is dropped from the hidden states, so no deeper layer computes anything of it: a prompt gets cheaper to
compute as well as to hold. What a layer computes and what it holds are one list here.

Of a prompt of N tokens the newest 1 + R are the recent tokens, R = int(N * recent_ratio). They are protected
and vote. A layer that received n tokens has c = n - 1 - R of context, and the next layer receives the recent
tokens and the k = int(c * s) highest-voted of the context:

    vote[j] = mean over voters q of  w[q] * mean over heads h of A[h, q, j]
    w       = from 1 (oldest voter) to distance_weight (newest)
    s(i)    = p + (1 - p) * (1 + cos(pi * i / L)) / 2         cosine, from 1 towards p

with A the attention probabilities, j a token of the context, i the layer of L, and p the decay ratio. A
layer's ratio is of what the layer before it left. A layer that would keep `min_context_length` or less drops
nothing, only every `layerwise_downsample_interval`-th layer drops, and the first tokens (sinks, counted in k)
win against every vote.

Generated tokens pass all layers. Once `exceed_length_to_compress` of them are older than the recent tokens,
these vote on them, and each layer drops its own (`Generation` in policy.py). The prompt is not voted on
again.

A published file nests the fields under `prefill_stage` and `generation_stage`, beside `model` and `size`; a
flat one is read as well. A misspelt strategy is refused: the published code ran it as `constant`, without a
word.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minipyramid.errors import ConfigError, check_fields, expect_type, nearest, number
from minipyramid.policy import Generation, Policy, Seen, top_scored

STRATEGIES: dict[str, Callable[[float, int, int], float]] = {
    # (lowest ratio p, layer i, L) -> s(i), the ratio of the context that the next layer receives
    "cosine": lambda p, i, L: p + (1 - p) * (1 + math.cos(math.pi * i / L)) / 2,
    "linear": lambda p, i, L: 1 - (1 - p) * i / L,
    "constant": lambda p, i, L: p,
}


@dataclass(frozen=True)
class PyramidConfig(Policy):
    """The settings of PyramidInfer. The defaults are those published for 7B and 8B models.

    Attributes:
        recent_ratio: share of the tokens so far (in a conversation: of this turn's) that is recent.
        prefill_decay_ratio: the lowest ratio of the prompt's schedule.
        prefill_decay_strategy: cosine, linear or constant.
        min_context_length: a layer's context is never cut to this or below.
        layerwise_downsample_interval: drop after every so many layers.
        streamingllm_sink_len: first tokens of a prompt that always stay.
        distance_weight: weight of the newest voter, the oldest one's being 1.
        gen_decay_ratio, gen_decay_strategy: the schedule of generated tokens.
        exceed_length_to_compress: generated tokens that are voted on together.
        gen_compress_ratio: share of them that stays where the schedule is 1.

    Of our own, and by default without effect (docs/settings.md tells what it gives):
        prefill_full_layers: so many first layers hold the whole prompt; voting starts after the last of them.

    Raises:
        ConfigError: a strategy is not known, or a value is out of range.
        TypeError: a value has the wrong type.
    """

    recent_ratio: float = number(0.2, 0, 1)
    prefill_decay_ratio: float = number(0.9, 0, 1)
    prefill_decay_strategy: str = "cosine"
    min_context_length: int = number(64, 0, 10**9)
    layerwise_downsample_interval: int = number(1, 1, 10**9)
    streamingllm_sink_len: int = number(4, 0, 10**9)
    distance_weight: float = number(1.2, 1e-3, 1e3)
    gen_decay_ratio: float = number(0.1, 0, 1)
    gen_decay_strategy: str = "cosine"
    exceed_length_to_compress: int = number(16, 1, 10**9)
    gen_compress_ratio: float = number(0.9, 0, 1)
    prefill_full_layers: int = number(1, 1, 10**9)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("prefill_decay_strategy", "gen_decay_strategy"):
            strategy = getattr(self, name)
            expect_type(name, strategy, str, "str")
            if strategy not in STRATEGIES:
                raise ConfigError(f"{name} is {strategy!r}; {nearest(strategy, STRATEGIES)}")

    # --- how many ---

    def recent_tokens(self, tokens: int) -> int:
        """1 + R: so many of the newest are protected and vote."""
        return 1 + int(tokens * self.recent_ratio)

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """n(i + 1) = 1 + R + int((n(i) - 1 - R) * s(i)), unless layer i drops nothing."""
        recent = self.recent_tokens(prompt_tokens)
        schedule = STRATEGIES[self.prefill_decay_strategy]
        lengths, n = [], prompt_tokens
        for i in range(layers):
            lengths.append(n)
            ratio = schedule(self.prefill_decay_ratio, i, layers)
            drops = i + 1 >= self.prefill_full_layers and i % self.layerwise_downsample_interval == 0
            kept = int((n - recent) * ratio)
            if drops and kept > self.min_context_length:
                n = recent + kept
        return lengths

    def generation(self, prompt_tokens: int, layers: int) -> Generation:
        """Of each E = `exceed_length_to_compress`, max(1, int(E * gen_compress_ratio * s_gen(i))) stay."""
        schedule, group = STRATEGIES[self.gen_decay_strategy], self.exceed_length_to_compress
        ratios = [schedule(self.gen_decay_ratio, i, layers) for i in range(layers)]
        stay = tuple(max(1, int(group * self.gen_compress_ratio * ratio)) for ratio in ratios)
        return Generation(prompt_tokens, self.recent_ratio, group, stay, self.distance_weight)

    # --- which ---

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """The recent tokens, the sinks, and the highest-voted of the context.  [count]"""
        recent = self.recent_tokens(seen.prompt_tokens)
        weights = torch.linspace(1.0, self.distance_weight, recent, device=seen.q.device)
        vote = seen.votes(recent, weights).mean((0, 1)) / recent  # [T - recent]
        score = torch.cat((vote, vote.new_zeros(recent)))
        return top_scored(score, count, self.streamingllm_sink_len, recent)

    # --- where settings come from ---

    @classmethod
    def preset(cls, name: str) -> "PyramidConfig":
        """Published settings by the model they were published for; `ConfigError` for another name."""
        from minipyramid.presets import PRESETS

        expect_type("name", name, str, "a preset's name")
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
        return cls(**PRESETS[name][1])

    @classmethod
    def for_layers(cls, layers: int) -> "PyramidConfig":
        """The preset of the published model whose number of layers is nearest."""
        from minipyramid.presets import PRESETS

        return cls.preset(min(PRESETS, key=lambda name: abs(PRESETS[name][0] - layers)))

    @classmethod
    def load(cls, path: str | Path) -> "PyramidConfig":
        """Read a published file, or a flat one. Raises `CheckpointError` or `ConfigError`."""
        from minipyramid.policies import load_policy

        loaded = load_policy(Path(path))
        if not isinstance(loaded, cls):
            raise ConfigError(f"{path} has the settings of another policy; expected PyramidInfer's")
        return loaded

    @classmethod
    def for_budget(cls, share: float, *, prompt_tokens: int, new_tokens: int, layers: int) -> "PyramidConfig":
        """Settings that hold at most `share` of the full cache at the end of generation, as close as
        possible.

        They are solved from the preset nearest in depth (`minipyramid/budget.py` says what is given up
        first). The share is of layers * (prompt_tokens + new_tokens).

        Raises:
            BudgetError: with the smallest share that can be reached.
            ConfigError: the share is not above 0 and at most 1.
        """
        return cls.for_layers(layers).within(share, prompt_tokens, new_tokens, layers)

    def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> "PyramidConfig":
        """The same, solved from these settings."""
        from minipyramid.budget import solve

        solved: PyramidConfig = solve(self, share, prompt_tokens, new_tokens, layers)
        return solved
