"""From a directory to a model: every parameter is loaded with the right shape, or an error names it.

The model is built on the `meta` device, where it takes no memory. Tensors are read from memory-mapped files,
joined where the model fuses projections, and assigned. So nothing is initialised only to be overwritten. How
weights are stored stands in `minipyramid/formats/`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.linear import pack
from minipyramid.model import Model

# Is called with the number of parameters that are assigned, and of all.
Progress = Callable[[int, int], None]


def load(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Model:
    """Build the model and assign every parameter, cast to `dtype`, on `device`.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or misshapen.
    """
    from minipyramid.formats.names import parameter_sources
    from minipyramid.formats.safetensors import check_shapes, open_tensors, read_tensor

    sources = parameter_sources(config)
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        tensors = open_tensors(directory, stack)
        # Like transformers: the head is tied if it is absent or equal, and one that differs is kept.
        if config.tie_word_embeddings and "lm_head.weight" not in tensors:
            del sources["lm_head.weight"]
        check_shapes(directory, tensors, sources)
        for name, parts in sources.items():
            state[name] = torch.cat([read_tensor(tensors, part, dtype) for part, _ in parts]).to(device)
            if progress:
                progress(len(state), len(sources))
    embedding = state["embed_tokens"]
    head = state.get("lm_head.weight", embedding)
    if config.tie_word_embeddings and torch.equal(head, embedding):
        state["lm_head.weight"] = embedding
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).apply(pack)
