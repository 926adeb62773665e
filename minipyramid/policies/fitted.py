"""What a calibration has fitted to a checkpoint in closed form, as its file beside the profile holds it."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import CheckpointError, ConfigError

AXES = {"lines": 3, "stand_ins": 5, "guesses": 3}


def read_fitted(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, in float32: at least one of these three.

    lines: of the score `fitted`, a weight for each feature.  [L, K, 2 * D + 4]
    stand_ins: of each level a key and a value (`stand_ins.py`).  [levels, L, K, 2, D]
    guesses: weights of keys and values, by what a token left with.
        [L - depth, hidden_size + H * D + 1, 2 * K * D]

    Raises:
        CheckpointError: the file is missing or broken, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, or no file; put it beside the settings that name it, or calibrate again"
        )
    try:
        given = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:  # a name may be no file's name
        raise CheckpointError(f"{path} holds nothing fitted ({error}); calibrate again") from error
    known = [name for name in AXES if name in given]
    if not known:
        raise CheckpointError(f"{path} has {list(given)!r:.60}, expected {', '.join(AXES)}; calibrate again")
    for name in known:
        tensor = given[name]
        # Finite in float16, too, for a cache or its scales may be in that.
        is_finite = tensor.is_floating_point() and bool(tensor.half().isfinite().all())
        if tensor.dim() != AXES[name] or not is_finite:
            told = f"{path}: {name} are {list(tensor.shape)} of {tensor.dtype}, expected {AXES[name]} axes"
            raise CheckpointError(
                f"{told} of floating-point numbers that are finite in float16; calibrate again"
            )
    return {name: given[name].float() for name in known}


def check_shapes(
    source: str, tensors: list[tuple[str, Tensor | None]], config: ModelConfig, depth: int | None
) -> None:
    """Raise `ConfigError`, which begins with `source`, for what was fitted for another model than `config`'s.

    `tensors` are pairs of a name and what was fitted, or None; stand-ins are those of one level. `depth` is
    the number of layers in front of the cut, or None without guesses.
    """
    L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    features = config.hidden_size + config.num_attention_heads * D + 1
    shapes = {
        "lines": (L, K, 2 * D + 4),
        "stand_ins": (L, K, 2, D),  # of one level
        "guesses": (L - (depth or 0), features, 2 * K * D),
    }
    for name, tensor in tensors:
        if tensor is not None and tensor.shape != shapes[name]:
            told = f"{source}: {name} are {list(tensor.shape)}, and of this model {list(shapes[name])}"
            raise ConfigError(f"{told}; they were fitted for another model, so calibrate this one")
