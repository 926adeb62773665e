"""Which lines were read and which have their record, for files with more ids than memory has room for."""

import json
import sqlite3
from types import TracebackType

from minipyramid.batch.lines import Label
from minipyramid.errors import RequestError

TABLES = ("read", "written")


class Ids:
    """Two sets of labels in a temporary file, which is SQLite's own and gone when it is closed."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")
        for table in TABLES:
            self._base.execute(f"CREATE TABLE {table} (label TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, table: str, label: Label) -> bool:
        """Note a label in one of `TABLES`; returns whether it was new there."""
        try:
            added = self._base.execute(f"INSERT OR IGNORE INTO {table} VALUES (?)", [json.dumps(label)])
        except sqlite3.Error as error:
            problem = f"the ids of the lines find no room in the temporary directory ({error})"
            raise RequestError(f"{problem}; set TMPDIR to another") from error
        return added.rowcount == 1

    def written(self, label: Label) -> bool:
        """Whether the line has its record."""
        found = self._base.execute("SELECT 1 FROM written WHERE label = ?", [json.dumps(label)])
        return found.fetchone() is not None

    def __enter__(self) -> "Ids":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._base.close()
