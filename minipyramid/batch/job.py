"""A file of prompts through the engine: read as needed, written as finished.

Lines are prepared a little ahead of those that run, so the engine always has some to choose from, and no
more of the file is in memory. A line that cannot be served becomes a record with its `error`, and the rest
goes on. One that fails while it runs, which may be for want of memory just then, is tried once more.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipyramid import LLM, Completion, MiniPyramidError, RequestError, SamplingParams
from minipyramid.batch.ids import Ids
from minipyramid.batch.lines import Line, read_lines
from minipyramid.batch.output import Output
from minipyramid.engine import News, OnStep
from minipyramid.errors import expect_type
from minipyramid.request import Sequence

AHEAD = 64  # lines that wait for the engine's room


@dataclass
class Counts:
    """What became of the lines of a file."""

    finished: int = 0
    failed: int = 0  # whose record is an error
    skipped: int = 0  # that an earlier run had written


def run(
    llm: LLM,
    source: str | Path,
    target: str | Path,
    params: SamplingParams | None = None,
    *,
    resume: bool = False,
    strict: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = None,
) -> Counts:
    """Generate for every line of `source`, and append a record for each to `target`.

    Args:
        llm: what generates; others may use it meanwhile.
        source: a JSON object on each line: `id`, one of `prompt`, `messages` and `token_ids`, and fields of
            `SamplingParams`.
        target: where the records go, in the order in which they are finished.
        params: what lines do not say.
        resume: go on with a `target` that an earlier run has left; what it holds is not repeated.
        strict: check all lines before the first is generated.
        stop: asked after every step; once it is true nothing more is done, and the rest is for `resume`.
        on_step: called with the scheduler after every step.

    Raises:
        RequestError: a file cannot be read or written, or, if `strict`, a line is wrong.
    """
    source, target = Path(source), Path(target)
    params = SamplingParams() if params is None else params
    expect_type("params", params, SamplingParams, "SamplingParams")
    expect_type("llm", llm, LLM, "an LLM")
    if target.exists() and source.exists() and target.samefile(source):
        raise RequestError(f"{target} is the input as well; name another file for the output")
    if strict:
        check(llm, source, params, stop)
    with Ids() as ids, Output(target, resume, ids) as output:
        return Job(llm, params, output).run(mark_repeated(read_lines(source), ids), stop, on_step)


def mark_repeated(lines: Iterator[Line], ids: Ids) -> Iterator[Line]:
    """The lines; one whose id an earlier one has is told by its number."""
    for line in lines:
        repeated = not line.problem and not ids.add("read", line.label)
        yield line.repeated() if repeated else line


def check(llm: LLM, source: Path, params: SamplingParams, stop: Callable[[], bool]) -> None:
    """Raise what is wrong with the first line that cannot be served."""
    with Ids() as ids:
        for line in mark_repeated(read_lines(source), ids):
            if stop():
                return
            try:
                llm.engine.prepare(line.request(llm, params))
            except (MiniPyramidError, TypeError) as error:
                named = f"line {line.number}"  # a field's own error does not know its line
                told = str(error) if named in str(error) else f"{named}: {error}"
                raise RequestError(told) from error


class Job:
    """What runs and waits of one file."""

    def __init__(self, llm: LLM, params: SamplingParams, output: Output) -> None:
        self.llm, self.params, self.output = llm, params, output
        self.counts = Counts()
        self.lines: dict[Sequence, Line] = {}  # of all that wait and run
        self.news: deque[News] = deque()
        self.failed: set[int] = set()  # numbers of lines that have failed once while they ran

    def run(self, lines: Iterator[Line], stop: Callable[[], bool], on_step: OnStep) -> Counts:
        """Until all lines have their record, or it is to stop."""
        engine = self.llm.engine
        try:
            while not stop():
                self.take(lines, stop)
                if not self.lines:
                    break
                self.step()
                self.write_finished()
                if on_step:
                    on_step(engine.scheduler)
        finally:
            for sequence in self.lines:
                engine.cancel(sequence)
        return self.counts

    def step(self) -> None:
        """A step; if it is broken off, each that ran has an error, and its line is tried again."""
        try:
            self.llm.engine.advance()
        except Exception:
            if not self.news:  # nothing ran, so it would fail for ever
                raise

    def take(self, lines: Iterator[Line], stop: Callable[[], bool]) -> None:
        """Prepare lines until enough of them wait."""
        ahead = sum(sequence.row is None for sequence in self.lines)
        while ahead < AHEAD and not stop():
            line = next(lines, None)
            if line is None:
                return
            if self.output.ids.written(line.label):
                self.counts.skipped += 1
                continue
            ahead += self.submit(line)

    def submit(self, line: Line) -> bool:
        """Let a line wait for room; returns whether it does, and has not become an error."""
        try:
            sequence = self.llm.engine.prepare(line.request(self.llm, self.params))
        except (MiniPyramidError, TypeError) as error:
            self.write_error(line, error)
            return False
        self.lines[sequence] = line
        self.llm.engine.submit(sequence, self.news)
        return True

    def write_finished(self) -> None:
        """A record for each that has ended."""
        while self.news:
            sequence, piece = self.news.popleft()
            if piece is not None:
                continue
            line = self.lines.pop(sequence)
            if sequence.error and line.number not in self.failed:
                self.failed.add(line.number)
                self.submit(line)
            elif sequence.error:
                self.failed.discard(line.number)
                self.write_error(line, sequence.error)
            else:
                self.output.append(line.label | describe(sequence.completion, line))
                self.counts.finished += 1

    def write_error(self, line: Line, error: Exception) -> None:
        """What is wrong, in place of a text."""
        self.output.append(line.label | {"error": str(error)})
        self.counts.failed += 1


def describe(done: Completion, line: Line) -> dict[str, Any]:
    """What a record says of a prompt that was continued; ids, too, where it was given by ids."""
    record: dict[str, Any] = {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(done.prompt_token_ids),
        "new_tokens": len(done.token_ids),
        "kv_bytes": done.kv_bytes,
    }
    if "token_ids" in line.values:
        record["token_ids"] = done.token_ids
    if done.logprobs is not None:
        record["logprobs"] = done.logprobs
    return record
