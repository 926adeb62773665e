"""What a generation will hold, layer by layer, as a table with bars; without weights."""

import argparse
from pathlib import Path
from typing import Any

from minipyramid.cli.shapes import shape_config
from minipyramid.cli.terminal import readable
from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.eight_bits import with_kv_dtype
from minipyramid.errors import RequestError
from minipyramid.formats.huggingface import read_config
from minipyramid.hub import SHAPE, locate
from minipyramid.need import Planner
from minipyramid.plan import Plan
from minipyramid.policies import pick_policy
from minipyramid.sizes import parse_bytes
from minipyramid.tokenizer import load_tokenizer

BAR = 32  # characters of a layer that holds everything


def plan_of(args: argparse.Namespace, prompts: list[str], max_new_tokens: int) -> Plan:
    """Plan what the command line asks for; nothing but the configuration (and, for texts, the tokenizer) is
    read.

    Raises what loading would, and `RequestError` where neither texts nor `--prompt-tokens` are given.
    """
    if args.model.startswith(SHAPE):
        directory, config = Path(args.model), shape_config(args.model.removeprefix(SHAPE), args.quantize)
    else:
        directory = locate(args.model, args.revision)
        config = read_config(directory, args.quantize)
    config = with_kv_dtype(config, args.kv_dtype)
    lengths = [args.prompt_tokens] if args.prompt_tokens is not None else []
    if prompts:
        lengths += count_tokens(args, directory, config, prompts)
    if not lengths:
        raise RequestError("nothing to plan for; give a prompt or --prompt-tokens N")
    policy = pick_policy(args.policy, directory, config.num_hidden_layers)
    dtype = pick_dtype(args.dtype, config.dtype, pick_device(args.device))
    bytes_per_token = config.kv_bytes_per_token(dtype.itemsize)
    return Plan.of(Planner(config, policy, args.kv_budget, bytes_per_token), lengths, max_new_tokens)


def count_tokens(
    args: argparse.Namespace, directory: Path, config: ModelConfig, prompts: list[str]
) -> list[int]:
    """How many tokens each prompt has; `RequestError` where there is nothing to count them with."""
    if args.model.startswith(SHAPE):
        raise RequestError("a shape has no tokenizer to count a prompt with; give --prompt-tokens instead")
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if tokenizer is None:
        raise RequestError(
            f"{directory} has no tokenizer to count a prompt with; give --prompt-tokens instead"
        )
    if "" in prompts:
        raise RequestError("a prompt is empty; give at least one token")
    return [len(tokenizer.encode(prompt)) for prompt in prompts]


def as_dict(plan: Plan, kv_memory: str | None) -> dict[str, Any]:
    """The plan as `--json` prints it; lengths are of each sequence and layer."""
    figures = {
        "computed": plan.computed,
        "prompt_lengths": plan.at(0),
        "kv_lengths": plan.kv_lengths,
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_full": plan.kv_bytes_full,
        "kv_share": plan.kv_share,
        "votes_bytes": plan.votes_bytes,
        "slack_bytes": plan.slack_bytes,
    }
    return figures if kv_memory is None else {**figures, "max_batch": plan.max_batch(parse_bytes(kv_memory))}


def table(plan: Plan, kv_memory: str | None) -> str:
    """One line per layer, of all sequences together, and the sums.

    `computed` and `prompt` are tokens of the prompts: those that the layer computes, and those that it holds
    of them.
    """
    full = plan.kv_bytes_full // plan.bytes_per_token // plan.layers
    lines = [f"{'layer':>5} {'prompt':>8} {'held':>8} {'of full':>8} {'bytes':>10} {'computed':>9}  held"]
    by_layer = (zip(*lengths, strict=True) for lengths in (plan.at(0), plan.kv_lengths, plan.computed))
    layers = zip(*by_layer, strict=True)
    for i, (prompt, held, computed) in enumerate(layers):
        share = sum(held) / full
        size = readable(sum(held) * plan.bytes_per_token)
        bar = "█" * round(BAR * share)
        lines.append(f"{i:5} {sum(prompt):8} {sum(held):8} {share:8.1%} {size:>10} {sum(computed):9}  {bar}")
    lines.append(
        f"keys and values {readable(plan.kv_bytes)} of {readable(plan.kv_bytes_full)} ({plan.kv_share:.1%}), "
        f"votes {readable(plan.votes_bytes)}, slack {readable(plan.slack_bytes)}"
    )
    if kv_memory is not None:
        lines.append(
            f"{plan.max_batch(parse_bytes(kv_memory))} sequences like the largest fit into {kv_memory}"
        )
    return "\n".join(lines)
