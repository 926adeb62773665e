"""A control: as many tokens in each layer as one policy holds there, chosen by another.

It tells what the spread over the layers does, and what the choice. Every layer computes the whole prompt.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, expect_type
from minipyramid.policy import Generation, Policy, Seen


@dataclass(frozen=True)
class Split(Policy):
    """`like` says how many of each layer, `choice` which. `ConfigError` where `choice` cannot say it."""

    like: Policy
    choice: Policy

    def __post_init__(self) -> None:
        for name, policy in (("like", self.like), ("choice", self.choice)):
            expect_type(name, policy, Policy, "a policy")
        if type(self.choice).hold is Policy.hold:
            raise ConfigError(
                f"{type(self.choice).__name__} does not choose what is held, so it cannot be told how many; "
                "take a policy that has `hold`, as snapkv"
            )

    def check_model(self, config: ModelConfig) -> None:
        """Both are to be for it."""
        for policy in (self.like, self.choice):
            policy.check_model(config)

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """As many as `like` holds."""
        return self.like.held(prompt_tokens, layers)

    def hold(self, seen: Seen, count: int) -> Tensor:
        """Those that `choice` would hold."""
        return self.choice.hold(seen, count)

    def generation(self, prompt_tokens: int, layers: int) -> Generation | None:
        """As of `like`."""
        return self.like.generation(prompt_tokens, layers)

    def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> "Split":
        """The budget is that of `like`."""
        return replace(self, like=self.like.within(share, prompt_tokens, new_tokens, layers))
