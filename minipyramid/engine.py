"""The engine: prompts in, texts out, through the one decode loop of the project.

A request becomes a `Sequence`, the plan says how much cache all of them need, the cache is allotted, the prompts
are computed, and then every step takes one token of each running sequence. A sequence that has ended leaves its
row and is computed no further.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minipyramid import checkpoint
from minipyramid.cache import KVCache
from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.errors import RequestError, TokenizerError
from minipyramid.hub import locate
from minipyramid.plan import Plan, make_plan
from minipyramid.pyramid import Gathering, PyramidConfig, voting
from minipyramid.request import Completion, Prefill, Prompt, Prompts, Sequence, as_list, check_ids, check_length
from minipyramid.sampling import SamplingParams, choose, make_generator
from minipyramid.tokenizer import TextStream, Tokenizer, load_tokenizer

# Prompts are computed together up to this many tokens, and a longer one alone.
PREFILL_TOKENS = 4096


class LLM:
    """A checkpoint, ready to generate.

    Args:
        model: a checkpoint's directory in the Hugging Face layout, or a hub repository id.
        pyramid: "off", "auto" (the `pyramid.json` beside the checkpoint, else the preset for so many layers), a
            preset's name, the path of a JSON file, or a configuration.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, but on a CPU float16 runs as bf16, and
            both as float32 where the processor has no bf16 instructions.
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
        pyramid: str | Path | PyramidConfig = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> None:
        directory = locate(model, revision, progress=progress is not None)
        self.config = ModelConfig.load(directory)
        self.pyramid = pick_pyramid(pyramid, directory, self.config.num_hidden_layers)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.config.dtype, self.device)
        self.tokenizer = load_tokenizer(directory, self.config.vocab_size)
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
        """Like `generate`, but each as it is finished, with the index of its prompt."""
        sequences = self._sequences(as_list(prompts), params)
        return ((s.index, s.completion) for s, _ in self._run(sequences) if s.completion)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, Completion]:
        """The same for one prompt, as pieces of text; joined they are the completion's text.

        The generator's return value is the `Completion`. Raises like `generate`.
        """
        return self._pieces(*self._sequences([prompt], params))

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> list[Prefill]:
        """Compute prompts and tell what the cache holds of each, and the scores of the token that comes next."""
        sequences = self._sequences(as_list(prompts), SamplingParams(max_new_tokens=1), new_tokens=0)
        if not sequences:
            return []
        cache, logits = self._prefill(sequences, self.pyramid)
        lengths = [cache.row_lengths(row) for row in range(len(sequences))]
        return [Prefill(logits[row], cache.kept_positions(row), held) for row, held in enumerate(lengths)]

    @torch.inference_mode()
    def score(self, prompt: Prompt, continuation: Prompt) -> list[float]:
        """Log-probability (nats) of each token of a continuation, given the prompt's cache and what precedes it."""
        ids = self._ids(continuation, "the continuation", continues=True)
        sequences = self._sequences([prompt], SamplingParams(max_new_tokens=len(ids)))
        # What is scored is given and not generated: nothing of it is judged.
        given = self.pyramid and replace(self.pyramid, exceed_length_to_compress=len(ids) + 1)
        cache, logits = self._prefill(sequences, given)
        if len(ids) > 1:
            x = self.model(self._tensor(ids[:-1]), [len(ids) - 1], [0], cache)
            logits = torch.cat((logits, self.model.logits(x)))  # [T, vocab_size]
        scores: list[float] = logits.log_softmax(-1).gather(1, self._tensor(ids)[:, None])[:, 0].tolist()
        return scores

    def plan(self, prompt_lengths: Iterable[int], max_new_tokens: int) -> Plan:
        """What prompts of these lengths (tokens) will hold at the end of generation; nothing is allotted."""
        lengths = [index(length) for length in prompt_lengths]
        new = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
        if not lengths:
            raise RequestError("no prompt lengths are given; give at least one")
        for i, length in enumerate(lengths):
            check_length(length, new, f"prompt {i}", self.config)
        return make_plan(self.config, self.pyramid, lengths, [new] * len(lengths), self.dtype.itemsize)

    def _pieces(self, sequence: Sequence) -> Generator[str, None, Completion]:
        for _, piece in self._run([sequence]):
            if piece:
                yield piece
        return cast(Completion, sequence.completion)

    @torch.inference_mode()
    def _run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, str]]:
        """The decode loop. Yields a sequence with each piece of its text, and once more when it is complete."""
        if not sequences:
            return
        began = time.perf_counter()
        cache, logits = self._prefill(sequences, self.pyramid)
        running = list(sequences)  # running[i] has row i of the cache and of the logits
        gatherings = [
            Gathering(self.pyramid, len(s.prompt), s.params.max_new_tokens) for s in sequences if self.pyramid
        ]
        survivors = self.pyramid.survivors(self.config.num_hidden_layers) if self.pyramid else []
        tokens = self._choose(logits, running)
        prefill_s = time.perf_counter() - began  # taken behind the first transfer: a device computes asynchronously
        began = time.perf_counter()
        while running:
            for sequence, token in zip(running, tokens, strict=True):
                piece, left = sequence.accept(token), time.perf_counter()
                yield sequence, piece
                began += time.perf_counter() - left  # what the caller does meanwhile is not decoding
            # Also for those that end here: their last token belongs in the cache, as the plan counts it.
            votes = voting(gatherings, self.device) if gatherings else None
            rows = list(range(len(running)))
            x = self.model(self._tensor(tokens), [1] * len(running), rows, cache, voting=votes)
            for row, gathering in enumerate(gatherings):
                unjudged = gathering.unjudged
                if gathering.due():
                    cache.compact(row, unjudged, gathering.config.exceed_length_to_compress, survivors)
            finished = [row for row, sequence in enumerate(running) if sequence.finish_reason]
            for row in finished:
                decode_s = time.perf_counter() - began
                running[row].completion = self._complete(running[row], cache, row, prefill_s, decode_s)
                yield running[row], ""
            order = cache.retire(finished)
            running = [running[row] for row in order]
            gatherings = [gatherings[row] for row in order] if gatherings else []
            tokens = self._choose(self.model.logits(x[order]), running) if running else []

    def _prefill(self, sequences: list[Sequence], pyramid: PyramidConfig | None) -> tuple[KVCache, Tensor]:
        """Allot the cache and compute the prompts; returns the scores of each one's next token [B, vocab_size]."""
        lengths = [len(s.prompt) for s in sequences]
        new = [s.params.max_new_tokens for s in sequences]
        planned = make_plan(self.config, pyramid, lengths, new, self.dtype.itemsize)
        cache = KVCache.allot(
            self.config, planned.slots, planned.unjudged, len(sequences), dtype=self.dtype, device=self.device
        )
        last: list[Tensor] = []
        for rows in _groups(lengths, PREFILL_TOKENS):
            counts = [lengths[row] for row in rows]
            ids = self._tensor([token for row in rows for token in sequences[row].prompt])
            x = self.model(ids, counts, rows, cache, pyramid=pyramid)  # [T, hidden_size]
            final = torch.tensor([cache.lengths[-1][row] for row in rows])  # that reached the last layer
            last.append(x[final.cumsum(0) - 1])
        return cache, self.model.logits(torch.cat(last))

    def _choose(self, logits: Tensor, running: list[Sequence]) -> list[int]:
        """The next token of every running sequence, in one transfer from the device."""
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
        return Completion(
            text=s.text,
            token_ids=s.token_ids,
            prompt_token_ids=s.prompt,
            finish_reason=s.finish_reason,
            logprobs=s.logprobs if s.params.logprobs else None,
            kept_positions=cache.kept_positions(row),
            kv_lengths=cache.row_lengths(row),
            kv_bytes=cache.row_bytes(row),
            kv_bytes_full=cache.bytes_per_token * len(cache.lengths) * cache.positions[row],
            prefill_s=prefill_s,
            decode_s=decode_s,
        )

    def _sequences(
        self, prompts: list[Any], params: SamplingParams | list[SamplingParams] | None, new_tokens: int | None = None
    ) -> list[Sequence]:
        """Check a call's prompts and parameters, and tokenise."""
        each = params if isinstance(params, list) else [SamplingParams() if params is None else params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one per prompt"
            )
        made = []
        for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
            if not isinstance(p, SamplingParams):
                raise TypeError(f"params is {p!r}, expected SamplingParams or a list of them")
            name = "the prompt" if len(prompts) == 1 else f"prompt {i}"
            ids = self._ids(prompt, name)
            check_length(len(ids), p.max_new_tokens if new_tokens is None else new_tokens, name, self.config)
            if p.stop:
                self._need_tokenizer()
            seen = None
            if p.repetition_penalty != 1:
                seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
                seen[self._tensor(ids)] = True
            # A space before the first word belongs to the text only if something stands before it.
            at_start = self.tokenizer is not None and not self.tokenizer.decode(ids, continues=True)
            stream = TextStream(self.tokenizer, p.stop, at_start=at_start)
            made.append(Sequence(i, ids, p, self.config.eos_token_ids, stream, make_generator(p, self.device), seen))
        return made

    def _ids(self, given: Any, name: str, continues: bool = False) -> list[int]:
        """Token ids of a text or of ids; neither may be empty."""
        try:
            ids = given
            if isinstance(given, str):
                ids = self._need_tokenizer().encode(given, continues=continues) if given else []
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} is not valid Unicode ({error.reason}); give UTF-8 text") from error
        if isinstance(ids, list) and not ids:
            raise RequestError(f"{name} is empty; give at least one token")
        return check_ids(ids, name, self.config)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "the checkpoint has no tokenizer.model (tokenizer.json is not read); give token ids, or add it"
            )
        return self.tokenizer

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)


def pick_pyramid(pyramid: str | Path | PyramidConfig, directory: Path, layers: int) -> PyramidConfig | None:
    """The settings that a name, a file or a configuration stands for; None for `off`."""
    if isinstance(pyramid, PyramidConfig):
        return pyramid
    if not isinstance(pyramid, (str, Path)):
        raise TypeError(f"pyramid is {pyramid!r}, expected off, auto, a preset's name, a path or a PyramidConfig")
    if pyramid == "off":
        return None
    if pyramid == "auto":
        beside = directory / "pyramid.json"
        return PyramidConfig.load(beside) if beside.exists() else PyramidConfig.for_layers(layers)
    if isinstance(pyramid, Path) or pyramid.endswith(".json"):
        return PyramidConfig.load(pyramid)
    return PyramidConfig.preset(pyramid)


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
