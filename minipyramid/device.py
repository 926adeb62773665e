"""Where a model runs and in which number format: by default what is fast on this machine."""

import torch

from minipyramid.config import DTYPES
from minipyramid.errors import ConfigError, expect_type


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA if there is one, else the CPU. Raises `ConfigError` for what cannot be used here."""
    expect_type("device", device, (str, torch.device), "a name or a torch.device")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = repr(str(device))
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"device {name} cannot be used here; auto takes what can be") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {name} cannot run a model; expected auto, cpu, cuda or mps")
    return chosen


def pick_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype, except for half precision on a CPU.

    That is bfloat16 if the CPU multiplies it faster than float32, else float32 (float16 was eight times
    slower than bfloat16 with AVX512-BF16). Raises `ConfigError` for a dtype that the engine does not run.
    """
    expect_type("dtype", dtype, (str, torch.dtype), "a name or a torch.dtype")
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = stored
        if device.type == "cpu" and stored != "float32":
            from minipyramid.quicker import bf16_is_quicker

            name = "bfloat16" if has_bf16() and bf16_is_quicker() else "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected auto, {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def has_bf16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    # The operator that knows is private, so a build of torch may lack it.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())
