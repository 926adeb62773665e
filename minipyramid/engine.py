"""The engine: prompts in, texts out, through the one decode loop of the project.

A request becomes a `Sequence` that knows from its plan how much cache it will need. The scheduler starts as many as
fit, their prompts are computed, and then every step takes one token of each running sequence. A sequence that has
ended leaves its row and is computed no further (its last token still is, into the cache).
"""

import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid import checkpoint, request
from minipyramid.cache import KVCache, Span
from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.errors import RequestError, TokenizerError
from minipyramid.hub import locate
from minipyramid.model import PIECES
from minipyramid.plan import Need, Plan, Policy, make_plan, need, pick_pyramid
from minipyramid.pyramid import PyramidConfig
from minipyramid.request import Completion, Conversation, Params, Prefill, Prompt, Prompts, Sequence
from minipyramid.sampling import SamplingParams, choose
from minipyramid.schedule import Scheduler, default_memory
from minipyramid.tokenizer import TextStream, Tokenizer

OnStep = Callable[[Scheduler], None] | None  # hears of every step how many wait, run and are finished


class LLM:
    """A checkpoint, ready to generate.

    Args:
        model: a checkpoint's directory in the Hugging Face layout, or a hub repository id.
        pyramid: "off", "auto" (the `pyramid.json` beside the checkpoint, else the preset nearest in depth), a
            preset's name, the path of a JSON file, or a configuration.
        kv_budget: hold at most this share of the full cache's keys and values once all `max_new_tokens` are
            generated, by settings solved from `pyramid`'s for every request's length (`minipyramid/budget.py`). A text
            that ends earlier may hold a larger share of its own. None for `pyramid` as it is.
        kv_memory: bytes for the keys, values and votes of everything in flight, a number or as in "2GiB"; None for
            half of what is free.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, but on a CPU float16 runs as bf16, and
            both as float32 where the processor has no bf16 instructions.
        device: "auto" (CUDA if there is one, else the CPU), or what `torch.device` takes.
        compile: run decode steps through `torch.compile`. Worth it where steps are many and their layers small: the
            first step compiles some ten seconds long, as do those of other kinds (README, Limits).
        revision: branch, tag or commit of a hub repository.
        progress: called with (parameters loaded, of how many) while loading.

    Raises:
        CheckpointError, ConfigError, TokenizerError: what is wrong with the checkpoint, or cannot be done here.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        pyramid: str | Path | PyramidConfig = "auto",
        kv_budget: float | None = None,
        kv_memory: int | str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        compile: bool = False,
        revision: str | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> None:
        if not isinstance(compile, bool):
            raise TypeError(f"compile is {compile!r}, expected bool")
        directory = locate(model, revision, progress=progress is not None)
        self.config = ModelConfig.load(directory)
        self.policy = Policy(pick_pyramid(pyramid, directory, self.config.num_hidden_layers), kv_budget)
        self.kv_memory = None if kv_memory is None else request.parse_bytes(kv_memory)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.config.dtype, self.device)
        there = (directory / "tokenizer.model").is_file()  # without one it still runs on token ids
        self.tokenizer = Tokenizer(directory, self.config.vocab_size) if there else None
        self.model = checkpoint.load(directory, self.config, self.dtype, self.device, progress)
        if compile:
            self.model.compile_step()

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Continue any number of prompts; texts or token ids in, completions in their order out.

        As many run together as fit in `kv_memory`.

        Raises:
            BudgetError: `kv_budget` cannot be reached for a prompt's length.
            RequestError: a prompt is empty, too long, not of this vocabulary, or needs more than `kv_memory` alone.
            TokenizerError: texts are given to a checkpoint without a readable tokenizer.
        """
        return [completion for _, completion in sorted(self.completions(prompts, params), key=lambda done: done[0])]

    def completions(
        self, prompts: Prompts, params: Params = None, progress: OnStep = None
    ) -> Iterator[tuple[int, Completion]]:
        """Like `generate`, but each as it is finished, with the index of its prompt; `progress` hears of every step."""
        scheduler = self._scheduler(self._sequences(request.as_list(prompts), params))
        return ((s.index, s.completion) for s, piece in self._run(scheduler, progress) if piece is None)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, conversation: Conversation | None = None
    ) -> Generator[str, None, Completion]:
        """The same for one prompt, as pieces of text; joined they are the completion's text.

        With a `conversation` the prompt is its next turn. The generator's return value is the `Completion`. Raises
        like `generate`.
        """
        (sequence,) = self._sequences([prompt], params, conversation=conversation)
        return self._pieces(sequence, self._scheduler([sequence]))

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> list[Prefill]:
        """Compute prompts and tell what the cache holds of each, and the scores of the token that comes next."""
        done = []
        for sequence in self._sequences(request.as_list(prompts), SamplingParams(max_new_tokens=1), new=0):
            self._scheduler([sequence]).admit()
            logits, held = self._extend([sequence])[0], sequence.span.cache.rows[0]
            done.append(Prefill(logits, held.kept_positions(), held.lengths))
        return done

    @torch.inference_mode()
    def score(self, prompt: Prompt, continuation: Prompt) -> list[float]:
        """Log-probability (nats) of each token of a continuation, given the prompt's cache and what precedes it.

        The prompt is pruned as for generating so many tokens; what is scored is given, so nothing of it is judged.
        """
        ids = self._ids(continuation, "the continuation", continues=True)
        (sequence,) = self._sequences([prompt], SamplingParams(max_new_tokens=len(ids)))
        layers = self.config.num_hidden_layers
        # Room for the whole continuation, since nothing of it is dropped.
        sequence.need = need(sequence.pyramid, len(sequence.prompt), 0, layers).beside([len(ids)] * layers)
        self._scheduler([sequence]).admit()
        logits = self._extend([sequence])
        x = self.model.extend(self._tensor(ids), [Span(sequence.span.cache, 0, len(ids))], every=True)
        logits = torch.cat((logits, self.model.logits(x[:-1])))  # [T, vocab_size]
        scores: list[float] = logits.log_softmax(-1).gather(1, self._tensor(ids)[:, None])[:, 0].tolist()
        return scores

    def plan(self, prompt_lengths: Iterable[int], max_new_tokens: int) -> Plan:
        """What prompts of these lengths (tokens) will hold; nothing is allotted."""
        return make_plan(self.config, self.policy, prompt_lengths, max_new_tokens, self.dtype)

    def _pieces(self, sequence: Sequence, scheduler: Scheduler) -> Generator[str, None, Completion]:
        yield from (piece for _, piece in self._run(scheduler) if piece)
        return sequence.completion

    @torch.inference_mode()
    def _run(self, scheduler: Scheduler, progress: OnStep = None) -> Iterator[tuple[Sequence, str | None]]:
        """The decode loop. Yields a sequence with each piece of its text, and with None when it is complete."""
        while scheduler.waiting or scheduler.caches:
            self._start(scheduler.admit())
            running = scheduler.in_order()
            for sequence in running:
                yield sequence, sequence.accept()
            began = time.perf_counter()
            # Also for those that end here: their last token belongs in the cache, as the plan counts it.
            tokens = self._tensor([sequence.next_token for sequence in running])
            x = self.model.step(tokens, scheduler.caches)  # [B, hidden_size]
            left = [i for i, sequence in enumerate(running) if not sequence.completion.finish_reason]
            if left:
                self._choose(self.model.logits(x[left]), [running[i] for i in left])
            ended = scheduler.retire()  # after the choice, for it moves rows
            for sequence in running:
                sequence.completion.decode_s += time.perf_counter() - began
            for sequence in ended:
                yield sequence, None
            if progress:
                progress(scheduler)

    def _start(self, admitted: list[Sequence]) -> None:
        """Compute the prompts of those that start now, about a piece at a time, and choose each one's first token."""
        while admitted:
            began = time.perf_counter()
            ends = accumulate(len(sequence.prompt) for sequence in admitted)
            count = max(1, sum(end <= PIECES[self.device.type] for end in ends))
            self._choose(self._extend(admitted[:count]), admitted[:count])
            seconds = time.perf_counter() - began  # behind the transfer of tokens, for a device runs asynchronously
            for sequence in admitted[:count]:
                sequence.completion.prefill_s = seconds
            admitted = admitted[count:]

    def _extend(self, started: list[Sequence]) -> Tensor:
        """Compute prompts into the cache; returns the scores of each one's next token.  [B, vocab_size]"""
        ids = self._tensor([token for sequence in started for token in sequence.prompt])
        return self.model.logits(self.model.extend(ids, [sequence.span for sequence in started]))

    def _scheduler(self, sequences: list[Sequence]) -> Scheduler:
        per_token = self.config.kv_bytes_per_token(self.dtype.itemsize)
        memory = default_memory(self.device) if self.kv_memory is None else self.kv_memory
        return Scheduler(self._allot, per_token, memory, sequences)

    def _allot(self, need: Need, rows: int) -> KVCache:
        try:
            return KVCache.allot(self.config, need, rows, self.dtype, self.device)
        except RuntimeError as error:
            raise RequestError("the keys and values do not fit into memory; give a smaller kv_memory") from error

    def _choose(self, logits: Tensor, running: list[Sequence]) -> None:
        """The next token of every running sequence, in one transfer from the device."""
        rows = zip(logits, running, strict=True)
        chosen = torch.stack([choose(row, s.params, s.generator, s.seen) for row, s in rows])
        if any(s.params.logprobs for s in running):
            logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
            for sequence, logprob in zip(running, logprobs, strict=True):
                if sequence.completion.logprobs is not None:
                    sequence.completion.logprobs.append(logprob)
        for sequence, token in zip(running, chosen.tolist(), strict=True):
            sequence.next_token = token

    def _sequences(
        self, prompts: list[Any], params: Params, new: int | None = None, conversation: Conversation | None = None
    ) -> list[Sequence]:
        """Check a call's prompts and parameters, tokenise, and plan; for `new` tokens if not for `max_new_tokens`."""
        each = params if isinstance(params, list) else [SamplingParams() if params is None else params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or as many")
        # As it stands now, so that a turn that is added meanwhile, or twice, cannot mix with this one.
        before = Conversation() if conversation is None else replace(conversation)
        if before.held and before.held[0].config is not self.config:
            raise RequestError("the conversation was begun with another LLM, whose cache it holds; begin a new one")
        layers, made = self.config.num_hidden_layers, []
        for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
            if not isinstance(p, SamplingParams):
                raise TypeError(f"params is {p!r}, expected SamplingParams or a list of them")
            name = "the prompt" if len(prompts) == 1 else f"prompt {i}"
            ids = self._ids(prompt, name, continues=bool(before.token_ids))
            lengths = (len(ids), p.max_new_tokens if new is None else new)
            self.config.check_length(len(before.token_ids) + lengths[0], lengths[1], name)
            if p.stop:
                self._need_tokenizer()
            settings = self.policy.settings(*lengths, layers)
            done, needed = Completion(ids, [] if p.logprobs else None), need(settings, *lengths, layers)
            sequence = Sequence(i, name, ids, p, settings, needed, done, before, conversation)
            if before.held:
                sequence.need = sequence.need.beside(before.held[1].lengths)
            # A space before the first word belongs to the text only if something stands before it.
            at_start = self.tokenizer is not None and not self.tokenizer.decode(before.token_ids + ids, continues=True)
            sequence.stream = TextStream(self.tokenizer, p.stop, at_start=at_start)
            seed = secrets.randbits(63) if p.seed is None else p.seed
            sequence.generator = torch.Generator(self.device).manual_seed(seed)
            sequence.eos_ids = () if p.ignore_eos else self.config.eos_token_ids
            if p.repetition_penalty != 1:
                sequence.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
                sequence.seen[self._tensor(before.token_ids + ids)] = True
            made.append(sequence)
        return made

    def _ids(self, given: Any, name: str, continues: bool = False) -> list[int]:
        """Token ids of a text or of ids; neither may be empty."""
        text = isinstance(given, str) and given
        ids = self._need_tokenizer().encode(given, name, continues=continues) if text else given
        if isinstance(ids, (str, list)) and not ids:
            raise RequestError(f"{name} is empty; give at least one token")
        return request.check_ids(ids, name, self.config)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer.model (no other is read); give token ids, or add it")
        return self.tokenizer

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)
