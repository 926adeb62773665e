"""PyramidKV (Cai et al., 2024): SnapKV's choice, and the deeper a layer, the fewer tokens it holds."""

from dataclasses import dataclass

from minipyramid.policies.snapkv import WINDOW, SnapKV

STEEPNESS = 20  # its beta: the deepest layer has a 20th of the mean


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Every layer holds the newest, and beside them the more the shallower it is, along a line."""

    def spread(self, total: int, prompt_tokens: int, layers: int) -> list[int]:
        """Beside the newest the deepest layer has a 20th of the mean.

        It has more where the first layer would get more than the whole prompt.
        """
        newest = max(1, min(WINDOW, total // (2 * layers)))
        mean = total / layers - newest
        slope = min(mean - mean / STEEPNESS, prompt_tokens - newest - mean)
        # Sums up to each layer are rounded, and not each layer's share, so that they come to the total.
        ends = [mean * (i + 1) + slope * (i + 1) * (1 - i / max(1, layers - 1)) for i in range(layers)]
        ends[-1] = float(total - layers * newest)
        starts = [0.0, *ends[:-1]]
        return [newest + round(end) - round(start) for start, end in zip(starts, ends, strict=True)]
