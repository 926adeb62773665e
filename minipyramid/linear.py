"""A linear layer whose weight stands in memory as the machine multiplies it fastest.

A plain linear layer on a CPU reorders its weight at every call. oneDNN's packed form does so once, at load. All
linear layers of a 12-layer model with hidden size 768 took, in float32 on two AVX2 cores, plain against packed:
97 / 33 ms for 8 rows, 143 / 70 ms for 32, 718 / 642 ms for 512.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipyramid.device import quick_bf16

# oneDNN's product under a name of ours, into which `torch.compile` does not look: it refuses weights that it has not
# packed itself, and its own products took 68 ms where these took 26 (8 rows through all linear layers of the shape
# above). Here and not at first use, for an operator can be defined once, and models may be loaded in several threads.
PRODUCT = "minipyramid::packed_product"
if not hasattr(torch.ops.minipyramid, "packed_product"):  # as it is where this file is imported again
    torch.library.define(PRODUCT, "(Tensor x, Tensor w) -> Tensor")
    torch.library.impl(PRODUCT, "default", lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    # By `shape`, for `len` would fix the number of rows, and each would have a graph of its own.
    torch.library.register_fake(PRODUCT, lambda x, w: x.new_empty(x.shape[0], w.shape[0]))


class Linear(nn.Module):
    """y = x W^T.  [T, in] -> [T, out]"""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(out_features, in_features))
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear

    def __call__(self, x: Tensor) -> Tensor:  # in place of forward, whose caller nn.Module leaves untyped
        return self.product(x, self.weight)


def pack(module: nn.Module) -> None:
    """Replace the weight of a linear layer by its packed form, where there is one; for `nn.Module.apply`."""
    # Both operators are private, so a build of torch may lack them.
    there = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    if there and isinstance(module, Linear) and module.weight.device.type == "cpu":
        weight = module.weight.detach()
        if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and quick_bf16()):
            del module.weight
            # Tuned for the 8 rows of a decode step; for a prompt it hardly differs (8 against 512: within 10 %).
            module.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
            module.product = torch.ops.minipyramid.packed_product
