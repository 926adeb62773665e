"""The comparison as a PNG file."""

from pathlib import Path

from minipyramid.cli.plotting import load_matplotlib, save_plot
from minipyramid.cli.terminal import readable
from minipyramid.demo.kept import SHADES
from minipyramid.demo.picture import Picture

COLOUR, OUTLINE = "tab:blue", "tab:orange"


def plot(picture: Picture, path: Path) -> None:
    """What was kept by layer and position on the left, and how much by layer on the right."""
    kept, n, layers = picture.pruned.kept, len(picture.tokens), picture.layers
    figure = load_matplotlib().Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    for layer, row in enumerate(kept.holders):
        shades = [kept.shade(count) for count in row]
        for shade in set(shades) - {0}:
            tops = [layer + (1 if own == shade else 0) for own in shades]
            left.stairs(tops, range(n + 1), baseline=layer, fill=True, color=COLOUR, alpha=shade / SHADES)
    left.set(xlabel="position in the prompt", ylabel="layer", xlim=(0, n), ylim=(layers, 0))
    lighter = " (lighter: by some of the heads)" if kept.heads_differ else ""
    title = f"kept of {picture.prompts[0].name}, {picture.pruned.name}{lighter}"
    left.set_title(title.replace("$", r"\$"))  # no formula
    middles = [layer + 0.5 for layer in range(layers)]
    right.barh(middles, kept.counts, height=0.8, color=COLOUR)
    right.set(xlabel="tokens kept", xlim=(0, n))
    if kept.computed != kept.counts:
        right.barh(middles, kept.computed, height=0.8, fill=False, edgecolor=OUTLINE, clip_on=False)
        right.set(xlabel="tokens kept\n(outlined: computed)")
    share = picture.pruned.kv_bytes / picture.pruned.kv_bytes_full
    figure.suptitle(
        f"keys and values {readable(picture.pruned.kv_bytes)} ({share:.1%} of the full cache), "
        f"{picture.pruned.tokens_per_s:.1f} tokens/s (full cache {picture.full.tokens_per_s:.1f})"
    )
    save_plot(figure, path, dpi=120)
