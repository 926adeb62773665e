"""A book cut into sentences, and stretches of it that a story's facts are planted in.

Real prose is the harder place to find a fact in: its sentences share little with the facts, while made-up
ones repeat a few words over and over.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence

from minipyramid import RequestError

FEWEST_WORDS, MOST_WORDS = 3, 60  # of what counts as a sentence
BLANK_LINES = 10  # one line in so many is blank where blank lines part the paragraphs
# A sentence ends before a capital letter, though not behind a title or an initial ("Mr. H. G. Wells").
NO_TITLE = r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])"
END = re.compile(NO_TITLE + r"""([.!?]["'\u201d\u2019)]*) (?=["'\u201c\u2018(]*[A-Z])""")
PARAGRAPH_ENDS = tuple(".!?:;\"'\u201d\u2019)")  # a heading ends otherwise


def sentences(text: str) -> list[str]:
    """All sentences of a text in their order, each on one line; headings are left out.

    A shorter one stands together with the next, and what is longer than `MOST_WORDS` is left out: verse or a
    table, mostly.
    """
    lines = text.splitlines()
    wrapped = BLANK_LINES * sum(not line.strip() for line in lines) > len(lines)
    found, short = [], ""
    for paragraph in re.split(r"\n\s*\n", text) if wrapped else lines:
        if not paragraph.rstrip().endswith(PARAGRAPH_ENDS):
            continue
        for piece in END.sub(r"\1\n", " ".join(paragraph.split())).splitlines():
            short = f"{short} {piece}".lstrip()
            words = len(short.split())
            if words < FEWEST_WORDS:
                continue
            if words <= MOST_WORDS:
                found.append(short)
            short = ""
    return found


def stretch(
    book: Sequence[str], rng: random.Random, tokens: int, count: Callable[[str], int]
) -> Iterator[str]:
    """A book's sentences as they stand there, from one that is drawn so that `tokens` or more follow.

    Args:
        book: all of its sentences.
        count: tokens of a text.

    Raises `RequestError` where the whole book has fewer tokens.
    """
    last, left = len(book), tokens
    while left > 0:
        if last == 0:
            has = f"the text has {tokens - left} tokens in sentences"
            raise RequestError(f"{has}, expected {tokens} or more; give a longer text")
        last -= 1
        left -= count(book[last])
    for i in range(rng.randrange(last + 1), len(book)):
        yield book[i]
