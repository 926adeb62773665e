"""What a calibration has found, as a picture: where the model looks back, and both lists of every level."""

from pathlib import Path

from minipyramid.calibrate.find import Found
from minipyramid.cli.plotting import load_matplotlib, save_plot

NOTHING = 1e-6  # nats; what costs less is drawn as costing that, for the axis is logarithmic


def plot(found: Found, file: Path) -> None:
    """Three panels: what layers cost, what cuts cost, and what the levels compute (outlined) and hold."""
    figure = load_matplotlib().Figure(figsize=(15, 4.5), layout="constrained")
    curves, depths, lists = figure.subplots(1, 3)
    layers = range(len(found.curves))
    sizes = sorted({point.share for points in found.curves for point in points if point.share < 1})
    for share in sizes:
        losses = [next(p.loss for p in points if p.share == share) for points in found.curves]
        curves.plot(layers, [max(loss, NOTHING) for loss in losses], marker=".", label=f"{share:.0%}")
    curves.set(yscale="log", xlabel="layer", ylabel="loss, nats", title="one layer alone holds a share")
    curves.legend(title="held")
    for computed, by_depth in found.depths.items():
        where, losses_there = zip(*by_depth, strict=True)
        depths.plot(where, [max(loss, NOTHING) for loss in losses_there], marker=".", label=f"{computed:.0%}")
    depths.set(
        yscale="log", xlabel="layers that compute all", ylabel="loss, nats", title="the others are cut"
    )
    if found.depths:
        depths.legend(title="computed")
    for i, level in enumerate(found.levels):
        for layer in layers:
            lists.barh(layer, 0.8 * level.held[layer], left=i, color="tab:blue")
            lists.barh(layer, 0.8 * level.computed[layer], left=i, fill=False, edgecolor="tab:orange")
    lists.set(xlabel="level, by what it holds", ylabel="layer", title="computed (outlined) and held")
    lists.set_xticks([i + 0.4 for i in range(len(found.levels))], [f"{x.share:.0%}" for x in found.levels])
    lists.invert_yaxis()
    save_plot(figure, file)
