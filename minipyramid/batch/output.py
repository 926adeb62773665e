"""The file of records: whole lines only, however the run that writes them ends.

A record is handed to the system before the next step, in one write but where a disk is full, so a run that is
killed leaves at most its last line torn. That one is dropped when the file is opened again, and its prompt is
asked again. (So is what the system had not yet put on the disk when the machine itself went down.)
"""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from minipyramid.batch.ids import Ids
from minipyramid.batch.lines import is_record, label_of
from minipyramid.cli.json_input import json_object
from minipyramid.errors import RequestError

BEGINNINGS = (b'{"id": ', b'{"line": ')  # of every record


class Output:
    """Appends records to a file, and knows which it held before.

    Raises `RequestError` where it cannot be written, is being written by another run, or holds something and
    is not to be resumed.
    """

    def __init__(self, path: Path, resume: bool, ids: Ids) -> None:
        self.path, self.ids = path, ids
        try:
            # Unbuffered: what is appended is the system's at once.
            self._file = path.open("ab", buffering=0)
            try:
                self._begin(resume)
            except BaseException:
                self._file.close()
                raise
        except BlockingIOError as error:
            raise RequestError(f"{path} is being written by another run; wait for it, or end it") from error
        except ValueError as error:
            raise RequestError(f"{str(path)!r} is no file's name ({error}); give another") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _begin(self, resume: bool) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, also by a kill
        self._whole = 0
        if not self.path.is_file():
            return  # a pipe, say, which has held nothing
        if not resume and self.path.stat().st_size:
            raise RequestError(f"{self.path} holds something already; resume it, or name another file")
        for record in self._whole_records():
            if not is_record(record):
                raise RequestError(f"{self.path} holds {record!r:.60}, which is no record; name another file")
            self.ids.add("written", label_of(record))
        self._file.truncate(self._whole)

    def _whole_records(self) -> Iterator[dict[str, Any]]:
        """Records up to the last line that has its end; `_whole` counts their bytes."""
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.endswith(b"\n"):
                    yield json_object(data, f"line {number} of {self.path}")
                    self._whole += len(data)  # after the caller has taken it for a record
                elif not any(data.startswith(begin[: len(data)]) for begin in BEGINNINGS):
                    raise RequestError(f"{self.path} ends with {data!r:.60}, no record; name another file")

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; where there is no room for all of it, none of it stays."""
        data = json.dumps(record).encode() + b"\n"
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            if self.path.is_file():
                self._file.truncate(self._whole)
            raise self._unwritable(error) from error
        self._whole += len(data)
        self.ids.add("written", label_of(record))

    def _unwritable(self, error: OSError) -> RequestError:
        return RequestError(f"{self.path} cannot be written ({error.strerror}); what it holds stays whole")

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()
