"""The engine: requests in, tokens out, through the one decode loop of the project.

A request becomes a `Sequence` that knows beforehand how much cache it will need. The scheduler starts as many
as fit, their prompts are computed, and then every step computes one token of each running sequence. When a
sequence's last token is chosen it takes one more step, which writes that token into the cache; then it leaves
its row.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minipyramid.cache import HeldTokens, Row, Span
from minipyramid.errors import RequestError, TokenizerError, expect_type, not_finite
from minipyramid.model import Model
from minipyramid.need import Planner, need_of
from minipyramid.policy import FULL, Policy
from minipyramid.request import Completion, Conversation, Prompt, Request, Sequence, check_ids
from minipyramid.sampling import SamplingParams, choose
from minipyramid.scheduler import Scheduler
from minipyramid.tokenizer import TextStream, Tokenizer

# Prompt tokens that are computed together, by device; they share one reading of the weights. On two AVX512
# cores, in float32, 16 prompts of 700 tokens took 2.6 s two at a time and 2.9 s one at a time (12 layers,
# hidden size 768, 45 % held), and 16 of 512 tokens of the embedded checkpoint 0.53 s four at a time for 0.68.
PROMPT_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 4096, "mps": 4096}

News = tuple[Sequence, str | None]  # a piece of a sequence's text, or None: it has ended
OnStep = Callable[[Scheduler], None] | None  # called after every step that generated tokens


class Engine:
    """Requests can be added at any time; `step` computes one token of each that runs.

    Several threads may use one engine. One of them steps at a time; the others wait until its step is
    over, for it has computed their sequences, too.

    Args:
        model: the decoder with its weights.
        tokenizer: None for token ids only.
        policy: what the layers compute and hold.
        kv_budget: share of the full cache that each request may hold at its end; None for `policy` as it is.
        kv_memory: bytes for the keys, values and votes of everything in flight; None for half of what is
            free.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        policy: Policy = FULL,
        kv_budget: float | None = None,
        kv_memory: int | str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.eos_ids = self.config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ())
        self.device, self.dtype = model.embed_tokens.device, model.embed_tokens.dtype
        self.scheduler = Scheduler(self.config, self.dtype, self.device, kv_memory)
        self.planner = Planner(self.config, policy, kv_budget, self.scheduler.bytes_per_token)
        # Guards `_stepping`, and taking from `_cancelled` and `_news`; not held during a step.
        self._step_over = threading.Condition()
        self._stepping = 0  # the thread that is in a step
        self._cancelled: deque[Sequence] = deque()
        self._news: deque[News] = deque()  # of what was added by `add`

    # --- what callers do ---

    def add(self, request: Request) -> Sequence:
        """Take a request; it starts as soon as there is room, and what is new of it is put into its `news`.

        Raises:
            BudgetError: `kv_budget` cannot be reached for the prompt's length.
            RequestError: the prompt is empty, too long, not of this vocabulary, or needs more than
                `kv_memory`.
            TokenizerError: a text is given to a checkpoint without a readable tokenizer.
        """
        sequence = self.prepare(request)
        self.submit(sequence, self._news)
        return sequence

    def step(self) -> list[News]:
        """Compute one token of every running sequence, and start what has room.

        Returns what is new of all that was added by `add` since `step` was last called, whichever thread has
        computed it; one that has ended with its `error` set has failed, and has a part of its text, or none.
        Where another thread is in a step, this call waits for its end.
        """
        self.advance()
        with self._step_over:  # so that `cancel` does not take pieces away meanwhile
            return [self._news.popleft() for _ in range(len(self._news))]

    def cancel(self, sequence: Sequence) -> None:
        """Give its row back at once, or after the step that is being computed.

        Then it has `ended`, and `step` no longer reports it.
        """
        expect_type("sequence", sequence, Sequence, "what Engine.add has returned")
        with self._step_over:
            self._cancelled.append(sequence)
            if not self._stepping:
                self._release_cancelled()

    def run(self, sequences: list[Sequence], on_step: OnStep = None) -> Iterator[News]:
        """Submit prepared sequences and step until all have ended; closing it cancels those that are left."""
        news: deque[News] = deque()
        left = len(sequences)
        try:
            for sequence in sequences:
                self.submit(sequence, news)
            while left:
                before = self.scheduler.generated
                self.advance()
                while news:
                    sequence, piece = news.popleft()
                    if sequence.error:
                        raise sequence.error
                    left -= 1 if piece is None else 0
                    yield sequence, piece
                if on_step and self.scheduler.generated > before:
                    on_step(self.scheduler)
        finally:
            for sequence in sequences:
                if sequence.news is news:  # it was submitted here
                    self.cancel(sequence)

    # --- from a request to a sequence ---

    def prepare(self, request: Request) -> Sequence:
        """Check a request, tokenise its prompt, and plan it; raises as `add` does, and starts nothing."""
        expect_type("request", request, Request, "a Request")
        params, name, to_score = request.params, request.name, request.continuation
        expect_type("params", params, SamplingParams, "SamplingParams or a list of them")
        conversation = Conversation() if request.conversation is None else request.conversation
        expect_type("conversation", conversation, Conversation, "a Conversation")
        # As it stands now, so that a turn that is added meanwhile, or twice, cannot mix with this one.
        earlier = conversation.held
        earlier_ids = check_ids(conversation.token_ids, "the conversation's token_ids", self.config)
        expect_type("the conversation's held", earlier, (HeldTokens, type(None)), "HeldTokens or None")
        if earlier and earlier.config is not self.config:
            raise RequestError(
                "the conversation holds another LLM's cache, or is a deep copy; begin a new one"
            )
        ids = self.encode(request.prompt, name, continues=bool(earlier_ids))
        new_tokens = params.max_new_tokens if to_score is None else len(to_score)
        self.config.check_length(len(earlier_ids) + len(ids), new_tokens, name)
        if params.stop:
            self.need_tokenizer()
        policy, layers = self.planner.policy_for(len(ids), new_tokens), self.config.num_hidden_layers
        if to_score is None:
            need = need_of(policy, len(ids), new_tokens, layers)
        else:  # nothing of what is scored is dropped
            check_ids(to_score, "the continuation", self.config)
            need = need_of(policy, len(ids), 0, layers).plus([new_tokens] * layers)
        if earlier:
            need = need.plus(earlier.lengths)
        # A space before the first word belongs to the text only if something stands before it.
        at_start = self.tokenizer is not None and not self.tokenizer.decode(earlier_ids + ids, continues=True)
        stream = TextStream(self.tokenizer, params.stop, at_start=at_start)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        generator = torch.Generator(self.device).manual_seed(seed)
        completion = Completion(ids, [] if params.logprobs else None)
        eos_ids = () if params.ignore_eos else self.eos_ids + request.ends
        how = (policy, need, completion, earlier, earlier_ids, eos_ids, stream, generator)
        sequence = Sequence(request, ids, new_tokens, *how, prepared_by=self)
        if params.repetition_penalty != 1:
            sequence.seen_ids = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
            sequence.seen_ids[self._tensor(earlier_ids + ids)] = True
        self.scheduler.check(sequence)
        return sequence

    def submit(self, sequence: Sequence, news: deque[News]) -> None:
        """Let a prepared sequence wait until it can start; what is new of it goes into `news`."""
        expect_type("sequence", sequence, Sequence, "what Engine.prepare has returned")
        if sequence.prepared_by is not self:
            raise RequestError(f"{sequence.request.name} was taken before or is another engine's; prepare it")
        sequence.prepared_by, sequence.news = None, news
        self.scheduler.waiting.append(sequence)  # safe beside a step, which finds it now or the next time

    def encode(self, text_or_ids: Prompt, name: str, continues: bool = False) -> list[int]:
        """Token ids of a text or of ids; neither may be empty."""
        ids = text_or_ids
        if isinstance(text_or_ids, str) and text_or_ids:
            ids = self.need_tokenizer().encode(text_or_ids, name, continues=continues)
        if isinstance(ids, (str, list)) and not ids:
            raise RequestError(f"{name} is empty; give at least one token")
        return check_ids(ids, name, self.config)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, where something cannot be done without one."""
        if self.tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer; give token ids, from Python or by --batch")
        return self.tokenizer

    # --- one step ---

    def advance(self) -> None:
        """One step, by this thread or, where another is in one, by that; news goes where `submit` says."""
        with self._step_over:
            if self._stepping == threading.get_ident():
                raise RequestError("a policy cannot ask the engine that is running it; give it another LLM")
            if self._stepping:
                self._step_over.wait()
                return
            self._stepping = threading.get_ident()
        try:
            # Around all of it: slabs allotted outside inference mode cost a compiled step another graph.
            with torch.inference_mode():
                self._decode()
                self._start(self.scheduler.admit())
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            with self._step_over:
                try:
                    self._release_cancelled()
                finally:
                    self._stepping = 0
                    self._step_over.notify_all()

    def _decode(self) -> None:
        """The decode loop's body: one token of every running sequence."""
        running = self.scheduler.in_order()
        if not running:
            return
        began = time.perf_counter()
        # Also for those whose last token is chosen: it belongs in the cache, as the plan counts it.
        tokens = self._tensor([sequence.last_token for sequence in running])
        x = self.model.step(tokens, self.scheduler.caches)  # [B, hidden_size]
        self.scheduler.generated += len(running)
        finishing = [sequence for sequence in running if sequence.completion.finish_reason]
        left = [i for i, sequence in enumerate(running) if not sequence.completion.finish_reason]
        if left:
            self._choose(self.model.logits(x[left]), [running[i] for i in left])
        # Timed after the transfer of tokens, for a device runs asynchronously.
        seconds = time.perf_counter() - began
        for sequence in running:
            sequence.completion.decode_s += seconds
        for sequence in finishing:
            self._end(sequence)

    def _start(self, admitted: list[Sequence]) -> None:
        """Compute the prompts of those that start, some at a time, and choose each one's first token."""
        left = []
        for sequence in admitted:
            if sequence.row:
                left.append((sequence, sequence.row))
            else:  # there was no memory after all
                self._let_go(sequence)
        while left:
            together = left
            if len(self.scheduler.running) > 1:
                from minipyramid.beginnings import next_together  # a single prompt does without

                most = PROMPT_TOKENS_AT_ONCE[self.device.type]
                together = next_together(left, self.scheduler.running.values(), most)
            self._try_prompts(together)
            left = left[len(together) :]

    def _try_prompts(self, together: list[tuple[Sequence, Row]]) -> None:
        """Compute some prompts; where that fails (a policy may raise), each by itself, so one fails alone."""
        try:
            self._compute_prompts(together)
        except Exception as error:
            for sequence, row in together:
                if len(together) == 1:
                    sequence.error = error
                    self._let_go(sequence)
                elif not (sequence.ended or sequence.completion.token_ids):  # the others have theirs
                    sequence.completion.shared_tokens = 0
                    self._try_prompts([(sequence, row)])

    def _compute_prompts(self, together: list[tuple[Sequence, Row]]) -> None:
        began = time.perf_counter()
        for sequence, row in together:
            # What a row already holds of its prompt was computed for another one that begins alike.
            if not sequence.completion.shared_tokens:
                row.adopt(sequence.earlier)
        to_compute = [s.prompt[s.completion.shared_tokens :] for s, _ in together]
        ids = self._tensor([token for tokens in to_compute for token in tokens])
        spans = [
            Span(row, len(tokens), s.policy, seed=sum(s.prompt), looked_over=self._look_over(s, row))
            for (s, row), tokens in zip(together, to_compute, strict=True)
        ]
        logits = self.model.logits(self.model.extend(ids, spans))  # [B, vocab_size]
        writes = [i for i, (sequence, _) in enumerate(together) if sequence.request.continuation is None]
        if writes:
            self._choose(logits[writes], [together[i][0] for i in writes])
        seconds = time.perf_counter() - began
        for (sequence, row), of_one in zip(together, logits, strict=True):
            sequence.completion.prefill_s = seconds
            if sequence.request.continuation is not None:
                self._score(sequence, row, sequence.request.continuation, of_one[None])

    def _look_over(self, sequence: Sequence, row: Row) -> list[Tensor] | None:
        """The scores that the policy gives a prompt in an extra pass, which uses the sequence's row."""

        def compute(ids: list[int], policy: Policy) -> None:
            from minipyramid.extra_pass import run_extra  # most policies read a prompt once

            run_extra(self.model, sequence, row, self._tensor(ids), policy)

        return sequence.policy.look_over(sequence.prompt, compute)

    def _score(self, sequence: Sequence, row: Row, ids: list[int], logits: Tensor) -> None:
        """Append a continuation, and note the logits after the prompt and after each of its tokens."""
        if ids:
            x = self.model.extend(self._tensor(ids), [Span(row, len(ids))], all_positions=True)
            logits = torch.cat((logits, self.model.logits(x)))
        if not logits.isfinite().all():
            raise not_finite(self.dtype)
        sequence.logits = logits  # [1 + len(ids), vocab_size]
        self._end(sequence)

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> None:
        """The next token of every sequence, in one transfer from the device; logits [B, vocab_size]."""
        chosen = choose(logits, [(s.request.params, s.generator, s.seen_ids) for s in sequences])
        logprobs: list[float | None] = [None] * len(sequences)
        if any(sequence.request.params.logprobs for sequence in sequences):
            logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
        told = torch.stack((chosen, logits.isfinite().all(-1)), 1).tolist()
        for sequence, (token, is_finite), logprob in zip(sequences, told, logprobs, strict=True):
            if not is_finite:  # its neighbours go on
                sequence.error = not_finite(self.dtype)
                self._let_go(sequence)
                continue
            piece = sequence.accept(token, logprob)
            if piece:
                sequence.news.append((sequence, piece))

    def _end(self, sequence: Sequence) -> None:
        """Note what it holds, and let it go."""
        if sequence.row:
            sequence.note_held(sequence.row)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Give its row back, unless it has ended or was never submitted here."""
        if self.scheduler.retire(sequence):
            sequence.news.append((sequence, None))

    @torch.inference_mode()
    def _release_cancelled(self) -> None:
        while self._cancelled:
            sequence = self._cancelled.popleft()
            self._let_go(sequence)
            if sequence.news is self._news:
                for piece in [piece for piece in self._news if piece[0] is sequence]:
                    self._news.remove(piece)

    def _fail(self, error: BaseException) -> None:
        """A step that broke off leaves rows half written, so those that ran end; the others still wait."""
        for sequence in self.scheduler.drop_all():
            sequence.error = RequestError(f"a step was broken off ({type(error).__name__}); ask again")
            sequence.news.append((sequence, None))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)
