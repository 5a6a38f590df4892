"""The figures of a rate plane: metrics over it, against the rates, over the grid of betas, and against each other."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.evaluation.information import accuracy_bound, entropy
from utils.plane import drawing
from utils.plane.cells import BETAS, UNITS, Plane
from utils.plane.drawing import COLOURS, GREY, RED, Drawing, Grid, bar_of, legend, panels, rate_axis, table
from utils.plane.excess import by_trainings
from utils.plane.metrics import ACCURACIES, BRACKETS, metric
from utils.plane.mixtures import hull
from utils.plane.slopes import FAR_OFF, Slope, slope_rows

CORNERS = np.array([[[0.00, 0.16, 0.55], [0.33, 0.22, 0.00]], [[0.60, 0.80, 1.00], [1.00, 0.86, 0.20]]])  # [y, z], RGB
CIRCLE, STAR = {"mfc": "none", "mec": "k", "ls": "none"}, {"mfc": "none", "mec": RED, "ls": "none"}


def draw_seeds(ax: Axes, plane: Plane, x: str, y: str) -> None:
    """Draws every run of the cells that have several, as points with a line to the cell's median."""
    for cell in plane.cells:
        for row in cell.repeats if len(cell.repeats) > 1 else ():
            xs, ys = ([plane.scale(n) * of.get(n, math.nan) for of in (row, cell.median)] for n in (x, y))
            ax.plot(xs, ys, "-", c=GREY, lw=0.4, zorder=1)
            ax.plot(xs[0], ys[0], ".", c=GREY, ms=3, mew=0, ls="none", zorder=1, label="single seeds")


def mark(ax: Axes, plane: Plane, x: str, y: str, name: str) -> None:
    """Marks cells on the diagonal (circles), the cell (1, 1) (square) and around the best cell for a metric a star."""
    xs, ys, on = plane.values(x), plane.values(y), plane.diagonal
    ax.plot(xs[on], ys[on], "o", ms=5.8, mew=0.6, label=drawing.DIAGONAL, **CIRCLE)
    one = on & np.isclose(plane.values("beta_y"), 1)
    ax.plot(xs[one], ys[one], "s", ms=8, mew=0.8, label="both 1", **CIRCLE)
    if metric(name).better and (best := plane.best(name)) is not None:
        ax.plot(xs[best], ys[best], "*", zorder=4, label="best", ms=17, mew=1.1, clip_on=False, **STAR)


def dots(ax: Axes, plane: Plane, x: str, y: str, colours: np.ndarray, **look) -> PathCollection:
    """Draws cells: round ones that were trained on their own, square ones that were unfolded from a multi-rate model.

    In batches of mixed settings, each has a marker. `colours` are RGB (N, 3), or numbers (N,); NaN is not drawn.
    """
    finite, points = np.isfinite(colours.reshape(len(colours), -1)).all(1), None
    markers = {False: cycle("o^DvP"), True: cycle("spXh8")}
    kinds = [(kind, mask, bool(plane.unfolded[mask][0])) for kind, mask in plane.kinds.items()]
    numbers = Counter(unfolded for _, _, unfolded in kinds)
    for kind, mask, unfolded in kinds:
        cells, marker, label = finite & mask, next(markers[unfolded]), textwrap.fill(kind, 40)
        if numbers[unfolded] == 1:
            label = "multi-rate model" if unfolded else None
        if cells.any() or points is None:
            at = plane.values(x)[cells], plane.values(y)[cells]
            points = ax.scatter(*at, c=colours[cells], marker=marker, zorder=2, label=label, **look)
    return points


def draw_values(ax: Axes, plane: Plane, x: str, name: str, colours: np.ndarray, norm: Normalize) -> PathCollection:
    """Draws a metric against a rate: cells as dots, or as bars from the lower to the upper end of what is known."""
    look, low = {"norm": norm, "cmap": "viridis"}, plane.values(name)
    if BRACKETS.get(name) not in plane.names:
        ax.set_title(plane.title(name))
        draw_seeds(ax, plane, x, name)
        return dots(ax, plane, x, name, np.where(np.isfinite(low), colours, math.nan), lw=0, s=12, **look)
    ax.set_title(plane.title(name).replace(", at least", ""))
    high = plane.values(BRACKETS[name])
    finite = np.isfinite(low) & np.isfinite(high)
    at, low, high, colours = (v[finite] for v in (plane.values(x), low, np.maximum(high, low), colours))
    ax.vlines(at, low, high, lw=1.8, zorder=2, label="at least to at most", **look).set_array(colours)
    ends = [ax.scatter(at, v, c=colours, marker="_", s=14, lw=1, zorder=2, **look) for v in (low, high)]
    return ends[1]


def rate_planes(plane: Plane, names: Sequence[str]) -> Drawing:
    """Each metric over the rate plane, with R(z) along x and R(y|z) along y, and crosses where rates were asked for."""
    (figure, axes), targets = panels(plane, len(names)), plane.targets * UNITS[plane.unit]
    r_z, r_y = plane.values("kl_z"), plane.values("kl_y")
    for ax, name in zip(axes, names, strict=True):
        draw_seeds(ax, plane, "kl_z", "kl_y")
        values = plane.values(name)
        unknown = ~np.isfinite(values)
        ax.plot(r_z[unknown], r_y[unknown], "x", ms=2.5, c=GREY, mew=0.5)
        look = {"cmap": COLOURS[metric(name).better], "norm": Normalize(np.nanmin(values), np.nanmax(values))}
        points = dots(ax, plane, "kl_z", "kl_y", values, lw=0, s=14, **look)
        for x, y, target_y, target_z in zip(r_z, r_y, *targets.T, strict=True):
            if math.isfinite(target_y) or math.isfinite(target_z):
                at = x if math.isnan(target_z) else target_z, y if math.isnan(target_y) else target_y
                ax.plot([at[0], x], [at[1], y], "-", c=RED, lw=0.7, zorder=3)
                ax.plot(*at, "x", c=RED, ms=4, mew=0.9, ls="none", zorder=3, label="asked for")
        mark(ax, plane, "kl_z", "kl_y", name)
        for *at, cell in zip(r_z, r_y, plane.cells, strict=True):
            count, of = cell.collapsed("kl_z", "kl_y"), len(cell.runs)
            if 0 < count < of:
                ax.annotate(f"{count}/{of}", tuple(at), (4, 3), textcoords="offset points", fontsize=7)
        ax.set_title(plane.title(name))
        bar_of(figure, points, ax, name)
        rate_axis(ax, "x", plane, "kl_z")
        rate_axis(ax, "y", plane, "kl_y")
    legend(figure, axes)
    return Drawing(figure, table(plane, names))


def against(plane: Plane, names: Sequence[str], rate: str, colour: str, lines: Callable[[Axes, str], None]) -> Figure:
    """Each metric against a rate, in the colours of another; `lines` draws into a panel what else it shows."""
    figure, axes = panels(plane, len(names))
    colours = plane.values(colour)
    norm = Normalize(colours.min(), colours.max())  # shared by all panels
    for ax, name in zip(axes, names, strict=True):
        points = draw_values(ax, plane, rate, name, colours, norm)
        lines(ax, name)
        mark(ax, plane, rate, name, name)
        rate_axis(ax, "x", plane, rate)
    bar_of(figure, points, axes, None, label=plane.title(colour), aspect=40, shrink=0.7)
    legend(figure, axes)
    return figure


def with_ends(names: Sequence[str]) -> list[str]:
    """Metrics, each followed by the upper end of what it is the lower end of."""
    return [n for name in names for n in (name, BRACKETS.get(name)) if n]


def total_rates(plane: Plane, names: Sequence[str]) -> Drawing:
    """Each metric against the total rate, with what mixtures of all cells and of ordinary beta-VAEs reach."""
    rows = []

    def lines(ax: Axes, name: str) -> None:
        for of, text, cells, look in (
            ("all cells", "all cells", True, {"c": RED, "lw": 2, "alpha": 0.6}),
            (drawing.DIAGONAL, "beta_y = beta_z", plane.diagonal, {"c": "k", "lw": 0.9, "ls": "--"}),
        ):
            if corners := hull(plane, name, cells):
                ax.plot(*zip(*(row.values() for row in corners), strict=True), zorder=1, label=f"hull of {of}", **look)
                rows.extend({"what": f"hull of {text}"} | row for row in corners)

    figure = against(plane, names, "rate", "kl_z", lines)
    return Drawing(figure, table(plane, with_ends(names)) + rows)


def against_rate_z(plane: Plane, names: Sequence[str]) -> Drawing:
    """Accuracies and mutual information against R(z), with the bounds that R(z) and the entropy of the labels imply,
    which hold for samples of z; without bounds if the labels are not known."""
    most, unit = max(plane.values("kl_z").max(), 1e-3), UNITS[plane.unit]
    rates = np.unique([*np.linspace(0, most, 200), *np.geomspace(1e-3, 10 * unit, 60)])
    rates = rates[rates <= most]

    def lines(ax: Axes, name: str) -> None:
        of_samples = name in ACCURACIES["z"]
        if plane.labels is not None and (of_samples or name in ("mi_z_low", "mi_q_mc", "mi_q")):
            bounds = np.minimum(rates, entropy(plane.labels) * unit)
            if of_samples:
                bounds = [accuracy_bound(rate / unit, plane.labels) for rate in rates]
            ax.plot(rates, bounds, "-", c=RED, label="bound from R(z) and H(label)")
        if of_samples:
            look = {"c": RED, "ms": 4, "mew": 0.7, "label": "bound from the cell's own I(z; label)"}
            ax.plot(plane.values("kl_z"), plane.values("acc_bound"), "_", **look)

    return Drawing(against(plane, names, "kl_z", "kl_y", lines), table(plane, [*with_ends(names), "acc_bound"]))


def beta_colours(beta_y: np.ndarray, beta_z: np.ndarray) -> np.ndarray:
    """RGB colours (N, 3) of pairs of betas: beta_y from dark to light, beta_z from blue to yellow.

    These are the two directions of colour that are left to deuteranopes and protanopes.
    """
    shares = []
    for beta in (beta_y, beta_z):
        least = beta[beta > 0].min() if (beta > 0).any() else 1.0
        u = np.log(np.maximum(beta, least / 2))  # a beta of 0 is placed next to the smallest
        shares.append(((u - u.min()) / max(np.ptp(u), 1e-9))[:, None])
    y, z = shares
    return (1 - y) * ((1 - z) * CORNERS[0, 0] + z * CORNERS[0, 1]) + y * ((1 - z) * CORNERS[1, 0] + z * CORNERS[1, 1])


def tasks(plane: Plane, names: Sequence[str]) -> Drawing:
    """The colour code of the betas, the rate plane in these colours, and the tasks' metrics against each other."""
    views = [("beta_z", "beta_y"), ("kl_z", "kl_y")]
    views += [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    figure, axes = panels(plane, len(views), height=0.95, columns=3)
    betas = [plane.values(name) for name in BETAS]
    colours, scale = beta_colours(*betas), "log" if np.min(betas) > 0 else "symlog"
    key, rates, *others = axes
    key.scatter(*betas[::-1], c=colours, s=20, lw=0.3, ec="0.3")
    key.set(xscale=scale, yscale=scale, xlabel=drawing.BETA_Z, ylabel=drawing.BETA_Y, title="colours")
    for ax, (x, y) in zip(axes[1:], views[1:], strict=True):
        dots(ax, plane, x, y, colours, s=14, lw=0.3, ec="0.3")
    rate_axis(rates, "x", plane, "kl_z")
    rate_axis(rates, "y", plane, "kl_y")
    for ax, (x, y) in zip(others, views[2:], strict=True):
        ax.set(xlabel=plane.title(x), ylabel=plane.title(y))
    for name, marker in zip(names, "*PDX", strict=False):
        best, look = plane.best(name), {"ms": 13 if marker == "*" else 9, "mew": 0.9, "clip_on": False, **CIRCLE}
        for ax, (x, y) in zip(axes, views, strict=True):
            label = f"best {metric(name).label}" if ax is key else None
            ax.plot(plane.values(x)[best], plane.values(y)[best], marker, label=label, **look)
    legend(figure, axes)
    return Drawing(figure, table(plane, names))


def heat_map(ax: Axes, grid: Grid, values: Sequence[float], room: int = 7, name: str | None = None, **colours) -> None:
    """A heat map over the grid of betas, annotated with its values if a row has at most `room` of them."""
    image = grid.image(values)
    ax.set_facecolor("0.9")
    colouring = ax.imshow(image, origin="lower", aspect="auto", interpolation="nearest", **colours)
    ratios = {"ticks": [0.25, 0.5, 1, 2, 4], "format": "%g"} if isinstance(colouring.norm, LogNorm) else {}
    bar_of(ax.figure, colouring, ax, name, **ratios)
    grid.label(ax, room)
    if grid.shape[1] <= room and grid.shape[0] <= 11:
        for (i, j), v in np.ndenumerate(image):
            if math.isfinite(v):
                r, g, b, _ = colouring.cmap(colouring.norm(v))
                colour = "w" if 0.3 * r + 0.59 * g + 0.11 * b < 0.5 else "k"
                text = f"{v:.3g}"
                if len(text) > 4:
                    text = f"{v:.2f}" if abs(v) < 10 else f"{v:.0f}"
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)


def heat_maps(plane: Plane, names: Sequence[str]) -> Drawing:
    """Heat maps of the rates and of each metric over the grid of betas; the cells have one setting but for these."""
    names = list(dict.fromkeys(("kl_z", "kl_y", *names)))
    figure, axes = panels(plane, len(names), height=0.75)
    grid = Grid(*map(plane.values, BETAS))
    for ax, name in zip(axes, names, strict=True):
        heat_map(ax, grid, plane.values(name), 5 if len(names) > 4 else 7, name, cmap=COLOURS[metric(name).better])
        ax.set_title(plane.title(name))
        if metric(name).better and (best := plane.best(name)) is not None:
            corner = grid.column[best] - 0.5, grid.row[best] - 0.5
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=RED, lw=1.6, clip_on=False))
    return Drawing(figure, table(plane, names))


def slope_maps(plane: Plane, estimates: Sequence[Slope]) -> Drawing:
    """The slopes of D over the grid of betas, relative to the betas: 1 everywhere if all cells are at their optimum."""
    figure, axes = panels(plane, 2, height=0.75)
    grid = Grid(*([s.cell.median[name] for s in estimates] for name in BETAS))
    for ax, layer, rate in zip(axes, ("z", "y"), ("R(z)", "R(y|z)"), strict=True):
        ratios = np.array([getattr(s, f"ratio_{layer}") for s in estimates])
        norm = LogNorm(1 / FAR_OFF**2, FAR_OFF**2)
        heat_map(ax, grid, np.where(ratios > 0, ratios, math.nan), cmap="PuOr", norm=norm)
        ax.set_title(rf"$-$dD/d{rate} over $\beta_{layer}$")
    return Drawing(figure, slope_rows(estimates))


def excess_maps(plane: Plane, rows: list[dict]) -> Drawing:
    """The excess loss of multi-rate cells over the grid of betas, a panel for each pair of trainings."""
    groups = by_trainings(rows)
    figure, axes = panels(plane, len(groups), height=0.75)
    largest = max((abs(row["excess"]) for row in rows if math.isfinite(row["excess"])), default=1.0) or 1.0
    for ax, ((shared, own), of_both) in zip(axes, groups.items(), strict=True):
        grid = Grid(*([row[name] for row in of_both] for name in BETAS))
        norm = Normalize(-largest, largest)
        heat_map(ax, grid, [row["excess"] for row in of_both], cmap="PuOr_r", norm=norm)
        ax.set_title(f"excess loss (nats): {shared}\nfor all; {own}, on their own")
    return Drawing(figure, rows)


def batches(groups: Sequence, about: str) -> Drawing:
    """Each metric against the total rate, with marker, colour and hull of each batch; apart what is not comparable.

    `groups` are those of utils/plane/compare.py.
    """
    several = len({group.of for group in groups}) > 1
    some, rows = next(iter(groups[0].planes.values())), []
    figure, axes = panels(some, len(groups))
    drawing.say(figure, about)
    looks = dict(zip(dict.fromkeys(batch for g in groups for batch in g.planes), cycle(drawing.MARKERS), strict=False))
    for ax, (name, of, planes) in zip(axes, groups, strict=True):
        for batch, plane in planes.items():
            marker, colour = looks[batch]
            draw_seeds(ax, plane, "rate", name)
            ax.plot(plane.values("rate"), plane.values(name), marker, c=colour, ms=3.5, mew=0, ls="none", label=batch)
            corners = hull(plane, name)
            ax.plot(*zip(*(row.values() for row in corners), strict=True) if corners else ((), ()), c=colour, lw=1.2)
            rows += [{"batch": batch, "of": of, **row} for row in table(plane, [name])]
            rows += [{"batch": batch, "of": of, "what": "hull", **row} for row in corners]
        ax.set_title(f"{some.title(name)}, {of}" if several else some.title(name))
        rate_axis(ax, "x", max(planes.values(), key=lambda p: p.values("rate").max()), "rate")
    legend(figure, axes)
    return Drawing(figure, rows)
