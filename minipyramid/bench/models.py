"""The model that is measured: a checkpoint, or a known shape with random weights."""

import argparse
import zlib
from pathlib import Path

import torch
from torch import Tensor

from minipyramid import LLM, Engine
from minipyramid.cli.shapes import shape_config
from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.eight_bits import with_kv_dtype
from minipyramid.formats.huggingface import read_config
from minipyramid.formats.names import parameter_sources
from minipyramid.formats.weights import parameter_of
from minipyramid.hub import SHAPE
from minipyramid.linear import reorder
from minipyramid.model import Model
from minipyramid.policies import pick_policy
from minipyramid.quantised import Packed, take_packed

SPREAD = 0.02  # standard deviation of random weights


def config_of(args: argparse.Namespace) -> ModelConfig:
    """The model's configuration; no weights are read."""
    if args.model.startswith(SHAPE):
        config = shape_config(args.model.removeprefix(SHAPE), args.quantize)
    else:
        config = read_config(Path(args.model), args.quantize)
    return with_kv_dtype(config, args.kv_dtype)


def plain_kv_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer of another library's cache, which holds no 8 bits."""
    return with_kv_dtype(config, "auto").kv_bytes_per_token(dtype.itemsize)


def device_and_dtype(args: argparse.Namespace, config: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Where all methods run, and in which number format."""
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, config.dtype, device)


def load_llm(args: argparse.Namespace, policy: str, kv_budget: float | None) -> LLM:
    """This engine with the model's weights, under a policy."""
    if not args.model.startswith(SHAPE):
        return LLM(
            args.model,
            policy=policy,
            kv_budget=kv_budget,
            kv_memory=args.kv_memory,
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            quantize=args.quantize,
            device=args.device,
        )
    config, directory = config_of(args), Path(args.model)
    device, dtype = device_and_dtype(args, config)
    chosen = pick_policy(policy, directory, config.num_hidden_layers)
    model = random_model(config, dtype, device)
    return LLM.of(Engine(model, None, chosen, kv_budget, args.kv_memory), directory)


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """A model whose weights are random, made on the device."""
    with torch.device("meta"):
        model = Model(config)
    state: dict[str, Tensor | Packed] = {}
    for name, parts in parameter_sources(config).items():
        made = [random_tensor(part, shape, dtype, device) for part, shape in parts]
        state[name] = parameter_of(name, made, config, dtype, device)
    take_packed(model, state)
    model.load_state_dict(state, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).apply(reorder)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stored tensor. It depends on its name alone, so every method has the same; norms have ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, SPREAD, generator=generator)
