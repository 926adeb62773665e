"""A beginning that several prompts share is computed once.

The keys and values of a token depend on nothing that stands behind it. So a prompt takes those of its
beginning from the row of one that begins alike, has been computed and still runs, and only what follows is
computed. The rows stay apart: what is taken is copied, so the plan is the same.

This needs a policy that drops nothing. Under the others the newest tokens of a prompt decide what is held of
its beginning, and another prompt's newest would decide otherwise; there each prompt is computed whole. (Who
wants a beginning to be pruned by itself makes it the first turn of a `Conversation`.) Keys and values in 8
bits are not taken, either: a prompt looks at its own before they are rounded, and its text would change.
"""

from collections.abc import Iterable

import torch

from minipyramid.cache import Row
from minipyramid.policy import FULL
from minipyramid.request import Sequence

LEAST = 16  # tokens in common that are worth a copy
# And those for which the others wait until one prompt is computed. Two prompts that share a half took 0.92
# times as long whole as in turn with 64 + 64 tokens, 1.07 with 128 + 128, and 16 that share 1,000 of 1,020
# tokens 6.3 times (the embedded checkpoint, float32, one core; a larger model gains earlier).
WORTH_WAITING = 100


def next_together(
    left: list[tuple[Sequence, Row]], running: Iterable[Sequence], most: int
) -> list[tuple[Sequence, Row]]:
    """The first of those that are left to compute; the beginnings that they take are copied into their rows.

    As many as have at most `most` tokens to compute, and at least one. Of several that begin alike the first
    is computed before the others, which then take its beginning.
    """
    together: list[tuple[Sequence, Row]] = []
    for sequence, row in left:
        source, shared = longest(sequence, row, running)
        most -= len(sequence.prompt) - shared
        waits = may_take(sequence, row) and any(
            common(sequence.prompt, other.all_ids) >= shared + WORTH_WAITING
            for other, _ in together
            if other.request.continuation is None  # one that is scored ends at once, with its row
        )
        if together and (most < 0 or waits):
            break
        if source:
            copy_beginning(row, source, shared)
            sequence.completion.shared_tokens = shared
        together.append((sequence, row))
    return together


def copy_beginning(row: Row, source: Row, count: int) -> None:
    """Let a row hold the first `count` tokens of another, of which nothing was dropped, and nothing else."""
    for layer in range(len(row.lengths)):
        k, v = source.read(layer)
        row.write(layer, k[:, :count], v[:, :count], torch.arange(count, device=k.device))
    row.position = count


def longest(sequence: Sequence, row: Row, running: Iterable[Sequence]) -> tuple[Row | None, int]:
    """The row of the sequence that shares the longest beginning with this one, and how many tokens it is."""
    best, most = None, LEAST - 1
    for other in running if may_take(sequence, row) else ():
        source = other.row
        if source and source.lengths == [source.position] * len(source.lengths):  # nothing is dropped of it
            ids = other.all_ids[: source.position]
            shared = common(ids, sequence.prompt[:-1])  # the last token's logits are wanted
            if shared > most:
                best, most = source, shared
    return best, most if best else 0


def may_take(sequence: Sequence, row: Row) -> bool:
    """Whether it may take another's beginning: nothing is dropped, no turn before it, nothing in 8 bits."""
    return sequence.policy == FULL and not sequence.earlier and row.cache.config.kv_dtype == "auto"


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    alike = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(alike) if a != b), min(len(one), len(other)))
