"""The methods that are this engine: which policies are compared, and one run of each.

Rows stand in this order: `full`; every policy that is named, as it is; with a budget S every named policy but
`full` and `auto` once more, held to the budget, as `<name> S`; and `budget S`, which is `auto` held to it.
`--fixed` and `--compile` run the last of these in another way, as `fixed <name>` and `compiled <name>`, where
the name is `budget` if there is one.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minipyramid import RequestError, SamplingParams, compiled
from minipyramid.bench.models import config_of, device_and_dtype, load_llm
from minipyramid.bench.work import Work, make_work
from minipyramid.errors import MiniPyramidError
from minipyramid.need import Planner
from minipyramid.policies import pick_policy

Run = Callable[[], dict[str, Any]]  # does the whole work once, and returns its figures


@dataclass(frozen=True)
class Method:
    """A policy, and how it is run."""

    policy: str  # as `pick_policy` takes it
    kv_budget: float | None = None
    fixed: int = 0  # prompts of a batch that ends before the next begins; 0 for the engine's own batches
    compiled: bool = False


def our_methods(args: argparse.Namespace) -> dict[str, Method]:
    """The methods by the names of their rows, in the order of the table."""
    named = list(dict.fromkeys(name.strip() for name in args.policy.split(",")))
    methods = {name: Method(name) for name in ["full", *named]}
    last, share = list(methods)[-1], args.kv_budget
    if share is not None:
        solved = [name for name in named if name not in ("full", "auto")]
        methods |= {f"{name} {share}": Method(name, share) for name in solved}
        last = "budget"
        methods[f"budget {share}"] = Method("auto", share)
    compared = list(methods.values())[-1]
    if args.fixed:
        methods[f"fixed {last}"] = replace(compared, fixed=args.fixed)
    if args.compile:
        methods[f"compiled {last}"] = replace(compared, compiled=True)
    return methods


def planners_of(args: argparse.Namespace) -> dict[str, Planner]:
    """What the methods will hold; no weights are loaded. Raises what `pick_policy` does."""
    config = config_of(args)
    _, dtype = device_and_dtype(args, config)
    bytes_per_token = config.kv_bytes_per_token(dtype.itemsize)
    planners = {}
    for name, method in our_methods(args).items():
        policy = pick_policy(method.policy, Path(args.model), config.num_hidden_layers)
        planners[name] = Planner(config, policy, method.kv_budget, bytes_per_token)
    return planners


def check_budgets(planners: dict[str, Planner], work: Work) -> None:
    """Raise `RequestError` if a method cannot hold its budget at some length."""
    for name, planner in planners.items():
        try:
            for prompt_tokens, new_tokens in set(work.lengths):
                planner.policy_for(prompt_tokens, new_tokens)
        except MiniPyramidError as error:
            raise RequestError(f"{name!r} cannot be run: {error}") from error


def our_method(name: str, args: argparse.Namespace) -> Run:
    """Load the engine for one method."""
    method = our_methods(args)[name]
    llm = load_llm(args, method.policy, method.kv_budget)
    if method.compiled:
        compiled.compile_step(llm.model)
    work = make_work(args, llm.config)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.new_tokens]
    size = method.fixed or len(work.prompts)

    def run() -> dict[str, Any]:
        began, prefill = time.perf_counter(), 0.0
        all_completions = []
        for i in range(0, len(params), size):
            completions = llm.generate(work.prompts[i : i + size], params[i : i + size])
            all_completions += completions
            # Prompts that were computed together all tell the same time, which counts once.
            prefill += sum({completion.prefill_s for completion in completions})
        total = time.perf_counter() - began
        held = sum(completion.kv_bytes for completion in all_completions)
        plans = [llm.plan([prompt_tokens], new_tokens) for prompt_tokens, new_tokens in work.lengths]
        return {
            "prefill_s": prefill,
            "decode_s": total - prefill,
            "kv_bytes": held,
            "kv_bytes_aux": sum(plan.votes_bytes + plan.slack_bytes for plan in plans),
            "kv_share": held / sum(completion.kv_bytes_full for completion in all_completions),
        }

    return run
