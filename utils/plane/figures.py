"""The figures of a plane: metrics over it, against rates, over the betas, against each other."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, cycle
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from datasets.table import DATASETS
from utils.evaluation.information import accuracy_bound
from utils.evaluation.probes import label_entropy
from utils.plane import drawing
from utils.plane.cells import BETAS, OF_LIKELIHOOD, UNITS, Plane, number
from utils.plane.drawing import COLOURS, GREY, RED, Drawing, Grid, bar_of, panels, rate_axes, rate_axis
from utils.plane.excess import by_trainings
from utils.plane.gains import errors, hull
from utils.plane.metrics import ACCURACIES, BRACKETS, metric
from utils.plane.neighbours import predictions
from utils.plane.slopes import FAR_OFF
from utils.plane.tables import cells_of

CORNERS = [[[0.00, 0.16, 0.55], [0.33, 0.22, 0.00]], [[0.60, 0.80, 1.00], [1.00, 0.86, 0.20]]]
PREDICTED = "not evaluated: predicted by other cells"
CIRCLE, STAR = {"mfc": "none", "mec": "k", "ls": "none"}, {"mfc": "none", "mec": RED, "ls": "none"}


def draw_seeds(ax: Axes, plane: Plane, x: str, y: str) -> None:
    """Draws every run of the cells that have several, with a line to the cell's median."""
    for cell in plane.cells:
        for row in cell.repeats if len(cell.repeats) > 1 else ():
            both = row, cell.median
            xs, ys = ([plane.scale(n) * of.get(n, math.nan) for of in both] for n in (x, y))
            ax.plot(xs, ys, "-", c=GREY, lw=0.4, zorder=1)
            ax.plot(xs[0], ys[0], ".", c=GREY, ms=3, mew=0, ls="none", zorder=1, label="single seeds")


def mark(ax: Axes, plane: Plane, x: str, y: str, name: str) -> None:
    """Marks cells on the diagonal (circles), (1, 1) (square) and the best for a metric (stars)."""
    xs, ys, on = plane.values(x), plane.values(y), plane.diagonal
    one = on & np.isclose(plane.values("beta_y"), 1)
    for cells, marker, size, label in ((on, "o", 5.8, drawing.DIAGONAL), (one, "s", 8, "both 1")):
        if cells.any():
            ax.plot(xs[cells], ys[cells], marker, ms=size, mew=0.7, label=label, **CIRCLE)
    ties = plane.ties(name)
    if len(ties):
        label = "best" if len(ties) == 1 else "best, equally good"
        ax.plot(xs[ties], ys[ties], "*", zorder=4, label=label, ms=17, mew=1.1, clip_on=False, **STAR)


def dots(ax: Axes, plane: Plane, x: str, y: str, colours: np.ndarray, **look) -> None:
    """Draws cells: round ones of separate trainings, square ones of a multi-rate model.

    In batches of mixed settings, each has a marker. `colours` are RGB (N, 3), or numbers (N,);
    NaN is not drawn.
    """
    finite = np.isfinite(colours.reshape(len(colours), -1)).all(1)
    markers = {False: cycle("o^DvP"), True: cycle("spXh8")}
    kinds = [(kind, mask, bool(plane.unfolded[mask][0])) for kind, mask in plane.kinds.items()]
    numbers = Counter(unfolded for _, _, unfolded in kinds)
    for kind, mask, unfolded in kinds:
        cells, marker, label = finite & mask, next(markers[unfolded]), textwrap.fill(drawing.literal(kind), 40)
        if numbers[unfolded] == 1:
            label = "multi-rate model" if unfolded else None
        if cells.any():
            at, look["c"] = (plane.values(x)[cells], plane.values(y)[cells]), colours[cells]
            ax.scatter(*at, marker=marker, zorder=2, label=label, **look)


def draw_errors(ax: Axes, plane: Plane, x: str, low: str, high: str) -> None:
    """Draws bars from a metric less its standard error to another with its own added."""
    ends = plane.values(low) - errors(plane, low), plane.values(high) + errors(plane, high)
    several = {len(cell.runs) > 1 for cell in plane.cells}
    of = {(True,): "seeds", (False,): "one seed's images"}.get(tuple(several), "seeds, or one seed's images")
    if (known := np.isfinite(ends).all(0)).any():
        at, low, high = (values[known] for values in (plane.values(x), *ends))
        ax.vlines(at, low, high, colors=GREY, lw=0.6, zorder=1, label=f"standard error over {of}")


def predicted(plane: Plane, name: str) -> dict[int, dict]:
    """Rows of the cells, by their indices, in which others predict a metric."""
    values, errors = predictions(plane, name)
    columns, rows = {n: plane.values(n) for n in (*BETAS, "kl_z", "kl_y")} | {name: values, f"{name}_se": errors}, {}
    for i in np.flatnonzero(np.isfinite(values)):
        of_cell = {n: column[i] for n, column in columns.items()}
        rows[i] = {"what": "predicted", "runs": " ".join(plane.cells[i].runs), **of_cell}
    return rows


def rate_planes(plane: Plane, names: Sequence[str]) -> Drawing:
    """Each metric over the rate plane, with R(z) along x and R(y|z) along y."""
    r_z, r_y = plane.values("kl_z"), plane.values("kl_y")
    rows = cells_of(plane, names)

    def draw(ax: Axes, name: str) -> None:
        draw_seeds(ax, plane, "kl_z", "kl_y")
        values, of_others = plane.values(name), predicted(plane, name)
        unknown = ~np.isfinite(values)
        unknown[list(of_others)] = False
        if unknown.any():
            label = "not evaluated, or saturated"
            ax.plot(r_z[unknown], r_y[unknown], "x", ms=2.5, c=GREY, mew=0.5, ls="none", label=label)
        norm = Normalize(np.nanmin(values), np.nanmax(values))
        look = {"cmap": COLOURS[metric(name).better], "norm": norm}
        dots(ax, plane, "kl_z", "kl_y", values, lw=0, s=14, **look)
        rows.extend(of_others.values())
        for i, row in of_others.items():
            colour = matplotlib.colormaps[look["cmap"]](norm(row[name]))
            ax.plot(r_z[i], r_y[i], "o", ms=3.5, mew=0.9, mec=colour, mfc="none", ls="none", label=PREDICTED)
        for z, y, (target_y, target_z) in zip(r_z, r_y, plane.asked, strict=True):
            if (target_y, target_z) != (y, z):
                ax.plot([target_z, z], [target_y, y], "-", c=RED, lw=0.7, zorder=3)
                ax.plot(target_z, target_y, "x", c=RED, ms=4, mew=0.9, ls="none", zorder=3, label="asked for")
        mark(ax, plane, "kl_z", "kl_y", name)
        for *at, cell in zip(r_z, r_y, plane.cells, strict=True):
            count, of = cell.collapsed("kl_z", "kl_y"), len(cell.runs)
            if 0 < count < of:
                ax.annotate(f"{count}/{of}", at, (4, 3), textcoords="offset points", fontsize=7)
                ax.plot([], [], "k", marker="$1/4$", ms=9, mew=0, ls="none", label="seeds that collapsed")
        ax.set_title(plane.title(name))
        bar_of(ax.figure, ax, **look)
        rate_axes(ax, plane)

    return Drawing(panels(plane.about, names, draw), rows)


def against(plane: Plane, names: Sequence[str], rate: str, colour: str, lines: Callable) -> Figure:
    """Each metric against a rate, dots or bars between two ends; `lines(ax, name)` adds to it."""
    rates, colours = plane.values(rate), plane.values(colour)
    look = {"norm": rate_norm(plane, colour), "cmap": "viridis"}  # for all panels

    def draw(ax: Axes, name: str) -> None:
        low, high = plane.values(name), plane.values(BRACKETS.get(name, name))
        is_known = name not in BRACKETS or not np.isfinite(high).any()
        draw_errors(ax, plane, rate, name, name if is_known else BRACKETS[name])
        title = plane.title(name) if is_known else plane.title(name).replace(", at least", "")
        ax.set_ylabel(textwrap.fill(title, 30))
        if is_known:
            draw_seeds(ax, plane, rate, name)
            dots(ax, plane, rate, name, np.where(np.isfinite(low), colours, math.nan), lw=0, s=12, **look)
        else:
            known = np.isfinite(low) & np.isfinite(high)
            at, low, high, shown = (v[known] for v in (rates, low, np.maximum(high, low), colours))
            ax.vlines(at, low, high, lw=1.8, zorder=2, label="at least to at most", **look).set_array(shown)
            for end in (low, high):
                ax.scatter(at, end, c=shown, marker="_", s=14, lw=1, zorder=2, **look)
        lines(ax, name)
        mark(ax, plane, rate, name, name)
        rate_axis(ax, "x", plane, rate)

    figure = panels(plane.about, names, draw)
    bar_of(figure, figure.axes, **look, label=plane.title(colour), aspect=40, shrink=0.7)
    return figure


def rate_norm(plane: Plane, name: str) -> LogNorm:
    """Colours of a rate on a logarithmic scale, from a tenth of a nat."""
    rates, least = plane.values(name), 0.1 * UNITS[plane.unit]
    low = max(rates.min(), least)
    return LogNorm(low, max(rates.max(), 10 * low), clip=True)


def with_ends(names: Sequence[str]) -> list[str]:
    """Metrics, each followed by the upper end of what it is the lower end of."""
    return [n for name in names for n in (name, BRACKETS.get(name)) if n]


def total_rates(plane: Plane, names: Sequence[str]) -> Drawing:
    """Each metric against the total rate, with what mixtures of all and of ordinary cells reach."""
    rows, best = [], least_loss(plane)

    def line(ax: Axes, name: str, points: list[dict], label: str, **look) -> None:
        if points:
            ax.plot(*([row[n] for row in points] for n in ("rate", name)), zorder=1, label=label, **look)
            what = label.replace(drawing.DIAGONAL, "beta_y = beta_z")
            rows.extend({"what": what, "rate": row["rate"], name: row[name]} for row in points)

    def lines(ax: Axes, name: str) -> None:
        line(ax, name, hull(plane, name), "hull of all cells", c=RED, lw=2, alpha=0.6)
        of_ordinary = hull(plane, name, plane.diagonal)
        line(ax, name, of_ordinary, f"hull of {drawing.DIAGONAL}", c="k", lw=0.9, ls="--")
        line(ax, name, [row for row in best if name in row], "least loss possible", c="k", lw=1.2, ls=":")

    figure = against(plane, names, "rate", "kl_z", lines)
    return Drawing(figure, cells_of(plane, with_ends(names)) + rows)


def least_loss(plane: Plane) -> list[dict[str, float]]:
    """Metrics of the best of all models at 100 betas of the cells' range, where they are known."""
    kinds = {tuple(cell.settings.get(n) for n in ("dataset", *OF_LIKELIHOOD)) for cell in plane.cells}
    (dataset, likelihood, sigma), *others = kinds
    row, betas = DATASETS.get(dataset), plane.betas
    if others or row is None or row.optimum is None or likelihood != row.likelihood or not (betas > 0).any():
        return []
    betas = np.geomspace(betas[betas > 0].min(), betas.max(), 100)
    metrics = [best.metrics for beta in betas if (best := row.optimum(beta, number(sigma)))]
    return [{name: plane.scale(name) * value for name, value in of.items()} for of in metrics]


def against_rate_z(plane: Plane, names: Sequence[str]) -> Drawing:
    """Accuracies and information against R(z), with what R(z), H(label) and the number of images imply."""
    most, unit = max(plane.values("kl_z").max(), 1e-3), UNITS[plane.unit]
    rates = np.unique([*np.linspace(0, most, 200), *np.geomspace(1e-3, 10 * unit, 60)])
    rates = rates[rates <= most]

    def lines(ax: Axes, name: str) -> None:
        of_samples = name in ACCURACIES["z"]
        if plane.labels is not None and (of_samples or name in ("mi_z_low", "mi_q_mc", "mi_q")):
            bounds = np.minimum(rates, label_entropy(plane.labels)[0] * unit)
            if of_samples:
                bounds = [accuracy_bound(rate / unit, plane.labels) for rate in rates]
            ax.plot(rates, bounds, "-", c=RED, label="bound from R(z) and H(label)")
        if name == "mi_zx_low":
            ax.plot(rates, rates, "-", c=RED, label="all of R(z)")
            if plane.labels is not None and (most_known := math.log(len(plane.labels)) * unit) < most:
                ax.axhline(most_known, c=GREY, lw=0.8, ls=":", label="ln N")
        if of_samples:
            look = {"c": RED, "ms": 4, "mew": 0.7, "label": "bound from the cell's own I(z; label)"}
            ax.plot(plane.values("kl_z"), plane.values("acc_bound"), "_", **look)

    figure = against(plane, names, "kl_z", "kl_y", lines)
    return Drawing(figure, cells_of(plane, [*with_ends(names), "acc_bound"]))


def beta_colours(beta_y: np.ndarray, beta_z: np.ndarray) -> np.ndarray:
    """RGB colours (N, 3): beta_y from dark to light, beta_z from blue to yellow.

    These are the two directions of colour that are left to deuteranopes and protanopes.
    """
    shares = []
    for beta in (beta_y, beta_z):
        least = beta[beta > 0].min() if (beta > 0).any() else 1.0
        u = np.log(np.maximum(beta, least / 2))  # a beta of 0 is placed next to the smallest
        shares.append(((u - u.min()) / max(np.ptp(u), 1e-9))[:, None])
    y, z = shares
    dark, light = ((1 - z) * blue + z * yellow for blue, yellow in np.array(CORNERS))
    return (1 - y) * dark + y * light


def tasks(plane: Plane, names: Sequence[str]) -> Drawing:
    """The colours of the betas, and in these the rate plane and tasks' metrics."""
    views = [("beta_z", "beta_y"), ("kl_z", "kl_y"), *combinations(names, 2)]
    colours, scale = beta_colours(*plane.betas), "log" if np.min(plane.betas) > 0 else "symlog"

    def draw(ax: Axes, view: tuple[str, str]) -> None:
        look, (x, y) = {"lw": 0.3, "ec": "0.3"}, view
        if view == views[0]:
            ax.scatter(*plane.betas[::-1], c=colours, s=20, **look)
            ax.set(xscale=scale, yscale=scale, xlabel=drawing.BETA_Z, ylabel=drawing.BETA_Y, title="colours")
        else:
            dots(ax, plane, x, y, colours, s=14, **look)
            ax.set(xlabel=plane.title(x), ylabel=plane.title(y))
        if view == views[1]:
            rate_axes(ax, plane)
        for name, marker in zip(names, "*PDX", strict=False):
            ties, size = plane.ties(name), 13 if marker == "*" else 9
            at = plane.values(x)[ties], plane.values(y)[ties]
            label = f"best {metric(name).label}" if view == views[0] else None
            ax.plot(*at, marker, label=label, ms=size, mew=0.9, clip_on=False, **CIRCLE)

    figure = panels(plane.about, views, draw, height=0.95, columns=3)
    return Drawing(figure, cells_of(plane, names))


class Map(NamedTuple):
    """A heat map over the grid of betas: cells' values, their colours, the best, what is predicted, by indices."""

    title: str
    grid: Grid
    values: Sequence[float]
    cmap: str
    norm: Normalize
    best: Sequence[int] = ()
    predicted: dict[int, float] = {}


def maps(plane: Plane, layers: Sequence[Map]) -> Figure:
    """Heat maps, annotated with their values if a row has few of them."""
    room = 5 if len(layers) > 4 else 7

    def draw(ax: Axes, layer: Map) -> None:
        title, grid, values, cmap, norm, best, of_others = layer
        image = grid.image(values)
        ax.set_facecolor("0.9")
        if np.isnan(image).any():
            ax.patch.set(hatch="////", edgecolor="0.7")
            ax.plot([], [], "s", mfc="0.9", mec="0.7", ms=7, ls="none", label="grey, hatched: not known")
        look = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
        colours = ax.imshow(image, cmap=cmap, norm=norm, **look)
        ratios = {"ticks": [0.25, 0.5, 1, 2, 4], "format": "%g"} if cmap == "PuOr" else {}
        bar_of(ax.figure, ax, cmap, colours.norm, **ratios)
        largest = np.nanmax(abs(image), initial=0)
        decimals = 0 if largest >= 100 or not largest else min(3, 2 - math.floor(math.log10(largest)))
        grid.label(ax, room)
        ax.set_title(title)
        for i in best:
            corner, label = (grid.column[i] - 0.5, grid.row[i] - 0.5), "best of this grid"
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=RED, lw=1.6, clip_on=False, label=label))
        for i, value in of_others.items():
            corner, colour = (grid.column[i] - 0.35, grid.row[i] - 0.35), colours.cmap(colours.norm(value))
            ax.add_patch(Rectangle(corner, 0.7, 0.7, fill=False, ec=colour, lw=1.6, label=PREDICTED))
        for (i, j), v in np.ndenumerate(image):
            if grid.shape[1] <= room and grid.shape[0] <= 11 and math.isfinite(v):
                r, g, b, _ = colours.cmap(colours.norm(v))
                colour = "w" if 0.3 * r + 0.59 * g + 0.11 * b < 0.5 else "k"
                ax.text(j, i, f"{v:.{decimals}f}", ha="center", va="center", fontsize=7, color=colour)

    return panels(plane.about, layers, draw, height=0.75)


def heat_maps(plane: Plane, names: Sequence[str]) -> Drawing:
    """Rates and metrics over the grid of betas; the cells have one setting but for these."""
    grid, layers, rows = Grid(*plane.betas), [], cells_of(plane, names)
    for name in dict.fromkeys(("kl_z", "kl_y", *names)):
        of_others = predicted(plane, name)
        rows.extend(of_others.values())
        norm = rate_norm(plane, name) if name in ("kl_z", "kl_y") else Normalize()
        cmap = COLOURS[metric(name).better]
        values = {i: row[name] for i, row in of_others.items()}
        layers.append(Map(plane.title(name), grid, plane.values(name), cmap, norm, plane.ties(name), values))
    return Drawing(maps(plane, layers), rows)


def slope_maps(plane: Plane, rows: list[dict]) -> Drawing:
    """The slopes of D relative to the betas, over their grid: 1 where cells are at an optimum."""
    grid = Grid(*([row[name] for row in rows] for name in BETAS))
    norm, layers = LogNorm(1 / FAR_OFF**2, FAR_OFF**2), []
    for layer, rate in (("z", "R(z)"), ("y", "R(y|z)")):
        slopes, betas = ([row.get(f"{what}_{layer}", math.nan) for row in rows] for what in ("slope", "beta"))
        ratios = [slope / beta if slope > 0 else math.nan for slope, beta in zip(slopes, betas, strict=True)]
        layers.append(Map(rf"$-$dD/d{rate} over $\beta_{layer}$", grid, ratios, "PuOr", norm))
    return Drawing(maps(plane, layers), rows)


def excess_maps(plane: Plane, rows: list[dict]) -> Drawing:
    """The excess loss of multi-rate cells over the grid, a panel for each pair of trainings."""
    excess = [abs(row["excess"]) for row in rows if math.isfinite(row["excess"])]
    largest, layers = max(excess, default=1.0) or 1.0, []
    for (shared, separate), of_both in by_trainings(rows).items():
        grid = Grid(*([row[name] for row in of_both] for name in BETAS))
        title = f"excess loss (nats): {shared}\nfor all; {separate}, separately"
        values, norm = [row["excess"] for row in of_both], Normalize(-largest, largest)
        layers.append(Map(title, grid, values, "PuOr_r", norm))
    return Drawing(maps(plane, layers), rows)
