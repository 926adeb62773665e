"""transformers as it comes: its own attention (sdpa), cache and loop, our weights, batches padded left."""

import argparse
import importlib
import time
from typing import Any

import torch
from torch import Tensor

from minipyramid import RequestError
from minipyramid.bench.methods import Run
from minipyramid.bench.models import config_of, device_and_dtype, plain_kv_bytes, random_tensor
from minipyramid.bench.work import make_work
from minipyramid.cli.shapes import shape_dict
from minipyramid.formats.names import parameter_sources
from minipyramid.hub import SHAPE


def transformers_method(args: argparse.Namespace) -> Run:
    """Load its model."""
    config = config_of(args)
    device, dtype = device_and_dtype(args, config)
    model, work = load_model(args, device, dtype), make_work(args, config)
    size = args.fixed or len(work.prompts)
    per_token = config.num_hidden_layers * plain_kv_bytes(config, dtype)

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        prefill = decode = 0.0
        held = 0
        for i in range(0, len(work.prompts), size):
            prompts, new = work.prompts[i : i + size], max(work.new_tokens[i : i + size])
            longest = max(map(len, prompts))
            padding = [longest - len(prompt) for prompt in prompts]
            ids = [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
            mask = [[0] * n + [1] * (longest - n) for n in padding]
            first, began = FirstToken(), time.perf_counter()
            model.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[first],
            )
            prefill += first.at - began
            decode += time.perf_counter() - first.at
            held = max(held, len(prompts) * (longest + new))
        return {
            "prefill_s": prefill,
            "decode_s": decode,
            "kv_bytes": held * per_token,
            "kv_bytes_aux": 0,
            "kv_share": 1.0,
        }

    return run


def load_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """Its Llama with the weights that our engine has; untyped, for the library is no dependency."""
    try:
        library: Any = importlib.import_module("transformers")
        llama, config_class = library.LlamaForCausalLM, library.LlamaConfig
    except ImportError as error:
        raise RequestError(f"--versus needs transformers ({error}); pip install transformers") from error
    if args.model.startswith(SHAPE):
        raw = shape_dict(args.model.removeprefix(SHAPE))
        del raw["torch_dtype"]  # the weights are made in `dtype`
        with torch.device("meta"):
            model = llama(config_class(**raw, attn_implementation="sdpa", eos_token_id=None))
        parts = [part for sources in parameter_sources(config_of(args)).values() for part in sources]
        state = {name: random_tensor(name, shape, dtype, device) for name, shape in parts}
        model.load_state_dict(state, assign=True)
        # Its frequencies are no parameter, so they are still on the meta device.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    else:
        model = library.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    model.eval()
    model.generation_config.eos_token_id = None
    return model


class FirstToken:
    """A logits processor that changes nothing and notes when the logits of the first new token are there."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not self.at:
            scores[0, 0].item()  # waits until the device has computed them
            self.at = time.perf_counter()
        return scores
