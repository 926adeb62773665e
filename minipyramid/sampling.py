"""What a caller may ask of a continuation, and the way from logits to the next token.

Each sequence has its own parameters and its own random generator and is treated by itself. So a text depends
on its seed and never on what else is in the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.errors import RequestError, check_fields, expect_type, number


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued. Applied in this order: repetition_penalty, temperature, top_k, top_p, min_p.

    Attributes:
        max_new_tokens: generate at most this many.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: draw from the k likeliest (and those that tie with the last); 0 from all.
        top_p: draw from the likeliest tokens that together reach this probability.
        min_p: draw from tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 1 makes tokens of the prompt and the text so far less likely (Keskar et al.,
            2019).
        stop: texts that end the generation and are left out of it; kept as a tuple.
        seed: the same seed gives the same text; None draws one.
        ignore_eos: go on past the end-of-text token, to a fixed length.
        logprobs: report the log-probability of each generated token, before penalty and temperature.

    Raises:
        RequestError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    max_new_tokens: int = number(64, 1, 10**9)
    temperature: float = number(0.0, 0, 1e30)
    top_k: int = number(0, 0, 10**9)
    top_p: float = number(1.0, math.ulp(0.0), 1)
    min_p: float = number(0.0, 0, 1)
    repetition_penalty: float = number(1.0, 0.01, 100)
    stop: str | tuple[str, ...] | list[str] = ()
    seed: int | None = number(None, 0, 2**63 - 1, int)
    ignore_eos: bool = number(False, False, True)
    logprobs: bool = number(False, False, True)

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        expect_type("stop", stop, (list, tuple), "a text or a list of texts")
        for text in stop:
            expect_type("stop", text, str, "a text or a list of texts")
        if "" in stop:
            raise RequestError("stop holds an empty text, which would end every generation; leave it out")
        object.__setattr__(self, "stop", tuple(stop))


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator, seen: Tensor | None) -> Tensor:
    """The next token of one sequence.  [vocab_size] float32 -> [] int64, left on its device

    Args:
        seen: marks the ids that the repetition penalty makes less likely, [vocab_size] bool.
    """
    if seen is not None:
        penalty = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        return logits.argmax()
    # The largest logit becomes 0 and the temperature stays above 0, so that nothing overflows to a NaN.
    shifted = logits - logits.max()
    probs = (shifted / max(params.temperature, 1e-30)).softmax(-1)  # [vocab_size]
    probs = _filter(probs, params)
    # The largest of p / e, with e from an exponential, is a draw from p. Unlike multinomial it needs no sync.
    e = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / e).argmax()


def _filter(probs: Tensor, params: SamplingParams) -> Tensor:
    """Set the tokens that top_k, top_p and min_p leave out to 0.  [vocab_size]"""
    if 0 < params.top_k < len(probs):
        least = probs.topk(params.top_k).values[-1]
        probs = torch.where(probs < least, 0.0, probs)
        # top_p is a share of what top_k left.
        probs = probs / probs.sum()
    if params.top_p < 1:
        ordered, ids = probs.sort(descending=True)
        # The tokens before these suffice. The likeliest stays even if top_p rounds to 0.
        beyond = ordered.cumsum(-1) - ordered >= params.top_p
        beyond[0] = False
        probs = torch.zeros_like(probs).scatter(0, ids, ordered.masked_fill(beyond, 0.0))
    return torch.where(probs < params.min_p * probs.max(), 0.0, probs)
