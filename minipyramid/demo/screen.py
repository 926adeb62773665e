"""The comparison as lines of text, for a terminal."""

import io
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from textwrap import wrap

from minipyramid.demo.picture import Picture, Token, computed_in_words, ending, figures, legend, outcome

BAR = 40  # characters of a layer that kept everything
EIGHTHS = " ▏▎▍▌▋▊▉"
COMPUTED = "░"  # of a bar: computed and not kept
INDENT = 4  # of what was generated
MOST_LINES = 60  # of the marked prompt; the page shows all of it
MOST_COLUMNS = 110  # longer lines are hard to read
INVERSE, UNDERLINED, PLAIN = "\x1b[7m", "\x1b[4m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """What can be shown: characters in a line, block characters, and inverse text."""

    width: int
    blocks: bool
    colour: bool


def style_of_stdout() -> Style:
    """What the terminal, or the file that stands for it, can show."""
    stream = sys.stdout or io.StringIO()  # there may be none
    try:
        f"█{EIGHTHS}{COMPUTED}".encode(stream.encoding or "ascii")
        blocks = True
    except (UnicodeEncodeError, LookupError):
        blocks = False
    colour = stream.isatty() and "NO_COLOR" not in os.environ
    return Style(min(MOST_COLUMNS, max(40, shutil.get_terminal_size().columns - 1)), blocks, colour)


def screen(picture: Picture, style: Style) -> list[str]:
    """Everything as lines of text."""
    full, pruned = picture.full, picture.pruned
    column = max(12, len(pruned.name))
    lines = [*wrap(picture.title, style.width), "", f"{'':34} {full.name:>{column}} {pruned.name:>{column}}"]
    lines += [f"{name:34} {left:>{column}} {right:>{column}}" for name, left, right in figures(picture)]
    for i in range(len(picture.prompts)):
        lines += ["", *text_lines(picture, i, style.width)]
    lines += ["", *layer_lines(picture, style)]
    kept = pruned.kept
    told = f"{computed_in_words(kept)} {legend(picture)} {marks_in_words(picture, style)}:"
    lines += ["", *wrap(told, style.width), ""]
    shares = [count / kept.heads for count in kept.holders[kept.smallest]]
    return lines + excerpt(marked([shown(token.text) for token in picture.tokens], shares, style))


def layer_lines(picture: Picture, style: Style) -> list[str]:
    """A line per layer, with a bar of what it kept and, where that was more, of what it computed."""
    kept, n = picture.pruned.kept, len(picture.tokens)
    counts, beyond = kept.counts, COMPUTED if style.blocks else "."
    differ = kept.computed != counts
    told = f" ({beyond} computed and not kept)" if differ else ""
    lines = [f"Kept of {picture.prompts[0].name}, layer by layer{told}:"]
    for layer, (count, computed) in enumerate(zip(counts, kept.computed, strict=True)):
        filled = bar(count / n, BAR, style.blocks)
        line = f"{layer:5} {count:7} {count / n:6.1%} {filled}"
        if differ:
            line += beyond * (round(computed / n * BAR) - len(filled)) + f" {computed} computed"
        lines.append(line)
    return lines


def bar(share: float, width: int, blocks: bool) -> str:
    """A share of `width` characters, to the nearest eighth of one, or in whole ones of ASCII."""
    if not blocks:
        return "#" * round(share * width)
    whole, rest = divmod(round(share * width * 8), 8)
    return "█" * whole + EIGHTHS[rest].strip()


def marks_in_words(picture: Picture, style: Style) -> str:
    """How the prompt below it is marked."""
    kept = picture.pruned.kept
    by_all, by_some = ("inverse", "underlined") if style.colour else ("in brackets", "in braces")
    if any(0 < count < kept.heads for count in kept.holders[kept.smallest]):
        return f"What all of its heads kept is {by_all}, what some of them kept {by_some}"
    return f"What it kept is {by_all}"


def marked(texts: list[str], shares: Sequence[float], style: Style) -> list[str]:
    """The text in lines, with marks around each run of kept tokens; without the marks they join to the text.

    shares [position] of the heads that keep a token: 1 has one kind of mark, less than 1 another, 0 none.
    """
    by_all, by_some = ((INVERSE, PLAIN), (UNDERLINED, PLAIN)) if style.colour else ("[]", "{}")
    whole = "".join(texts)
    marks = []  # of each character
    for text, share in zip(texts, shares, strict=True):
        mark = by_all if share == 1 else by_some if share > 0 else ("", "")
        marks += [mark] * len(text)
    lines = []
    for start, stop in breaks(whole, style.width):
        content = whole[start:stop].rstrip()
        line = ""
        for (begin, end), run in groupby(zip(marks[start:stop], content, strict=False), key=itemgetter(0)):
            line += begin + "".join(c for _, c in run) + end
        lines.append(line + whole[start + len(content) : stop])
    return lines


def text_lines(picture: Picture, prompt: int, width: int) -> list[str]:
    """Both texts of a prompt, one under the other."""
    lines = wrap(shown(ending(picture.prompts[prompt])), width)
    for side in (picture.full, picture.pruned):
        lines += [
            f"{side.name}:",
            *(" " * INDENT + line for line in wrapped(side.texts[prompt].tokens, width - INDENT)),
        ]
    return lines + wrap(outcome(picture, prompt), width)


def wrapped(tokens: list[Token], width: int) -> list[str]:
    """A text in lines."""
    text = "".join(shown(token.text) for token in tokens)
    return [text[start:end].strip() for start, end in breaks(text, width)]


def shown(text: str, spaces: str = "\n") -> str:
    """Without what would move a terminal's cursor, or turn the direction of what follows."""
    return "".join(c for c in text if c in spaces or c.isprintable())


def breaks(text: str, width: int) -> list[tuple[int, int]]:
    """(start, end) of each line, its space or line break included, so that the lines join to the text."""
    lines, start = [], 0
    while start < len(text):
        end = text.find("\n", start, start + width + 1) + 1
        if not end and len(text) - start > width:
            end = text.rfind(" ", start, start + width + 1) + 1
        end = end or min(start + width, len(text))
        lines.append((start, end))
        start = end
    return lines


def excerpt(lines: list[str]) -> list[str]:
    """The first and last lines of many, and how many were left out between them."""
    lines = [line.rstrip() for line in lines]
    if len(lines) <= MOST_LINES:
        return lines
    head, tail = MOST_LINES // 3, MOST_LINES - MOST_LINES // 3
    left_out = f"... ({len(lines) - head - tail} lines are left out here; --html FILE shows all) ..."
    return [*lines[:head], "", left_out, "", *lines[-tail:]]
