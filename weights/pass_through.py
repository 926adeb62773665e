"""The embedded checkpoint with further layers that change nothing, so that it looks back at another depth.

A layer whose output projections are zero adds nothing to the hidden states: the model's function stays as it
is, to the bit, and every other layer stands deeper. A calibration has to find each such variant's depth.

    python weights/pass_through.py --after 0,3,3,7 --out deeper

puts one such layer after layer 0, two after layer 3 and one after layer 7.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from minipyramid.calibrate.settings import in_safetensors

STORYTELLER = Path(__file__).resolve().parent / "storyteller"
ZERO = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # what a layer writes to the hidden states
LAYER = "model.layers."


def insert_layers(model: Path, after: list[int], out: Path) -> Path:
    """Write `model` with a layer that changes nothing after each of the layers named.

    It is a copy of the layer but for that. The settings file stays behind, for it is of another number of
    layers. Returns `out`.
    """
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    order: list[tuple[int, bool]] = []  # of which layer a copy stands there, and whether it changes nothing
    for layer in range(config["num_hidden_layers"]):
        order += [(layer, False)] + [(layer, True)] * after.count(layer)
    written = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    for place, (layer, passes) in enumerate(order):
        for name, tensor in tensors.items():
            if name.startswith(f"{LAYER}{layer}."):
                part = name.removeprefix(f"{LAYER}{layer}.")
                value = torch.zeros_like(tensor) if passes and part in ZERO else tensor.clone()
                written[f"{LAYER}{place}.{part}"] = value
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(order)}, indent=1))
    (out / "model.safetensors").write_bytes(in_safetensors(written, {"format": "pt"}))
    shutil.copy(model / "tokenizer.model", out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Insert layers that change nothing.")
    parser.add_argument("--model", type=Path, default=STORYTELLER)
    parser.add_argument("--after", required=True, help="layers, comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    insert_layers(args.model, [int(layer) for layer in args.after.split(",")], args.out)
