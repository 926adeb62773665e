"""The engine: prompts in, texts out, through the one decode loop of the project.

A request becomes a `Sequence`, the plan says how much cache all of them need, the cache is allotted, the prompts
are computed, and then every step takes one token of each running sequence. A sequence that has ended leaves its
row and costs nothing from then on.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minipyramid import checkpoint
from minipyramid.cache import KVCache
from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, RequestError, TokenizerError
from minipyramid.plan import Plan, plan
from minipyramid.sampling import SamplingParams, choose, make_generator
from minipyramid.tokenizer import TextStream, Tokenizer

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Prompts are computed so many tokens at a time, or one prompt at a time where it is longer.
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class Completion:
    """What became of one prompt. The text and the ids are without the prompt; the ids end with the token that
    ended the text, if one did."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "stop": end of text or a stop string; "length": max_new_tokens
    logprobs: list[float] | None  # of each generated token, where asked for
    kv_lengths: list[int]  # per layer, tokens held at the end
    kv_bytes: int  # bytes of keys and values held at the end
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
    """A request on its way."""

    index: int  # place among the prompts of its call
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    stream: TextStream
    eos: frozenset[int]
    seen: Tensor | None  # [vocab_size] bool, for the repetition penalty
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    completion: Completion | None = None

    def accept(self, token: int) -> str:
        """Take the next token; returns the text that became certain with it."""
        self.token_ids.append(token)
        if self.seen is not None:
            self.seen[token] = True
        piece = self.stream.push(token)
        if self.stream.stopped or (token in self.eos and not self.params.ignore_eos):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self.stream.finish()
            self.finish_reason = "stop" if self.stream.stopped else self.finish_reason
        self.text += piece
        return piece


class LLM:
    """A checkpoint, ready to generate.

    Args:
        model: a checkpoint's directory in the Hugging Face layout, or a hub repository id.
        dtype: "auto" (the checkpoint's, but float32 where this processor is slow with it), or a name of `DTYPES`.
        device: "auto" (CUDA if there is one, else the CPU), or what `torch.device` takes.
        revision: branch, tag or commit of a hub repository.
        progress: called with (parameters loaded, of how many) while loading.

    Raises:
        CheckpointError, ConfigError, TokenizerError: what is wrong with the checkpoint.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> None:
        if not isinstance(model, (str, Path)):
            raise TypeError(f"model is {model!r}, expected a path or a hub repository id")
        directory = checkpoint.locate(model, revision)
        self.config = ModelConfig.load(directory)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.config.dtype, self.device)
        self.tokenizer, self._no_tokenizer = _tokenizer(directory, self.config)
        self.model = checkpoint.load(directory, self.config, self.dtype, self.device, progress)

    def generate(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue prompts, all in one batch; texts or token ids in, completions in their order out.

        Raises:
            RequestError: a prompt is empty, too long or not of this vocabulary.
            TokenizerError: texts are given to a checkpoint without a readable tokenizer.
        """
        done = dict(self.completions(prompts, params))
        return [done[i] for i in range(len(done))]

    def completions(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """The same as they are finished: (index of the prompt, completion). Raises like `generate`, at the first."""
        sequences = self._sequences(prompts, params)
        for sequence, _ in self._run(sequences):
            if sequence.completion:
                yield sequence.index, sequence.completion

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, Completion]:
        """The same for one prompt, as pieces of text; joined they are the completion's text.

        The generator's return value is the `Completion`. Raises like `generate`, at the first piece.
        """
        (sequence,) = self._sequences([prompt], params)
        for _, piece in self._run([sequence]):
            if piece:
                yield piece
        return cast(Completion, sequence.completion)

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> list[Prefill]:
        """Compute prompts and tell what the cache holds of each, and the scores of the token that comes next."""
        sequences = self._sequences(prompts, SamplingParams(max_new_tokens=1), new_tokens=0)
        cache, logits = self._prefill(sequences)
        lengths = [cache.row_lengths(row) for row in range(len(sequences))]
        return [Prefill(logits[i], [list(range(n)) for n in row], row) for i, row in enumerate(lengths)]

    @torch.inference_mode()
    def score(self, prompt: Prompt, continuation: Prompt) -> list[float]:
        """Log-probability (nats) of each token of a continuation, given the prompt's cache and what precedes it."""
        if isinstance(continuation, str):
            ids = self._need_tokenizer().encode(continuation, continues=True)
        else:
            ids = self._checked_ids(continuation, "the continuation")
        if not ids:
            raise RequestError("the continuation is empty; give at least one token to score")
        params = SamplingParams(max_new_tokens=len(ids))
        sequences = self._sequences([prompt], params)
        cache, first = self._prefill(sequences)
        logits = first
        if len(ids) > 1:
            x = self.model(self._tensor(ids[:-1]), [len(ids) - 1], [0], cache)
            logits = torch.cat((first, self.model.logits(x)))  # [T, vocab_size]
        scores: list[float] = logits.log_softmax(-1).gather(1, self._tensor(ids)[:, None])[:, 0].tolist()
        return scores

    def plan(self, prompt_lengths: Iterable[int], max_new_tokens: int) -> Plan:
        """What prompts of these lengths (tokens) will hold at the end of generation; nothing is allotted."""
        lengths = list(prompt_lengths)
        return plan(self.config, lengths, [max_new_tokens] * len(lengths), self.dtype.itemsize)

    # --- inside ---

    @torch.inference_mode()
    def _run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, str]]:
        """The decode loop. Yields a sequence with each piece of its text, and once more when it is complete."""
        if not sequences:
            return
        began = time.perf_counter()
        cache, logits = self._prefill(sequences)
        ready = time.perf_counter()
        running = list(sequences)  # running[i] has row i of the cache and of the logits
        while running:
            for sequence, token in zip(running, self._choose(logits, running), strict=True):
                yield sequence, sequence.accept(token)
            # Also for those that end here: their last token belongs into the cache, as the plan counts it.
            ids = self._tensor([sequence.token_ids[-1] for sequence in running])
            x = self.model(ids, [1] * len(running), list(range(len(running))), cache)
            finished = [row for row, sequence in enumerate(running) if sequence.finish_reason]
            for row in finished:
                seconds = (ready - began, time.perf_counter() - ready)
                running[row].completion = self._complete(running[row], cache, row, *seconds)
                yield running[row], ""
            if finished:
                order = cache.retire(finished)
                running, x = [running[row] for row in order], x[order]
            logits = self.model.logits(x)

    def _prefill(self, sequences: list[Sequence]) -> tuple[KVCache, Tensor]:
        """Allot the cache and compute the prompts; returns the scores of each one's next token [B, vocab_size]."""
        lengths = [len(s.prompt) for s in sequences]
        planned = plan(self.config, lengths, [s.params.max_new_tokens for s in sequences], self.dtype.itemsize)
        cache = KVCache.allot(self.config, planned.slots, len(sequences), self.dtype, self.device)
        last: list[Tensor] = []
        for rows in _groups(lengths, PREFILL_TOKENS):
            counts = [lengths[row] for row in rows]
            ids = self._tensor([token for row in rows for token in sequences[row].prompt])
            x = self.model(ids, counts, rows, cache)  # [T, hidden_size]
            last.append(x[torch.tensor(counts).cumsum(0) - 1])
        return cache, self.model.logits(torch.cat(last))

    def _choose(self, logits: Tensor, running: list[Sequence]) -> list[int]:
        """The next token of every running sequence, fetched from the device at once."""
        chosen = torch.stack(
            [choose(row, s.params, s.generator, s.seen) for row, s in zip(logits, running, strict=True)]
        )
        if any(s.params.logprobs for s in running):
            logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
            for sequence, logprob in zip(running, logprobs, strict=True):
                sequence.logprobs.append(logprob)
        tokens: list[int] = chosen.tolist()
        return tokens

    def _complete(self, s: Sequence, cache: KVCache, row: int, prefill_s: float, decode_s: float) -> Completion:
        full = self.plan([len(s.prompt)], len(s.token_ids)).kv_bytes_full
        return Completion(
            text=s.text,
            token_ids=s.token_ids,
            prompt_token_ids=s.prompt,
            finish_reason=s.finish_reason or "",
            logprobs=s.logprobs if s.params.logprobs else None,
            kv_lengths=cache.row_lengths(row),
            kv_bytes=cache.row_bytes(row),
            kv_bytes_full=full,
            prefill_s=prefill_s,
            decode_s=decode_s,
        )

    def _sequences(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None, new_tokens: int | None = None
    ) -> list[Sequence]:
        """Check a call's prompts and parameters, and tokenise."""
        many: list[Any] = prompts if isinstance(prompts, list) else [prompts]
        if many and all(isinstance(p, int) for p in many):
            many = [many]
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise RequestError(f"{len(each)} sampling parameters for {len(many)} prompts; give one, or one per prompt")
        made = []
        for i, (prompt, p) in enumerate(zip(many, each, strict=True)):
            name = "the prompt" if len(many) == 1 else f"prompt {i}"
            if not isinstance(p, SamplingParams):
                raise TypeError(f"params is {p!r}, expected SamplingParams or a list of them")
            ids = self._prompt_ids(prompt, name)
            self._check_length(len(ids), p.max_new_tokens if new_tokens is None else new_tokens, name)
            if p.stops and self.tokenizer is None:
                self._need_tokenizer()
            seen = None
            if p.repetition_penalty != 1:
                seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
                seen[self._tensor(ids)] = True
            stream = TextStream(self.tokenizer, p.stops)
            eos = frozenset(self.config.eos_token_ids)
            made.append(Sequence(i, ids, p, make_generator(p, self.device), stream, eos, seen))
        return made

    def _prompt_ids(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(f"{name} is empty; give at least one character")
            return self._need_tokenizer().encode(prompt)
        ids = self._checked_ids(prompt, name)
        if not ids:
            raise RequestError(f"{name} is empty; give at least one token")
        return ids

    def _checked_ids(self, ids: Any, name: str) -> list[int]:
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TypeError(f"{name} is a {type(ids).__name__}, expected a text or a list of token ids")
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{name} holds the token id {wrong}, expected 0 to {self.config.vocab_size - 1}")
        return ids

    def _check_length(self, prompt: int, new: int, name: str) -> None:
        context = self.config.max_position_embeddings
        if prompt > context:
            raise RequestError(
                f"{name} has {prompt} tokens, more than the context of {context}; shorten it by {prompt - context}"
            )
        if prompt + new > context:
            raise RequestError(
                f"{name} has {prompt} tokens and {new} new ones would exceed the context of {context}; "
                + (f"ask for at most {context - prompt} new tokens" if prompt < context else "shorten it")
            )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        return self.tokenizer

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)


def _tokenizer(directory: Path, config: ModelConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or why there is none; a checkpoint without one still runs on token ids."""
    if not (directory / "tokenizer.model").exists():
        try:
            return Tokenizer(directory), ""
        except TokenizerError as error:
            return None, str(error)
    tokenizer = Tokenizer(directory)
    # Embeddings are often padded to a round number of rows, but not by more than this.
    if not config.vocab_size - 512 < tokenizer.vocab_size <= config.vocab_size:
        raise TokenizerError(
            f"{directory / 'tokenizer.model'} has {tokenizer.vocab_size} tokens, but the model has "
            f"{config.vocab_size}; expected the tokenizer that the model was trained with"
        )
    return tokenizer, ""


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; a name that torch cannot use raises `ConfigError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here; expected auto, cpu or cuda") from error
    return chosen


def pick_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype, except on a processor without instructions for it, which takes float32.

    bf16 products were 400 times slower than float32 on a processor with AVX2 only, and float16 eight times
    slower than bf16 on one that has both.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return DTYPES[dtype]
    if stored not in DTYPES:
        raise ConfigError(f"config.json: dtype is {stored!r}, expected one of {', '.join(DTYPES)}")
    if device.type != "cpu" or stored == "float32":
        return DTYPES[stored]
    quick = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if quick else torch.float32


def _groups(lengths: list[int], limit: int) -> Iterator[list[int]]:
    """Consecutive indices whose lengths sum to at most `limit`, or one alone that is longer."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        if group and sum(lengths[j] for j in group) + length > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
