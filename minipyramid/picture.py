"""How a comparison is shown: a screen of text, a page, a plot. Pure functions of what was measured.

What is dropped from a prompt stays away from all deeper layers, so one number per token tells everything that was kept
of it: its *depth*, how many layers hold it, which are the first so many.
"""

import html
import importlib
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import Any

from minipyramid.errors import RequestError
from minipyramid.plan_table import readable

BAR = 40  # characters of a layer that kept everything
EIGHTHS = " ▏▎▍▌▋▊▉"
SPACES = "\n\r\t"  # that a page may have
MOST_LINES = 60  # of the marked prompt; the page shows all of it
INVERSE, PLAIN = "\x1b[7m", "\x1b[0m"


@dataclass(frozen=True)
class Token:
    """A token's part of the text, which may be empty, and what to call it by itself."""

    text: str
    name: str


@dataclass(frozen=True)
class Side:
    """What one method took and held for all prompts, and what it made of the first."""

    name: str
    prompt_s: float
    decode_s: float
    generated: int  # tokens
    kv_bytes: int
    kv_bytes_full: int  # what the full cache would hold
    right: int  # prompts whose known answer came
    token_ids: list[int]  # generated, up to the end of text
    tokens: list[Token]  # the same
    depth: list[int]  # of each token of the prompt

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens, over all seconds."""
        return self.generated / (self.prompt_s + self.decode_s)


@dataclass(frozen=True)
class Picture:
    """Both sides, and the first prompt."""

    title: str
    tokens: list[Token]  # of the prompt
    layers: int
    newest: int  # tokens at the prompt's end that stay, for they vote
    sinks: int  # tokens at its beginning that stay, as far as there is room
    answer: str | None  # known to be right
    prompts: int
    full: Side
    pruned: Side


@dataclass(frozen=True)
class Style:
    """What can be shown: characters in a line, block characters, and inverse text."""

    width: int
    blocks: bool
    colour: bool


# --- Facts and figures -------------------------------------------------------------------------------------------


def kept_by_layer(depth: list[int], layers: int) -> list[int]:
    """Tokens of the prompt that each layer holds."""
    return [sum(d > layer for d in depth) for layer in range(layers)]


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
    return f"The texts first differ at token {at}: {names[0]} (full cache), {names[1]} (pyramid)."


def figures(picture: Picture) -> list[tuple[str, str, str]]:
    """(what, of the full cache, of the pyramid)"""
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
    """What the last layer kept, and what of it was no choice."""
    depth = picture.pruned.depth
    kept, n = kept_by_layer(depth, picture.layers)[-1], len(depth)
    if kept == n:
        return f"The last layer kept all of the prompt's {n} tokens."
    newest = min(picture.newest, n)
    first = min(picture.sinks, kept - newest)  # as far as there was room for them
    parts = [f"the newest {newest}, which vote", f"the first {first}" if first > 0 else ""]
    parts += [f"{kept - newest - first} that were voted for" if kept > newest + first else ""]
    told = f"The last layer kept {kept} of the prompt's {n} tokens: {', '.join(filter(None, parts))}"
    return f"{told}. No other layer holds less."


# --- On a terminal -----------------------------------------------------------------------------------------------


def screen(picture: Picture, style: Style) -> list[str]:
    """Everything as lines of text."""
    depth, kept = picture.pruned.depth, kept_by_layer(picture.pruned.depth, picture.layers)
    lines = [*wrap(picture.title, style.width), "", f"{'':34} {picture.full.name:>12} {picture.pruned.name:>12}"]
    lines += [f"{name:34} {full:>12} {pruned:>12}" for name, full, pruned in figures(picture)]
    lines += ["", *side_by_side(picture, style.width), "", difference(picture)]
    if picture.answer is not None:
        lines.append(f"The story's own answer is {picture.answer!r}.")
    lines += ["", "Kept of the prompt, layer by layer:"]
    for layer, count in enumerate(kept):
        share = count / len(depth)
        lines.append(f"{layer:5} {count:7} {share:6.1%} {bar(share, BAR, style.blocks)}")
    text = marked([shown(token.text) for token in picture.tokens], [d == picture.layers for d in depth], style)
    marks = "inverse" if style.colour else "in brackets"
    return [*lines, "", *wrap(f"{legend(picture)} What it kept is {marks}:", style.width), "", *excerpt(text)]


def bar(share: float, width: int, blocks: bool) -> str:
    """A share of `width` characters, to the nearest eighth of one, or in whole ones of ASCII."""
    if not blocks:
        return "#" * round(share * width)
    whole, rest = divmod(round(share * width * 8), 8)
    return "█" * whole + EIGHTHS[rest].strip()


def side_by_side(picture: Picture, width: int) -> list[str]:
    """Both texts in columns."""
    half = (width - 3) // 2
    columns = [[side.name, "-" * half, *wrapped(side.tokens, half)] for side in (picture.full, picture.pruned)]
    return [f"{left:{half}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]


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


def marked(texts: list[str], kept: list[bool], style: Style) -> list[str]:
    """The text in lines, with marks around each run of kept tokens; without the marks they join to the text."""
    begin, end = (INVERSE, PLAIN) if style.colour else ("[", "]")
    whole = "".join(texts)
    flags = [k for text, k in zip(texts, kept, strict=True) for _ in text]
    lines = []
    for start, stop in breaks(whole, style.width):
        content = whole[start:stop].rstrip()
        line = ""
        for k, run in groupby(zip(content, flags[start:stop], strict=False), key=itemgetter(1)):
            part = "".join(c for c, _ in run)
            line += begin + part + end if k else part
        lines.append(line + whole[start + len(content) : stop])
    return lines


def excerpt(lines: list[str]) -> list[str]:
    """The first and last lines of many, and how many were left out between them."""
    lines = [line.rstrip() for line in lines]
    if len(lines) <= MOST_LINES:
        return lines
    head, tail = MOST_LINES // 3, MOST_LINES - MOST_LINES // 3
    left_out = f"... ({len(lines) - head - tail} lines are left out here; --html FILE shows all) ..."
    return [*lines[:head], "", left_out, "", *lines[-tail:]]


# --- As a page ---------------------------------------------------------------------------------------------------


def page(picture: Picture) -> str:
    """One file of HTML that needs nothing else."""
    full, pruned, n = picture.full, picture.pruned, len(picture.tokens)
    at = first_difference(full.token_ids, pruned.token_ids)
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(left)}</td><td>{escape(right)}</td></tr>'
        for name, left, right in figures(picture)
    ]
    answer = f" The story's own answer is {picture.answer!r}." if picture.answer is not None else ""
    return Template(PAGE).substitute(
        style=STYLE,
        script=SCRIPT,
        headline=escape(
            f"{readable(pruned.kv_bytes)} of keys and values instead of {readable(full.kv_bytes)} "
            f"({pruned.kv_bytes / pruned.kv_bytes_full:.1%}); "
            f"{pruned.tokens_per_s:.1f} tokens/s instead of {full.tokens_per_s:.1f}"
        ),
        title=escape(picture.title),
        rows="\n".join(rows),
        layers=picture.layers,
        last_layer=picture.layers - 1,
        height=min(480, max(160, 10 * picture.layers)),
        n=n,
        last=n - 1,
        map=map_path(pruned.depth),
        grid="".join(f"M0 {layer}h{n}" for layer in range(1, picture.layers)),
        legend=escape(legend(picture)),
        tokens="".join(token_span(token, d) for token, d in zip(picture.tokens, pruned.depth, strict=True)),
        difference=escape(difference(picture) + answer),
        full=generated_text(full, at),
        pruned=generated_text(pruned, at),
    )


def escape(text: str) -> str:
    """For HTML, where a carriage return of its own would be read as a line break."""
    return html.escape(text).replace("\r", "&#13;")


def map_path(depth: list[int]) -> str:
    """What was kept, as an outline: each token is a column from the top, one wide and its depth high."""
    path, x = "M0 0", 0
    for d, run in groupby(depth):
        count = len(list(run))
        path += f"V{d}h{count}"
        x += count
    return path + "V0Z"


def token_span(token: Token, depth: int) -> str:
    """A token of the prompt; the script reads its depth from its style. One without a text shows its name."""
    name = "" if token.text else f' data-name="{escape(token.name)}"'
    return f'<span style="--depth:{depth}"{name}>{escape(shown(token.text, SPACES))}</span>'


def generated_text(side: Side, at: int | None) -> str:
    """A text with its first differing token marked; one that has none there has ended."""
    texts = [escape(token.text or token.name) for token in side.tokens]
    if at is None:
        return "".join(texts)
    marked_one = texts[at] if at < len(texts) else "(end)"
    return "".join(texts[:at]) + f"<mark>{marked_one}</mark>" + "".join(texts[at + 1 :])


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>What the pyramid kept</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$headline</h1>
<p>$title</p>
<table>
<thead><tr><td></td><th scope="col">full cache</th><th scope="col">pyramid</th></tr></thead>
<tbody>
$rows
</tbody>
</table>

<h2>What each layer kept of the prompt</h2>
<p>From left to right the prompt's tokens, from top to bottom the layers; filled where a layer kept the token. Point at
the map or at the text below it, or use the arrow keys.</p>
<div class="axis"><span>layer 0</span></div>
<svg id="map" viewBox="0 0 $n $layers" preserveAspectRatio="none" style="height:${height}px" tabindex="0" role="slider"
 aria-label="Map of what $layers layers kept of $n tokens; arrow keys move along the tokens"
 aria-valuemin="0" aria-valuemax="$last" aria-valuenow="0">
<path class="kept" d="$map"/>
<path class="grid" d="$grid"/>
<rect id="column" x="0" y="0" width="1" height="$layers"/>
</svg>
<div class="axis"><span>layer $last_layer</span><span>position 0 to $last</span></div>
<p><output id="readout" aria-live="polite"></output></p>

<h2>The prompt</h2>
<p>The stronger the shade, the more layers kept the token. $legend</p>
<div id="text" class="text" tabindex="0" role="group" aria-label="The prompt" style="--layers:$layers">$tokens</div>

<h2>What was generated</h2>
<p>$difference</p>
<div class="sides">
<section><h3>full cache</h3><div class="text">$full</div></section>
<section><h3>pyramid</h3><div class="text">$pruned</div></section>
</div>
</main>
<script>
$script</script>
</body>
</html>
"""

STYLE = """:root { color-scheme: light dark; --ground: #fff; --ink: #1b1d21; --dim: #5c6370; --line: #d5d9e0;
  --kept: 37 99 235; --on: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --ink: #e8eaee; --dim: #9aa2af; --line: #343a44; --kept: 96 165 250; --on: #fb923c; }
}
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
p { color: var(--dim); }
table { border-collapse: collapse; }
th, td { padding: .2rem 1rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th[scope=row] { text-align: left; font-weight: normal; }
tbody tr { border-top: 1px solid var(--line); }
#map { display: block; width: 100%; overflow: visible; background: rgb(var(--kept) / .1); touch-action: pan-y; }
.kept { fill: rgb(var(--kept)); }
.grid { stroke: var(--ground); stroke-width: .5px; vector-effect: non-scaling-stroke; fill: none; }
#column { fill: none; stroke: var(--on); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: .85rem; }
output { color: var(--ink); font-family: ui-monospace, monospace; }
.text { position: relative; max-height: 26rem; overflow: auto; padding: .75rem; border: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { background: rgb(var(--kept) / calc(.5 * var(--depth) / var(--layers))); }
.text span.on { outline: 2px solid var(--on); }
.text span[data-name]::before { content: attr(data-name); font: italic .8em ui-monospace, monospace; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
mark { background: #fde047; color: #1b1d21; }
:focus-visible { outline: 2px solid var(--on); outline-offset: 2px; }
"""

SCRIPT = """"use strict";
const [map, column, text, readout] = ["map", "column", "text", "readout"].map(id => document.getElementById(id));
const tokens = [...text.children], places = new Map(tokens.map((token, i) => [token, i]));
const layers = Number(text.style.getPropertyValue("--layers"));
let current = 0, pointer = "";

// Highlight a token in the map and in the text, and tell about it.
function show(position) {
  tokens[current].classList.remove("on");
  current = Math.max(0, Math.min(tokens.length - 1, position));
  const token = tokens[current], depth = Number(token.style.getPropertyValue("--depth"));
  const name = JSON.stringify(token.textContent || token.dataset.name);
  token.classList.add("on");
  column.setAttribute("x", current);
  readout.textContent = "position " + current + ": " + name + ", kept by " + depth + " of " + layers
    + (depth === 1 ? " layers, in layer 0" : " layers, in layers 0 to " + (depth - 1));
  map.setAttribute("aria-valuenow", current);
  map.setAttribute("aria-valuetext", readout.textContent);
}

// The text has a scroll bar of its own, so that the map stays where the pointer is.
function reveal() {
  text.scrollTop = tokens[current].offsetTop - text.clientHeight / 2;
}

function pointAtMap(event) {
  const box = map.getBoundingClientRect();
  show(Math.floor((event.clientX - box.left) / box.width * tokens.length));
  reveal();
}
map.addEventListener("pointermove", pointAtMap);
map.addEventListener("pointerdown", pointAtMap);

text.addEventListener("pointermove", event => {
  const at = event.clientX + " " + event.clientY;
  // Browsers send events for text that scrolls under a resting pointer, too.
  if (at !== pointer && places.has(event.target)) show(places.get(event.target));
  pointer = at;
});

document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const moves = { ArrowLeft: current - 1, ArrowRight: current + 1 };
  if (document.activeElement === map) Object.assign(moves, { Home: 0, End: tokens.length - 1 });
  if (!(event.key in moves)) return;
  event.preventDefault();
  show(moves[event.key]);
  reveal();
});

show(0);
"""


# --- As a plot ---------------------------------------------------------------------------------------------------


def load_matplotlib() -> Any:
    """The part of it that draws into files; an optional extra, so it is looked for where it is asked for."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RequestError('--plot needs matplotlib; install it with pip install "minipyramid[plot]"') from error


def plot(picture: Picture, path: Path) -> None:
    """What was kept by layer and position, and how much by layer, as a PNG file."""
    depth, layers = picture.pruned.depth, picture.layers
    figure = load_matplotlib().Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    left.stairs(depth, range(len(depth) + 1), fill=True, color="tab:blue")
    left.set(xlabel="position in the prompt", ylabel="layer", xlim=(0, len(depth)), ylim=(layers, 0))
    left.set_title("kept of the prompt")
    right.barh([i + 0.5 for i in range(layers)], kept_by_layer(depth, layers), height=0.8, color="tab:blue")
    right.set(xlabel="tokens kept", xlim=(0, len(depth)))
    share = picture.pruned.kv_bytes / picture.pruned.kv_bytes_full
    figure.suptitle(
        f"keys and values {readable(picture.pruned.kv_bytes)} ({share:.1%} of the full cache), "
        f"{picture.pruned.tokens_per_s:.1f} tokens/s (full cache {picture.full.tokens_per_s:.1f})"
    )
    figure.savefig(path, format="png", dpi=120)
