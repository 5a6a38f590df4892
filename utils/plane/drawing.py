"""How figures look: a paper's column or text width, 7 to 9 point type, colours that colour-blind people tell."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from utils.plane.cells import UNITS, Plane
from utils.plane.metrics import metric

matplotlib.rcParams.update(
    {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
    | {"legend.fontsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 0.9, "pdf.fonttype": 42, "savefig.dpi": 200}
)
COLUMN, TEXT = 3.25, 6.75  # inches: ICML's
BETA_Y, BETA_Z = r"$\beta_y$", r"$\beta_z$"
DIAGONAL = r"$\beta_y = \beta_z$"
GREY, RED = "0.55", "#d55e00"
MARKERS = (("o", "#0072b2"), ("^", "#d55e00"), ("s", "#009e73"), ("D", "#000000"), ("v", "#cc79a7"), ("P", "#e69f00"))
CORNERS = np.array([[[0.00, 0.16, 0.55], [0.33, 0.22, 0.00]], [[0.60, 0.80, 1.00], [1.00, 0.86, 0.20]]])  # [y, z], RGB


class Drawn(NamedTuple):
    """A figure, and what it shows as rows of a table."""

    figure: Figure
    rows: list[dict]


def panels(plane: Plane, n: int, height: float = 0.8, columns: int = 0, about: str = "") -> tuple[Figure, list[Axes]]:
    """A figure with n panels that says what it is of; `height` is relative to a panel's width."""
    columns = min(n, columns or (2 if n <= 4 else 3))
    rows = math.ceil(n / columns)
    width = COLUMN if n == 1 else TEXT
    figure = Figure((width, rows * height * width / columns + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for extra in grid[n:]:
        extra.remove()
    say(figure, about or plane.about)
    return figure, list(grid[:n])


def say(figure: Figure, about: str) -> None:
    """Writes above a figure what it is of."""
    width = int(20 * figure.get_figwidth())  # characters
    text = "\n".join(textwrap.fill(line, width) for line in about.splitlines())
    figure.suptitle(text, x=0.01, ha="left", fontsize=7, color="0.35")


def rate_axis(ax: Axes, which: str, plane: Plane, name: str) -> None:
    """Labels an axis as a rate; where most of the rates would crowd at 0, it is logarithmic from 1 nat on."""
    axis, nat = getattr(ax, f"{which}axis"), UNITS[plane.unit]
    axis.set_label_text(plane.title(name))
    if crowded(plane, name):
        getattr(ax, f"set_{which}scale")("symlog", linthresh=nat)
        getattr(ax, f"set_{which}lim")(-0.1 * nat, 1.5 * plane.values(name).max())
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


def crowded(plane: Plane, name: str) -> bool:
    """Whether most of the rates would crowd at 0 on a linear axis."""
    rates = plane.values(name)
    return bool(np.median(rates) < rates.max() / 5 and rates.max() > 10 * UNITS[plane.unit])


def bar_of(figure: Figure, shown, axes, name: str | None, **how) -> None:
    """A colour bar, with the better end on top."""
    bar = figure.colorbar(shown, ax=axes, pad=0.02, **how)
    bar.minorticks_off()  # whose labels would be of another format
    if name is not None and metric(name).better < 0:
        bar.ax.invert_yaxis()


def colours_of(name: str) -> str:
    """The colour map of a metric: yellow is best."""
    return {1: "viridis", -1: "viridis_r", 0: "cividis"}[metric(name).better]


def seeds(ax: Axes, plane: Plane, x: str, y: str) -> None:
    """Draws every run of the cells that have several, as points with a line to the cell's median."""
    sx, sy = plane.scale(x), plane.scale(y)
    for cell in plane.cells:
        for row in cell.repeats if len(cell.repeats) > 1 else ():
            x0, x1 = (sx * of.get(x, math.nan) for of in (row, cell.median))
            y0, y1 = (sy * of.get(y, math.nan) for of in (row, cell.median))
            ax.plot([x0, x1], [y0, y1], "-", c=GREY, lw=0.4, zorder=1)
            ax.plot(x0, y0, ".", c=GREY, ms=3, mew=0, ls="none", zorder=1, label="single seeds")


def mark(ax: Axes, plane: Plane, x: str, y: str, name: str | None) -> None:
    """Marks cells on the diagonal (circles), the cell (1, 1) (square) and around the best cell for a metric a star."""
    xs, ys, on = plane.values(x), plane.values(y), plane.diagonal
    ax.plot(xs[on], ys[on], "o", ms=5.8, mfc="none", mec="k", mew=0.6, ls="none", label=DIAGONAL)
    one = on & np.isclose(plane.values("beta_y"), 1)
    ax.plot(xs[one], ys[one], "s", ms=8, mfc="none", mec="k", mew=0.8, ls="none", label="both 1")
    best = plane.best(name) if name and metric(name).better else None
    if best is not None:
        star = {"ms": 17, "mfc": "none", "mec": RED, "mew": 1.1, "ls": "none", "clip_on": False}
        ax.plot(xs[best], ys[best], "*", zorder=4, label="best", **star)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend for all panels, below them."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        wide = 2 if figure.get_figwidth() < TEXT else 4
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=wide, frameon=False)


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


def table(plane: Plane, names: Sequence[str]) -> list[dict]:
    """What a figure of cells shows: for each the median of the metrics, and its runs where there are several."""
    columns = list(dict.fromkeys(("beta_y", "beta_z", "kl_z", "kl_y", "rate", *names)))
    rows, differing = [], plane.differing
    for cell in plane.cells:
        several = len(cell.runs) > 1
        known = {n: plane.scale(n) * cell.median[n] for n in columns if n in cell.median}
        of_cell = {n: cell.settings.get(n) for n in differing}
        rows.append({"what": "median" if several else "run", "runs": " ".join(cell.runs), **of_cell, **known})
        for run, row in zip(cell.runs, cell.repeats, strict=True) if several else ():
            known = {n: plane.scale(n) * row[n] for n in columns if not math.isnan(row.get(n, math.nan))}
            rows.append({"what": "seed", "runs": run, **of_cell, **known})
    return rows


def headings(rows: Sequence[Mapping], plane: Plane) -> dict[str, str]:
    """The headings of such rows' columns, with units."""
    return {n: n if metric(n).label == n.replace("_", " ") else plane.title(n) for row in rows for n in row}


def rendered(figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    """The content of the figure's file in each format, with the layout computed for the first."""
    files = {}
    for name in dict.fromkeys(formats):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=name)
        files[name] = buffer.getvalue()
        figure.set_layout_engine("none")
    return files
