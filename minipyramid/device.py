"""Where a model runs and in which number format, chosen by what the machine is quick with."""

from __future__ import annotations

import torch

from minipyramid.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; what torch cannot use raises `ConfigError`."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device is {device!r}, expected a name or a torch.device")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here; expected auto, cpu or cuda") from error


def pick_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype, except on a processor that is slow with it.

    bf16 products were 400 times slower than float32 on a processor with AVX2 only, and float16 eight times
    slower than bf16 on one with AVX512-BF16.
    """
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype is {dtype!r}, expected a name or a torch.dtype")
    name = str(dtype).removeprefix("torch.")
    asked = stored if name == "auto" else name
    if asked not in DTYPES:
        source = "config.json: " if name == "auto" else ""
        raise ConfigError(f"{source}dtype is {asked!r}, expected one of {', '.join(DTYPES)}")
    if name != "auto" or device.type != "cpu" or asked == "float32":
        return DTYPES[asked]
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
