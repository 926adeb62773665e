"""Ray Data reads lines, hands them to actors with an engine each, and writes files of records.

What is ours are the two ends: a batch of lines becomes records as `minipyramid.batch` makes them, and a block
of records becomes lines. Retries after a worker dies, and what a resumed run leaves out, are Ray's. Ray tells
rows apart by one column, and that is the line itself, so two lines of one file must differ.
"""

import json
from collections import deque
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink

from minipyramid import LLM, MiniPyramidError, SamplingParams
from minipyramid.batch.job import describe
from minipyramid.batch.lines import read_line
from minipyramid.engine import News
from minipyramid.request import Sequence

BEGINNING = 200  # characters of a line that has no id
LINES_AT_ONCE = 64  # that a worker gets; more of them lose more when it dies


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
        target: a directory.
        model: a checkpoint's directory or a hub repository id, which every worker can reach.
        workers: engines.
        params: what lines do not say.
        resume: leave out the lines that an earlier run with this `target` has finished. It keeps note of
            them in `target`.checkpoint, which is gone when a run has finished all.
        lines_at_once: lines that a worker gets at once.
        cpus, gpus: of each worker.
        options: those of `LLM`.
    """
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    notes = f"{Path(target).absolute()}.checkpoint"
    context.checkpoint_config = CheckpointConfig("text", notes) if resume else None
    try:
        lines = ray.data.read_text(sources(source))
        records = lines.map_batches(
            Worker,
            fn_constructor_args=(str(model), params or SamplingParams(), options),
            batch_size=lines_at_once,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus or None,
        )
        records.write_datasink(Records(str(Path(target).absolute()), file_format="jsonl"))
    finally:
        context.checkpoint_config = before


def sources(source: str | Path | list[str]) -> list[str]:
    """The files as Ray wants them, for its workers have other working directories."""
    return [str(Path(name).absolute()) for name in (source if isinstance(source, list) else [source])]


class Worker:
    """An actor with an engine; a batch of lines in, their records out."""

    def __init__(self, model: str, params: SamplingParams, options: dict[str, Any]) -> None:
        self.llm, self.params = LLM(model, **options), params

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Lines under `text`, by which Ray tells them apart; what became of them under `record`."""
        texts = [str(text) for text in batch["text"]]
        return {"text": texts, "record": records_of(self.llm, texts, self.params)}


def records_of(llm: LLM, texts: list[str], params: SamplingParams) -> list[str]:
    """The record of each line; one without an id is told by its beginning, for its number is not known."""
    engine, news = llm.engine, deque[News]()
    lines = [read_line(number, text.encode()) for number, text in enumerate(texts)]
    labels = [{"line": texts[line.number][:BEGINNING]} if line.problem else line.label for line in lines]
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
    return [json.dumps(label | record) for label, record in zip(labels, records, strict=True)]


class Records(BlockBasedFileDatasink):
    """Writes the records alone."""

    def write_block_to_file(self, block: Any, file: Any) -> None:
        """A line for each."""
        for record in block.to_arrow().column("record").to_pylist():
            file.write(record.encode() + b"\n")
