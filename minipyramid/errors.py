"""What can go wrong, by whose part it is: the checkpoint, the tokenizer, a configuration, a request.

Every message is one sentence that names the thing, what was expected and, where there is one, the way out, so a
program can print it as it stands and a person can act on it. A value of the wrong Python type raises `TypeError`.
"""

import math


class MiniPyramidError(Exception):
    """Base of all errors that this package raises for its user's input."""


class CheckpointError(MiniPyramidError):
    """A checkpoint that is missing, unreachable, damaged or not what its configuration says."""


class TokenizerError(MiniPyramidError):
    """A tokenizer that is missing, unreadable or of another vocabulary than the model."""


class ConfigError(MiniPyramidError):
    """A configuration that the engine cannot run as it is meant."""


class RequestError(MiniPyramidError):
    """A prompt or a sampling parameter that cannot be served."""


class BudgetError(MiniPyramidError):
    """A share of the full cache that no schedule can come down to; `smallest` is one that can."""

    def __init__(self, share: float, smallest: float, prompt_tokens: int, new_tokens: int, layers: int) -> None:
        # Rounded up, for what the message offers must be taken.
        self.smallest = math.ceil(smallest * 1e4) / 1e4
        super().__init__(
            f"a budget of {share} cannot be held with {prompt_tokens} + {new_tokens} tokens in {layers} layers; "
            f"the smallest that can is {self.smallest:.4f}"
        )
