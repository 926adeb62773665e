"""The page's HTML, style and script, into which `page.py` puts what was found."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>What was kept: $name</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$headline</h1>
<p>$title</p>
<table>
<thead><tr><td></td><th scope="col">$full_name</th><th scope="col">$name</th></tr></thead>
<tbody>
$rows
</tbody>
</table>

<h2>What each layer kept of $prompt</h2>
<p>From left to right the prompt's tokens, from top to bottom the layers; filled where a layer kept the
token$lighter. The bars tell how many tokens each layer kept$outlined. $computed
Point at the map or at the text below it, or use the arrow keys.</p>
<div class="maps">
<div class="axis"><span>layer 0</span></div>
<div class="axis"></div>
<svg id="map" viewBox="0 0 $n $layers" preserveAspectRatio="none" style="height:${height}px" tabindex="0"
 role="slider" aria-label="Map of what $layers layers kept of $n tokens; arrow keys move along the tokens"
 aria-valuemin="0" aria-valuemax="$last" aria-valuenow="0">
$map
<path class="grid" d="$grid"/>
<rect id="column" x="0" y="0" width="1" height="$layers"/>
</svg>
<svg id="bars" viewBox="0 0 $n $layers" preserveAspectRatio="none" style="height:${height}px" role="img"
 aria-label="Of $n tokens, from the first layer to the last, computed: $computed_counts; kept: $kept_counts">
$bars
</svg>
<div class="axis"><span>layer $last_layer</span><span>position 0 to $last</span></div>
<div class="axis"><span>0</span><span>$n tokens</span></div>
</div>
<p><output id="readout" aria-live="polite"></output></p>

<h2>The text of $prompt</h2>
<p>The stronger the shade, the more layers kept the token$lighter_text. $legend</p>
<div id="text" class="text" tabindex="0" role="group" aria-label="The prompt"
 style="--layers:$layers">$tokens</div>
<ol id="told" hidden>$told</ol>

<h2>What was generated</h2>
$texts
</main>
<script>
$script</script>
</body>
</html>
"""

STYLE = """:root { color-scheme: light dark; --ground: #fff; --ink: #1b1d21; --dim: #5c6370; --line: #d5d9e0;
  --kept: 37 99 235; --on: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --ink: #e8eaee; --dim: #9aa2af; --line: #343a44;
    --kept: 96 165 250; --on: #fb923c; }
}
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; }
p { color: var(--dim); }
table { border-collapse: collapse; }
th, td { padding: .2rem 1rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th[scope=row] { text-align: left; font-weight: normal; }
tbody tr { border-top: 1px solid var(--line); }
.maps { display: grid; grid-template-columns: 4fr 1fr; column-gap: 1.5rem; }
.maps svg { display: block; width: 100%; overflow: visible; background: rgb(var(--kept) / .1); }
#map { touch-action: pan-y; }
.kept { fill: rgb(var(--kept)); }
.grid { stroke: var(--ground); stroke-width: .5px; vector-effect: non-scaling-stroke; fill: none; }
.computed { stroke: var(--on); stroke-width: 1px; vector-effect: non-scaling-stroke; fill: none;
  pointer-events: all; }
#column { fill: none; stroke: var(--on); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: .85rem; }
output { color: var(--ink); font-family: ui-monospace, monospace; }
.text { position: relative; max-height: 26rem; overflow: auto; padding: .75rem; border: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { background: rgb(var(--kept) / calc(.5 * var(--held) / var(--layers))); }
.text span.on { outline: 2px solid var(--on); }
.text span[data-name]::before { content: attr(data-name); font: italic .8em ui-monospace, monospace; }
section + section { margin-top: 2rem; border-top: 1px solid var(--line); }
mark { background: #fde047; color: #1b1d21; }
:focus-visible { outline: 2px solid var(--on); outline-offset: 2px; }
"""

SCRIPT = """"use strict";
const [map, column, text, told, readout] = ["map", "column", "text", "told", "readout"].map(
  id => document.getElementById(id));
const tokens = [...text.children], places = new Map(tokens.map((token, i) => [token, i]));
let current = 0, pointer = "";

// Highlight a token in the map and in the text, and tell about it.
function show(position) {
  tokens[current].classList.remove("on");
  current = Math.max(0, Math.min(tokens.length - 1, position));
  const token = tokens[current];
  const name = JSON.stringify(token.textContent || token.dataset.name);
  token.classList.add("on");
  column.setAttribute("x", current);
  const where = told.children[token.dataset.told].textContent;
  readout.textContent = "position " + current + ": " + name + ", " + where;
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
