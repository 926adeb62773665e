"""From a directory to a model: every parameter is loaded with the right shape, or the error names it.

The model is built on the `meta` device, where it takes no memory, and tensors are read from memory-mapped
safetensors, joined where the model fuses projections, and assigned. Nothing is initialised to be overwritten.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipyramid.config import ModelConfig, read_json
from minipyramid.errors import CheckpointError
from minipyramid.linear import pack
from minipyramid.model import Model

Progress = Callable[[int, int], None]  # parameters assigned, of how many


def load(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> Model:
    """Build the model and assign every parameter, cast to `dtype`, on `device`.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or misshapen.
    """
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        sources = parameter_sources(config)
        # transformers ties where the head is absent or equal, and keeps a head that differs.
        if config.tie_word_embeddings and "lm_head.weight" not in tensors:
            del sources["lm_head.weight"]
        _check_shapes(tensors, sources, directory)
        state: dict[str, Tensor] = {}
        for name, parts in sources.items():
            state[name] = torch.cat([_read(tensors, directory, part, dtype) for part, _ in parts]).to(device)
            if progress:
                progress(len(state), len(sources))
    embedding = state["embed_tokens"]
    if config.tie_word_embeddings and torch.equal(state.get("lm_head.weight", embedding), embedding):
        state["lm_head.weight"] = embedding
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).apply(pack)


Shape = tuple[int, ...]


def parameter_sources(config: ModelConfig) -> dict[str, list[tuple[str, Shape]]]:
    """For each parameter of ours the tensors that it joins, with the shapes they must have."""
    hidden, ffn, vocab, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    in_layer: dict[str, list[tuple[str, Shape]]] = {
        "input_layernorm": [("input_layernorm", (hidden,))],
        "qkv_proj.weight": [(f"self_attn.{n}_proj", (size, hidden)) for n, size in (("q", q), ("k", kv), ("v", kv))],
        "o_proj.weight": [("self_attn.o_proj", (hidden, q))],
        "post_attention_layernorm": [("post_attention_layernorm", (hidden,))],
        "gate_up_proj.weight": [(f"mlp.{n}_proj", (ffn, hidden)) for n in ("gate", "up")],
        "down_proj.weight": [("mlp.down_proj", (hidden, ffn))],
    }
    sources: dict[str, list[tuple[str, Shape]]] = {
        "embed_tokens": [("model.embed_tokens.weight", (vocab, hidden))],
        "norm": [("model.norm.weight", (hidden,))],
        "lm_head.weight": [("lm_head.weight", (vocab, hidden))],
    }
    for i in range(config.num_hidden_layers):
        for name, parts in in_layer.items():
            sources[f"layers.{i}.{name}"] = [(f"model.layers.{i}.{part}.weight", shape) for part, shape in parts]
    return sources


Tensors = Mapping[str, tuple[Any, str]]  # tensor's name -> the open file that holds it, and that file's name


def _open(directory: Path, stack: ExitStack) -> Tensors:
    """Open `model.safetensors`, or every shard that the index names; nothing is read yet."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        shards = ["model.safetensors"]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to shards; fetch it again")
        shards = sorted(set(weight_map.values()))
    else:
        raise CheckpointError(f"{directory} has no weights; expected model.safetensors or shards with {index.name}")
    tensors: dict[str, tuple[Any, str]] = {}
    for shard in shards:
        path = directory / shard
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{path} is missing, though {index.name} names it; fetch the checkpoint again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is truncated or no safetensors file ({why}); fetch it again") from error
        tensors |= dict.fromkeys(file.keys(), (file, shard))
    return tensors


def _check_shapes(tensors: Tensors, sources: dict[str, list[tuple[str, Shape]]], directory: Path) -> None:
    """Every tensor is there with its shape and no other is, before any is read."""
    expected = dict(part for parts in sources.values() for part in parts)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{directory} lacks the tensor {name}, expected with shape {list(shape)}")
        file, shard = tensors[name]
        found, asked = file.get_slice(name).get_shape(), list(shape)
        if found != asked:
            raise CheckpointError(f"{directory / shard}: {name} has shape {found}, but config.json asks for {asked}")
    left_over = [n for n in tensors.keys() - expected.keys() if not n.endswith("rotary_emb.inv_freq")]
    if left_over:
        raise CheckpointError(f"{directory} holds {min(left_over)}, no tensor of this Llama; check config.json")


def _read(tensors: Tensors, directory: Path, name: str, dtype: torch.dtype) -> Tensor:
    file, shard = tensors[name]
    tensor: Tensor = file.get_tensor(name)
    told = f"{directory / shard}: {name} holds"
    if not tensor.is_floating_point():
        raise CheckpointError(f"{told} {tensor.dtype}, expected floating point; quantised weights are not read")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{told} values that are not finite in {dtype}; fetch it again")
    return tensor
