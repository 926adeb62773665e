"""A request on its way from a prompt to a completion, checked before anything is computed."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minipyramid.cache import KVCache, Row, Span
from minipyramid.config import ModelConfig
from minipyramid.errors import RequestError
from minipyramid.plan import Need
from minipyramid.pyramid import Gathering, PyramidConfig
from minipyramid.sampling import SamplingParams
from minipyramid.tokenizer import TextStream

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]


Params = SamplingParams | list[SamplingParams] | None  # for all prompts, or one for each


@dataclass
class Completion:
    """What became of one prompt. Text and ids are without the prompt; the ids end with the one that ended the text."""

    prompt_token_ids: list[int]
    logprobs: list[float] | None = None  # nats, of each generated token, where asked for
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop": end of text or a stop string; "length": max_new_tokens
    kept_positions: list[list[int]] = field(default_factory=list)  # [layer][slot] positions held at the end
    kv_lengths: list[int] = field(default_factory=list)  # per layer, tokens held at the end
    kv_bytes: int = 0  # of keys and values held at the end
    kv_bytes_full: int = 0  # what the full cache would hold
    prefill_s: float = 0.0  # seconds in which its prompt was computed, with those that started together
    decode_s: float = 0.0  # seconds of the steps that it took part in


@dataclass(frozen=True)
class Prefill:
    """What a prompt leaves behind: the scores of the next token, and what each layer kept."""

    logits: Tensor  # [vocab_size] float32
    kept_positions: list[list[int]]  # [layer][slot]
    kv_lengths: list[int]  # [layer]


@dataclass(eq=False)
class Conversation:
    """What former turns have left. Given to each turn's call, it goes on from turn to turn; a turn cut short is undone.

    A turn's prompt is pruned among itself and sees what was kept of the turns before it (of these nothing more goes).
    What is held is copied once per turn, into the cache that the turn is allotted, and counts as in flight meanwhile.
    """

    held: tuple[KVCache, Row] | None = None  # a cache of one row
    token_ids: list[int] = field(default_factory=list)  # of all turns, prompts and replies


@dataclass
class Sequence:
    """A prompt that is being continued."""

    index: int  # place among the prompts of its call
    name: str  # what errors call it
    prompt: list[int]
    params: SamplingParams
    pyramid: PyramidConfig | None
    need: Need  # of the cache
    completion: Completion  # what has become of it so far
    before: Conversation  # what former turns had left when it was planned
    conversation: Conversation | None = None  # to which its turn is added at its end
    eos_ids: tuple[int, ...] = ()  # that end it
    stream: TextStream = field(init=False)
    generator: torch.Generator = field(init=False)
    seen: Tensor | None = None  # [vocab_size] bool, ids that the repetition penalty makes less likely
    span: Span = field(init=False)  # where its prompt goes, once it has started
    next_token: int = -1  # chosen, not yet accepted

    def start(self, cache: KVCache) -> Row:
        """Take a row of a cache, with what former turns left, and return it."""
        new = self.params.max_new_tokens
        row = cache.add_row(Gathering(self.pyramid, len(self.prompt), new) if self.pyramid else None)
        if self.before.held:
            cache.adopt(row, *self.before.held)
        self.span = Span(cache, row, len(self.prompt), self.pyramid)
        return cache.rows[row]

    def accept(self) -> str:
        """Take the token that was chosen; returns the text that became certain with it."""
        done, token = self.completion, self.next_token
        done.token_ids.append(token)
        if self.seen is not None:
            self.seen[token] = True
        piece = self.stream.push(token)
        if token in self.eos_ids:
            done.finish_reason = "stop"
        elif len(done.token_ids) == self.params.max_new_tokens:
            done.finish_reason = "length"
        if done.finish_reason:
            piece += self.stream.finish()
        if self.stream.stopped:
            done.finish_reason = "stop"
        done.text += piece
        return piece

    def finish(self, cache: KVCache, held: Row) -> None:
        """Note what is held of it at the end, and leave it to the next turn, if it has one."""
        done = self.completion
        done.kept_positions, done.kv_lengths = held.kept_positions(), list(held.lengths)
        done.kv_bytes = cache.bytes_per_token * sum(held.lengths)
        done.kv_bytes_full = cache.bytes_per_token * len(held.lengths) * held.position
        if self.conversation is not None:
            self.conversation.held = (cache, held)
            self.conversation.token_ids = self.before.token_ids + self.prompt + done.token_ids


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


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or a text such as 500MiB or 2GB (units are powers of 1,024 either way)."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"the size is {size!r}, expected bytes or a text such as 2GiB")
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if not match or not (count := int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))):
        raise RequestError(f"the size is {size!r}, expected bytes or a text such as 2GiB")
    return count
