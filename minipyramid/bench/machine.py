"""The machine that was measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from minipyramid.bench.floors import Rates


def machine_of(dtype: torch.dtype, device: torch.device, rates: Rates) -> dict[str, Any]:
    """As `--json` prints it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": rates.flops / 1e9,
        "read_gb_s": rates.bytes_per_s / 1e9,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same for people."""
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['dtype']}: "
        f"{machine['gflops']:.0f} GFLOP/s, reading {machine['read_gb_s']:.0f} GB/s"
    )


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
