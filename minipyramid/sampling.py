"""What a caller may ask of a continuation, and the way from logits to the next token.

Sequences of equal parameters are treated together, but each has its own random generator, and nothing is
computed across rows. So a text depends on its seed and not on what else is in the batch, up to the rounding
of the model's products, which in bf16 can show in a draw.
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


# A sequence's parameters, its generator, and the ids that the penalty makes less likely, [vocab_size] bool.
Choice = tuple[SamplingParams, torch.Generator, Tensor | None]


def choose(logits: Tensor, choices: list[Choice]) -> Tensor:
    """The next token of every sequence.  [B, vocab_size] float32 -> [B] int64, left on the device"""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, (p, _, _) in enumerate(choices):
        filters = (p.temperature, p.top_k, p.top_p, p.min_p) if p.temperature else ()
        groups.setdefault((p.repetition_penalty, *filters), []).append(i)
    chosen = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    for rows in groups.values():
        alike = logits if len(groups) == 1 else logits[rows]
        chosen[rows] = _choose_alike(alike, [choices[i] for i in rows])
    return chosen


def _choose_alike(logits: Tensor, choices: list[Choice]) -> Tensor:
    """The same for sequences of equal parameters."""
    params = choices[0][0]
    if params.repetition_penalty != 1:
        seen = torch.stack([ids for _, _, ids in choices if ids is not None])  # [B, vocab_size]
        penalty = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        return logits.argmax(-1)
    # The largest logit becomes 0 and the temperature stays above 0, so that nothing overflows to a NaN.
    shifted = logits - logits.amax(-1, keepdim=True)
    probs = shifted.div_(max(params.temperature, 1e-30)).softmax(-1)  # [B, vocab_size]
    if params.top_k or params.top_p < 1 or params.min_p:
        from minipyramid.filters import keep_likely

        probs = keep_likely(probs, params)
    # The largest of p / e, with e from an exponential, is a draw from p. Unlike multinomial it needs no sync.
    for row, (_, generator, _) in zip(probs, choices, strict=True):
        row.div_(torch.empty_like(row).exponential_(generator=generator))
    return probs.argmax(-1)
