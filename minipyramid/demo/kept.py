"""What the layers computed and kept of a prompt: the data that every picture draws.

PyramidInfer prunes between layers, so there a layer keeps a part of what the layer before it kept. Other
policies choose anew in every layer, and some of them in every key/value head. So the data is a number for
each layer and token: how many of the layer's heads hold the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from minipyramid.cache import Positions

SHADES = 4  # in which a picture tells how many heads hold a token; the darkest is all of them


@dataclass(frozen=True)
class Kept:
    """What the layers computed and kept of one prompt."""

    heads: int  # key/value heads of a layer
    holders: list[list[int]]  # [layer][position] how many heads hold the token
    computed: list[int]  # [layer] tokens of the prompt
    stand_ins: frozenset[int] = frozenset()  # layers of which one more slot stands for what was dropped

    @classmethod
    def of(
        cls,
        kept_positions: list[Positions],
        heads: int,
        computed: list[int],
        replaced: Sequence[int | None] = (),
    ) -> "Kept":
        """From a completion, of whose positions those of generated tokens are left out.

        So are those whose slot a stand-in has taken: `replaced` is what `Profile.replaced_positions` says.
        """
        holders = []
        for positions, lost in zip_longest(kept_positions, replaced):
            row = [0] * computed[0]  # layer 0 computes the whole prompt
            for head in by_head(positions, heads):
                for position in head:
                    if position < len(row) and position != lost:
                        row[position] += 1
            holders.append(row)
        stand_ins = frozenset(layer for layer, lost in enumerate(replaced) if lost is not None)
        return cls(heads, holders, computed, stand_ins)

    @property
    def counts(self) -> list[int]:
        """Tokens of the prompt that each layer keeps; all heads of a layer keep equally many."""
        return [sum(row) // self.heads for row in self.holders]

    @property
    def smallest(self) -> int:
        """The layer that keeps the fewest tokens; of several the last."""
        counts = self.counts
        return max(layer for layer, count in enumerate(counts) if count == min(counts))

    @property
    def heads_differ(self) -> bool:
        """Whether some heads of a layer hold a token that its others do not."""
        return any(0 < count < self.heads for row in self.holders for count in row)

    @property
    def columns(self) -> list[tuple[int, ...]]:
        """The same by token.  [position][layer]"""
        return list(zip(*self.holders, strict=True))

    def shade(self, count: int) -> int:
        """How dark a token is drawn where `count` heads of a layer hold it: 0 to `SHADES`, which is all."""
        return 1 + (SHADES - 1) * count // self.heads if count else 0

    def where(self, column: tuple[int, ...]) -> str:
        """Which layers keep a token, in words; `column` is its entry of `columns`."""
        by_all = [layer for layer, count in enumerate(column) if count == self.heads]
        by_some = [layer for layer, count in enumerate(column) if 0 < count < self.heads]
        parts = []
        if by_all:
            of = "layer" if len(column) == 1 else "layers"
            parts.append(f"kept by {len(by_all)} of {len(column)} {of}, in {layers_in_words(by_all)}")
        if by_some:
            parts.append(f"kept by some heads of {layers_in_words(by_some)}")
        return "; ".join(parts) or "kept by no layer"


def by_head(positions: Positions, heads: int) -> list[list[int]]:
    """The positions that each head of a layer holds; where they are told once, all heads hold the same."""
    of_heads = [head for head in positions if isinstance(head, list)]
    return of_heads or [[position for position in positions if isinstance(position, int)]] * heads


def layers_in_words(layers: list[int]) -> str:
    """Ascending layers, such as "layers 0 to 2 and 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    listed = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
    return ("layer " if len(layers) == 1 else "layers ") + listed
