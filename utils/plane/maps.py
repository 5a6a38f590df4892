"""Heat maps over the grid of betas."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.plane.cells import Plane
from utils.plane.drawing import BETA_Y, BETA_Z, RED, Drawn, bar_of, colours_of, panels, table
from utils.plane.excess import Pair, excess_rows
from utils.plane.metrics import metric
from utils.plane.slopes import FAR_OFF, Slope, slope_rows


class Grid:
    """The grid of betas: row and column of each cell, with beta_y along y and beta_z along x."""

    def __init__(self, beta_y: np.ndarray, beta_z: np.ndarray):
        self.beta_y, self.row = np.unique(beta_y, return_inverse=True)
        self.beta_z, self.column = np.unique(beta_z, return_inverse=True)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.beta_y), len(self.beta_z)

    def image(self, values: np.ndarray) -> np.ndarray:
        """The value (N,) of the cell at each grid point, (rows, columns); NaN where there is none."""
        image = np.full(self.shape, math.nan)
        image[self.row, self.column] = values
        return image

    def label(self, ax: Axes, room: int = 11) -> None:
        """Labels the axes with the betas, with at most `room` ticks along x."""
        for which, betas, shown in (("x", self.beta_z, room), ("y", self.beta_y, 11)):
            step = math.ceil(len(betas) / shown)
            at = range((len(betas) // 2) % step, len(betas), step)  # including the middle, usually 1
            getattr(ax, f"set_{which}ticks")(at, [f"{betas[i]:.3g}" for i in at])
        ax.set_xlabel(BETA_Z)
        ax.set_ylabel(BETA_Y)


def heat_map(figure: Figure, ax: Axes, grid: Grid, values: np.ndarray, name: str | None, room: int, **colours) -> None:
    """A heat map over the grid of betas, annotated with its values if a row has at most `room` of them."""
    image = grid.image(values)
    ax.set_facecolor("0.9")
    shown = ax.imshow(image, origin="lower", aspect="auto", interpolation="nearest", **({"cmap": "viridis"} | colours))
    ratios = [0.25, 0.5, 1, 2, 4]
    logarithmic = {"ticks": ratios, "format": "%g"} if isinstance(shown.norm, LogNorm) else {}
    bar_of(figure, shown, ax, name, **logarithmic)
    grid.label(ax, room)
    if grid.shape[1] <= room and grid.shape[0] <= 11:
        for (i, j), v in np.ndenumerate(image):
            if math.isfinite(v):
                r, g, b, _ = shown.cmap(shown.norm(v))
                dark = 0.3 * r + 0.59 * g + 0.11 * b < 0.5
                ax.text(j, i, short(v), ha="center", va="center", fontsize=7, color="w" if dark else "k")


def short(value: float) -> str:
    """A number in at most five characters, unless it is large."""
    text = f"{value:.3g}"
    return text if len(text) <= 4 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def heat_maps(plane: Plane, names: Sequence[str]) -> Drawn:
    """Heat maps of the rates and of each metric over the grid of betas; the cells have one setting but for these."""
    names = list(dict.fromkeys(("kl_z", "kl_y", *names)))
    figure, axes = panels(plane, len(names), height=0.75)
    room = 5 if len(names) > 4 else 7
    grid = Grid(plane.values("beta_y"), plane.values("beta_z"))
    for ax, name in zip(axes, names, strict=True):
        heat_map(figure, ax, grid, plane.values(name), name, room, cmap=colours_of(name))
        ax.set_title(plane.title(name))
        best = plane.best(name) if metric(name).better else None
        if best is not None:
            corner = grid.column[best] - 0.5, grid.row[best] - 0.5
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, ec=RED, lw=1.6, clip_on=False))
    return Drawn(figure, table(plane, names))


def slope_maps(plane: Plane, found: Sequence[Slope]) -> Drawn:
    """The slopes of D over the grid of betas, relative to the betas: 1 everywhere if all cells are at their optimum."""
    figure, axes = panels(plane, 2, height=0.75)
    grid = Grid(*(np.array([s.cell.median[name] for s in found]) for name in ("beta_y", "beta_z")))
    for ax, layer, rate in zip(axes, ("z", "y"), ("R(z)", "R(y|z)"), strict=True):
        ratios = np.array([getattr(s, f"ratio_{layer}") for s in found])
        colours = {"cmap": "PuOr", "norm": LogNorm(1 / FAR_OFF**2, FAR_OFF**2)}
        heat_map(figure, ax, grid, np.where(ratios > 0, ratios, math.nan), None, room=7, **colours)
        ax.set_title(rf"$-$dD/d{rate} over $\beta_{layer}$")
    return Drawn(figure, slope_rows(found))


def excess_maps(plane: Plane, found: Sequence[Pair]) -> Drawn:
    """The excess loss of multi-rate cells over the grid of betas, a panel for each pair of trainings."""
    kinds = list(dict.fromkeys(pair.trainings for pair in found))
    figure, axes = panels(plane, len(kinds), height=0.75)
    largest = max((abs(pair.excess) for pair in found if math.isfinite(pair.excess)), default=1.0) or 1.0
    for ax, trainings in zip(axes, kinds, strict=True):
        these = [pair for pair in found if pair.trainings == trainings]
        grid = Grid(*(np.array([pair.unfolded.median[n] for pair in these]) for n in ("beta_y", "beta_z")))
        colours = {"cmap": "PuOr_r", "norm": Normalize(-largest, largest)}
        heat_map(figure, ax, grid, np.array([pair.excess for pair in these]), None, room=7, **colours)
        ax.set_title(f"excess loss (nats): {trainings[0]}\nfor all; {trainings[1]}, on their own")
    return Drawn(figure, excess_rows(found))
