"""What a comparison found, and the sentences and figures that the screen, the page and the plot share."""

from dataclasses import dataclass

from minipyramid.cli.terminal import readable
from minipyramid.demo.kept import Kept


@dataclass(frozen=True)
class Token:
    """A token's part of the text, which may be empty, and what to call it by itself."""

    text: str
    name: str


@dataclass(frozen=True)
class Side:
    """What one policy took and held for all prompts, and what it made of the first."""

    name: str
    prompt_s: float
    decode_s: float
    generated: int  # tokens
    kv_bytes: int
    kv_bytes_full: int  # what the full cache would hold
    right: int  # prompts whose known answer came
    token_ids: list[int]  # generated, up to the end of text
    tokens: list[Token]  # the same
    kept: Kept  # of the first prompt

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens, over all seconds."""
        return self.generated / (self.prompt_s + self.decode_s)


@dataclass(frozen=True)
class Picture:
    """Both sides, and the first prompt."""

    title: str
    tokens: list[Token]  # of the prompt
    newest: int  # tokens at the prompt's end that PyramidInfer keeps, for they vote; 0 for other policies
    sinks: int  # tokens at its beginning that PyramidInfer keeps, as far as there is room
    answer: str | None  # known to be right
    prompts: int
    full: Side
    pruned: Side

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self.pruned.kept.holders)


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first token in which two texts differ, one's end included; None if they are the same."""
    same = [a == b for a, b in zip(left, right, strict=False)]
    at = [*same, False].index(False)
    return at if at < max(len(left), len(right)) else None


def difference(picture: Picture) -> str:
    """The same as a sentence."""
    sides = (picture.full, picture.pruned)
    at = first_difference(*(side.token_ids for side in sides))
    if at is None:
        return "The texts differ nowhere."
    names = [repr(side.tokens[at].name) if at < len(side.tokens) else "its end" for side in sides]
    told = [f"{name} ({side.name})" for name, side in zip(names, sides, strict=True)]
    return f"The texts first differ at token {at}: {', '.join(told)}."


def figures(picture: Picture) -> list[tuple[str, str, str]]:
    """(what, of the full cache, of the other policy)"""
    sides = (picture.full, picture.pruned)
    rows = {
        "prompt, seconds": [f"{side.prompt_s:.2f}" for side in sides],
        "generation, seconds": [f"{side.decode_s:.2f}" for side in sides],
        "generated tokens/s, of all seconds": [f"{side.tokens_per_s:.1f}" for side in sides],
        "keys and values held": [readable(side.kv_bytes) for side in sides],
        "share of the full cache": [f"{side.kv_bytes / side.kv_bytes_full:.1%}" for side in sides],
    }
    if picture.answer is not None:
        rows["answers right"] = [f"{side.right} of {picture.prompts}" for side in sides]
    return [(name, full, pruned) for name, (full, pruned) in rows.items()]


def legend(picture: Picture) -> str:
    """What the layer that keeps the fewest tokens keeps, and what of it was no choice."""
    kept, n = picture.pruned.kept, len(picture.tokens)
    layer = kept.smallest
    count, row = kept.counts[layer], kept.holders[layer]
    name = "The last layer" if layer == picture.layers - 1 else f"Layer {layer}"
    if count == n:
        return f"{name} kept all of the prompt's {n} tokens."
    told = f"{name} kept {count} of the prompt's {n} tokens"
    by_all = sum(held == kept.heads for held in row)
    if picture.newest:
        newest = min(picture.newest, n)
        first = max(0, min(picture.sinks, count - newest))  # as far as there was room for them
        voted = count - newest - first
        parts = [f"the newest {newest}, which vote"]
        parts += [f"the first {first}"] if first else []
        parts += [f"{voted} that were voted for"] if voted else []
        told += f": {', '.join(parts)}"
    elif by_all < count:
        by_some = sum(0 < held < kept.heads for held in row)
        told += f" in each of its {kept.heads} heads: {by_all} in all of them, {by_some} in some"
    return f"{told}. No other layer holds less."


def computed_in_words(kept: Kept) -> str:
    """What the layers computed, beside what they kept."""
    if kept.computed == kept.counts:
        return "Each layer computed just the tokens that it kept."
    if min(kept.computed) == kept.computed[0]:
        return "Each layer computed all tokens of the prompt."
    return "The deeper layers computed fewer tokens of the prompt."
