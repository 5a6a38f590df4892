"""The figures of a rate plane: metrics over it, against the rates, and against each other."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize

from models.tables import COLLAPSED
from utils.plane.cells import UNITS, Plane
from utils.plane.compare import Group
from utils.plane.drawing import (
    BETA_Y,
    BETA_Z,
    DIAGONAL,
    GREY,
    MARKERS,
    RED,
    Drawn,
    bar_of,
    beta_colours,
    colours_of,
    legend,
    mark,
    panels,
    rate_axis,
    seeds,
    table,
)
from utils.plane.metrics import ACCURACIES, BRACKETS, metric
from utils.plane.mixtures import hull


def dots(
    ax: Axes, plane: Plane, x: str, y: str, colours: np.ndarray, norm=None, cmap="viridis", **how
) -> PathCollection:
    """Draws cells: round ones that were trained on their own, square ones that were unfolded from a multi-rate model.

    In batches of mixed settings, each has a marker. `colours` are numbers (N,), of which NaN is not drawn, or RGB (N,
    3).
    """
    there = np.isfinite(colours) if colours.ndim == 1 else np.ones(len(colours), bool)
    if colours.ndim == 1 and norm is None and there.any():
        norm = Normalize(colours[there].min(), colours[there].max())
    how = how | ({"cmap": cmap, "norm": norm, "lw": 0} if colours.ndim == 1 else {"lw": 0.3, "ec": "0.3"})
    drawn, free = None, {False: cycle("o^DvP"), True: cycle("spXh8")}
    kinds = [(kind, mask, bool(plane.unfolded[mask][0])) for kind, mask in plane.kinds.items()]
    several = Counter(unfolded for _, _, unfolded in kinds)
    for kind, mask, unfolded in kinds:
        shown = there & mask
        marker, label = next(free[unfolded]), textwrap.fill(kind, 40)
        if several[unfolded] == 1:
            label = "multi-rate model" if unfolded else None
        if shown.any() or drawn is None:
            at = plane.values(x)[shown], plane.values(y)[shown]
            drawn = ax.scatter(*at, c=colours[shown], marker=marker, zorder=2, label=label, **how)
    return drawn


def is_bar(plane: Plane, name: str) -> bool:
    """Whether a metric is drawn from its lower to its upper end."""
    return BRACKETS.get(name) in plane.names


def draw_values(ax: Axes, plane: Plane, x: str, name: str, colours: np.ndarray, norm: Normalize) -> PathCollection:
    """Draws a metric against a rate: cells as dots, or as bars from the lower to the upper end of what is known."""
    ax.set_title(plane.title(name).replace(", at least", "") if is_bar(plane, name) else plane.title(name))
    if not is_bar(plane, name):
        seeds(ax, plane, x, name)
        return dots(ax, plane, x, name, np.where(np.isfinite(plane.values(name)), colours, math.nan), norm=norm, s=12)
    low, high = plane.values(name), plane.values(BRACKETS[name])
    known = np.isfinite(low) & np.isfinite(high)
    at, low, high, colours = (v[known] for v in (plane.values(x), low, np.maximum(high, low), colours))
    how = {"norm": norm, "cmap": "viridis", "zorder": 2}
    ax.vlines(at, low, high, lw=1.8, label="at least to at most", **how).set_array(colours)
    ax.scatter(at, low, c=colours, marker="_", s=14, lw=1, **how)
    return ax.scatter(at, high, c=colours, marker="_", s=14, lw=1, **how)


def draw_targets(ax: Axes, plane: Plane) -> None:
    """Rates that were asked for, as crosses, each with a line to what was reached; R(z) along x, R(y|z) along y."""
    asked = plane.asked * UNITS[plane.unit]
    for (y, z), r_y, r_z in zip(asked, plane.values("kl_y"), plane.values("kl_z"), strict=True):
        if math.isfinite(y) or math.isfinite(z):
            at = z if math.isfinite(z) else r_z, y if math.isfinite(y) else r_y
            ax.plot([at[0], r_z], [at[1], r_y], "-", c=RED, lw=0.7, zorder=3)
            ax.plot(*at, "x", c=RED, ms=4, mew=0.9, ls="none", zorder=3, label="asked for")


def rate_planes(plane: Plane, names: Sequence[str]) -> Drawn:
    """Each metric over the rate plane, with R(z) along x and R(y|z) along y."""
    figure, axes = panels(plane, len(names))
    for ax, name in zip(axes, names, strict=True):
        seeds(ax, plane, "kl_z", "kl_y")
        values = plane.values(name)
        without = ~np.isfinite(values)
        ax.plot(plane.values("kl_z")[without], plane.values("kl_y")[without], "x", ms=2.5, c=GREY, mew=0.5)
        points = dots(ax, plane, "kl_z", "kl_y", values, cmap=colours_of(name), s=14)
        draw_targets(ax, plane)
        mark(ax, plane, "kl_z", "kl_y", name)
        for cell in plane.cells:
            count = sum(min(row["kl_z"], row["kl_y"]) < COLLAPSED for row in cell.repeats)
            if 0 < count < len(cell.repeats):
                at = (plane.scale(n) * cell.median[n] for n in ("kl_z", "kl_y"))
                ax.annotate(f"{count}/{len(cell.repeats)}", tuple(at), (4, 3), textcoords="offset points", fontsize=7)
        ax.set_title(plane.title(name))
        bar_of(figure, points, ax, name)
        rate_axis(ax, "x", plane, "kl_z")
        rate_axis(ax, "y", plane, "kl_y")
    legend(figure, axes)
    return Drawn(figure, table(plane, names))


def total_rates(plane: Plane, names: Sequence[str]) -> Drawn:
    """Each metric against the total rate, with what mixtures of all cells and of ordinary beta-VAEs reach."""
    figure, axes = panels(plane, len(names))
    r_z, rows = plane.values("kl_z"), table(plane, [n for name in names for n in (name, BRACKETS.get(name)) if n])
    norm = Normalize(r_z.min(), r_z.max())  # shared by all panels
    for ax, name in zip(axes, names, strict=True):
        points = draw_values(ax, plane, "rate", name, r_z, norm)
        lines = (("hull of all cells", r_z == r_z, {"c": RED, "lw": 2, "alpha": 0.6}),
                 (f"hull of {DIAGONAL}", plane.diagonal, {"c": "k", "lw": 0.9, "ls": "--"}))  # fmt: skip
        for label, among, how in lines:
            xs, vs = hull(plane, name, among)
            ax.plot(xs, vs, zorder=1, **({"label": label} if len(xs) else {}), **how)
            what = label.replace(DIAGONAL, "beta_y = beta_z")
            rows += [{"what": what, "rate": x, name: v} for x, v in zip(xs.tolist(), vs.tolist(), strict=True)]
        mark(ax, plane, "rate", name, name)
        rate_axis(ax, "x", plane, "rate")
    bar_of(figure, points, axes, None, label=plane.title("kl_z"), aspect=40, shrink=0.7)
    legend(figure, axes)
    return Drawn(figure, rows)


def against_rate_z(plane: Plane, names: Sequence[str], bound: Callable[[float], float] | None, h: float) -> Drawn:
    """Accuracies and mutual information against R(z), with the bounds that R(z) implies, which hold for samples of z.

    `bound` maps information on the label, in nats, to the largest accuracy; `h` is the entropy of the label in nats.
    They are None and NaN if the labels are not known.
    """
    figure, axes = panels(plane, len(names))
    r_z, r_y, unit = plane.values("kl_z"), plane.values("kl_y"), UNITS[plane.unit]
    grid = np.unique(np.concatenate([np.linspace(0, max(r_z.max(), 1e-3), 200), np.geomspace(1e-3, 10 * unit, 60)]))
    grid, norm = grid[grid <= max(r_z.max(), 1e-3)], Normalize(r_y.min(), r_y.max())
    for ax, name in zip(axes, names, strict=True):
        colours = draw_values(ax, plane, "kl_z", name, r_y, norm)
        of_samples = name.removesuffix("_standardized") in ACCURACIES["z"]
        if math.isfinite(h) and (of_samples or name in ("mi_z_low", "mi_q_mc", "mi_q")):
            line = np.array([bound(v / unit) for v in grid]) if of_samples else np.minimum(grid, h * unit)
            ax.plot(grid, line, "-", c=RED, label="bound from R(z) and H(label)")
        if of_samples:
            ax.plot(
                r_z, plane.values("acc_bound"), "_", c=RED, ms=4, mew=0.7, label="bound from the cell's own I(z; label)"
            )
        mark(ax, plane, "kl_z", name, name)
        rate_axis(ax, "x", plane, "kl_z")
    bar_of(figure, colours, axes, None, label=plane.title("kl_y"), aspect=40, shrink=0.7)
    legend(figure, axes)
    shown = [n for name in names for n in (name, BRACKETS.get(name)) if n]
    return Drawn(figure, table(plane, [*shown, "acc_bound"]))


def tasks(plane: Plane, names: Sequence[str]) -> Drawn:
    """The colour code of the betas, the rate plane in these colours, and the tasks' metrics against each other."""
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    figure, axes = panels(plane, 2 + len(pairs), height=0.95, columns=3)
    colours = beta_colours(plane.values("beta_y"), plane.values("beta_z"))
    key, rates, *others = axes
    key.scatter(plane.values("beta_z"), plane.values("beta_y"), c=colours, s=20, lw=0.3, ec="0.3")
    positive = all((plane.values(n) > 0).all() for n in ("beta_y", "beta_z"))
    key.set(xscale="log" if positive else "symlog", yscale="log" if positive else "symlog")
    key.set(xlabel=BETA_Z, ylabel=BETA_Y, title="colours")
    views = [(key, "beta_z", "beta_y"), (rates, "kl_z", "kl_y")]
    views += [(ax, *pair) for ax, pair in zip(others, pairs, strict=True)]
    for ax, x, y in views[1:]:
        dots(ax, plane, x, y, colours, s=14)
    rate_axis(rates, "x", plane, "kl_z")
    rate_axis(rates, "y", plane, "kl_y")
    for ax, x, y in views[2:]:
        ax.set(xlabel=plane.title(x), ylabel=plane.title(y))
    for name, marker in zip(names, "*PDX", strict=False):
        best = plane.best(name)
        for ax, x, y in views:
            label = f"best {metric(name).label}" if ax is key else None
            at = plane.values(x)[best], plane.values(y)[best]
            size = 13 if marker == "*" else 9
            ax.plot(*at, marker, ms=size, mfc="none", mec="k", mew=0.9, ls="none", label=label, clip_on=False)
    legend(figure, axes)
    return Drawn(figure, table(plane, names))


def batches(groups: Sequence[Group], about: str) -> Drawn:
    """Each metric against the total rate, with marker, colour and hull of each batch; apart what is not comparable."""
    several = len({group.of for group in groups}) > 1
    some = next(iter(groups[0].planes.values()))
    figure, axes = panels(some, len(groups), about=about)
    looks = dict(zip(dict.fromkeys(batch for group in groups for batch in group.planes), cycle(MARKERS), strict=False))
    rows = []
    for ax, (name, of, planes) in zip(axes, groups, strict=True):
        for batch, plane in planes.items():
            marker, colour = looks[batch]
            seeds(ax, plane, "rate", name)
            at = plane.values("rate"), plane.values(name)
            ax.plot(*at, marker, c=colour, ms=3.5, mew=0, ls="none", label=batch)
            xs, vs = hull(plane, name, at[0] == at[0])
            ax.plot(xs, vs, c=colour, lw=1.2)
            rows += [{"batch": batch, "of": of, **row} for row in table(plane, [name])]
            rows += [
                {"batch": batch, "of": of, "what": "hull", "rate": x, name: v} for x, v in zip(xs, vs, strict=True)
            ]
        ax.set_title(f"{some.title(name)}{f', {of}' * several}")
        rate_axis(ax, "x", max(planes.values(), key=lambda p: p.values("rate").max()), "rate")
    legend(figure, axes)
    return Drawn(figure, rows)
