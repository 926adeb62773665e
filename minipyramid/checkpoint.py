"""From a directory to a model: every parameter is loaded with the right shape, or an error names it.

The model is built on the `meta` device, where it takes no memory. Tensors are read from memory-mapped files,
joined where the model fuses projections, and assigned. So nothing is initialised only to be overwritten. How
weights are stored stands in `minipyramid/formats/`.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from minipyramid.config import ModelConfig
from minipyramid.linear import reorder
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
    from minipyramid.formats.weights import read_parameters

    state = read_parameters(directory, config, dtype, device, progress)
    with torch.device("meta"):
        model = Model(config)
    if config.quantization:
        from minipyramid.quantised import take_packed

        take_packed(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).apply(reorder)
