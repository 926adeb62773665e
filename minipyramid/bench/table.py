"""All methods measured, a row of medians for each."""

import argparse
import statistics
from typing import Any

import torch

from minipyramid.bench.floors import Rates, best_of, floors, measure_rates, weight_bytes
from minipyramid.bench.machine import machine_line, machine_of
from minipyramid.bench.methods import check_budgets, planners_of
from minipyramid.bench.models import config_of, device_and_dtype, plain_kv_bytes
from minipyramid.bench.work import make_work
from minipyramid.bench.workers import take_turns
from minipyramid.cli.terminal import readable
from minipyramid.need import Planner
from minipyramid.policy import FULL

COLUMNS = (
    "method batch prompt_tokens new_tokens prefill_s decode_s total_s tokens_per_s kv_bytes kv_bytes_aux "
    "kv_share peak_rss_mb prefill_floor_share decode_floor_share"
).split()


def measure(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Run all methods in turns; returns what `--json` prints. What cannot be is refused before that."""
    config = config_of(args)
    device, dtype = device_and_dtype(args, config)
    planners = planners_of(args)
    work = make_work(args, config)
    check_budgets(planners, work)
    if args.versus:
        planners[args.versus] = Planner(config, FULL, None, plain_kv_bytes(config, dtype))
    seen: list[Rates] = []
    # Others may use a CPU as well, so it may be quicker in another moment. A GPU is full of models by then.
    each_turn = device.type == "cpu"
    if not each_turn:
        seen.append(measure_rates(dtype, device))
        torch.cuda.empty_cache()  # for the models, which other processes load
    # Each worker would find out for itself which format is quicker, and two might differ.
    argv = [*argv, "--dtype", str(dtype).removeprefix("torch.")]

    def before_turn() -> None:
        if each_turn:
            seen.append(measure_rates(dtype, device))

    figures = take_turns(list(planners), args.runs, argv, before_turn)
    rates = best_of(seen)
    rows = []
    for name, planner in planners.items():
        runs = figures[name]
        row = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        prompt_floor, decode_floor = floors(planner, work, weight_bytes(config, dtype.itemsize), rates)
        row |= {
            "method": name,
            "batch": len(work.prompts),
            "prompt_tokens": max(map(len, work.prompts)),
            "new_tokens": max(work.new_tokens),
            "total_s": row["prefill_s"] + row["decode_s"],
            "tokens_per_s": work.generated / (row["prefill_s"] + row["decode_s"]),
            "prefill_floor_share": prompt_floor / row["prefill_s"],
            "decode_floor_share": decode_floor / row["decode_s"],
        }
        rows.append({column: row[column] for column in COLUMNS})
    return {"rows": rows, "machine": machine_of(dtype, device, rates)}


def table(result: dict[str, Any]) -> str:
    """The rows for people."""
    width = max(24, *(len(row["method"]) for row in result["rows"]))
    lines = [
        machine_line(result["machine"]),
        f"{'method':{width}} {'prompt s':>9} {'decode s':>9} {'tokens/s':>9} {'KV held':>10} {'share':>6} "
        f"{'peak MB':>8} {'floor: prompt':>13} {'decode':>7}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['method']:{width}} {row['prefill_s']:9.2f} {row['decode_s']:9.2f} "
            f"{row['tokens_per_s']:9.1f} {readable(row['kv_bytes']):>10} {row['kv_share']:6.1%} "
            f"{row['peak_rss_mb']:8.0f} {row['prefill_floor_share']:13.2f} {row['decode_floor_share']:7.2f}"
        )
    return "\n".join(lines)
