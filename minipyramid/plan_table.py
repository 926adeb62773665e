"""What a generation will hold, layer by layer, as a table with bars; from a configuration alone, without weights."""

import argparse
from pathlib import Path
from typing import Any

from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.errors import RequestError
from minipyramid.hub import locate
from minipyramid.plan import Plan, Policy, make_plan, pick_pyramid
from minipyramid.request import parse_bytes
from minipyramid.shapes import PREFIX, shape_config
from minipyramid.tokenizer import Tokenizer

BAR = 32  # characters of a layer that holds everything
CONFIGURATION = "*config.json pyramid.json added_tokens.json tokenizer.model"


def plan_of(args: argparse.Namespace, prompts: list[str], max_new_tokens: int) -> Plan:
    """Plan what the command line asks for; nothing but the configuration (and, for texts, the tokenizer) is read.

    Raises what loading would, and `RequestError` where neither texts nor `--prompt-tokens` are given.
    """
    if args.model.startswith(PREFIX):
        directory, config = Path(args.model), shape_config(args.model.removeprefix(PREFIX))
    else:
        directory = locate(args.model, args.revision, wanted=CONFIGURATION)
        config = ModelConfig.load(directory)
    lengths = [args.prompt_tokens] if args.prompt_tokens is not None else []
    if prompts:
        if args.model.startswith(PREFIX):
            raise RequestError("a shape has no tokenizer to count a prompt with; give --prompt-tokens instead")
        if not (directory / "tokenizer.model").is_file():
            raise RequestError(
                f"{directory} has no tokenizer.model to count a prompt with; give --prompt-tokens instead"
            )
        if "" in prompts:
            raise RequestError("a prompt is empty; give at least one token")
        lengths += [len(Tokenizer(directory, config.vocab_size).encode(prompt)) for prompt in prompts]
    if not lengths:
        raise RequestError("nothing to plan for; give a prompt or --prompt-tokens N")
    policy = Policy(pick_pyramid(args.pyramid, directory, config.num_hidden_layers), args.kv_budget)
    dtype = pick_dtype(args.dtype, config.dtype, pick_device(args.device))
    return make_plan(config, policy, lengths, max_new_tokens, dtype)


def as_dict(plan: Plan, kv_memory: str | None) -> dict[str, Any]:
    """The plan as `--json` prints it; lengths are of each sequence and layer."""
    figures = {
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
    """One line per layer, of all sequences together, and the sums."""
    full = plan.kv_bytes_full // plan.bytes_per_token // plan.layers
    lines = [f"{'layer':>5} {'prompt':>8} {'held':>8} {'of full':>8} {'bytes':>10}"]
    layers = zip(*plan.at(0), strict=True), zip(*plan.kv_lengths, strict=True)
    for i, (prompt, held) in enumerate(zip(*layers, strict=True)):
        share = sum(held) / full
        size = readable(sum(held) * plan.bytes_per_token)
        lines.append(f"{i:5} {sum(prompt):8} {sum(held):8} {share:8.1%} {size:>10}  {'█' * round(BAR * share)}")
    lines.append(
        f"keys and values {readable(plan.kv_bytes)} of {readable(plan.kv_bytes_full)} ({plan.kv_share:.1%}), "
        f"votes {readable(plan.votes_bytes)}, slack {readable(plan.slack_bytes)}"
    )
    if kv_memory is not None:
        lines.append(f"{plan.max_batch(parse_bytes(kv_memory))} sequences like the largest fit into {kv_memory}")
    return "\n".join(lines)


def readable(size: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{size:.0f} B"
