"""Both sides of the comparison: the same weights in one process, one after the other, over the same prompts.

All prompts differ, and both sides generate equally many tokens (the end of text is passed over, and what
follows it is not shown). Only generated tokens count as throughput. It is one run of each and says what
happens; for how fast it is, `python -m minipyramid.bench` takes turns.
"""

import argparse
import time
from collections.abc import Collection
from pathlib import Path

import torch

from minipyramid import (
    LLM,
    BudgetError,
    Completion,
    Policy,
    PyramidConfig,
    RequestError,
    SamplingParams,
    TokenizerError,
)
from minipyramid.cli.terminal import LoadingLine, RunningLine, set_threads
from minipyramid.demo.cases import Case, first_of_each, names, tell
from minipyramid.demo.kept import Kept
from minipyramid.demo.picture import Picture, Prompt, Side, Text
from minipyramid.demo.tokens import tokens_of
from minipyramid.policies import POLICIES, SPLIT, class_of
from minipyramid.policies.own import Own
from minipyramid.policies.profile import replaced_positions
from minipyramid.tokenizer import Tokenizer

KV_BUDGET = 0.5  # where neither a policy nor a budget is given


def compare(args: argparse.Namespace, given: list[str]) -> Picture:
    """Load once, run both sides, and collect what is drawn."""
    set_threads(args.threads)
    budget = KV_BUDGET if args.policy is None and args.kv_budget is None else args.kv_budget
    asked = "auto" if args.policy is None else args.policy
    with LoadingLine(quiet=False) as line:
        pruned = LLM(
            args.model,
            policy=asked,
            kv_budget=budget,
            dtype=args.dtype,
            quantize=args.quantize,
            progress=line.update,
        )
    tokenizer = pruned.tokenizer
    if tokenizer is None:
        raise TokenizerError(
            f"{args.model} has no tokenizer.model or tokenizer.json, and the prompts here are texts; add it"
        )
    full = pruned.under("full")
    cases = [Case(prompt) for prompt in given] or tell(args, pruned, tokenizer)
    called = names(len(cases))
    ids = [tokenizer.encode(case.prompt, name) for case, name in zip(cases, called, strict=True)]
    for name, prompt in zip(called, ids, strict=True):
        pruned.config.check_length(len(prompt), args.max_new_tokens, name)
    try:
        plan = pruned.plan(map(len, ids), args.max_new_tokens)
    except BudgetError as error:
        default = "" if budget == args.kv_budget else f" (the demo's default is {budget})"
        raise RequestError(f"{error}; give that as --kv-budget{default}, or longer prompts") from error
    policy = plan.requests[0][0]
    for llm in (full, pruned):
        # All of it once, for what runs first is slower: with a shorter warm-up a prompt of 494 tokens took
        # 0.07 s under a profile, and 0.03 when it came again.
        llm.generate(ids, SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True))
    newest, sinks = 0, 0
    if isinstance(policy, PyramidConfig):
        newest, sinks = policy.recent_tokens(len(ids[0])), policy.streamingllm_sink_len
    answers = [case.answer for case in cases]
    questions = len(cases) - answers.count(None)
    asking = f" ({questions} with a question)" if questions else ""
    machine = f"{str(pruned.dtype).removeprefix('torch.')} on {pruned.device.type}"
    return Picture(
        title=f"{Path(args.model).name}, {pruned.config.num_hidden_layers} layers, "
        f"{machine}, threads: {torch.get_num_threads()}; "
        f"prompts: {len(cases)}{asking}, of {sum(map(len, ids))} tokens; "
        f"generated: {args.max_new_tokens} tokens each",
        prompts=[
            Prompt(called[i], tokens_of(tokenizer, cases[i].prompt, ids[i], []), answers[i])
            for i in first_of_each(cases)
        ],
        newest=newest,
        sinks=sinks,
        questions=questions,
        full=run_side("full cache", full, tokenizer, cases, args.max_new_tokens),
        pruned=run_side(side_name(policy, asked), pruned, tokenizer, cases, args.max_new_tokens),
    )


def side_name(policy: Policy, asked: str) -> str:
    """What a policy is called beside the full cache; `asked` is what it was asked for by."""
    if asked.endswith(SPLIT):
        return asked
    kind = type(policy.policy if isinstance(policy, Own) else policy)
    named = [name for name in POLICIES if class_of(name) is kind]
    return named[0] if named else kind.__name__.lower()


def run_side(name: str, llm: LLM, tokenizer: Tokenizer, cases: list[Case], new_tokens: int) -> Side:
    """Continue all prompts, and add up what it took and held."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)  # so that both do equal work
    with RunningLine(quiet=False) as line:
        began = time.perf_counter()
        done = dict(llm.completions([case.prompt for case in cases], params, line.update))
        total = time.perf_counter() - began
    completions = [done[i] for i in range(len(cases))]
    # Prompts that were computed together share their seconds, which count once.
    prompt_s = sum({completion.prefill_s for completion in completions})
    eos, first = llm.engine.eos_ids, completions[0]
    right = [case.answer is not None and done[i].text.startswith(case.answer) for i, case in enumerate(cases)]
    N, layers = len(first.prompt_token_ids), llm.config.num_hidden_layers
    plan = llm.plan([N], new_tokens)
    replaced = replaced_positions(plan.requests[0][0], N, layers)
    return Side(
        name=name,
        prompt_s=prompt_s,
        decode_s=total - prompt_s,
        generated=sum(len(completion.token_ids) for completion in completions),
        kv_bytes=sum(completion.kv_bytes for completion in completions),
        kv_bytes_full=sum(completion.kv_bytes_full for completion in completions),
        right=sum(right),
        texts=[text_of(tokenizer, cases[i].prompt, completions[i], eos) for i in first_of_each(cases)],
        kept=Kept.of(first.kept_positions, llm.config.num_key_value_heads, plan.computed[0], replaced),
    )


def text_of(tokenizer: Tokenizer, prompt: str, completion: Completion, eos: Collection[int]) -> Text:
    """What a completion generated, without what follows the end of text."""
    ids, given = completion.token_ids, completion.prompt_token_ids
    ended = [i for i, token in enumerate(ids) if token in eos]
    ids = ids[: ended[0] + 1 if ended else None]
    return Text(ids, tokens_of(tokenizer, prompt, given, ids)[len(given) :])
