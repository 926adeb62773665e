"""Settings of PyramidInfer as published, by the model that they were published for."""

from typing import Any

# name: the model's layers, and what differs from the defaults of `PyramidConfig`
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama2-7b": (32, {}),
    "llama2-13b": (40, {"prefill_decay_ratio": 0.8, "layerwise_downsample_interval": 2}),
    "llama2-70b": (80, {"layerwise_downsample_interval": 3}),
    "llama3-8b": (32, {}),
    "llama3-70b": (80, {"layerwise_downsample_interval": 3}),
}
