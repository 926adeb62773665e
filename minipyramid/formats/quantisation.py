"""Which layout quantised weights lie in, and a checkpoint's tensors as if its weights were whole."""

from functools import partial
from typing import Any

from torch import Tensor

from minipyramid.errors import CheckpointError, ConfigError, expect_type
from minipyramid.formats import awq, compressed_tensors, gptq, scaled
from minipyramid.formats.layout import Layout, Part
from minipyramid.formats.weights import AT_LOAD, Stored
from minipyramid.quantised import Quantised

METHODS = {
    "gptq": gptq.layout_of,
    "awq": awq.layout_of,
    compressed_tensors.METHOD: compressed_tensors.layout_of,
    "fp8": scaled.fp8_layout,
    "fbgemm_fp8": scaled.fbgemm_layout,
}


def check_quantize(quantize: str, settings: Any) -> None:
    """Refuse what plain weights cannot become, and what is done already. Raises `ConfigError`."""
    expect_type("quantize", quantize, (str, type(None)), "a name")
    if quantize != AT_LOAD:
        raise ConfigError(f"quantize is {quantize!r}, expected {AT_LOAD!r}")
    if settings is not None:
        raise ConfigError(f"quantize is {quantize!r}, but the weights are quantised already; leave it out")


def layout_of(settings: Any) -> Layout:
    """What `quantization_config` says. Raises `ConfigError` for what is not implemented."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        problem = f"the weights are quantised by {method or 'an unnamed method'}, which is not implemented"
        raise ConfigError(f"quantization_config: {problem}; take the model's plain weights")
    try:
        return METHODS[method](settings)
    except ConfigError as error:
        raise ConfigError(f"quantization_config: {error}") from error


def gather(
    tensors: dict[str, Stored], shapes: dict[str, tuple[int, ...]], layout: Layout
) -> dict[str, Stored]:
    """The parts of each quantised weight as one tensor under the plain weight's name; others as they are.

    Raises `CheckpointError` if a part is missing or misshapen.
    """
    gathered = dict(tensors)
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or f"{layer}.{layout.mark}" not in tensors:
            continue
        rows, columns = shape
        found = {}
        for suffix, part in layout.parts(rows, columns).items():
            # Some are the model's own, as Qwen2's biases.
            own = f"{layer}.{suffix}" != name and f"{layer}.{suffix}" in shapes
            stored = None if own else gathered.pop(f"{layer}.{suffix}", None)
            if stored is not None:
                _check_shape(stored, f"{layer}.{suffix}", part, layout)
                found[suffix] = stored
            elif not part.optional:
                raise CheckpointError(f"{layer}.{suffix} is missing, which belongs to {layer}.{layout.mark}")
        for suffix in layout.ignored:
            gathered.pop(f"{layer}.{suffix}", None)
        path = found[layout.mark].path
        gathered[name] = Stored(path, [rows, columns], partial(_read, layer, found, layout, rows, columns))
    return gathered


def _check_shape(stored: Stored, name: str, part: Part, layout: Layout) -> None:
    if stored.shape not in part.shapes:
        asked = " or ".join(map(str, part.shapes))
        problem = (
            f"{name} has shape {stored.shape}, but quantization_config ({layout.method}) asks for {asked}"
        )
        raise CheckpointError(f"{stored.path}: {problem}")


def _read(layer: str, found: dict[str, Stored], layout: Layout, rows: int, columns: int) -> Quantised:
    parts: dict[str, Tensor] = {}
    path, asked = found[layout.mark].path, layout.parts(rows, columns)
    for suffix, stored in found.items():
        tensor = stored.read()
        if not isinstance(tensor, Tensor) or tensor.dtype not in asked[suffix].dtypes:
            allowed = " or ".join(map(str, asked[suffix].dtypes))
            held = getattr(tensor, "dtype", None)
            raise CheckpointError(f"{stored.path}: {layer}.{suffix} holds {held}, expected {allowed}")
        parts[suffix] = tensor
    try:
        weight = layout.read(parts, rows, columns)
    except ValueError as error:
        raise CheckpointError(f"{path}: {layer} {error}; take the model's plain weights") from error
    if not weight.scales.isfinite().all():
        raise CheckpointError(f"{path}: {layer} has scales that are not finite; fetch it again")
    return weight
