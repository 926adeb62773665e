"""A line of the input: its id, and the request that it asks for.

A line is a JSON object with an `id`, one of `prompt`, `messages` and `token_ids`, and any fields of
`SamplingParams`. A field of another name is an error, for a misspelt one would be left out without a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from minipyramid import LLM, Request, RequestError, SamplingParams
from minipyramid.cli.json_input import json_object
from minipyramid.errors import expect_type, nearest

PROMPTS = ("prompt", "messages", "token_ids")
SAMPLING = tuple(field.name for field in fields(SamplingParams))
KNOWN = ("id", *PROMPTS, *SAMPLING)
MOST_BYTES = 64 << 20  # of a line; what is longer, or never ends, is no prompt
LONGEST_ID = 1024  # characters

Label = dict[str, Any]  # how a record names its line: by its id, or by its number where it has none


def label_of(record: dict[str, Any]) -> Label:
    """What a record names its line by."""
    return {name: record[name] for name in ("id", "line") if name in record}


def is_record(given: dict[str, Any]) -> bool:
    """Whether it names its line as a record does, and says what became of it."""
    names = list(label_of(given).values())
    return len(names) == 1 and type(names[0]) in (str, int) and ("text" in given or "error" in given)


@dataclass(frozen=True)
class Line:
    """A line that is not blank; `problem` says why its record names it by its number."""

    number: int  # from 1
    values: dict[str, Any]
    problem: str = ""

    @property
    def label(self) -> Label:
        """How its record names it."""
        return {"line": self.number} if self.problem else {"id": self.values["id"]}

    def by_number(self, problem: str) -> "Line":
        """The same line, whose record names it by its number."""
        return replace(self, problem=f"line {self.number} {problem}")

    def repeated(self) -> "Line":
        """The same line, whose id an earlier one has."""
        return self.by_number(f"has the id {self.values['id']!r} of an earlier line; give each its own")

    def request(self, llm: LLM, defaults: SamplingParams) -> Request:
        """What it asks for; raises `RequestError`, or `TypeError` for a field of the wrong type."""
        name, values = f"line {self.number}", self.values
        if self.problem:
            raise RequestError(self.problem)
        for field in values:
            if field not in KNOWN:
                raise RequestError(f"{name} has the field {field!r:.60}; {nearest(field, KNOWN)}")
        given = [field for field in PROMPTS if field in values]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise RequestError(f"{name} has {found}; give one of {', '.join(PROMPTS)}")
        params = replace(defaults, **{field: values[field] for field in SAMPLING if field in values})
        if given == ["messages"]:
            return llm.chat_request(values["messages"], params, name=name)
        kind = str if given == ["prompt"] else list
        expect_type(
            f"{given[0]} of {name}", values[given[0]], kind, "a text" if kind is str else "a list of ids"
        )
        return Request(values[given[0]], params, name=name)


def read_lines(source: Path) -> Iterator[Line]:
    """Lines as they are needed, so that a file may be larger than memory; blank ones are left out."""
    try:
        with source.open("rb") as file:
            for number, data in numbered(file):
                yield read_line(number, data)
    except (OSError, ValueError) as error:  # a name may be no file's name
        raise RequestError(f"{source} cannot be read: {error}") from error


def numbered(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None in place of the bytes of one that is too long."""
    number = 0
    while data := file.readline(MOST_BYTES):
        number += 1
        too_long = len(data) == MOST_BYTES and not data.endswith(b"\n")
        while too_long and (rest := file.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
            pass  # the rest of it is skipped, whatever it is
        if too_long or data.strip():
            yield number, None if too_long else data


def read_line(number: int, data: bytes | None) -> Line:
    """A line as far as its id; without its bytes it is one that is too long."""
    if data is None:
        return Line(number, {}).by_number(f"is longer than {MOST_BYTES >> 20} MiB; give less")
    try:
        line = Line(number, json_object(data, f"line {number}"))
    except RequestError as error:
        return Line(number, {}, str(error))
    name = line.values.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        found = "no id" if "id" not in line.values else f"the id {name!r:.60}"
        return line.by_number(f"has {found}; give a text or a whole number")
    if len(str(name)) > LONGEST_ID:
        return line.by_number(f"has an id of more than {LONGEST_ID} characters; give a shorter one")
    return line
