"""From logits to the next token, each sequence by its own parameters and its own random generator.

Every row is treated by itself, so a text depends on its seed and never on what else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minipyramid.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued. The order is that of the field: penalty, temperature, top_k, top_p, min_p.

    Attributes:
        max_new_tokens: generate at most so many.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: draw from the k likeliest; 0 from all.
        top_p: draw from the likeliest tokens that together reach this probability.
        min_p: draw from tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 1 makes tokens of the prompt and the text so far less likely (Keskar et al., 2019).
        stop: texts that end the generation, themselves left out.
        seed: the same seed gives the same text; None draws one.
        ignore_eos: go on behind the end-of-text token, to a fixed length.
        logprobs: report the log-probability of each generated token, before penalty and temperature.

    Raises:
        RequestError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] | list[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in RANGES:
                kind, lowest, highest, expected = RANGES[field.name]
                _check_type(field.name, value, kind)
                if not lowest <= value <= highest:
                    raise RequestError(f"{field.name} is {value}, expected {expected}")
            elif field.name in ("ignore_eos", "logprobs"):
                _check_type(field.name, value, bool)
        if self.seed is not None:
            _check_type("seed", self.seed, int)
            if not 0 <= self.seed < 2**63:
                raise RequestError(f"seed is {self.seed}, expected 0 to 2**63 - 1")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) for s in stop):
            raise TypeError(f"stop is {self.stop!r}, expected a text or a list of texts")
        if "" in stop:
            raise RequestError("stop holds an empty text, which would end every generation at once; leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple, also where it was given as one text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_TINY = math.ulp(0.0)
_MOST = 1e30
# field: type, lowest, highest, in words
RANGES: dict[str, tuple[type, float, float, str]] = {
    "max_new_tokens": (int, 1, _MOST, "at least 1"),
    "temperature": (float, 0, _MOST, "0 (greedy) or a positive number"),
    "top_k": (int, 0, _MOST, "0 (off) or more"),
    "top_p": (float, _TINY, 1, "above 0 and at most 1"),
    "min_p": (float, 0, 1, "0 to 1"),
    "repetition_penalty": (float, _TINY, _MOST, "a positive number"),
}


def _check_type(name: str, value: Any, kind: type) -> None:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r}, expected {'a number' if kind is float else kind.__name__}")


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator:
    """A sequence's own source of random numbers, from its seed or a fresh one."""
    generator = torch.Generator(device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator, seen: Tensor | None) -> Tensor:
    """The next token of one sequence.  [vocab_size] float32 -> [] int64, left on its device

    Args:
        seen: marks the ids that the repetition penalty makes less likely, [vocab_size] bool.
    """
    if seen is not None:
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        return logits.argmax()
    # Shifted, and the temperature kept from rounding to 0, so that neither end overflows to a NaN.
    probs = ((logits - logits.max()) / max(params.temperature, 1e-30)).softmax(-1)  # [vocab_size]
    probs = _keep(probs, params)
    # The largest of p / e, e drawn from an exponential, is a draw from p: no sync, unlike torch.multinomial.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax()


def _keep(probs: Tensor, params: SamplingParams) -> Tensor:
    """Set the tokens that top_k, top_p and min_p leave out to 0."""
    if 0 < params.top_k < len(probs):
        probs = torch.where(probs < probs.topk(params.top_k).values[-1], 0.0, probs)
        probs = probs / probs.sum()
    if params.top_p < 1:
        ordered, ids = probs.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= params.top_p  # what stands before a token already suffices
        probs = probs.index_fill(0, ids[beyond], 0.0) if bool(beyond.any()) else probs
    return torch.where(probs < params.min_p * probs.max(), 0.0, probs)
