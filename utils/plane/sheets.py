"""Samples and reconstructions of the cells: one picture each, and image sheets over the grid of betas."""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from utils.distributed import progress
from utils.errors import UserError
from utils.images import tiled, to_pil
from utils.plane.advice import TASKS
from utils.plane.cells import BETAS, Plane
from utils.plane.drawing import COLUMN, DIAGONAL, MARKERS, TEXT, Drawing, Grid, legend, rate_axis, say, table
from utils.plane.metrics import metric
from utils.runs import Run, load_model
from utils.seeds import generator

OVERVIEW = 10  # pictures in a row of the overview
MOST_CELLS = 9  # along each axis of an image sheet
MOST_PIXELS = 256  # along each side of a cell's picture in the page
KINDS = ("samples", "reconstructions")


class Pictures(NamedTuple):
    """What cells make, by kind and by the cell's index: pictures (H, W, 3) for sheets, data: URIs for the page."""

    of_sheets: dict[str, dict[int, np.ndarray]]
    of_page: dict[str, dict[int, str]]
    originals: np.ndarray | None = None  # the test images that are reconstructed

    @property
    def kinds(self) -> list[str]:
        """Of samples and reconstructions those that there are."""
        return [kind for kind, of_cells in self.of_page.items() if of_cells]


def first_images(plane: Plane, load_data: Callable, n: int) -> torch.Tensor | None:
    """The first n test images (B, C, H, W) of the plane's first run; None, with a note, if they cannot be loaded.

    `load_data` gives the data set of a Config.
    """
    paths = [plane.folder / cell.runs[0] for cell in plane.cells]
    path = next((path for path in paths if (path / "config.json").is_file()), paths[0])
    try:
        return next(iter(load_data(Run.open(path).config).test.batches(n)))[0]
    except UserError as e:
        plane.notes.append(f"no reconstructions: {e}")
        return None


def images_of(path: Path, device: torch.device, n: int, x: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """n samples of a run's model and its reconstructions of the first n images x, (B, C, H, W) each.

    Raises UserError if the model cannot be read, or its images have another shape than x.
    """
    run = Run.open(path)
    model = load_model(run, device)
    samples = model.sample(n, generator=generator(device, run.config.seed, "sheet"))
    if x is None:
        return {"samples": samples}
    if x.shape[1:] != samples.shape[1:]:
        raise UserError(f"{path}: its images have another shape")
    return {"samples": samples, "reconstructions": model.reconstruct(x[:n])}


def pictures_of(plane: Plane, device: torch.device, n: int, x: torch.Tensor | None) -> Pictures:
    """Loads each cell's first run once, and pictures n images of each kind; cells that fail are noted in the plane."""
    betas, in_sheet = np.stack([plane.values(name) for name in BETAS], 1), np.zeros(len(plane.cells), bool)
    for mask in plane.kinds.values():  # each has a sheet
        in_sheet[mask] = np.all([np.isin(of_axis, thinned(of_axis)) for of_axis in betas[mask].T], axis=0)
    columns, failures, pictures = math.ceil(n**0.5), [], Pictures({k: {} for k in KINDS}, {k: {} for k in KINDS})
    for i, cell in enumerate(progress(plane.cells, unit="cell", desc="pictures")):
        try:
            for kind, images in images_of(plane.folder / cell.runs[0], device, n, x).items():
                picture = together(images, columns)
                pictures.of_page[kind][i] = to_uri(picture)
                if in_sheet[i]:
                    pictures.of_sheets[kind][i] = picture
        except UserError as e:
            failures.append(str(e))
    if failures:
        more = ", ..." if len(failures) > 1 else ""
        plane.notes.append(f"no pictures of {len(failures)} cell(s): {failures[0]}{more}")
    return pictures._replace(originals=None if x is None else together(x[:n], columns))


def thinned(values: np.ndarray) -> np.ndarray:
    """At most MOST_CELLS of the distinct values, evenly spaced and including the middle one."""
    distinct = np.unique(values)
    step = math.ceil(len(distinct) / MOST_CELLS)
    return distinct[(len(distinct) // 2) % step :: step]


def together(images: torch.Tensor, columns: int) -> np.ndarray:
    """The images (B, C, H, W) as one, (height, width, 3), with grey lines between several."""
    picture = tiled(images, min(columns, len(images)), 0.5, line=1 if len(images) > 1 else 0)
    return picture.permute(1, 2, 0).cpu().numpy()


def to_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as a data: URI of a WebP, without loss if it is grey: a seventh of a PNG in colour."""
    image, buffer = to_pil(torch.from_numpy(picture).permute(2, 0, 1)), io.BytesIO()
    grey = bool((picture == picture[:, :, :1]).all())
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    image.save(buffer, "WEBP", quality=90, lossless=grey)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheets(plane: Plane, pictures: Pictures) -> dict[str, Drawing]:
    """Image sheets of samples and reconstructions, by name; apart for cells of other settings."""
    drawings = {}
    for kind, of_kind in pictures.of_sheets.items():
        for settings, mask in plane.kinds.items():
            cells = {i: plane.cells[i] for i in of_kind if mask[i]}
            if cells:
                betas = {i: {name: cell.median[name] for name in BETAS} for i, cell in cells.items()}
                of_betas = {tuple(betas[i].values()): of_kind[i] for i in reversed(cells)}  # of several, the first
                figure = sheet(of_betas, kind, pictures.originals if kind == "reconstructions" else None)
                say(figure, plane.where(mask).about)
                rows = [betas[i] | {"run": cell.runs[0]} for i, cell in cells.items()]
                drawings[f"{kind}_{settings}" if settings else kind] = Drawing(figure, rows)
    return drawings


def sheet(pictures: dict[tuple[float, float], np.ndarray], title: str, originals: np.ndarray | None = None) -> Figure:
    """A sheet of pictures (H, W, 3) of one size, arranged by their (beta_y, beta_z), with `originals` beside them."""
    grid = Grid(*zip(*pictures, strict=True))
    (h, w, _), gap = next(iter(pictures.values())).shape, 4
    rows, columns = grid.shape
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    for picture, row, column in zip(pictures.values(), grid.row, grid.column, strict=True):
        top, left = (rows - 1 - row) * (h + gap), column * (w + gap)
        canvas[top : top + h, left : left + w] = picture
    full = COLUMN if columns < 4 else TEXT
    widths = [full - 0.4] if originals is None else [full - 1.4, 1]
    height = max(widths[0] * canvas.shape[0] / canvas.shape[1], len(widths) - 1)
    figure = Figure((full, height + 0.7), layout="constrained")
    ax, *others = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    x, y = w / (w + gap) / 2, h / (h + gap) / 2  # half a picture, in units of their spacing
    extent = (-x, columns - 1 + x, -y, rows - 1 + y)
    ax.imshow(canvas.clip(0, 1), extent=extent, aspect=(h + gap) / (w + gap), interpolation="nearest")
    ax.spines[:].set_visible(False)
    grid.label(ax)
    ax.set_title(title)
    ax.tick_params(length=0)
    for other in others:
        other.imshow(originals.clip(0, 1), interpolation="nearest")
        other.set_title("test images")
        other.set_axis_off()
    return figure


def overview(plane: Plane, names: Sequence[str], device: torch.device, x: torch.Tensor | None) -> Drawing | None:
    """The idea at a glance: the rate plane, where each of the tasks is done best, and what these models make.

    `names` are metrics, x images to reconstruct (B, C, H, W). None, with a note, where a model cannot be read.
    """
    best = {name: plane.cells[plane.best(name)] for name in names}
    try:
        images = {n: images_of(plane.folder / cell.runs[0], device, 2 * OVERVIEW, x) for n, cell in best.items()}
    except UserError as e:
        plane.notes.append(f"no overview: {e}")
        return None
    figure = Figure((TEXT, 0.42 * TEXT), layout="constrained")
    places = figure.subplot_mosaic([["plane", name] for name in names], width_ratios=[1, 1.15])
    ax, on, r_z, r_y = places["plane"], plane.diagonal, plane.values("kl_z"), plane.values("kl_y")
    ax.plot(r_z, r_y, "o", c="0.75", ms=3, mew=0, ls="none", label="all cells")
    line = np.flatnonzero(on)[np.argsort(r_y[on])]
    ax.plot(r_z[line], r_y[line], "o--", c="k", ms=4, mfc="w", lw=0.8, label=f"ordinary beta-VAEs, {DIAGONAL}")
    stars = Counter()
    for (name, cell), (_, colour) in zip(best.items(), MARKERS, strict=False):
        at = plane.shown(cell.median, ("kl_z", "kl_y")).values()
        ax.plot(*at, "*", c=colour, ms=15 / (1 + stars[cell.runs]), mec="w", mew=0.5, ls="none", zorder=3)
        stars[cell.runs] += 1  # smaller, so that those of one cell are all seen
        kind = "samples" if x is None or name in TASKS["generation"] else "reconstructions"
        picture = places[name]
        picture.imshow(together(images[name][kind], OVERVIEW).clip(0, 1), interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set(color=colour, linewidth=2)
        task = next(task for task, metrics in TASKS.items() if name in metrics).replace(", ", " ")
        value = f"{plane.scale(name) * cell.median[name]:.3g} {plane.unit_of(name)}"
        picture.set_title(f"best {task} ({kind}): {metric(name).label} {value}", fontsize=7)
    rate_axis(ax, "x", plane, "kl_z")
    rate_axis(ax, "y", plane, "kl_y")
    legend(figure, [ax])
    say(figure, plane.about)
    return Drawing(figure, table(plane, names))
