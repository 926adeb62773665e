"""Where a model runs and in which number format, chosen by what the machine is quick with."""

import torch

from minipyramid.config import DTYPES
from minipyramid.errors import ConfigError


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; what cannot be used here raises `ConfigError`."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device is {device!r}, expected a name or a torch.device")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here; expected auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {str(device)!r} cannot run a model; expected auto, cpu, cuda or mps")
    return chosen


def pick_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype; half precision on a CPU is bf16 where it has instructions for it, else float32.

    bf16 products were 400 times slower than float32 on a processor with AVX2 only, and float16 eight times
    slower than bf16 on one with AVX512-BF16.
    """
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype is {dtype!r}, expected a name or a torch.dtype")
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = stored if device.type != "cpu" or stored == "float32" else "bfloat16" if quick_bf16() else "float32"
    elif name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected auto, {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def quick_bf16() -> bool:
    """Whether the CPU has bf16 products; the operator that knows is private and missing from some builds of torch."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())
