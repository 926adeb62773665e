"""What a calibration has fitted to a checkpoint in closed form, as its file beside the profile holds it."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minipyramid.errors import CheckpointError

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
    try:
        given = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:  # a name may be no file's name
        raise CheckpointError(f"{path} holds nothing fitted ({error}); calibrate again") from error
    fitted = {name: given[name].float() for name in AXES if name in given}
    if not fitted:
        raise CheckpointError(f"{path} has {list(given)!r:.60}, expected {', '.join(AXES)}; calibrate again")
    for name, tensor in fitted.items():
        # Finite in float16, too, for a cache or its scales may be in that.
        finite = given[name].is_floating_point() and tensor.half().isfinite().all()
        if tensor.dim() != AXES[name] or not finite:
            shape = list(tensor.shape)
            raise CheckpointError(f"{path}: {name} are {shape}, expected finite numbers on {AXES[name]} axes")
    return fitted
