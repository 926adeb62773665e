"""Decode steps through `torch.compile`: one graph per layer, the same for all layers.

As one graph, all 12 layers took 54 s to compile instead of 8, and a step then 11 ms instead of 12.5
(uncompiled 16; 8 sequences, hidden size 192, float32, two CPU cores).
"""

import torch

from minipyramid.errors import ConfigError
from minipyramid.linear import Linear, reordered_product
from minipyramid.model import Layer, Model

# oneDNN's product as our own operator, opaque to `torch.compile`. The compiler refuses weights that it has
# not reordered itself, and its own products took 68 ms where these took 26 (8 rows through all linear layers
# of a model of 12 layers and hidden size 768, float32, two AVX2 cores). It is defined here and not at first
# use, since an operator can be defined only once and models may be compiled in several threads.
NAME = "minipyramid::reordered_product"
# It exists already when this file is imported again.
if not hasattr(torch.ops.minipyramid, "reordered_product"):
    torch.library.define(NAME, "(Tensor x, Tensor w) -> Tensor")
    torch.library.impl(NAME, "default", reordered_product)
    # `shape[0]` and not `len`, which would fix the number of rows and compile a graph for each.
    torch.library.register_fake(NAME, lambda x, w: x.new_empty(x.shape[0], w.shape[0]))


def compile_step(model: Model) -> None:
    """From now on the model's steps run compiled. Raises `ConfigError` where nothing can be compiled."""
    try:
        torch.compile(torch.neg)(model.norm)
    except (RuntimeError, OSError) as error:
        inner = getattr(error, "inner_exception", error)  # what its first line would not say
        why = (str(inner).strip() or type(inner).__name__).splitlines()[0]
        raise ConfigError(
            f"compile cannot be used here; leave it out, or see to its compiler ({why})"
        ) from error
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.product is reordered_product:
            layer.product = torch.ops.minipyramid.reordered_product
    # The sizes of slabs differ by layer and request; as symbols they share one graph.
    model.layer_step = torch.compile(Layer.step, dynamic=True)
