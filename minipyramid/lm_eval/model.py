"""lm-evaluation-harness asks, and pruned caches answer.

The last token of a context is read behind its pruned cache, as `minipyramid.eval` does it. So the answer goes
through what the policy holds also where a policy computes the whole prompt, and where one token is asked for.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lm_eval.models  # noqa: F401  # the harness registers its own only while there is no other
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from minipyramid import LLM, BudgetError, ConfigError, Request, RequestError, SamplingParams
from minipyramid.request import Sequence

Scored = tuple[float, bool]  # log-likelihood, and whether each token is the likeliest
Pair = tuple[Any, list[int], list[int]]  # texts or None, ids of the context and of what follows

log = logging.getLogger(__name__)


@dataclass
class Held:
    """What the requests' caches held at their ends, all together."""

    requests: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    over_budget: int = 0  # that are too short for the budget, and ran without

    def add(self, other: "Held") -> None:
        """Count others, too."""
        self.requests += other.requests
        self.kv_bytes += other.kv_bytes
        self.kv_bytes_full += other.kv_bytes_full
        self.over_budget += other.over_budget

    @property
    def kv_share(self) -> float:
        """Of the full cache's bytes."""
        return self.kv_bytes / max(1, self.kv_bytes_full)


@register_model("minipyramid")
class MiniPyramidLM(TemplateLM):
    """A checkpoint under a policy.

    Args:
        pretrained: a checkpoint's directory or a hub repository id.
        policy, kv_budget, kv_memory, dtype, device, kv_dtype, quantize, revision, compile: those of
            `LLM`. A context that is too short for the budget runs without one, and `held` counts it.
        max_length: tokens of a context and what follows; longer contexts lose their beginning.
        max_gen_toks: generated, where a task names no number.
        rolling_context: tokens of context before what is scored of a text that is longer than `max_length`;
            half of that by default.
        batch_size, max_batch_size: of no effect, as many run together as fit into `kv_memory`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        policy: str = "auto",
        kv_budget: float | None = None,
        kv_memory: int | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        kv_dtype: str = "auto",
        quantize: str | None = None,
        revision: str | None = None,
        compile: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        rolling_context: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        self.without_budget = LLM(
            pretrained,
            policy=policy,
            kv_memory=kv_memory,
            dtype=dtype,
            device=device_of(device),
            kv_dtype=kv_dtype,
            quantize=quantize,
            revision=revision,
            compile=compile,
        )
        self.llm = self.without_budget
        if kv_budget is not None:
            self.llm = self.llm.under(policy, kv_budget=float(kv_budget), kv_memory=kv_memory)
        self.text = self.llm.engine.need_tokenizer()
        context = self.llm.config.max_position_embeddings
        self.max_length = context if max_length is None else int(max_length)
        if not 2 <= self.max_length <= context:
            raise ConfigError(f"max_length is {max_length}, expected 2 to the context of {context}")
        half = self.max_length // 2
        self.rolling_context = half if rolling_context is None else int(rolling_context)
        if not 1 <= self.rolling_context < self.max_length:  # something must be left to score
            raise ConfigError(f"rolling_context is {rolling_context}, expected 1 to {self.max_length - 1}")
        if self.prefix_token_id < 0:
            problem = "the checkpoint names no token that begins or ends a text"
            raise ConfigError(f"{problem}, and the harness puts one before a text; add it to config.json")
        self.max_gen_toks = int(max_gen_toks)
        self.pretrained = pretrained
        self.held = Held()

    # --- what the harness reads ---

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        ends = self.llm.config.eos_token_ids
        return ends[0] if ends else self.text.bos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text: the beginning, or else the end of another."""
        return self.text.bos_id if self.text.bos_id >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For its cache of rendered requests."""
        return self.pretrained.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its scores."""
        told = {**vars(self.held), "kv_share": self.held.kv_share}
        return {f"minipyramid_{name}": value for name, value in told.items()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, which begins with a beginning-of-text token once, or not at all."""
        ids, begin = self.text.encode(string), [self.text.bos_id]
        while ids[:1] == begin:
            ids = ids[1:]
        with_begin = self.text.add_bos if add_special_tokens is None else add_special_tokens
        return begin + ids if with_begin else ids

    # --- what it asks ---

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; nothing stands before a first window, so it prunes nothing."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            # A window is one less than what fits, for the last token of its context is read by itself.
            rolling = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length - 1, self.rolling_context
            )
            of_text = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[Scored]:
        """Of each continuation, given its context."""
        asked = []
        for _texts, context, following in requests:
            if not following or len(following) >= self.max_length:
                raise RequestError(
                    f"a continuation has {len(following)} tokens, expected 1 to {self.max_length - 1}"
                )
            kept = context[-(self.max_length - len(following)) :]
            prompt, read = (kept[:-1], kept[-1:]) if len(kept) > 1 else (kept, [])
            asked.append(Request(prompt, continuation=read + following, name="a context"))
        scores: dict[int, Scored] = {}
        for i, sequence in self._run(asked):
            following = requests[i][2]
            if sequence.logits is None:
                raise RequestError("a context was cancelled; evaluate again")
            logprobs = sequence.logits[-len(following) - 1 : -1].log_softmax(-1)  # [T, vocab_size]
            sequence.logits = None  # of many requests they would fill the memory
            target = torch.tensor(following, device=logprobs.device)
            score = float(logprobs.gather(1, target[:, None]).sum())
            scores[i] = (score, bool((logprobs.argmax(-1) == target).all()))
        return [scores[i] for i in range(len(requests))]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the stop texts."""
        asked = []
        for context, how in (request.args for request in requests):
            params = sampling_of(dict(how), self.max_gen_toks)
            room = self.max_length - params.max_new_tokens
            if room < 1:
                raise RequestError(
                    f"max_gen_toks leaves no room in max_length = {self.max_length}; ask for less"
                )
            asked.append(Request(self.tok_encode(context)[-room:], params, name="a context"))
        texts = {i: sequence.completion.text for i, sequence in self._run(asked)}
        return [texts[i] for i in range(len(asked))]

    def _run(self, requests: list[Request]) -> Iterable[tuple[int, Sequence]]:
        """All of them, each with its index as it ends; tells what they held."""
        held = Held()
        budgeted: dict[Sequence, int] = {}
        short: dict[Sequence, int] = {}
        for i, request in enumerate(requests):
            try:
                budgeted[self.llm.engine.prepare(request)] = i
            except BudgetError:
                short[self.without_budget.engine.prepare(request)] = i
        held.over_budget = len(short)
        for llm, index in ((self.llm, budgeted), (self.without_budget, short)):
            for sequence, piece in llm.engine.run(list(index)):
                if piece is None:
                    done = sequence.completion
                    held.add(Held(requests=1, kv_bytes=done.kv_bytes, kv_bytes_full=done.kv_bytes_full))
                    yield index[sequence], sequence
        self.held.add(held)
        share = f"{held.kv_bytes} bytes of {held.kv_bytes_full}, {held.kv_share:.1%}"
        over = f"; {held.over_budget} were too short for the budget" if held.over_budget else ""
        # The harness shows warnings alone, and these figures belong beside its scores.
        log.warning("minipyramid: %d requests held %s%s", held.requests, share, over)


def device_of(given: str | None) -> str:
    """What `LLM` is asked for; the harness's command line asks for CUDA by itself, whether there is any."""
    return given if given and (torch.cuda.is_available() or not given.startswith("cuda")) else "auto"


def sampling_of(how: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """A task's generation settings; one that is not known here is refused."""
    until = how.pop("until", None) or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    new = how.pop("max_gen_toks", how.pop("max_new_tokens", max_gen_toks))
    sampled = how.pop("do_sample", None)
    temperature = how.pop("temperature", 0.0 if not sampled else 1.0) or 0.0
    given = {
        name: how.pop(name)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
        if name in how
    }
    if how:
        raise RequestError(
            f"a task's generation_kwargs have {', '.join(how)}, which are not known; leave them out"
        )
    greedy = sampled is False
    return SamplingParams(new, 0.0 if greedy else temperature, stop=tuple(stop), **given)
