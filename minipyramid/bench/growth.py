"""A decode step's time by what the cache holds: it should grow with the bytes that are read, no faster."""

import argparse
import math
import statistics
import time
from typing import Any

import torch

from minipyramid import LLM, RequestError
from minipyramid.bench.floors import best_of, measure_rates, weight_bytes
from minipyramid.bench.machine import machine_line, machine_of
from minipyramid.bench.models import load_llm
from minipyramid.cache import KVCache
from minipyramid.cli.terminal import readable
from minipyramid.formats.names import parameter_sources
from minipyramid.need import Need

HELD = (512, 1024, 2048, 4096, 8192)  # tokens of each sequence
STEPS = 12  # of which the median counts


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Time some steps with each number of tokens held; returns what `--json` prints."""
    llm = load_llm(args, "full", None)
    config, batch = llm.config, args.batch_size
    stored = [shape for parts in parameter_sources(config).values() for _, shape in parts]
    # Of the embedding only a few rows are read.
    weights = sum(map(math.prod, stored)) - config.vocab_size * config.hidden_size
    rows, measured = [], []
    for held in HELD:
        measured.append(measure_rates(llm.dtype, llm.device))
        cache = filled_cache(llm, batch, held)
        step_s = statistics.median(time_steps(llm, cache))
        read = (
            weight_bytes(config, llm.dtype.itemsize) * weights
            + cache.bytes_per_token * config.num_hidden_layers * batch * held
        )
        rows.append({"held_tokens": held, "batch": batch, "step_s": step_s, "read_bytes": read})
    rates = best_of(measured)
    for row in rows:
        row["floor_share"] = row["read_bytes"] / rates.bytes_per_s / row["step_s"]
    return {"rows": rows, "machine": machine_of(llm.dtype, llm.device, rates)}


def filled_cache(llm: LLM, batch: int, held: int) -> KVCache:
    """A cache that holds so many tokens in every layer, and has room for the steps.

    It holds zeros, for which a step takes as long. The prompts that they stand for are not computed, so they
    may be longer than the model's context. Raises `RequestError` where memory is short.
    """
    layers = llm.config.num_hidden_layers
    need = Need((held + STEPS,) * layers)
    try:
        cache = KVCache.allot(llm.config, [need] * batch, llm.dtype, llm.device)
    except RuntimeError as error:
        told = f"{batch} sequences of {held} tokens do not fit into memory"
        raise RequestError(f"{told}; give a smaller --batch-size") from error
    for _ in range(batch):
        row = cache.add_row()
        row.lengths, row.position = [held] * layers, held
    return cache


@torch.inference_mode()
def time_steps(llm: LLM, cache: KVCache) -> list[float]:
    """Seconds of each step, up to the choice of the next tokens."""
    tokens = torch.full((len(cache.rows),), 3, device=llm.device)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        llm.model.logits(llm.model.step(tokens, [cache])).argmax(-1).tolist()
        times.append(time.perf_counter() - began)
    return times


def growth_table(result: dict[str, Any]) -> str:
    """The rows for people."""
    lines = [
        machine_line(result["machine"]),
        f"{'tokens held':>11} {'batch':>5} {'step ms':>8} {'read':>10} {'ms per GiB':>10} {'floor':>6}",
    ]
    for row in result["rows"]:
        step_ms, read = 1e3 * row["step_s"], row["read_bytes"]
        lines.append(
            f"{row['held_tokens']:11} {row['batch']:5} {step_ms:8.1f} {readable(read):>10} "
            f"{step_ms / (read / 2**30):10.1f} {row['floor_share']:6.2f}"
        )
    return "\n".join(lines)
