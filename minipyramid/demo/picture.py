"""What a comparison found, and the sentences and figures that the screen, the page and the plot share."""

from dataclasses import dataclass

from minipyramid.cli.terminal import readable
from minipyramid.demo.kept import Kept, layers_in_words

ENDING = 30  # tokens of a prompt that are shown above what follows them


@dataclass(frozen=True)
class Token:
    """A token's part of the text, which may be empty, and what to call it by itself."""

    text: str
    name: str


@dataclass(frozen=True)
class Prompt:
    """A prompt that is shown."""

    name: str
    tokens: list[Token]
    answer: str | None  # known to be right


@dataclass(frozen=True)
class Text:
    """What one policy generated from a prompt, up to the end of text."""

    token_ids: list[int]
    tokens: list[Token]  # the same


@dataclass(frozen=True)
class Side:
    """What one policy took and held for all prompts, and what it made of those that are shown."""

    name: str
    prompt_s: float
    decode_s: float
    generated: int  # tokens
    kv_bytes: int
    kv_bytes_full: int  # what the full cache would hold
    right: int  # questions whose known answer came
    texts: list[Text]  # of each prompt that is shown
    kept: Kept  # of the first prompt

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens, over all seconds."""
        return self.generated / (self.prompt_s + self.decode_s)


@dataclass(frozen=True)
class Picture:
    """Both sides, and the prompts that are shown, of which what was kept of the first is drawn."""

    title: str
    prompts: list[Prompt]
    newest: int  # tokens at the prompt's end that PyramidInfer keeps, for they vote; 0 for other policies
    sinks: int  # tokens at its beginning that PyramidInfer keeps, as far as there is room
    questions: int  # of all prompts, those whose answer is known
    full: Side
    pruned: Side

    @property
    def tokens(self) -> list[Token]:
        """Of the prompt that is drawn."""
        return self.prompts[0].tokens

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self.pruned.kept.holders)


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first token in which two texts differ, one's end included; None if they are the same."""
    same = [a == b for a, b in zip(left, right, strict=False)]
    at = [*same, False].index(False)
    return at if at < max(len(left), len(right)) else None


def ending(prompt: Prompt) -> str:
    """What a prompt ends with, where both sides go on."""
    last = " ".join("".join(token.text for token in prompt.tokens[-ENDING:]).split())
    return f"{prompt.name.capitalize()} ends: {'... ' if len(prompt.tokens) > ENDING else ''}{last}"


def outcome(picture: Picture, prompt: int) -> str:
    """Where the two texts of a prompt that is shown first differ, and what was asked for."""
    sides = (picture.full, picture.pruned)
    texts, answer = [side.texts[prompt] for side in sides], picture.prompts[prompt].answer
    right = f" The right answer is {answer!r}." if answer is not None else ""
    at = first_difference(*(text.token_ids for text in texts))
    if at is None:
        return f"The texts differ nowhere.{right}"
    names = [repr(text.tokens[at].name) if at < len(text.tokens) else "its end" for text in texts]
    told = [f"{name} ({side.name})" for name, side in zip(names, sides, strict=True)]
    return f"The texts first differ at token {at}: {', '.join(told)}.{right}"


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
    if picture.questions:
        rows["answers right"] = [f"{side.right} of {picture.questions}" for side in sides]
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
    if layer in kept.stand_ins:
        told += "; one more slot stands for the others"
    return f"{told}. No other layer holds less."


def computed_in_words(kept: Kept) -> str:
    """What the layers computed, beside what they kept."""
    if kept.computed == kept.counts:
        return "Each layer computed just the tokens that it kept."
    if min(kept.computed) == kept.computed[0]:
        return "Each layer computed all tokens of the prompt."
    whole = [layer for layer, count in enumerate(kept.computed) if count == kept.computed[0]]
    return f"Only {layers_in_words(whole)} computed all tokens of the prompt."
