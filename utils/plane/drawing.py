"""How figures look: a paper's column or text width, 7 to 9 point type, colours that colour-blind people tell."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from utils.files import to_csv, write_atomic, write_text
from utils.plane.cells import BETAS, UNITS, Plane
from utils.plane.metrics import metric

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
STYLE |= {"legend.fontsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 0.9, "pdf.fonttype": 42, "savefig.dpi": 200}
COLUMN, TEXT = 3.25, 6.75  # inches: ICML's
BETA_Y, BETA_Z, DIAGONAL = r"$\beta_y$", r"$\beta_z$", r"$\beta_y = \beta_z$"
GREY, RED = "0.55", "#d55e00"
COLOURS = {1: "viridis", -1: "viridis_r", 0: "cividis"}  # by which way a metric is better: yellow is best
MARKERS = (("o", "#0072b2"), ("^", "#d55e00"), ("s", "#009e73"), ("D", "#000000"), ("v", "#cc79a7"), ("P", "#e69f00"))

styled = matplotlib.rc_context(STYLE)  # decorates what draws and writes figures


class Drawing(NamedTuple):
    """A figure, and what it shows as rows of a table."""

    figure: Figure
    rows: list[dict]


def panels(plane: Plane, n: int, height: float = 0.8, columns: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure with n panels that says what it is of; `height` is relative to a panel's width."""
    columns = min(n, columns or (2 if n <= 4 else 3))
    rows, width = math.ceil(n / columns), COLUMN if n == 1 else TEXT
    figure = Figure((width, rows * height * width / columns + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for extra in axes[n:]:
        extra.remove()
    say(figure, plane.about)
    return figure, list(axes[:n])


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


def bar_of(figure: Figure, artist, axes, name: str | None, **look) -> None:
    """A colour bar, with the better end on top."""
    bar = figure.colorbar(artist, ax=axes, pad=0.02, **look)
    bar.minorticks_off()  # whose labels would be of another format
    if name is not None and metric(name).better < 0:
        bar.ax.invert_yaxis()


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend for all panels, below them."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        columns = 2 if figure.get_figwidth() < TEXT else 4
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)


class Grid:
    """The grid of betas: row and column of each cell, with beta_y along y and beta_z along x."""

    def __init__(self, beta_y: Sequence[float], beta_z: Sequence[float]):
        self.beta_y, self.row = np.unique(beta_y, return_inverse=True)
        self.beta_z, self.column = np.unique(beta_z, return_inverse=True)
        self.shape = len(self.beta_y), len(self.beta_z)

    def image(self, values: Sequence[float]) -> np.ndarray:
        """The value (N,) of the cell at each grid point, (rows, columns); NaN where there is none."""
        image = np.full(self.shape, math.nan)
        image[self.row, self.column] = values
        return image

    def label(self, ax: Axes, room: int = 11) -> None:
        """Labels the axes with the betas, with at most `room` ticks along x."""
        for which, name, betas, most in (("x", BETA_Z, self.beta_z, room), ("y", BETA_Y, self.beta_y, 11)):
            step = math.ceil(len(betas) / most)
            ticks = range((len(betas) // 2) % step, len(betas), step)  # including the middle, usually 1
            ax.set(**{f"{which}ticks": ticks, f"{which}ticklabels": [f"{betas[i]:.3g}" for i in ticks]})
            ax.set(**{f"{which}label": name})


def table(plane: Plane, names: Sequence[str]) -> list[dict]:
    """What a figure of cells shows: for each the median of the metrics, and its runs where there are several."""
    columns, rows = dict.fromkeys((*BETAS, "kl_z", "kl_y", "rate", *names)), []
    for cell in plane.cells:
        settings = {n: cell.settings.get(n) for n in plane.differing}
        several = len(cell.runs) > 1
        lines = [("median" if several else "run", " ".join(cell.runs), cell.median)]
        lines += [("seed", *pair) for pair in zip(cell.runs, cell.repeats, strict=True)] if several else []
        rows += [{"what": w, "runs": runs, **settings, **plane.shown(values, columns)} for w, runs, values in lines]
    return rows


def headings(rows: Sequence[Mapping], plane: Plane) -> dict[str, str]:
    """The headings of such rows' columns, with units."""
    return {n: n if metric(n).label == n.replace("_", " ") else plane.title(n) for row in rows for n in row}


def write_drawing(
    folder: Path, name: str, formats: Sequence[str], drawing: Drawing, titles: Mapping[str, str]
) -> bytes:
    """Writes a figure in each format, with its rows as a CSV under the titles of their columns; returns a PNG of it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for form in dict.fromkeys(("png", *formats)):
        drawing.figure.savefig(buffer := io.BytesIO(), format=form)
        drawing.figure.set_layout_engine("none")  # the layout is that of the first
        files[form] = buffer.getvalue()
    for form in formats:
        write_atomic(folder / f"{name}.{form}", files[form])
    rows = [{titles[column]: value for column, value in row.items()} for row in drawing.rows]
    write_text(folder / f"{name}.csv", to_csv(rows, titles.values()))
    return files["png"]
