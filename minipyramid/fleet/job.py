"""Ray Data reads lines, hands them to actors with an engine each, and writes files of records.

What is ours are the ends: lines become rows (`lines.py`), a batch of rows becomes records as
`minipyramid.batch` makes them, and a block of records becomes lines. Retries after a worker dies, and what a
resumed run leaves out, are Ray's: it notes the labels of a file's records before it writes the file and
confirms them afterwards, and what was not confirmed is taken away when a run is resumed.
"""

import json
import logging
from collections import deque
from inspect import signature
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink

from minipyramid import LLM, MiniPyramidError, RequestError, SamplingParams
from minipyramid.batch.job import describe
from minipyramid.batch.lines import Line
from minipyramid.engine import News
from minipyramid.errors import expect_type
from minipyramid.fleet.lines import Lines, files_of, line_of
from minipyramid.formats.huggingface import read_config
from minipyramid.hub import locate
from minipyramid.request import Sequence

log = logging.getLogger("minipyramid")
LINES_AT_ONCE = 64  # that a worker gets; more of them lose more when it dies
NOTES = "_finished"  # Ray's, in the target


def run(
    source: str | Path | list[str],
    target: str | Path,
    model: str | Path,
    *,
    workers: int = 1,
    params: SamplingParams | None = None,
    resume: bool = False,
    lines_at_once: int = LINES_AT_ONCE,
    cpus: float = 1,
    gpus: float = 0,
    **options: Any,
) -> None:
    """Generate for every line of the files of `source`; files of records are written into `target`.

    Args:
        source: a file with a JSON object on each line, a directory of them, or a list.
        target: a directory; notes of what is finished stand in it, too.
        model: a checkpoint's directory or a hub repository id, which every worker can reach.
        workers: engines.
        params: what lines do not say.
        resume: go on with a `target` that an earlier run has left; what it holds is not repeated.
        lines_at_once: lines that a worker gets at once.
        cpus, gpus: of each worker. Ray needs a CPU more, to read and to write.
        options: those of `LLM`.

    Raises:
        RequestError: a file cannot be read, or `target` holds records and is not to be resumed.
        CheckpointError, ConfigError: the model cannot be run, told before Ray starts anything.
    """
    params = SamplingParams() if params is None else params
    expect_type("params", params, SamplingParams, "SamplingParams")
    target = Path(target).absolute()
    if not resume and target.is_dir() and any(path.is_file() for path in target.rglob("*")):
        raise RequestError(f"{target} holds something already; resume it, or name another directory")
    check_model(model, options)
    files = files_of(source)
    if not ray.is_initialized():
        ray.init()
    there = ray.cluster_resources().get("CPU", 0)
    if workers * cpus >= there:  # a cluster may grow, so this is no error
        log.warning("minipyramid: the workers take all of %g CPUs, and Ray waits for one to read by", there)
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        "label", str(target / NOTES), delete_checkpoint_on_success=False
    )
    try:
        records = ray.data.read_datasource(Lines(files, lines_at_once)).map_batches(
            Worker,
            fn_constructor_args=(str(model), params, options),
            batch_size=lines_at_once,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus or None,
        )
        records.write_datasink(Records(str(target), file_format="jsonl"))
    finally:
        context.checkpoint_config = before


def check_model(model: str | Path, options: dict[str, Any]) -> None:
    """Raise what every worker would fail by, as far as it can be told without weights."""
    signature(LLM).bind(model, **options)
    read_config(locate(model, options.get("revision")), options.get("quantize"))


class Worker:
    """An actor with an engine; a batch of lines in, their records out."""

    def __init__(self, model: str, params: SamplingParams, options: dict[str, Any]) -> None:
        self.llm, self.params = LLM(model, **options), params

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Rows of lines; returns the label of each and what became of it."""
        labels = [str(label) for label in batch["label"]]
        rows = zip(labels, map(int, batch["number"]), batch["data"], strict=True)
        records = records_of(self.llm, [line_of(*row) for row in rows], self.params)
        told = [json.dumps(json.loads(label) | record) for label, record in zip(labels, records, strict=True)]
        return {"label": labels, "record": told}


def records_of(llm: LLM, lines: list[Line], params: SamplingParams) -> list[dict[str, Any]]:
    """What became of each line."""
    engine, news = llm.engine, deque[News]()
    records: list[dict[str, Any]] = [{} for _ in lines]
    running: dict[Sequence, int] = {}
    for i, line in enumerate(lines):
        try:
            sequence = engine.prepare(line.request(llm, params))
        except (MiniPyramidError, TypeError) as error:
            records[i] = {"error": str(error)}
        else:
            running[sequence] = i
            engine.submit(sequence, news)
    while running:
        engine.advance()
        while news:
            sequence, piece = news.popleft()
            if piece is None:
                i = running.pop(sequence)
                failed = {"error": str(sequence.error)} if sequence.error else None
                records[i] = failed or describe(sequence.completion, lines[i])
    return records


class Records(BlockBasedFileDatasink):
    """Writes the records alone."""

    def write_block_to_file(self, block: Any, file: Any) -> None:
        """A line for each."""
        for record in block.to_arrow().column("record").to_pylist():
            file.write(record.encode() + b"\n")
