#!/usr/bin/env bash
# For those who have the weights of a real model: what its layers need, and what that costs.
# Each command also runs with any other Llama. None was run on a GPU yet: what they need is counted, not measured.
set -euo pipefail
model=${1:-meta-llama/Llama-3.1-8B}
text=${2:-weights/books-fit.txt}

# Where the model looks back, from plain text. --out, for a repository of the hub is no place to write to.
# Beside the weights (15 GiB in bf16) it takes 8 GiB for queries, keys and values of all windows (10,240 tokens of
# 0.4 MB, once whole and once behind a cut), 8 GiB for the caches that hold them, and 17 GiB while guesses are fitted.
# Fewer samples and shorter contexts need less.
python -m minipyramid.calibrate --model "$model" --text "$text" --context 1024,4096 --samples 2 \
    --budget 0.5,0.25,0.1,0.05 --out llama-3.1-8b.json --plot llama-3.1-8b.png

# What one request of 8,192 tokens will hold, layer by layer, before anything is computed.
python -m minipyramid.generate --model "$model" --policy llama-3.1-8b.json --kv-budget 0.1 --plan \
    --prompt-tokens 8192 --max-new-tokens 256

# Against the other policies at equal bytes, on another text.
python -m minipyramid.eval --model "$model" --text weights/books-sample.txt --context 4096 --samples 32 \
    --recall stories,prose --budgets 0.5,0.25 --policies full,llama-3.1-8b.json,llama3-8b,snapkv,keydiff

# How fast, beside the full cache.
python -m minipyramid.bench --model "$model" --policy full,llama-3.1-8b.json --kv-budget 0.1 \
    --prompt-tokens 8192 --max-new-tokens 256 --batch-size 4
