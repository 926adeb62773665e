"""`LLM`: a checkpoint, ready to generate. It loads, and hands requests to the engine."""

from collections.abc import Generator, Iterable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minipyramid import checkpoint, request
from minipyramid.device import pick_device, pick_dtype
from minipyramid.engine import Engine, OnStep
from minipyramid.errors import RequestError, expect_type
from minipyramid.policy import Policy
from minipyramid.request import Completion, Conversation, Params, Prefill, Prompt, Prompts, Request, Sequence
from minipyramid.sampling import SamplingParams
from minipyramid.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from minipyramid.formats.chat import ChatFormat
    from minipyramid.plan import Plan

    Formats = dict[str | None, ChatFormat]  # of chats, by the name that was asked for

AnyPolicy = str | Path | Policy  # a name, a file, or a policy
Memory = int | str | None  # bytes, or as in "2GiB"
Messages = list[dict[str, Any]]  # of a chat
Single = SamplingParams | None
Earlier = Conversation | None  # turns that a prompt follows
Finished = Generator[tuple[int, Completion], None, None]  # a prompt's index, and what became of it


class LLM:
    """A checkpoint, ready to generate. Several threads may use one: the engine lets one at a time step.

    Args:
        model: a checkpoint's directory in the Hugging Face layout, or a hub repository id.
        policy: what the layers compute and hold. "auto" (the checkpoint's `pyramid.json`, else the published
            settings nearest in depth), "full", a policy's name ("snapkv"), a preset's ("llama2-7b"), the path
            of a JSON file, a class of your own ("package.module:Name"), or a `Policy` object.
        kv_budget: hold at most this share of the full cache's keys and values once all `max_new_tokens` are
            generated, by settings solved from `policy`'s for every request's length. A text that ends earlier
            may hold a larger share of its own. None for `policy` as it is.
        kv_memory: bytes for the keys, values and votes of everything in flight, a number or as in "2GiB".
            None for half of what is free, in the container if one has a limit.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, but on a CPU float16 runs as
            bf16, and both as float32 where the processor multiplies float32 faster.
        device: "auto" (CUDA if there is one, else the CPU), or what `torch.device` takes.
        quantize: "int8" keeps the weights of linear layers in 8 bits, with a scale for each output: a quarter
            of float32's bytes. Their products round to bfloat16, whatever `dtype` is.
        kv_dtype: "int8" holds keys and values in 8 bits, with a scale for each token and key/value head;
            "auto" in `dtype`. A budget is a share of tokens, so of the full cache in the same numbers.
        chat_format: the default of `chat_request`'s `chat_format`; None for the checkpoint's own template.
        compile: run decode steps through `torch.compile`. Worth it where steps are many and their layers
            small: the first step compiles some ten seconds long, as do those of other kinds (README, Limits).
        revision: branch, tag or commit of a hub repository.
        progress: called with (parameters loaded, of how many) while loading.

    Raises:
        CheckpointError, ConfigError, TokenizerError: what is wrong with the checkpoint, or cannot be done
            here.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policy: AnyPolicy = "auto",
        kv_budget: float | None = None,
        kv_memory: Memory = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        kv_dtype: str = "auto",
        quantize: str | None = None,
        chat_format: str | None = None,
        compile: bool = False,
        revision: str | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> None:
        # Imported where they are needed: a model that comes in an engine needs none of them.
        from minipyramid.eight_bits import with_kv_dtype
        from minipyramid.formats.huggingface import read_config
        from minipyramid.hub import fetch_weights, locate
        from minipyramid.policies import pick_policy

        expect_type("compile", compile, bool, "bool")
        directory = locate(model, revision, progress=progress is not None)
        config = with_kv_dtype(read_config(directory, quantize), kv_dtype)
        chosen = pick_policy(policy, directory, config.num_hidden_layers)
        chosen.check_model(config)  # before weights are read
        on = pick_device(device)
        tokenizer = load_tokenizer(directory, config.vocab_size)
        number_format = pick_dtype(dtype, config.dtype, on)
        fetch_weights(model, revision, directory, progress is not None)  # now that the rest can be used
        loaded = checkpoint.load(directory, config, number_format, on, progress)
        if compile:
            from minipyramid.compiled import compile_step

            compile_step(loaded)
        self._use(Engine(loaded, tokenizer, chosen, kv_budget, kv_memory), directory, {})
        if chat_format is not None:
            self._chat_formats[None] = self.chat_format(chat_format)

    def _use(self, engine: Engine, directory: Path, formats: "Formats") -> None:
        self.engine, self.directory, self._chat_formats = engine, directory, formats
        self.model, self.tokenizer, self.config = engine.model, engine.tokenizer, engine.config
        self.device, self.dtype = engine.device, engine.dtype

    @classmethod
    def of(cls, engine: Engine, directory: Path, formats: "Formats | None" = None) -> "LLM":
        """An LLM on an engine that is there; `directory` is where a settings file would be."""
        llm = cls.__new__(cls)
        llm._use(engine, directory, {} if formats is None else formats)
        return llm

    def under(self, policy: AnyPolicy, *, kv_budget: float | None = None, kv_memory: Memory = None) -> "LLM":
        """The same weights under another policy, in an engine of its own; arguments as those of `LLM`."""
        from minipyramid.policies import pick_policy

        chosen = pick_policy(policy, self.directory, self.config.num_hidden_layers)
        engine = Engine(self.model, self.tokenizer, chosen, kv_budget, kv_memory)
        return LLM.of(engine, self.directory, self._chat_formats)

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Continue any number of prompts; texts or token ids in, completions in their order out.

        As many run together as fit in `kv_memory`.

        Raises:
            BudgetError: `kv_budget` cannot be reached for a prompt's length.
            RequestError: a prompt is empty, too long, not of this vocabulary, or needs more than `kv_memory`.
            TokenizerError: texts are given to a checkpoint without a readable tokenizer.
        """
        # By the index, which no two share.
        return [done for _, done in sorted(self.completions(prompts, params))]

    def completions(self, prompts: Prompts, params: Params = None, on_step: OnStep = None) -> Finished:
        """Like `generate`, but each as it is finished, with its prompt's index.

        `on_step` is called after every step that generated tokens.
        """
        listed = request.as_list(prompts)
        one = SamplingParams() if params is None else params
        each = one if isinstance(one, list) else [one] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"{len(each)} sampling parameters for {len(listed)} prompts; give one for all")
        sequences = self._prepare(listed, each)
        # A function of its own, so that what is wrong is raised by the call and not by the first `next`.
        return self._completions(sequences, on_step)

    def _prepare(self, prompts: list[Prompt], params: list[SamplingParams], **others: Any) -> list[Sequence]:
        """Check all requests of a call before any starts."""
        one = len(prompts) == 1
        names = ["the prompt" if one else f"prompt {i}" for i in range(len(prompts))]
        each = zip(prompts, params, names, strict=True)
        return [self.engine.prepare(Request(prompt, p, name=name, **others)) for prompt, p, name in each]

    def _completions(self, sequences: list[Sequence], on_step: OnStep) -> Finished:
        index = {sequence: i for i, sequence in enumerate(sequences)}
        for sequence, piece in self.engine.run(sequences, on_step):
            if piece is None:
                yield index[sequence], sequence.completion

    def stream(
        self, prompt: Prompt, params: Single = None, conversation: Earlier = None
    ) -> Generator[str, None, Completion]:
        """Continue one prompt, as pieces of text; joined they are the completion's text.

        With a `conversation` the prompt is its next turn. The generator's return value is the `Completion`. A
        generator that is closed gives its room back at once. Raises like `generate`.
        """
        asked = Request(prompt, SamplingParams() if params is None else params, conversation)
        return self._pieces(self.engine.prepare(asked))

    def _pieces(self, sequence: Sequence) -> Generator[str, None, Completion]:
        for _, piece in self.engine.run([sequence]):
            if piece is not None:
                yield piece
        return sequence.completion

    def chat(
        self, messages: Messages, params: Single = None, conversation: Earlier = None, **how: Any
    ) -> Completion:
        """The answer to messages, which are dictionaries with a `role` and a `content` each.

        With a `conversation` they are its next turn. Further arguments are those of `chat_request`.
        """
        sequence = self.engine.prepare(self.chat_request(messages, params, conversation, **how))
        self._run(sequence)
        return sequence.completion

    def stream_chat(
        self, messages: Messages, params: Single = None, conversation: Earlier = None, **how: Any
    ) -> Generator[str, None, Completion]:
        """The same as pieces of text; like `stream`."""
        return self._pieces(self.engine.prepare(self.chat_request(messages, params, conversation, **how)))

    def chat_request(
        self, messages: Messages, params: Single = None, conversation: Earlier = None, **how: Any
    ) -> Request:
        """What `chat` asks of the engine: a prompt of token ids.

        Args:
            messages: the whole conversation, or its next turn if there is a `conversation`.
            params: as for `generate`.
            conversation: whose cache is carried on.
            chat_format: "llama2", "llama3", "zephyr", "chatml", "vicuna", or one of the checkpoint's named
                templates; None for what `LLM` was given, or else the checkpoint's own.
            variables: what else its template is to know, as `date_string`.
            name: what errors call the messages.

        Raises:
            ConfigError: there is no such template, or it fails.
            RequestError: a message is malformed, or the template refuses them.
        """
        from minipyramid.formats.chat import request_of

        return request_of(self.chat_format, messages, params, conversation, **how)

    def chat_format(self, name: str | None = None) -> "ChatFormat":
        """How the checkpoint is talked to; each is made once, for it keeps a process that renders."""
        from minipyramid.formats.chat import ChatFormat

        expect_type("chat_format", name, (str, type(None)), "a name")
        if name not in self._chat_formats:
            made = ChatFormat(self.directory, self.engine.need_tokenizer(), name)
            self._chat_formats[name] = made
        return self._chat_formats[name]

    def prefill(self, prompts: Prompts, conversation: Earlier = None) -> list[Prefill]:
        """Compute prompts and tell what the cache holds of each, and the logits of the token that comes next.

        With a `conversation`, which is updated, one prompt is its next turn, to which nothing is replied.
        """
        listed, prefills = request.as_list(prompts), []
        if conversation and len(listed) != 1:
            raise RequestError(f"{len(listed)} prompts are given for one conversation; give one")
        defaults = [SamplingParams()] * len(listed)
        for sequence in self._prepare(listed, defaults, conversation=conversation, continuation=[]):
            logits, kept = self._run_to_logits(sequence), sequence.completion
            prefills.append(Prefill(logits[0], kept.kept_positions, kept.kv_lengths))
        return prefills

    def score(self, prompt: Prompt, continuation: Prompt, conversation: Earlier = None) -> list[float]:
        """Log-probability (nats) of each token of a continuation, from the prompt's cache and earlier tokens.

        The prompt is pruned as for generating so many tokens; what is scored is given, so nothing of it is
        dropped.
        """
        ids = self.engine.encode(continuation, "the continuation", continues=True)
        logits = self.logits(prompt, ids, conversation)[:-1]  # [T, vocab_size]
        target = torch.tensor(ids, device=logits.device)[:, None]
        scores: list[float] = logits.log_softmax(-1).gather(1, target)[:, 0].tolist()
        return scores

    def logits(self, prompt: Prompt, continuation: list[int], conversation: Earlier = None) -> Tensor:
        """Logits of what may follow the prompt and each token of a continuation.  [1 + T, vocab_size]

        A `conversation` is left as it is.
        """
        to_score = request.check_ids(continuation, "the continuation", self.config)
        asked = Request(prompt, conversation=copy(conversation), continuation=to_score)
        return self._run_to_logits(self.engine.prepare(asked))

    def plan(self, prompt_lengths: Iterable[int], max_new_tokens: int) -> "Plan":
        """What prompts of these lengths (tokens) will hold; nothing is allotted."""
        from minipyramid.plan import Plan

        return Plan.of(self.engine.planner, prompt_lengths, max_new_tokens)

    def _run_to_logits(self, sequence: Sequence) -> Tensor:
        """Run what generates nothing; returns the logits after the prompt and each token to score."""
        self._run(sequence)
        if sequence.logits is None:
            raise RequestError(f"{sequence.request.name} was cancelled before it was computed; ask again")
        return sequence.logits.clone()  # which may be changed, for it is made outside inference mode

    def _run(self, sequence: Sequence) -> None:
        for _ in self.engine.run([sequence]):
            pass
