"""Rotary positions (RoPE, Su et al. 2021): queries and keys are rotated by angles that grow with position.

Keys are rotated once, at their original positions, before they enter the cache.
"""

import math

import torch
from torch import Tensor

from minipyramid.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each pair of components, after scaling.  [D / 2] float32

    `linear` slows every pair by `factor`. `llama3` does so to pairs that make fewer than `low_freq_factor`
    waves in the original context, leaves those with more than `high_freq_factor`, and blends in between.
    """
    rope, D = config.rope, config.head_dim
    # "cpu" by name: models are built under `meta`, where the division imported 2.4 s of torch's compiler.
    pairs = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float()
    inv_freq = 1.0 / rope.rope_theta ** (pairs / D)  # [D / 2]
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "llama3":
        waves = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        # 0: slowed by the factor, 1: left as it is.
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * inv_freq / rope.factor + keep * inv_freq
    return inv_freq


def rotations(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, computed in float32.  [T] -> two of [T, 1, D / 2]"""
    angles = positions[:, None, None].float() * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate every head in place; pairs are components i and i + D / 2, as in Hugging Face.  [T, heads, D]"""
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
