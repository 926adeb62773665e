"""A request on its way from a prompt to a completion."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minipyramid.cache import HeldTokens, KVCache, Positions, Row
from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError, expect_type
from minipyramid.need import Need
from minipyramid.policy import PendingTokens, Policy
from minipyramid.sampling import SamplingParams
from minipyramid.tokenizer import TextStream

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]
Params = SamplingParams | list[SamplingParams] | None  # for all prompts, or one for each


@dataclass(eq=False)
class Conversation:
    """What earlier turns have left. Pass the same one to every turn: it is updated when a turn ends.

    A turn that is cut short leaves it as it was. A turn's prompt is pruned among its own tokens, and sees
    what is held of earlier turns, of which nothing more is dropped. What is held is copied into the cache
    that the turn is allotted, and counts as in flight meanwhile.
    """

    held: HeldTokens | None = None
    token_ids: list[int] = field(default_factory=list)  # of all turns, prompts and replies


@dataclass(frozen=True)
class Request:
    """What is asked of the engine: to continue a prompt, or to score a continuation of it."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    conversation: Conversation | None = None  # whose next turn the prompt is
    continuation: list[int] | None = None  # to be scored, in place of generating one; it may be empty
    name: str = "the prompt"  # what errors call it
    ends: tuple[int, ...] = ()  # token ids that end it, beside those that end every text of the model


@dataclass
class Completion:
    """What became of one prompt. Text and ids are of what followed the prompt."""

    prompt_token_ids: list[int]
    logprobs: list[float] | None = None  # nats, of each generated token, where asked for
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop": end of text or a stop string; "length": max_new_tokens
    # Held at the end: [layer][slot], or [layer][head][slot] where heads hold different tokens.
    kept_positions: list[Positions] = field(default_factory=list)
    kv_lengths: list[int] = field(default_factory=list)  # per layer, tokens held at the end
    kv_bytes: int = 0  # of keys and values held at the end
    kv_bytes_full: int = 0  # what the full cache would hold
    shared_tokens: int = 0  # first tokens of the prompt that were computed for another one that begins alike
    prefill_s: float = 0.0  # seconds in which its prompt was computed, with those computed together
    decode_s: float = 0.0  # seconds of the steps that it took part in


@dataclass(frozen=True)
class Prefill:
    """What a prompt leaves behind: the logits of the next token, and what each layer holds."""

    logits: Tensor  # [vocab_size] float32
    kept_positions: list[Positions]  # [layer][slot]; [layer][head][slot] where heads hold different tokens
    kv_lengths: list[int]  # [layer]


@dataclass(eq=False)
class Sequence:
    """A request that the engine has taken: the handle that `Engine.add` returns."""

    request: Request
    prompt: list[int]  # token ids
    new_tokens: int  # that may follow it
    policy: Policy
    need: Need  # of the cache
    completion: Completion  # what has become of it so far
    earlier: HeldTokens | None  # what earlier turns had left when it was prepared
    earlier_ids: list[int]
    eos_ids: tuple[int, ...]  # that end it
    stream: TextStream
    generator: torch.Generator
    # Where the engine puts what is new of it: a piece of its text at a time, and None once it has ended.
    news: "deque[tuple[Sequence, str | None]]" = field(default_factory=deque)
    seen_ids: Tensor | None = None  # [vocab_size] bool, ids that the repetition penalty makes less likely
    # [1 + T, vocab_size], after the prompt and after each token of a continuation to score.
    logits: Tensor | None = None
    row: Row | None = None  # where it is held, while it runs
    last_token: int = -1  # accepted, and computed in the next step
    ended: bool = False  # finished, cancelled or failed
    error: Exception | None = None
    prepared_by: object = None  # the engine that prepared it, until it is submitted

    @property
    def all_ids(self) -> list[int]:
        """Token ids of earlier turns, of the prompt, and of what followed it so far."""
        return self.earlier_ids + self.prompt + self.completion.token_ids

    def take_row(self, cache: KVCache) -> Row:
        """Take a row of a cache and return it."""
        pending = None
        if self.request.continuation is None:  # what is scored is never dropped
            generation = self.policy.generation(len(self.prompt), len(cache.keys))
            pending = PendingTokens(generation, self.new_tokens) if generation else None
        self.row = cache.add_row(self.need, pending)
        return self.row

    def accept(self, token: int, logprob: float | None) -> str:
        """Take the token that was chosen; returns the text that became certain with it."""
        completion, self.last_token = self.completion, token
        completion.token_ids.append(token)
        if completion.logprobs is not None and logprob is not None:
            completion.logprobs.append(logprob)
        if self.seen_ids is not None:
            self.seen_ids[token] = True
        piece = self.stream.push(token)
        if token in self.eos_ids:
            completion.finish_reason = "stop"
        elif len(completion.token_ids) == self.new_tokens:
            completion.finish_reason = "length"
        if completion.finish_reason:
            piece += self.stream.finish()
        if self.stream.stopped:
            completion.finish_reason = "stop"
        completion.text += piece
        return piece

    def note_held(self, row: Row) -> None:
        """Write down what is held of it at its end, and leave it to the next turn, if there is one."""
        completion, bytes_per_token = self.completion, row.cache.bytes_per_token
        completion.kept_positions, completion.kv_lengths = row.kept_positions(), list(row.lengths)
        completion.kv_bytes = bytes_per_token * sum(row.lengths)
        completion.kv_bytes_full = bytes_per_token * len(row.lengths) * row.position
        conversation = self.request.conversation
        if conversation is not None and not self.request.continuation:  # what is scored becomes no turn
            conversation.held = row.copy_out()
            conversation.token_ids = self.all_ids


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several; a list of ids is one."""
    expect_type("prompts", prompts, (str, list), "a text, a list of texts or of token id lists")
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
