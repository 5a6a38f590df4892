"""Samples and reconstructions of the cells: one picture each, and image sheets over the grid of betas."""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.loading import load_data
from utils.distributed import progress
from utils.errors import UserError
from utils.images import tiled, to_pil
from utils.plane.advice import TASKS
from utils.plane.cells import Plane
from utils.plane.drawing import COLUMN, DIAGONAL, MARKERS, TEXT, Drawn, legend, rate_axis, say, table
from utils.plane.maps import Grid
from utils.plane.metrics import metric
from utils.runs import Run, load_model
from utils.seeds import generator

OVERVIEW = 10  # pictures in a row of the overview
GENERATION = TASKS["generation"]
MOST_CELLS = 9  # along each axis of an image sheet
MOST_PIXELS = 256  # along each side of a cell's picture in the page


def thinned(values: np.ndarray) -> np.ndarray:
    """At most MOST_CELLS of the distinct values, evenly spaced and including the middle one."""
    distinct = np.unique(values)
    step = math.ceil(len(distinct) / MOST_CELLS)
    return distinct[(len(distinct) // 2) % step :: step]


def together(images: torch.Tensor, columns: int) -> np.ndarray:
    """The images (B, C, H, W) as one, (height, width, 3), with grey lines between several."""
    picture = tiled(images, min(columns, len(images)), 0.5, line=1 if len(images) > 1 else 0)
    return picture.permute(1, 2, 0).cpu().numpy()


class Pictures(NamedTuple):
    """What the cells make, by their index in the plane: pictures (H, W, 3) for the sheets, images for the page."""

    samples: dict[int, np.ndarray]
    reconstructions: dict[int, np.ndarray]
    originals: np.ndarray | None  # the test images that are reconstructed
    shown: dict[str, dict[int, str]]  # samples and reconstructions of all cells, as data: URIs


def pictures(plane: Plane, folder: Path, args) -> Pictures:
    """Loads each cell's first run once, and pictures what it makes; cells that fail are noted in `plane.notes`."""
    beta_y, beta_z = plane.values("beta_y"), plane.values("beta_z")
    chosen = np.zeros(len(plane.cells), bool)
    for of in plane.kinds.values():  # each has a sheet
        chosen[of] = np.isin(beta_y[of], thinned(beta_y[of])) & np.isin(beta_z[of], thinned(beta_z[of]))
    made, failures, x, tile = Pictures({}, {}, None, {"samples": {}, "reconstructions": {}}), [], None, None
    for i, cell in enumerate(progress(plane.cells, unit="cell", desc="pictures")):
        try:
            run = Run.open(folder / cell.runs[0])
            if tile is None:
                tile = partial(together, columns=math.ceil(args.images**0.5))
                shape, x = run.config.image_shape, test_images(run, args, plane, args.images)
            if run.config.image_shape != shape:
                raise UserError(f"{run.path}: its images have another shape")
            model = load_model(run, args.device)
            drawn = model.sample(args.images, generator=generator(args.device, run.config.seed, "sheet"))
            kinds = {"samples": drawn} if x is None else {"samples": drawn, "reconstructions": model.reconstruct(x)}
            for kind, images in kinds.items():
                made.shown[kind][i] = to_uri(picture := tile(images))
                if chosen[i]:
                    getattr(made, kind)[i] = picture
        except UserError as e:
            failures.append(str(e))
    if failures:
        plane.notes.append(f"no pictures of {len(failures)} cell(s): {failures[0]}" + ", ..." * (len(failures) > 1))
    return made._replace(originals=None if x is None else tile(x))


def to_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as a data: URI of a WebP, without loss if it is grey: a seventh of a PNG in colour."""
    image, buffer = to_pil(torch.from_numpy(picture).permute(2, 0, 1)), io.BytesIO()
    grey = bool((picture == picture[:, :, :1]).all())
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    image.save(buffer, "WEBP", quality=90, lossless=grey)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheets(plane: Plane, made: Pictures) -> dict[str, Drawn]:
    """Image sheets of samples and reconstructions, by name; apart for cells of other settings."""
    drawn, betas = {}, np.stack([plane.values("beta_y"), plane.values("beta_z")], 1)
    for kind, pictures_of in (("samples", made.samples), ("reconstructions", made.reconstructions)):
        for settings, mask in plane.kinds.items():
            of_kind = {i: picture for i, picture in pictures_of.items() if mask[i]}
            if of_kind:
                of_betas = {tuple(betas[i]): of_kind[i] for i in reversed(of_kind)}  # of several, the first
                figure = sheet(of_betas, kind, made.originals if kind == "reconstructions" else None)
                say(figure, plane.where(mask).about)
                rows = [dict(zip(("beta_y", "beta_z"), betas[i], strict=True)) for i in of_kind]
                rows = [row | {"run": plane.cells[i].runs[0]} for row, i in zip(rows, of_kind, strict=True)]
                drawn[f"{kind}{f'_{settings}' * bool(settings)}"] = Drawn(figure, rows)
    return drawn


def overview(plane: Plane, names: Sequence[str], folder: Path, args) -> dict[str, Drawn]:
    """The idea at a glance: the rate plane, where each of the tasks is done best, and what these models make.

    `names` are metrics, such as those of reconstruction, generation and representation. Empty, with a note, where a
    model cannot be read.
    """
    best = {name: plane.cells[plane.best(name)] for name in names}
    x, made = None, {}
    for name, cell in best.items():
        try:
            run = Run.open(folder / cell.runs[0])
            model = load_model(run, args.device)
            x = test_images(run, args, plane, 2 * OVERVIEW) if x is None else x
        except UserError as e:
            plane.notes.append(f"no overview: {e}")
            return {}
        generated = model.sample(2 * OVERVIEW, generator=generator(args.device, run.config.seed, "sheet"))
        made[name] = generated if x is None or name in GENERATION else model.reconstruct(x)
    figure = Figure((TEXT, 0.42 * TEXT), layout="constrained")
    places = figure.subplot_mosaic([["plane", name] for name in names], width_ratios=[1, 1.15])
    ax = places["plane"]
    on, r_z, r_y = plane.diagonal, plane.values("kl_z"), plane.values("kl_y")
    ax.plot(r_z, r_y, "o", c="0.75", ms=3, mew=0, ls="none", label="all cells")
    line = np.flatnonzero(on)[np.argsort(r_y[on])]
    ax.plot(r_z[line], r_y[line], "o--", c="k", ms=4, mfc="w", lw=0.8, label=f"ordinary beta-VAEs, {DIAGONAL}")
    stars = Counter()
    for (name, cell), (_, colour) in zip(best.items(), MARKERS, strict=False):
        task = next(task for task, metrics in TASKS.items() if name in metrics).replace(", ", " ")
        at = (plane.scale(n) * cell.median[n] for n in ("kl_z", "kl_y"))
        ax.plot(*at, "*", c=colour, ms=15 / (1 + stars[cell.runs]), mec="w", mew=0.5, ls="none", zorder=3)
        stars[cell.runs] += 1  # smaller, so that those of one cell are all seen
        picture = places[name]
        picture.imshow(together(made[name], OVERVIEW).clip(0, 1), interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set(color=colour, linewidth=2)
        kind = "samples" if x is None or name in GENERATION else "reconstructions"
        value = plane.scale(name) * cell.median[name]
        picture.set_title(f"best {task} ({kind}): {metric(name).label} {value:.3g} {plane.unit_of(name)}", fontsize=7)
    rate_axis(ax, "x", plane, "kl_z")
    rate_axis(ax, "y", plane, "kl_y")
    legend(figure, [ax])
    say(figure, plane.about)
    return {"overview": Drawn(figure, table(plane, names))}


def test_images(run: Run, args, plane: Plane, n: int) -> torch.Tensor | None:
    """The first test images (B, C, H, W); None, with a note, if the data set cannot be loaded."""
    try:
        test = load_data(run.config, args.data_dir, args.device, args.download, args.dataset).test
        return next(iter(test.batches(n)))[0]
    except UserError as e:
        plane.notes.append(f"no reconstructions: {e}")
        return None


def sheet(pictures: dict[tuple[float, float], np.ndarray], title: str, originals: np.ndarray | None = None) -> Figure:
    """A sheet of pictures (H, W, 3) of one size, arranged by their (beta_y, beta_z), with `originals` beside them."""
    grid = Grid(*np.array(list(pictures)).T)
    (h, w, _), gap = next(iter(pictures.values())).shape, 4
    rows, columns = grid.shape
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    for picture, row, column in zip(pictures.values(), grid.row, grid.column, strict=True):
        top, left = (rows - 1 - row) * (h + gap), column * (w + gap)
        canvas[top : top + h, left : left + w] = picture
    beside = 0 if originals is None else 1
    full = COLUMN if columns < 4 else TEXT
    width = full - beside - 0.4
    height = width * canvas.shape[0] / canvas.shape[1]
    figure = Figure((full, max(height, beside) + 0.7), layout="constrained")
    axes = figure.subplots(1, 1 + beside, width_ratios=[width, 1][: 1 + beside], squeeze=False)[0]
    x, y = w / (w + gap) / 2, h / (h + gap) / 2  # half a picture, in units of their spacing
    extent = (-x, columns - 1 + x, -y, rows - 1 + y)
    axes[0].imshow(canvas.clip(0, 1), extent=extent, aspect=(h + gap) / (w + gap), interpolation="nearest")
    axes[0].spines[:].set_visible(False)
    grid.label(axes[0])
    axes[0].set_title(title)
    axes[0].tick_params(length=0)
    if originals is not None:
        axes[1].imshow(originals.clip(0, 1), interpolation="nearest")
        axes[1].set_title("test images")
        axes[1].set_axis_off()
    return figure
