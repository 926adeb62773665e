"""The settings of PyramidInfer: the published ones by their names, with their presets and files, and four of our own.

A published file nests the fields under `prefill_stage` and `generation_stage`, beside `model` and `size`; a flat one
is read as well. A name that is not known, a strategy misspelt or a value out of range is refused: the published code
ran a misspelt strategy as `constant`, without a word.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from minipyramid.config import read_json
from minipyramid.errors import ConfigError, check_number, number

# What differs from the defaults, and the layers of the model that it was published for.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama2-7b": (32, {}),
    "llama2-13b": (40, {"prefill_decay_ratio": 0.8, "layerwise_downsample_interval": 2}),
    "llama2-70b": (80, {"layerwise_downsample_interval": 3}),
    "llama3-8b": (32, {}),
    "llama3-70b": (80, {"layerwise_downsample_interval": 3}),
}
STRATEGY_NAMES = ("cosine", "linear", "constant")
Settings = TypeVar("Settings", bound="PublishedSettings")


@dataclass(frozen=True)
class PublishedSettings:
    """How much is kept and by whose votes. The defaults are those published for 7B and 8B models.

    Attributes:
        recent_ratio: share of the tokens so far (in a conversation: of this turn's) that is protected and votes.
        prefill_decay_ratio: the lowest ratio of the prompt's schedule.
        prefill_decay_strategy: cosine, linear or constant.
        min_context_length: a layer's context is never cut to this or below.
        layerwise_downsample_interval: prune after every so many layers.
        streamingllm_sink_len: first tokens of a prompt that always stay.
        distance_weight: weight of the newest voter, the oldest one's being 1.
        gen_decay_ratio, gen_decay_strategy: the schedule of generated tokens.
        exceed_length_to_compress: generated tokens that are judged together.
        gen_compress_ratio: share of them that stays where the schedule is 1, in the first layer.

    Of our own, and by default without effect (docs/settings.md tells what they give):
        prefill_max_over_heads: a token's vote is the highest of the query heads' and not their mean.
        prefill_vote_neighbours: a token's vote is the mean of its own and those of so many tokens on either side.
        prefill_full_layers: so many layers, the first ones, hold the whole prompt; behind the last of them votes begin.
        prefill_full_ratio: below 1, all of these but the first hold, beside the tail, only this share of the context,
            the sinks and its newest tokens (not if that would leave `min_context_length` or less).

    Raises:
        ConfigError: a strategy is not known, a value out of range, or a ratio given for full layers that there are not.
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
    prefill_max_over_heads: bool = number(False, False, True)
    prefill_vote_neighbours: int = number(0, 0, 10**4)
    prefill_full_layers: int = number(1, 1, 10**9)
    prefill_full_ratio: float = number(1.0, 0, 1)

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if "limits" in field.metadata:
                check_number(field.name, value, field.metadata["limits"], ConfigError, TypeError)
            elif not isinstance(value, str):
                raise TypeError(f"{field.name} is {value!r}, expected str")
            elif value not in STRATEGY_NAMES:
                raise ConfigError(f"{field.name} is {value!r}; {nearest(value, STRATEGY_NAMES)}")
        if self.prefill_full_ratio < 1 and self.prefill_full_layers == 1:
            raise ConfigError(f"prefill_full_ratio is {self.prefill_full_ratio}, but prefill_full_layers 1; raise that")

    @classmethod
    def preset(cls: type[Settings], name: str) -> Settings:
        """Published settings by the model they were published for; `ConfigError` for another name."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
        return cls(**PRESETS[name][1])

    @classmethod
    def for_layers(cls: type[Settings], layers: int) -> Settings:
        """The preset of the published model whose number of layers is nearest."""
        return cls.preset(min(PRESETS, key=lambda name: abs(PRESETS[name][0] - layers)))

    @classmethod
    def load(cls: type[Settings], path: str | Path) -> Settings:
        """Read a published file, or a flat one. Raises `CheckpointError`, `ConfigError` or `TypeError`."""
        flat = {name: value for name, value in read_json(Path(path)).items() if name not in ("model", "size")}
        stages = {stage: flat.pop(stage, {}) for stage in ("prefill_stage", "generation_stage")}
        for stage, part in stages.items():
            if not isinstance(part, dict):
                raise ConfigError(f"{path}: {stage} is {part!r:.60}, expected an object")
            flat |= part
        known = [field.name for field in fields(cls)]
        for name in flat:
            if name not in known:
                raise ConfigError(f"{path}: {name!r:.60} is no setting; {nearest(name, [*known, *stages])}")
        try:
            return cls(**flat)
        except (ConfigError, TypeError) as error:  # of a file, a wrong type is no mistake of the caller's
            raise ConfigError(f"{path}: {error}") from error


def nearest(name: str, valid: Collection[str]) -> str:
    """What was probably meant, and otherwise all that could be."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(valid)}"
