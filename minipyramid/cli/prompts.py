"""The prompts of a command line."""

import argparse
import sys
from pathlib import Path

from minipyramid.cli.texts import read_at_most
from minipyramid.errors import RequestError

MOST_BYTES = 64 << 20  # of a prompt file; what is larger, or never ends, is no prompt


def read_prompts(args: argparse.Namespace, needed: bool = True) -> list[str]:
    """PROMPT, every --prompt and --prompt-file, in this order; with --lines each line of the file that is not
    blank.

    Raises `RequestError` where a file cannot be read, or where prompts are `needed` and there are none.
    """
    prompts: list[str] = ([args.prompt] if args.prompt is not None else []) + args.prompts
    lines = vars(args).get("lines", False)
    if lines and args.prompt_file is None:
        raise RequestError("--lines is for --prompt-file; give a file, or leave it out")
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
        # Not `splitlines`, which would also cut at a form feed.
        each = [line.removesuffix("\r") for line in text.split("\n")]
        prompts += [line for line in each if line.strip()] if lines else [text]
    if needed and not prompts:
        raise RequestError("no prompt; give one as an argument, with --prompt, or with --prompt-file")
    return prompts


def read_text(name: str) -> str:
    """A file's text, without a byte order mark; - is stdin.

    Raises `RequestError` where it is no text, or larger than `MOST_BYTES`.
    """
    told = f"--prompt-file {name}", "give a smaller one, or several"
    try:
        if name == "-":
            if sys.stdin is None:
                raise OSError("stdin is closed")
            data = read_at_most(sys.stdin.buffer, MOST_BYTES, *told)
        else:
            with Path(name).open("rb") as file:
                data = read_at_most(file, MOST_BYTES, *told)
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompt-file {name} cannot be read as UTF-8 text: {error}") from error
