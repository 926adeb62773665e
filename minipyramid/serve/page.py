"""The page at `/`: a prompt, what it becomes, and what every layer holds meanwhile. It needs nothing else."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'; connect-src 'self'; img-src data:">
<link rel="icon" href="data:,">
<title>minipyramid</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1d21; --dim: #5c6370; --line: #d5d9e0;
  --kept: 37 99 235; --on: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --ink: #e8eaee; --dim: #9aa2af; --line: #343a44; --kept: 96 165 250; }
}
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; }
textarea, input[type=password] { box-sizing: border-box; width: 100%; font: inherit; color: inherit;
  background: none; border: 1px solid var(--line); padding: .5rem; }
.sliders { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
.sliders input { width: 100%; }
button { font: inherit; padding: .3rem 1.2rem; margin: 1rem .5rem 1rem 0; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .75rem;
  min-height: 5rem; }
#text .prompt { color: var(--dim); }
#map { display: block; width: 100%; height: 12rem; background: rgb(var(--kept) / .1); }
#map path { fill: none; stroke: rgb(var(--kept)); stroke-width: .85; }
.dim { color: var(--dim); }
.wrong { color: var(--on); }
</style>
</head>
<body>
<main>
<h1>minipyramid</h1>
<form id="form">
<label for="prompt">Prompt</label>
<textarea id="prompt" rows="5">Once upon a time</textarea>
<div class="sliders">
<label>new tokens <output></output>
<input id="max_tokens" type="range" min="1" max="512" value="128"></label>
<label>temperature <output></output>
<input id="temperature" type="range" min="0" max="2" step="0.05" value="0.7"></label>
<label>top_p <output></output>
<input id="top_p" type="range" min="0.05" max="1" step="0.05" value="0.95"></label>
</div>
<details><summary class="dim">API key</summary>
<input id="key" type="password" autocomplete="off" aria-label="API key"></details>
<button id="go">Continue</button><button id="stop" type="button" disabled>Stop</button>
</form>
<div id="text" aria-live="polite"></div>
<h2>What every layer holds</h2>
<p class="dim">From left to right the tokens of the text, from top to bottom the layers; filled where a layer
holds the token.</p>
<svg id="map" preserveAspectRatio="none" role="img" aria-label="What every layer holds"></svg>
<p id="figures" class="dim"></p>
</main>
<script>
"use strict";
const [form, prompt, go, stop, text, map, figures, key] =
  ["form", "prompt", "go", "stop", "text", "map", "figures", "key"].map(id => document.getElementById(id));
const sliders = ["max_tokens", "temperature", "top_p"].map(id => document.getElementById(id));
let running = null;

for (const slider of sliders) {
  const output = slider.parentElement.querySelector("output");
  slider.addEventListener("input", () => { output.textContent = slider.value; });
  output.textContent = slider.value;
}

// A line for each layer, with a stroke over each run of positions that it holds.
function draw(layers) {
  const last = Math.max(...layers.flat(2), 0) + 1;
  map.setAttribute("viewBox", `0 0 ${last} ${layers.length}`);
  const lines = layers.map((runs, layer) =>
    runs.map(([first, end]) => `M${first} ${layer + .5}H${end + 1}`).join(""));
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", lines.join(""));
  map.replaceChildren(path);
  const counts = layers.map(runs => runs.reduce((sum, [first, end]) => sum + end + 1 - first, 0));
  figures.textContent = `Of ${last} tokens the layers hold ${counts.join(", ")}.`;
}

function span(content, kind) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = content;
  text.append(element);
  return element;
}

function take(line, said) {
  if (!line.startsWith("data: ") || line === "data: [DONE]") return;
  const data = JSON.parse(line.slice(6));
  if (data.error) throw new Error(data.error.message);
  for (const choice of data.choices) {
    said.textContent += choice.text;
    if (choice.kept_positions) draw(choice.kept_positions);
    if (choice.kv_bytes) {
      const share = (100 * choice.kv_bytes / choice.kv_bytes_full).toFixed(1);
      figures.textContent += ` Keys and values: ${choice.kv_bytes} bytes, ${share} % of the full cache's.`;
    }
  }
}

async function run() {
  text.replaceChildren();
  map.replaceChildren();
  figures.textContent = "";
  span(prompt.value, "prompt");
  const said = span("", "said"), body = { prompt: prompt.value, stream: true, kept_positions: true };
  for (const slider of sliders) body[slider.id] = Number(slider.value);
  const headers = { "Content-Type": "application/json" };
  if (key.value) headers.Authorization = "Bearer " + key.value;
  running = new AbortController();
  [go.disabled, stop.disabled] = [true, false];
  try {
    const answer = await fetch("/v1/completions",
      { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "";;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) take(line, said);
    }
  } catch (error) {
    if (error.name !== "AbortError") span(error.message, "wrong");
  } finally {
    [go.disabled, stop.disabled] = [false, true];
  }
}

form.addEventListener("submit", event => { event.preventDefault(); run(); });
stop.addEventListener("click", () => running.abort());
</script>
</body>
</html>
"""
