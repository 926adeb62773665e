"""The lines of files as rows of Ray Data, each under the label that its record will have.

Ray's own reader of texts takes a file whole, ends the job at a byte that is no UTF-8, and breaks lines where
JSON does not (at U+2028, say).
"""

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from ray.data.datasource import FileBasedDatasource

from minipyramid.batch.ids import Ids
from minipyramid.batch.lines import Line, numbered, read_line, read_lines
from minipyramid.errors import RequestError

SCHEMA = pyarrow.schema(
    [("label", pyarrow.string()), ("number", pyarrow.int64()), ("data", pyarrow.large_binary())]
)
Place = tuple[str, int]  # a file, and the number of a line


class Lines(FileBasedDatasource):
    """Rows of `SCHEMA`. By the label, JSON, Ray tells them apart, so each has another.

    Args:
        files: their absolute paths.
        lines_at_once: rows of a block, which is what a worker gets at once.
    """

    def __init__(self, files: list[str], lines_at_once: int) -> None:
        super().__init__(files)
        self.lines_at_once, self.repeated = lines_at_once, repeated(files)

    def _read_stream(self, f: Any, path: str) -> Iterator[Any]:
        lines = numbered(io.BufferedReader(f))
        while some := list(islice(lines, self.lines_at_once)):
            rows = []
            for number, data in some:
                label = {"line": f"{path}:{number}"}
                line = read_line(number, data)
                if not line.problem and (path, number) not in self.repeated:
                    label = line.label
                rows.append({"label": json.dumps(label), "number": number, "data": data})
            yield pyarrow.Table.from_pylist(rows, SCHEMA)


def line_of(label: str, number: int, data: bytes | None) -> Line:
    """A row's line; where the label does not have its id, an earlier line has it."""
    line = read_line(number, data)
    return line if line.problem or "id" in json.loads(label) else line.repeated()


def repeated(files: list[str]) -> set[Place]:
    """Lines with the id of an earlier one. All files are read for it once, here, before anything runs."""
    with Ids() as ids:
        return {
            (file, line.number)
            for file in files
            for line in read_lines(Path(file))
            if not line.problem and not ids.add("read", line.label)
        }


def files_of(source: str | Path | list[str]) -> list[str]:
    """The files, and those of directories; absolute, as workers are in other directories.

    In a directory what begins with "." or "_" is left out, as are all files below it: notes, not lines.

    Raises `RequestError` where there is none.
    """
    files: list[Path] = []
    for path in map(Path, source if isinstance(source, list) else [source]):
        if not path.exists():
            raise RequestError(f"{path} does not exist; give files with a JSON object on each line")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [p for p in inside if not any(n.startswith((".", "_")) for n in p.relative_to(path).parts)]
    if not files:
        raise RequestError(f"{source} holds no files; give some with a JSON object on each line")
    return [str(path.absolute()) for path in files]
