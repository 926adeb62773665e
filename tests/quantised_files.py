"""Checkpoints in each layout of quantised weights, written from the layout's description, and what they mean.

Nothing here reads a layout: the plain weights come from the numbers that are packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import TINY, random_tensors
from safetensors.torch import save_file
from torch import Tensor

# Large enough for torch's packed form of 4 bits, whose rows come in sixty-fours.
SHAPE = {**TINY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
FLOAT8 = torch.float8_e4m3fn


@dataclass
class Weight:
    """Whole numbers without a sign, and a scale and a zero for each group of columns."""

    numbers: Tensor  # [out, in] from 0
    scales: Tensor  # [out, G]
    zeros: Tensor  # [out, G] from 0
    bits: int
    group: int

    @property
    def plain(self) -> Tensor:
        out = torch.empty(self.numbers.shape)
        for j in range(self.numbers.shape[1]):
            at = j // self.group
            out[:, j] = (self.numbers[:, j] - self.zeros[:, at]).float() * self.scales[:, at].float()
        return out

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers of the last axis into int32, the first in the lowest bits, as all layouts do."""
    per_int = 32 // bits
    packed = torch.zeros(*numbers.shape[:-1], -(-numbers.shape[-1] // per_int), dtype=torch.int64)
    for j in range(numbers.shape[-1]):
        packed[..., j // per_int] |= numbers[..., j].long() << bits * (j % per_int)
    return packed.where(packed < 2**31, packed - 2**32).int()


def gptq(w: Weight, version: str) -> dict[str, Tensor]:
    """Along the inputs; the first version stores zeros less one."""
    zeros = w.zeros - int(version == "gptq")
    return {
        "qweight": pack(w.numbers, w.bits).T,
        "qzeros": pack(zeros.T, w.bits),
        "scales": w.scales.T.half(),
        "g_idx": (torch.arange(w.numbers.shape[1]) // w.group).int(),
    }


def awq(w: Weight) -> dict[str, Tensor]:
    """Along the outputs; slot i of an int32 has the output 0 2 4 6 1 3 5 7 [i]."""

    def in_order(numbers: Tensor) -> Tensor:
        eights = numbers.reshape(len(numbers), -1, 8)
        return torch.stack([eights[..., i] for i in (0, 2, 4, 6, 1, 3, 5, 7)], -1).flatten(1)

    return {
        "qweight": pack(in_order(w.numbers.T), 4),
        "qzeros": pack(in_order(w.zeros.T), 4),
        "scales": w.scales.T.half(),
    }


def packed_rows(w: Weight, asymmetric: bool) -> dict[str, Tensor]:
    """Along a row, and zeros along a column."""
    parts = {
        "weight_packed": pack(w.numbers, w.bits),
        "weight_scale": w.scales.bfloat16(),
        "weight_shape": torch.tensor(w.numbers.shape),
    }
    return parts | ({"weight_zero_point": pack(w.zeros.T, w.bits).T} if asymmetric else {})


def int8(w: Weight, asymmetric: bool, dim: int = 2) -> dict[str, Tensor]:
    """Numbers with a sign, in the weight's own shape."""
    parts = {
        "weight": (w.numbers - w.middle).to(torch.int8),
        "weight_scale": w.scales.bfloat16() if dim == 2 else w.scales.bfloat16()[0, :1],
    }
    return parts | ({"weight_zero_point": (w.zeros - w.middle).to(torch.int8)} if asymmetric else {})


@dataclass
class Case:
    """A layout in which every projection of the layers lies, and how the engine is to multiply it."""

    settings: dict[str, Any]
    write: Callable[[Weight], dict[str, Tensor]]
    bits: int = 4
    group: int = 0  # 0: all columns
    asymmetric: bool = False
    form: str = "Int4"  # or Int8, or Tensor
    shared_scale: bool = False
    extra: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, shape: tuple[int, int], seed: int) -> Weight:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shape
        group, top = self.group or columns, 1 << self.bits
        groups = columns // group
        middle = torch.full((rows, groups), top // 2)
        around = torch.randint(1, top - 1, (rows, groups), generator=generator)
        scales = (0.5 + torch.rand(rows, groups, generator=generator)) * 3 / columns**0.5 / top
        if self.shared_scale:
            scales[:] = scales[0, 0]
        return Weight(
            torch.randint(0, top, shape, generator=generator),
            scales.bfloat16().half().float(),  # exact in whatever it is stored
            around if self.asymmetric else middle,
            self.bits,
            group,
        )


def compressed(form: str, bits: int, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' settings."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": True, **weights},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "quantization_status": "compressed",
    }


W8A8 = compressed("int-quantized", 8, strategy="channel")
W8A8["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
GROUPS = {"strategy": "group", "group_size": 64}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
CASES = {
    "gptq": Case(GPTQ, lambda w: gptq(w, "gptq"), group=64, asymmetric=True),
    "gptq v2": Case(
        {**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, "gptq_v2"), group=64, asymmetric=True
    ),
    "gptq one group": Case({**GPTQ, "group_size": -1}, lambda w: gptq(w, "gptq")),
    "gptq 8 bits": Case(
        {**GPTQ, "bits": 8}, lambda w: gptq(w, "gptq"), bits=8, group=64, form="Tensor"
    ),
    "gptq 8 bits, one group": Case(
        {**GPTQ, "bits": 8, "group_size": -1}, lambda w: gptq(w, "gptq"), bits=8, form="Int8"
    ),
    "gptq odd group": Case({**GPTQ, "group_size": 16}, lambda w: gptq(w, "gptq"), group=16, form="Tensor"),
    "awq": Case(AWQ, awq, group=32, asymmetric=True),
    "int8": Case(W8A8, lambda w: int8(w, False), bits=8, form="Int8"),
    "int8 one scale": Case(
        compressed("int-quantized", 8, strategy="tensor"),
        lambda w: int8(w, False, 1),
        bits=8,
        form="Int8",
        shared_scale=True,
    ),
    "int8 asymmetric": Case(
        compressed("int-quantized", 8, strategy="channel", symmetric=False),
        lambda w: int8(w, True),
        bits=8,
        asymmetric=True,
        form="Tensor",
    ),
    "int8 packed": Case(
        compressed("pack-quantized", 8, strategy="channel"),
        lambda w: packed_rows(w, False),
        bits=8,
        form="Int8",
    ),
    "int4": Case(compressed("pack-quantized", 4, **GROUPS), lambda w: packed_rows(w, False), group=64),
    "int4 asymmetric": Case(
        compressed("pack-quantized", 4, **GROUPS, symmetric=False),
        lambda w: packed_rows(w, True),
        group=64,
        asymmetric=True,
    ),
    "int4 one group": Case(
        compressed("pack-quantized", 4, strategy="channel"), lambda w: packed_rows(w, False)
    ),
}  # fmt: skip


def fp8_parts(shape: tuple[int, int], seed: int, blocks: tuple[int, int], name: str, dim: int) -> Any:
    """A float8 weight, its scales, and the weight that they mean."""
    generator = torch.Generator().manual_seed(seed)
    down, across = -(-shape[0] // blocks[0]), -(-shape[1] // blocks[1])
    weight = (torch.randn(shape, generator=generator) * 50).to(FLOAT8)
    scales = (0.5 + torch.rand(down, across, generator=generator)) * 1.5 / 50 / shape[1] ** 0.5
    scales = scales.bfloat16().float()
    plain = torch.empty(shape)
    for i in range(down):
        for j in range(across):
            at = (slice(i * blocks[0], (i + 1) * blocks[0]), slice(j * blocks[1], (j + 1) * blocks[1]))
            plain[at] = weight[at].float() * scales[i, j]
    return {"weight": weight, name: scales.view(-1)[:1] if dim == 1 else scales}, plain


FP8 = {"type": "float"}
# Settings, name of the scales, block (0: all), dimensions of the scales.
FP8_CASES: dict[str, tuple[dict[str, Any], str, tuple[int, int], int]] = {
    "float8": (compressed("float-quantized", 8, **FP8, strategy="channel"), "weight_scale", (1, 0), 2),
    "float8 one scale": (
        compressed("float-quantized", 8, **FP8, strategy="tensor"),
        "weight_scale",
        (0, 0),
        1,
    ),
    "float8 blocks": (
        compressed("float-quantized", 8, **FP8, strategy="block", block_structure=[48, 80]),
        "weight_scale",
        (48, 80),
        2,
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", (128, 128), 2),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (1, 0), 2),
}


def write_both(directory: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    """A checkpoint in a layout, and the same in plain weights."""
    settings = FP8_CASES[name][0] if name in FP8_CASES else CASES[name].settings
    config = {**SHAPE, **changes}
    plain, stored = random_tensors(config), {}
    for i, (key, tensor) in enumerate(plain.items()):
        if "_proj" not in key:
            stored[key] = tensor
            continue
        shape, layer = (tensor.shape[0], tensor.shape[1]), key.removesuffix("weight")
        if name in FP8_CASES:
            _, scale, block, dim = FP8_CASES[name]
            parts, plain[key] = fp8_parts(shape, i, (block[0] or shape[0], block[1] or shape[1]), scale, dim)
        else:
            weight = CASES[name].weight(shape, i)
            parts, plain[key] = CASES[name].write(weight), weight.plain
        stored |= {layer + suffix: part.contiguous() for suffix, part in parts.items()}
    for sub, tensors, more in (
        ("quantised", stored, {"quantization_config": settings}),
        ("plain", plain, {}),
    ):
        (directory / sub).mkdir(parents=True, exist_ok=True)
        (directory / sub / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, directory / sub / "model.safetensors")
    return directory / "quantised", directory / "plain"
