"""The comparison as a page: one file of HTML that needs nothing else."""

import html
from itertools import groupby
from string import Template

from minipyramid.cli.terminal import readable
from minipyramid.demo.kept import SHADES, Kept
from minipyramid.demo.picture import (
    Picture,
    Text,
    Token,
    computed_in_words,
    ending,
    figures,
    first_difference,
    legend,
    outcome,
)
from minipyramid.demo.screen import shown
from minipyramid.demo.template import PAGE, SCRIPT, STYLE

SPACES = "\n\r\t"  # that a page may have


def page(picture: Picture) -> str:
    """The file's text."""
    full, pruned, n = picture.full, picture.pruned, len(picture.tokens)
    kept, columns, layers = pruned.kept, pruned.kept.columns, picture.layers
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(left)}</td><td>{escape(right)}</td></tr>'
        for name, left, right in figures(picture)
    ]
    # Many tokens are kept by the same layers, so what is told of a token stands in a list, each entry once.
    entries = {column: i for i, column in enumerate(dict.fromkeys(columns))}
    return Template(PAGE).substitute(
        style=STYLE,
        script=SCRIPT,
        headline=escape(
            f"{readable(pruned.kv_bytes)} of keys and values instead of {readable(full.kv_bytes)} "
            f"({pruned.kv_bytes / pruned.kv_bytes_full:.1%}); "
            f"{pruned.tokens_per_s:.1f} tokens/s instead of {full.tokens_per_s:.1f}"
        ),
        title=escape(picture.title),
        name=escape(pruned.name),
        full_name=escape(full.name),
        rows="\n".join(rows),
        layers=layers,
        last_layer=layers - 1,
        height=min(480, max(160, 10 * layers)),
        n=n,
        last=n - 1,
        map=map_paths(kept),
        grid="".join(f"M0 {layer}h{n}" for layer in range(1, layers)),
        bars="\n".join(map(layer_bar, range(layers), kept.counts, kept.computed)),
        kept_counts=", ".join(map(str, kept.counts)),
        computed_counts=", ".join(map(str, kept.computed)),
        outlined=", and the outlines how many it computed" if kept.computed != kept.counts else "",
        computed=computed_in_words(kept),
        lighter=", lighter where only some of its heads did" if kept.heads_differ else "",
        lighter_text=" in more of their heads" if kept.heads_differ else "",
        legend=escape(legend(picture)),
        tokens="".join(
            token_span(token, sum(column) / kept.heads, entries[column])
            for token, column in zip(picture.tokens, columns, strict=True)
        ),
        told="".join(f"<li>{kept.where(column)}</li>" for column in entries),
        prompt=escape(picture.prompts[0].name),
        texts="\n".join(both_texts(picture, i) for i in range(len(picture.prompts))),
    )


def escape(text: str) -> str:
    """For HTML, where a carriage return of its own would be read as a line break."""
    return html.escape(text).replace("\r", "&#13;")


def map_paths(kept: Kept) -> str:
    """What was kept, as a path for each shade.

    Neighbouring tokens that the same layers keep are one column, and a run of layers is one rectangle of it.
    """
    paths = [""] * (SHADES + 1)
    x = 0
    for column, neighbours in groupby(kept.columns):
        width, layer = len(list(neighbours)), 0
        for shade, run in groupby(column, key=kept.shade):
            height = len(list(run))
            paths[shade] += f"M{x} {layer}h{width}v{height}h-{width}z"
            layer += height
        x += width
    return "\n".join(
        f'<path class="kept" style="fill-opacity:{shade / SHADES:g}" d="{path}"/>'
        for shade, path in enumerate(paths)
        if shade and path
    )


def layer_bar(layer: int, count: int, computed: int) -> str:
    """How many tokens a layer kept and computed; pointing at it tells the numbers."""
    place = f'y="{layer}.1" height=".8"'
    outline = f'<rect class="computed" width="{computed}" {place}/>' if computed != count else ""
    return (
        f"<g><title>layer {layer}: {count} kept, {computed} computed</title>"
        f'<rect class="kept" width="{count}" {place}/>{outline}</g>'
    )


def token_span(token: Token, held: float, told: int) -> str:
    """A token of the prompt; `held` is the number of layers that keep it, of which heads are parts.

    The script reads from the list of what is `told`. A token without a text shows its name.
    """
    name = "" if token.text else f' data-name="{escape(token.name)}"'
    return (
        f'<span style="--held:{held:.4g}" data-told="{told}"{name}>{escape(shown(token.text, SPACES))}</span>'
    )


def both_texts(picture: Picture, prompt: int) -> str:
    """What both sides generated from a prompt, one under the other."""
    sides = (picture.full, picture.pruned)
    texts = [side.texts[prompt] for side in sides]
    at = first_difference(*(text.token_ids for text in texts))
    parts = [f"<p>{escape(shown(ending(picture.prompts[prompt])))}</p>"]
    parts += [
        f'<h3>{escape(side.name)}</h3><div class="text">{generated_text(text, at)}</div>'
        for side, text in zip(sides, texts, strict=True)
    ]
    return "\n".join(["<section>", *parts, f"<p>{escape(outcome(picture, prompt))}</p>", "</section>"])


def generated_text(text: Text, at: int | None) -> str:
    """A text with its first differing token marked; one that has none there has ended."""
    texts = [escape(token.text or token.name) for token in text.tokens]
    if at is None:
        return "".join(texts)
    marked_one = texts[at] if at < len(texts) else "(end)"
    return "".join(texts[:at]) + f"<mark>{marked_one}</mark>" + "".join(texts[at + 1 :])
