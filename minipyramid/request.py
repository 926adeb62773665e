"""A request on its way from a prompt to a completion, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError
from minipyramid.sampling import SamplingParams
from minipyramid.tokenizer import TextStream

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]


@dataclass(frozen=True)
class Completion:
    """What became of one prompt. Text and ids are without the prompt; the ids end with the one that ended the text."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "stop": end of text or a stop string; "length": max_new_tokens
    logprobs: list[float] | None  # nats, of each generated token, where asked for
    kept_positions: list[list[int]]  # [layer][slot] positions held at the end
    kv_lengths: list[int]  # per layer, tokens held at the end
    kv_bytes: int  # of keys and values held at the end
    kv_bytes_full: int  # what the full cache would hold
    prefill_s: float  # seconds until the prompts of its batch were computed
    decode_s: float  # seconds from there to its end


@dataclass(frozen=True)
class Prefill:
    """What a prompt leaves behind: the scores of the next token, and what each layer kept."""

    logits: Tensor  # [vocab_size] float32
    kept_positions: list[list[int]]  # [layer][slot]
    kv_lengths: list[int]  # [layer]


@dataclass
class Sequence:
    """A prompt that is being continued."""

    index: int  # place among the prompts of its call
    prompt: list[int]
    params: SamplingParams
    eos_ids: tuple[int, ...]
    stream: TextStream
    generator: torch.Generator
    seen: Tensor | None  # [vocab_size] bool, ids that the repetition penalty makes less likely
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    completion: Completion | None = None

    def accept(self, token: int) -> str:
        """Take the next token; returns the text that became certain with it."""
        self.token_ids.append(token)
        if self.seen is not None:
            self.seen[token] = True
        piece = self.stream.push(token)
        if token in self.eos_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self.stream.finish()
        if self.stream.stopped:
            self.finish_reason = "stop"
        self.text += piece
        return piece


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several; a list of ids is one."""
    if not isinstance(prompts, (str, list)):
        raise TypeError(f"prompts is a {type(prompts).__name__}, expected a text, a list of texts or of token id lists")
    one = isinstance(prompts, str) or (prompts and all(isinstance(p, int) for p in prompts))
    return [prompts] if one else list(prompts)


def check_ids(ids: Any, name: str, config: ModelConfig) -> list[int]:
    """Token ids as they were given, if they are ids of this vocabulary."""
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{name} is {ids!r:.60}, expected a text or a list of token ids")
    wrong = [i for i in ids if not 0 <= i < config.vocab_size]
    if wrong:
        raise RequestError(f"{name} holds the token id {wrong[0]}, expected 0 to {config.vocab_size - 1}")
    return list(ids)  # a caller may go on changing theirs


def check_length(prompt: int, new: int, name: str, config: ModelConfig) -> None:
    """Refuse what is empty or would run past the positions that the model was trained for."""
    if prompt < 1:
        raise RequestError(f"{name} has {prompt} tokens, expected at least 1")
    context = config.max_position_embeddings
    if prompt + new > context:
        over = f"{name} has {prompt} tokens, which with {new} new ones is more than the context of {context}"
        ways = [f"shorten it by {prompt + new - context}"]
        ways += [f"ask for at most {context - prompt} new tokens"] if prompt < context else []
        raise RequestError(f"{over}; {' or '.join(ways)}")
