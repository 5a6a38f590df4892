"""The figures of a rate plane, sized for a two-column paper: one panel fits a column, several the full width."""

import io
import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.plane.cells import BITS, Plane, frontier
from utils.plane.excess import Pair
from utils.plane.metrics import PROBES, metric
from utils.plane.slopes import FAR_OFF, Slope

matplotlib.rcParams.update(
    {"font.size": 7, "axes.linewidth": 0.6, "lines.linewidth": 0.9, "pdf.fonttype": 42, "savefig.dpi": 170}
)
COLUMN, TEXT = 3.4, 7.0  # inches
RATE_AXES = {"kl_z": "R(z)", "kl_y": "R(y|z)", "rate": "R(z) + R(y|z)"}
BETA_Y, BETA_Z = r"$\beta_y$", r"$\beta_z$"
DIAGONAL = r"$\beta_y = \beta_z$"
GREY, RED = "0.55", "#d55e00"


def panels(n: int, height: float = 0.85, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with n panels; `height` is relative to a panel's width."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    width = COLUMN if n == 1 else TEXT
    figure = Figure((width, rows * height * width / columns + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for extra in grid[n:]:
        extra.remove()
    return figure, list(grid[:n])


def outer(axes: Sequence[Axes], side: str) -> list[Axes]:
    """The panels in the first row (top), in the first or last column (left, right), or with none below (bottom)."""
    places = [(s.rowspan.start, s.colspan.start) for s in (ax.get_subplotspec() for ax in axes)]
    rows, columns = zip(*places, strict=True)
    at_edge = {
        "top": lambda row, column: row == min(rows),
        "left": lambda row, column: column == min(columns),
        "right": lambda row, column: column == max(columns),
        "bottom": lambda row, column: (row + 1, column) not in places,
    }[side]
    return [ax for ax, place in zip(axes, places, strict=True) if at_edge(*place)]


def title_of(name: str) -> str:
    """A metric's label with its unit, for an axis or a title."""
    known = metric(name)
    return f"{known.label} ({known.unit})" if known.unit else known.label


def rate_axes(axes: Sequence[Axes], which: str, name: str) -> None:
    """Labels the x or y axes of all panels as a rate: in nats on the outer side, in bits on the opposite one."""
    near, far = ("bottom", "top") if which == "x" else ("left", "right")
    for ax in axes:
        ax.tick_params(axis=which, **{f"label{near}": ax in outer(axes, near)})
    for ax in outer(axes, near):
        getattr(ax, f"set_{which}label")(f"{RATE_AXES[name]} (nats)")
    for ax in outer(axes, far):
        second = getattr(ax, f"secondary_{which}axis")(far, (lambda nats: nats * BITS, lambda bits: bits / BITS))
        getattr(second, f"set_{which}label")("bits", labelpad=1)
        second.tick_params(labelsize=5.5)


def seeds(ax: Axes, plane: Plane, x: str, y: str) -> None:
    """Draws every run of the cells that have several, as points with a line to the cell's median."""
    for cell in plane.cells:
        for row in cell.repeats if len(cell.repeats) > 1 else ():
            (x0, x1), (y0, y1) = ((row.get(n, math.nan), cell.median.get(n, math.nan)) for n in (x, y))
            ax.plot([x0, x1], [y0, y1], "-", c=GREY, lw=0.4, zorder=1)
            ax.plot(x0, y0, ".", c=GREY, ms=3, mew=0, ls="none", zorder=1, label="single runs")


def mark(ax: Axes, plane: Plane, x: str, y: str, name: str | None) -> None:
    """Marks cells on the diagonal (circles), the cell (1, 1) (square) and the best cell for a metric (star)."""
    xs, ys, on = plane.values(x), plane.values(y), plane.diagonal
    ax.plot(xs[on], ys[on], "o", ms=5.5, mfc="none", mec="k", mew=0.6, ls="none", label=DIAGONAL)
    one = on & np.isclose(plane.values("beta_y"), 1)
    ax.plot(xs[one], ys[one], "s", ms=8, mfc="none", mec="k", mew=0.8, ls="none", label="both 1")
    best = plane.best(name) if name and metric(name).better else None
    if best is not None:
        ax.plot(xs[best], ys[best], "*", ms=11, mfc=RED, mec="w", mew=0.6, ls="none", label="best")


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend for all panels, below them."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=4, frameon=False)


def scatter(ax: Axes, plane: Plane, x: str, y: str, name: str) -> PathCollection:
    """Draws the cells coloured by a metric, and those without it as small crosses."""
    xs, ys, values = plane.values(x), plane.values(y), plane.values(name)
    there = np.isfinite(values)
    ax.plot(xs[~there], ys[~there], "x", ms=2.5, c=GREY, mew=0.5)
    return dots(ax, plane, x, y, values, s=14)


def dots(ax: Axes, plane: Plane, x: str, y: str, colours: np.ndarray, norm=None, **kwargs) -> PathCollection:
    """Draws cells, round ones that were trained on their own, square ones that were unfolded from a multi-rate model.

    `colours` are numbers (N,), of which NaN is not drawn, or RGB (N, 3).
    """
    there = np.isfinite(colours) if colours.ndim == 1 else np.ones(len(colours), bool)
    if colours.ndim == 1 and norm is None and there.any():
        norm = Normalize(colours[there].min(), colours[there].max())
    how = {"cmap": "viridis", "norm": norm} if colours.ndim == 1 else {}
    for kind, marker, label in ((~plane.unfolded, "o", None), (plane.unfolded, "s", "multi-rate model")):
        shown = there & kind
        if shown.any() or marker == "o":
            at = plane.values(x)[shown], plane.values(y)[shown]
            drawn = ax.scatter(*at, c=colours[shown], marker=marker, lw=0, zorder=2, label=label, **how, **kwargs)
    return drawn


def draw_targets(ax: Axes, plane: Plane) -> None:
    """Rates that were asked for, as crosses, each with a line to what was reached; R(z) along x, R(y|z) along y."""
    for (y, z), r_y, r_z in zip(plane.asked, plane.values("kl_y"), plane.values("kl_z"), strict=True):
        if math.isfinite(y) or math.isfinite(z):
            at = z if math.isfinite(z) else r_z, y if math.isfinite(y) else r_y
            ax.plot([at[0], r_z], [at[1], r_y], "-", c=RED, lw=0.7, zorder=3)
            ax.plot(*at, "x", c=RED, ms=4, mew=0.9, ls="none", zorder=3, label="asked for")


def rate_planes(plane: Plane, names: Sequence[str]) -> Figure:
    """Each metric over the rate plane, with R(z) along x and R(y|z) along y."""
    figure, axes = panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        seeds(ax, plane, "kl_z", "kl_y")
        points = scatter(ax, plane, "kl_z", "kl_y", name)
        draw_targets(ax, plane)
        mark(ax, plane, "kl_z", "kl_y", name)
        figure.colorbar(points, ax=ax, label=title_of(name), pad=0.02)
    rate_axes(axes, "x", "kl_z")
    rate_axes(axes, "y", "kl_y")
    legend(figure, axes)
    return figure


def total_rates(plane: Plane, names: Sequence[str]) -> Figure:
    """Each metric against the total rate, with the convex hull of all cells and the line of ordinary beta-VAEs."""
    figure, axes = panels(len(names))
    rate, r_z, on = plane.values("rate"), plane.values("kl_z"), plane.diagonal
    norm = Normalize(r_z.min(), r_z.max())  # shared by all panels
    for ax, name in zip(axes, names, strict=True):
        values, better = plane.values(name), metric(name).better
        there = np.isfinite(values)
        seeds(ax, plane, "rate", name)
        points = dots(ax, plane, "rate", name, np.where(there, r_z, math.nan), norm=norm, s=12)
        if there.any() and better:
            ax.plot(*frontier(rate[there], values[there], better), "-", c=RED, label="hull of all cells")
        ordinary = np.flatnonzero(on & there)
        ordinary = ordinary[np.argsort(rate[ordinary])]
        ax.plot(rate[ordinary], values[ordinary], "k--", lw=0.8, zorder=1, label=f"{DIAGONAL}, by increasing rate")
        mark(ax, plane, "rate", name, name)
        ax.set_ylabel(title_of(name))
    rate_axes(axes, "x", "rate")
    figure.colorbar(points, ax=axes, label=title_of("kl_z"), pad=0.01, aspect=40, shrink=0.6)
    legend(figure, axes)
    return figure


def against_rate_z(plane: Plane, names: Sequence[str], bound: Callable[[float], float] | None, h: float) -> Figure:
    """Accuracies and mutual information against R(z), with the bounds that R(z) implies.

    `bound` maps information on the label, in nats, to the largest accuracy; `h` is the entropy of the label in nats.
    They are None and NaN if the labels are not known.
    """
    figure, axes = panels(len(names))
    r_z = plane.values("kl_z")
    grid = np.linspace(0, max(r_z.max(), 1e-3), 200)
    for ax, name in zip(axes, names, strict=True):
        seeds(ax, plane, "kl_z", name)
        colours = dots(ax, plane, "kl_z", name, plane.values("kl_y"), s=12)
        plain = name.removesuffix("_standardized")
        if plain in (*PROBES, "mi_q_mc", "mi_q", "mi_lr_lb") and math.isfinite(h):
            line = np.array([bound(v) for v in grid]) if plain in PROBES else np.minimum(grid, h)
            ax.plot(grid, line, "-", c=RED, label="bound from R(z) and H(label)")
        if plain in PROBES:
            ax.plot(r_z, plane.values("acc_bound"), "_", c=RED, ms=4, mew=0.7, label="acc_bound, from the cell's I")
        mark(ax, plane, "kl_z", name, name)
        ax.set_ylabel(title_of(name))
    rate_axes(axes, "x", "kl_z")
    figure.colorbar(colours, ax=axes, label=title_of("kl_y"), pad=0.01, aspect=40, shrink=0.6)
    legend(figure, axes)
    return figure


class Grid:
    """The grid of betas: row and column of each cell, with beta_y along y and beta_z along x."""

    def __init__(self, beta_y: np.ndarray, beta_z: np.ndarray):
        self.beta_y, self.row = np.unique(beta_y, return_inverse=True)
        self.beta_z, self.column = np.unique(beta_z, return_inverse=True)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.beta_y), len(self.beta_z)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of the values (N,) of the cells at each grid point, (rows, columns); NaN where there is none."""
        there = np.isfinite(values)
        sums, counts = np.zeros(self.shape), np.zeros(self.shape)
        np.add.at(sums, (self.row[there], self.column[there]), values[there])
        np.add.at(counts, (self.row[there], self.column[there]), 1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)

    def label(self, ax: Axes, room: int = 11) -> None:
        """Labels the axes with the betas, with at most `room` ticks along x."""
        for which, betas, shown in (("x", self.beta_z, room), ("y", self.beta_y, 11)):
            step = math.ceil(len(betas) / shown)
            at = range((len(betas) // 2) % step, len(betas), step)  # including the middle, usually 1
            getattr(ax, f"set_{which}ticks")(at, [f"{betas[i]:.3g}" for i in at])
        ax.set_xlabel(BETA_Z)
        ax.set_ylabel(BETA_Y)


def heat_map(figure: Figure, ax: Axes, grid: Grid, values: np.ndarray, label: str, room: int, **colours) -> None:
    """A heat map over the grid of betas, annotated with its values if a row has at most `room` of them."""
    image = grid.mean(values)
    ax.set_facecolor("0.9")
    shown = ax.imshow(image, origin="lower", aspect="auto", interpolation="nearest", **({"cmap": "viridis"} | colours))
    bar = figure.colorbar(shown, ax=ax, label=label, pad=0.02)
    if isinstance(shown.norm, LogNorm):
        bar.set_ticks(ratios := [0.25, 0.5, 1, 2, 4], labels=[f"{r:g}" for r in ratios])
        bar.minorticks_off()
    grid.label(ax, room)
    if grid.shape[1] <= room and grid.shape[0] <= 11:
        for (i, j), v in np.ndenumerate(image):
            if math.isfinite(v):
                r, g, b, _ = shown.cmap(shown.norm(v))
                dark = 0.3 * r + 0.59 * g + 0.11 * b < 0.5
                ax.text(j, i, short(v), ha="center", va="center", fontsize=4.5, color="w" if dark else "k")


def short(value: float) -> str:
    """A number in at most five characters, unless it is large."""
    text = f"{value:.3g}"
    return text if len(text) <= 4 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def heat_maps(plane: Plane, names: Sequence[str]) -> Figure:
    """Heat maps of the rates and of each metric over the grid of betas."""
    names = [*("kl_z", "kl_y", "rate"), *names]
    figure, axes = panels(len(names), height=0.7)
    grid = Grid(plane.values("beta_y"), plane.values("beta_z"))
    for ax, name in zip(axes, names, strict=True):
        heat_map(figure, ax, grid, plane.values(name), title_of(name), room=5)
        best = plane.best(name) if metric(name).better else None
        if best is not None:
            corner = grid.column[best] - 0.5, grid.row[best] - 0.5
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=RED, lw=1.4, clip_on=False))
    return figure


def beta_colours(beta_y: np.ndarray, beta_z: np.ndarray) -> np.ndarray:
    """RGB colours (N, 3) of pairs of betas: hue is the direction from (1, 1) in log space, saturation the distance."""
    least = min((b[b > 0].min() for b in (beta_z, beta_y) if (b > 0).any()), default=1.0)
    u, v = (np.log(np.maximum(b, least / 2)) for b in (beta_z, beta_y))  # a beta of 0 is placed next to the smallest
    distance = np.hypot(u, v)
    saturation = distance / max(distance.max(), 1e-9)
    hue = (np.arctan2(v, u) / (2 * math.pi)) % 1
    return hsv_to_rgb(np.stack([hue, saturation, 0.85 - 0.25 * saturation], -1))


def tasks(plane: Plane, names: Sequence[str]) -> Figure:
    """The colour code of the betas, the rate plane in these colours, and the tasks' metrics against each other."""
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    figure, axes = panels(2 + len(pairs), height=0.95)
    colours = beta_colours(plane.values("beta_y"), plane.values("beta_z"))
    key, rates, *others = axes
    key.scatter(plane.values("beta_z"), plane.values("beta_y"), c=colours, s=20, lw=0)
    positive = all((plane.values(n) > 0).all() for n in ("beta_y", "beta_z"))
    key.set(xscale="log" if positive else "symlog", yscale="log" if positive else "symlog")
    key.set(xlabel=BETA_Z, ylabel=BETA_Y, title="colours")
    views = [(key, "beta_z", "beta_y"), (rates, "kl_z", "kl_y")]
    views += [(ax, *pair) for ax, pair in zip(others, pairs, strict=True)]
    for ax, x, y in views[1:]:
        dots(ax, plane, x, y, colours, s=12)
    rate_axes([rates], "x", "kl_z")
    rate_axes([rates], "y", "kl_y")
    for ax, x, y in views[2:]:
        ax.set(xlabel=title_of(x), ylabel=title_of(y))
    for name, marker in zip(names, "*PD", strict=False):
        best = plane.best(name)
        for ax, x, y in views:
            label = f"best {metric(name).label}" if ax is key else None
            at = plane.values(x)[best], plane.values(y)[best]
            ax.plot(*at, marker, ms=9 if marker == "*" else 6, mfc="none", mec="k", mew=0.9, ls="none", label=label)
    legend(figure, axes)
    return figure


def slope_maps(found: Sequence[Slope]) -> Figure:
    """The slopes of D over the grid of betas, relative to the betas: 1 everywhere if all cells are at their optimum."""
    figure, axes = panels(2, columns=2, height=0.75)
    beta_y, beta_z = (np.array([s.cell.median[name] for s in found]) for name in ("beta_y", "beta_z"))
    grid = Grid(beta_y, beta_z)
    for ax, layer, rate in zip(axes, ("z", "y"), ("R(z)", "R(y|z)"), strict=True):
        ratios = np.array([getattr(s, f"ratio_{layer}") for s in found])
        label = rf"$-$dD/d{rate} over $\beta_{layer}$"
        colours = {"cmap": "PuOr", "norm": LogNorm(1 / FAR_OFF**2, FAR_OFF**2)}
        heat_map(figure, ax, grid, np.where(ratios > 0, ratios, math.nan), label, room=8, **colours)
    return figure


def excess_maps(found: Sequence[Pair]) -> Figure:
    """The excess loss of multi-rate cells over the grid of betas, a panel for each pair of lengths of training."""
    lengths = list(dict.fromkeys(pair.epochs for pair in found))
    figure, axes = panels(len(lengths), columns=2, height=0.75)
    largest = max((abs(pair.excess) for pair in found if math.isfinite(pair.excess)), default=1.0) or 1.0
    for ax, epochs in zip(axes, lengths, strict=True):
        these = [pair for pair in found if pair.epochs == epochs]
        grid = Grid(*(np.array([pair.unfolded.median[n] for pair in these]) for n in ("beta_y", "beta_z")))
        colours = {"cmap": "PuOr_r", "norm": Normalize(-largest, largest)}
        excess = np.array([pair.excess for pair in these])
        heat_map(figure, ax, grid, excess, "excess loss (nats)", room=8, **colours)
        ax.set_title(f"one for all, {epochs[0]} epochs, against own, {epochs[1]}")
    return figure


def rendered(figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    """The content of the figure's file in each format, with the layout computed for the first."""
    files = {}
    for name in dict.fromkeys(formats):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=name)
        files[name] = buffer.getvalue()
        figure.set_layout_engine("none")
    return files
