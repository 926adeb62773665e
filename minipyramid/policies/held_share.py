"""What most policies have in common: every layer computes the whole prompt and holds a share of it.

A policy of this kind prunes keys and values once a layer has computed them, and chooses anew in every layer.
It says which tokens; how many follows from its share, the same in every layer unless `spread` says otherwise.
All generated tokens stay, and a budget counts them.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from minipyramid.budget import most_tokens, refusal
from minipyramid.errors import ConfigError, check_fields, number
from minipyramid.policy import Policy

AnyShare = TypeVar("AnyShare", bound="HeldShare")


@dataclass(frozen=True)
class HeldShare(Policy):
    """Derive from it and write `hold`.

    Attributes:
        share: how much of a prompt is held, over all layers; each holds one token or more.
    """

    share: float = number(0.5, 0, 1)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """The share's tokens, over the layers as `spread` says."""
        total = int(self.share * prompt_tokens * layers * (1 + 1e-9))  # for 0.7 * 10 is a little below 7
        return self.spread(max(total, layers), prompt_tokens, layers)

    def spread(self, total: int, prompt_tokens: int, layers: int) -> list[int]:
        """How `total` tokens are spread over the layers: evenly."""
        return [total // layers + (1 if i < total % layers else 0) for i in range(layers)]

    def within(self: AnyShare, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> AnyShare:
        """What the generated tokens leave of the budget is held of the prompt."""
        most = int(most_tokens(share, prompt_tokens, new_tokens, layers))
        least = layers * (1 + new_tokens)
        if most < least:
            raise refusal(share, least, prompt_tokens, new_tokens, layers)
        return replace(self, share=min(1.0, (most - layers * new_tokens) / (layers * prompt_tokens)))
