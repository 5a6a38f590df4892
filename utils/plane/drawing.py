"""How figures look: a paper's widths, 7 to 9 point type, colours that colour-blind people tell."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FormatStrFormatter, MaxNLocator, NullFormatter, ScalarFormatter

from utils.files import to_csv, write_atomic, write_text
from utils.plane.cells import UNITS, Plane

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7}
STYLE |= {"text.usetex": False}  # LaTeX may not be there, and would read names
STYLE |= {"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.linewidth": 0.6}
STYLE |= {"lines.linewidth": 0.9, "pdf.fonttype": 42, "savefig.dpi": 200}
COLUMN, TEXT = 3.25, 6.75  # inches: ICML's
BETA_Y, BETA_Z, DIAGONAL = r"$\beta_y$", r"$\beta_z$", r"$\beta_y = \beta_z$"
GREY, RED = "0.55", "#d55e00"
COLOURS = {1: "viridis", -1: "viridis_r", 0: "cividis"}  # by the better way: yellow is best
MARKERS = [("o", "#0072b2"), ("^", "#d55e00"), ("s", "#009e73")]
MARKERS += [("D", "#000000"), ("v", "#cc79a7"), ("P", "#e69f00")]

styled = matplotlib.rc_context(STYLE)  # decorates what draws and writes figures


class Output(NamedTuple):
    """Where figures and tables go, and in which forms."""

    folder: Path
    formats: Sequence[str] = ("png", "pdf")  # of figures, and tex of tables
    header: bool = True  # whether figures say above what they are of

    @property
    def of_figures(self) -> list[str]:
        """The formats of figures."""
        return [form for form in self.formats if form != "tex"]


class Drawing(NamedTuple):
    """A figure, and what it shows as rows of a table."""

    figure: Figure
    rows: list[dict]


def panels(about: str, keys: Sequence, draw: Callable, height: float = 0.8, columns: int = 0) -> Figure:
    """A figure `about` something, with a panel for each key, by `draw(axes, key)`, and a legend.

    `height` is relative to a panel's width.
    """
    n = len(keys)
    columns = min(n, columns or (2 if n <= 4 else 3))
    rows, width = math.ceil(n / columns), COLUMN if n == 1 else TEXT
    figure = Figure((width, rows * height * width / columns + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for extra in axes[n:]:
        extra.remove()
    say(figure, about)
    for ax, key in zip(axes, keys, strict=False):
        draw(ax, key)
        if isinstance(ax.xaxis.get_major_locator(), AutoLocator):
            ax.xaxis.set_major_locator(MaxNLocator(5))  # more would touch
    legend(figure, axes[:n])
    return figure


def literal(name: str) -> str:
    """A name as it is, for matplotlib: dollars are no TeX, a first `_` does not hide it."""
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def say(figure: Figure, about: str) -> None:
    """Writes above a figure what it is of."""
    width, about = int(20 * figure.get_figwidth()), literal(about)  # characters
    text = "\n".join(textwrap.fill(line, width) for line in about.splitlines())
    figure.suptitle(text, x=0.01, ha="left", fontsize=7, color="0.35")


def rate_axis(ax: Axes, which: str, plane: Plane, name: str) -> None:
    """Labels an axis as a rate; logarithmic from 1 nat on where rates would crowd at 0."""
    axis, nat = getattr(ax, f"{which}axis"), UNITS[plane.unit]
    axis.set_label_text(plane.title(name))
    if crowded(plane, name):
        getattr(ax, f"set_{which}scale")("symlog", linthresh=nat)
        getattr(ax, f"set_{which}lim")(-0.1 * nat, 1.5 * plane.values(name).max())
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


def rate_axes(ax: Axes, plane: Plane) -> None:
    """Labels the axes as those of the rate plane."""
    rate_axis(ax, "x", plane, "kl_z")
    rate_axis(ax, "y", plane, "kl_y")


def crowded(plane: Plane, name: str) -> bool:
    """Whether most of the rates would crowd at 0 on a linear axis."""
    rates = plane.values(name)
    return bool(np.median(rates) < rates.max() / 5 and rates.max() > 10 * UNITS[plane.unit])


def bar_of(figure: Figure, axes, cmap, norm, **look) -> None:
    """A colour bar, with the better end on top."""
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, pad=0.02, **look)
    if isinstance(norm, LogNorm) and "ticks" not in look:
        bar.set_ticks([t for d in (0.01, 0.1, 1, 10, 100) for t in (d, 2 * d, 5 * d) if norm.vmin <= t <= norm.vmax])
        bar.formatter = FormatStrFormatter("%g")
    elif abs(norm.vmax - norm.vmin) < 1e-6 * abs(norm.vmax):  # the same up to rounding
        bar.set_ticks([norm.vmin], labels=[f"{norm.vmin:.4g}"])
    bar.minorticks_off()  # whose labels would be of another format
    if cmap == COLOURS[-1]:
        bar.ax.invert_yaxis()


def legend(figure: Figure, axes: Sequence[Axes], most: int = 4, **look) -> None:
    """Adds one legend for all panels, below them, of at most so many columns."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    entries = {label: handle for of_panel in pairs for handle, label in of_panel}
    if entries:
        longest = max(len(line) for label in entries for line in label.splitlines())
        width = 0.06 * longest + 0.45  # inches of a letter, of a mark
        columns = min(most, max(1, int(figure.get_figwidth() / width)))
        place = "outside lower center"
        figure.legend(entries.values(), entries, loc=place, ncols=columns, frameon=False, **look)


def show(ax: Axes, picture: np.ndarray, title: str, **look) -> None:
    """Shows a picture (H, W, 3) without a frame."""
    ax.imshow(picture.clip(0, 1), interpolation="nearest", **look)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(title)


class Grid:
    """The grid of betas: each cell's row and column, with beta_y along y and beta_z along x."""

    def __init__(self, beta_y: Sequence[float], beta_z: Sequence[float]):
        self.beta_y, self.row = np.unique(beta_y, return_inverse=True)
        self.beta_z, self.column = np.unique(beta_z, return_inverse=True)
        self.shape = len(self.beta_y), len(self.beta_z)

    def image(self, values: Sequence[float]) -> np.ndarray:
        """The value (N,) of the cell at each grid point, (rows, columns); NaN where is none."""
        image = np.full(self.shape, math.nan)
        image[self.row, self.column] = values
        return image

    def label(self, ax: Axes, room: int = 11, names: Sequence[str] = (BETA_Y, BETA_Z)) -> None:
        """Labels the axes, of these names, with the betas, with at most `room` ticks along x."""
        for axis, name, betas, most in (
            (ax.xaxis, names[1], self.beta_z, room),
            (ax.yaxis, names[0], self.beta_y, 11),
        ):
            step = math.ceil(len(betas) / most)
            ticks = range((len(betas) // 2) % step, len(betas), step)  # and the middle, usually 1
            axis.set_ticks(ticks, [f"{betas[i]:.3g}" for i in ticks])
            axis.set_label_text(name)


def write_drawing(out: Output, name: str, drawing: Drawing, heading: Callable[[str], str] = str) -> bytes:
    """Writes a figure in each format, and its rows as a CSV with a `heading` for each column.

    Returns the figure as a PNG.
    """
    out.folder.mkdir(parents=True, exist_ok=True)
    if not out.header:
        drawing.figure.suptitle("")
    files = {}
    for form in dict.fromkeys(("png", *out.of_figures)):
        drawing.figure.savefig(buffer := io.BytesIO(), format=form)
        drawing.figure.set_layout_engine("none")  # the layout is that of the first
        files[form] = buffer.getvalue()
    for form in out.of_figures:
        write_atomic(out.folder / f"{name}.{form}", files[form])
    titles = {column: heading(column) for row in drawing.rows for column in row}
    rows = [{titles[column]: value for column, value in row.items()} for row in drawing.rows]
    write_text(out.folder / f"{name}.csv", to_csv(rows, titles.values()))
    return files["png"]
