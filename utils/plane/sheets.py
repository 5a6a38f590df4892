"""Samples and reconstructions of the cells: one picture each, and image sheets over the betas."""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.batches import chosen
from utils.distributed import progress
from utils.errors import UserError
from utils.images import tiled, to_pil
from utils.plane import drawing
from utils.plane.advice import TASK_OF
from utils.plane.cells import BETAS, Plane
from utils.plane.drawing import BETA_Y, BETA_Z, TEXT, Drawing, Grid, legend, rate_axes, say, show
from utils.plane.metrics import metric
from utils.plane.tables import cells_of
from utils.runs import Run, load_model
from utils.seeds import generator

OVERVIEW = 10  # pictures in a row of the overview
MOST_CELLS = 9  # along each axis of an image sheet
MOST_PIXELS = 256  # along each side of a cell's picture in the page


class Pictures(NamedTuple):
    """What cells make, by kind and index: (H, W, 3) for sheets, data: URIs for the page."""

    of_sheets: dict[str, dict[int, np.ndarray]]
    of_page: dict[str, dict[int, str]]
    originals: np.ndarray | None = None  # the test images that are reconstructed

    @property
    def kinds(self) -> list[str]:
        """Of samples and reconstructions those that there are."""
        return [kind for kind, of_cells in self.of_page.items() if of_cells]


def images_to_reconstruct(plane: Plane, load_data: Callable, n: int) -> torch.Tensor | None:
    """n test images (B, C, H, W) of the first run, by `load_data`; None, with a note, without."""
    paths = [plane.folder / cell.runs[0] for cell in plane.cells]
    path = next((path for path in paths if (path / "config.json").is_file()), paths[0])
    try:
        return chosen(load_data(Run.open(path).config).test, n)[0]
    except UserError as e:
        plane.notes.append(f"no reconstructions: {e}")
        return None


def images_of(path: Path, device: torch.device, n: int, x: torch.Tensor | None) -> dict:
    """By kind n samples of a run and its reconstructions of n of the images x, (B, C, H, W).

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
    """Pictures n images of each kind by each cell's first run; notes those that fail."""
    in_sheets = {i for _, places, _ in sheets_of(plane).values() for i in places}
    columns, failures = math.ceil(n**0.5), []
    pictures = Pictures(*({"samples": {}, "reconstructions": {}} for _ in range(2)))
    for i, cell in enumerate(progress(plane.cells, unit="cell", desc="pictures")):
        try:
            images = images_of(plane.folder / cell.runs[0], device, n, x)
        except UserError as e:
            failures.append(str(e))
            continue
        for kind, of_kind in images.items():
            picture = together(of_kind, columns)
            pictures.of_page[kind][i] = to_uri(picture)
            if i in in_sheets:
                pictures.of_sheets[kind][i] = picture
    if failures:
        more = ", ..." if len(failures) > 1 else ""
        plane.notes.append(f"no pictures of {len(failures)} cell(s): {failures[0]}{more}")
    return pictures if x is None else pictures._replace(originals=together(x[:n], columns))


def sheets_of(plane: Plane) -> dict[str, tuple[np.ndarray, dict[int, tuple], list[str]]]:
    """By name the cells (N,) of each image sheet, the places of those that it shows, and the names of its axes, y, x.

    Those of other settings are apart, and so are those for which rates were asked for: their betas are no grid. Of many
    places along an axis, at most MOST_CELLS are shown, evenly spaced and with the middle one.
    """
    titles = [(BETA_Y, f"{plane.title('kl_y')} asked for"), (BETA_Z, f"{plane.title('kl_z')} asked for")]
    asked, parts = ~np.isnan(plane.targets), {}
    at = np.where(asked, plane.asked, plane.betas.T)
    for (kind, of_kind), pattern in product(plane.kinds.items(), product((False, True), repeat=2)):
        mask = of_kind & (asked == pattern).all(1)
        if not mask.any():
            continue
        is_shown = mask.copy()
        for values in at.T:
            distinct = np.unique(values[mask])
            step = math.ceil(len(distinct) / MOST_CELLS)
            is_shown &= np.isin(values, distinct[(len(distinct) // 2) % step :: step])
        places = {i: tuple(at[i].tolist()) for i in np.flatnonzero(is_shown).tolist()}
        names = [title[is_asked] for title, is_asked in zip(titles, pattern, strict=True)]
        rates = "_".join(["asked", *compress("yz", pattern)]) if any(pattern) else ""
        parts["-".join(filter(None, (kind, rates)))] = mask, places, names
    return parts


def together(images: torch.Tensor, columns: int) -> np.ndarray:
    """The images (B, C, H, W) as one, (height, width, 3), with grey lines between several."""
    line = 1 if len(images) > 1 else 0
    picture = tiled(images, min(columns, len(images)), 0.5, line=line)
    return picture.permute(1, 2, 0).cpu().numpy()


def to_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as a data: URI of a WebP, in colour with loss: a seventh of a PNG."""
    image, buffer = to_pil(torch.from_numpy(picture).permute(2, 0, 1)), io.BytesIO()
    grey = bool((picture == picture[:, :, :1]).all())
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    image.save(buffer, "WEBP", quality=90, lossless=grey)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheets(plane: Plane, pictures: Pictures) -> dict[str, Drawing]:
    """Image sheets of samples and reconstructions, by name (see `sheets_of`)."""
    drawings = {}
    for kind, of_kind in pictures.of_sheets.items():
        originals = pictures.originals if kind == "reconstructions" else None
        for settings, (mask, places, axes) in sheets_of(plane).items():
            cells = [(i, plane.cells[i]) for i in places if i in of_kind]
            if cells:
                first = {places[i]: of_kind[i] for i, _ in reversed(cells)}  # of several
                figure = sheet(first, kind, originals, axes)
                say(figure, plane.where(mask).about)
                rows = [{n: cell.median[n] for n in BETAS} | {"run": cell.runs[0]} for _, cell in cells]
                drawings[f"{kind}_{settings}" if settings else kind] = Drawing(figure, rows)
    return drawings


def sheet(pictures: dict, title: str, originals: np.ndarray | None = None, axes=(BETA_Y, BETA_Z)) -> Figure:
    """Pictures (H, W, 3) by their places along two axes, y and x, beside the `originals`."""
    grid = Grid(*zip(*pictures, strict=True))
    (h, w, _), gap = next(iter(pictures.values())).shape, 4
    rows, columns = grid.shape
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    for picture, row, column in zip(pictures.values(), grid.row, grid.column, strict=True):
        top, left = (rows - 1 - row) * (h + gap), column * (w + gap)
        canvas[top : top + h, left : left + w] = picture
    full = drawing.COLUMN if columns < 4 else TEXT
    widths = [full - 0.4] if originals is None else [full - 1.4, 1]
    height = max(widths[0] * canvas.shape[0] / canvas.shape[1], len(widths) - 1)
    figure = Figure((full, height + 0.7), layout="constrained")
    ax, *others = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    x, y = w / (w + gap) / 2, h / (h + gap) / 2  # half a picture, in units of their spacing
    extent = (-x, columns - 1 + x, -y, rows - 1 + y)
    show(ax, canvas, title, extent=extent, aspect=(h + gap) / (w + gap))
    grid.label(ax, names=axes)
    for other in others:
        show(other, originals, "test images")
        other.set_axis_off()
    return figure


def overview(plane: Plane, names: Sequence[str], device: torch.device, x: torch.Tensor | None) -> Drawing | None:
    """The plane at a glance: where metrics are best, and what these cells make, also of x (B, C, H, W).

    None, with a note, where a model cannot be read.
    """
    best = {name: plane.best(name) for name in names}
    try:
        paths = {name: plane.folder / plane.cells[i].runs[0] for name, i in best.items()}
        images = {name: images_of(p, device, 2 * OVERVIEW, x) for name, p in paths.items()}
    except UserError as e:
        plane.notes.append(f"no overview: {e}")
        return None
    figure = Figure((TEXT, 0.42 * TEXT), layout="constrained")
    places = figure.subplot_mosaic([["plane", name] for name in names], width_ratios=[1, 1.15])
    ax, on, r_z, r_y = places["plane"], plane.diagonal, plane.values("kl_z"), plane.values("kl_y")
    ax.plot(r_z, r_y, "o", c="0.75", ms=3, mew=0, ls="none", label="all cells")
    line = np.flatnonzero(on)[np.argsort(r_y[on])]
    label, look = f"ordinary beta-VAEs, {drawing.DIAGONAL}", {"ms": 4, "mfc": "w", "lw": 0.8}
    ax.plot(r_z[line], r_y[line], "o--", c="k", label=label, **look)
    stars = Counter()
    for (name, i), (_, colour) in zip(best.items(), drawing.MARKERS, strict=False):
        look = {"ms": 15 / (1 + stars[i]), "mec": "w", "mew": 0.5, "ls": "none", "zorder": 3}
        ax.plot(r_z[i], r_y[i], "*", c=colour, **look)
        stars[i] += 1  # smaller, so that those of one cell are all seen
        task = TASK_OF.get(name, "reconstruction")
        kind = "samples" if x is None or task == "generation" else "reconstructions"
        value = f"{plane.values(name)[i]:.3g} {plane.unit_of(name)}"
        title = f"best {task.replace(', ', ' ')} ({kind}):\n{metric(name).label} {value}"
        show(places[name], together(images[name][kind], OVERVIEW), "")
        places[name].set_title(title, fontsize=7)
        places[name].set(xticks=[], yticks=[])
        places[name].spines[:].set(color=colour, linewidth=2, visible=True)
    rate_axes(ax, plane)
    legend(figure, [ax])
    say(figure, plane.about)
    return Drawing(figure, cells_of(plane, names))
