"""The process that renders chat templates: a line of JSON in, a line of JSON out, until its input ends.

A template comes with a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from touching
anything, but not from running for ever or from filling the memory; a process can be given a limit, and ended.
It is run as a file (`minipyramid/formats/templates.py` does) and imports nothing of this package.
"""

import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_MEMORY = 512 << 20  # bytes; rendering a long conversation takes some 50 MiB
MOST_TEXT = 16 << 20  # characters, several times the longest context there is
MOST_WORDS = 300  # characters of a template's own words in an error


class Refused(TemplateError):
    """A template's own `raise_exception`: these messages are not what it is for."""


class Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for rendering it is not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class CheckedNamespace(Namespace):
    """jinja2's, without names that lead into Python's own attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def refuse(message: object) -> None:
    """A template calls it `raise_exception`."""
    raise Refused(str(message))


def as_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """jinja2's own `tojson` writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """In place of `dict`, which is a class and has attributes that lead out of the sandbox."""
    return dict(*args, **kwargs)


@lru_cache(maxsize=4)
def compiled(template: str) -> Template:
    """The environment is that for which templates on the hub are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": make_dict,
        "namespace": CheckedNamespace,
    }
    return environment.from_string(template)


def readable(error: Exception) -> str:
    """A template's own words for a terminal or a client: no control characters, and no more than a line."""
    words = " ".join(str(error)[: 2 * MOST_WORDS].split())
    return "".join(c if c.isprintable() else "?" for c in words)[:MOST_WORDS]


def answer(asked: dict[str, Any]) -> dict[str, str]:
    """The text, or what went wrong: `refused` by the template, or it `failed`."""
    try:
        template, variables = compiled(asked["template"]), asked["variables"]
        if variables is None:  # it was only to be checked
            return {"text": ""}
        parts, length = [], 0
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            if length > MOST_TEXT:
                return {"failed": f"writes more than {MOST_TEXT >> 20} million characters"}
        return {"text": "".join(parts)}
    except Refused as error:
        return {"refused": readable(error)}
    except MemoryError:
        return {"failed": f"needs more than {MOST_MEMORY >> 20} MiB"}
    except Exception as error:  # a template may raise whatever Python may
        return {"failed": f"fails ({type(error).__name__}: {readable(error)})"}


def main() -> None:
    """Render until the input ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not every system can; the limit in time holds everywhere
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
