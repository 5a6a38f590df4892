"""What z encodes and what y adds: walks between images, dimensions of z swept, y drawn anew.

Chosen cells stand side by side, so that one sees information move from y to z as the betas change.
What y adds to z, `own`, is explained in utils/explore.py.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models.latents import Gaussian
from utils.config import what_differs
from utils.errors import UserError
from utils.explore import Loaded
from utils.images import tiled
from utils.plane.drawing import COLUMN, TEXT, Drawing, Output, literal, say, show, styled, write_drawing

ALONG = 7  # images of a walk, and of a sweep from -3 to 3
MOST_DIMENSIONS = 8  # of z that are swept: those of the largest rates
N_RATES = 1000  # test images over which rates are averaged
SIDE_BY_SIDE = 3  # cells, across a page
Rows = list[tuple[str, Tensor]]  # what each row shows, and its images (n, C, H, W)
GAP = [""] * (ALONG // 2)
WALK, AGAIN = ["image", *GAP, "walk", *GAP, "image"], ["image", *GAP, "y drawn", *GAP]  # what the columns show
SWEEP = [f"{v:g}" for v in torch.linspace(-3, 3, ALONG).tolist()]


@styled
def traverse(cells: Sequence[Loaded], out: Output, n: int) -> None:
    """Draws traversals of n images by cells. Raises UserError where there are none."""
    for cell in cells:
        if cell.model.family is not Gaussian or not cell.model.z_shape[0]:
            why = "a category" if cell.model.z_shape[0] else "not there"
            raise UserError(f"--traverse: {cell.run.path}: its z is {why}, so that there is nothing to sweep")
    check_images("--traverse", cells)
    kinds = (between, WALK), (dimensions, SWEEP), (redrawn, AGAIN)
    write_drawings(out, {rows.__name__: side_by_side(cells, rows, n, columns) for rows, columns in kinds})


def check_images(flag: str, cells: Sequence[Loaded]) -> None:
    """Raises UserError naming the flag for cells of different data."""
    first = cells[0]
    for cell in cells:
        if cell.config.data_name != first.config.data_name:
            names = f"{cell.config.data_name}, {first.run.path} of {first.config.data_name}"
            raise UserError(f"{flag}: {cell.run.path} is of {names}; cells side by side need the same images")


def write_drawings(out: Output, drawings: dict[str, Drawing]) -> None:
    """Writes Drawings by name, and prints their files."""
    print("written:")
    for name, drawing in drawings.items():
        write_drawing(out, name, drawing)
        for form in (*out.of_figures, "csv"):
            print(f"  {out.folder / name}.{form}", flush=True)


def side_by_side(cells: Sequence[Loaded], rows_of: Callable, n: int, columns: Sequence[str]) -> Drawing:
    """A panel for each cell, of the same rows, under what tells cells apart and their rates."""
    parts = [rows_of(cell, n) for cell in cells]
    labels = [[label for label, _ in rows] for rows in parts]
    images = [torch.cat([images for _, images in rows]) for rows in parts]
    across = min(len(cells), SIDE_BY_SIDE)
    down, width = math.ceil(len(cells) / across), COLUMN if len(cells) == 1 else TEXT
    sides = [tiled(of_cell, len(columns), 1.0).shape[1:] for of_cell in images]
    height = (width / across - 0.8) * max(h / w for h, w in sides)
    figure = Figure((width, down * (height + 0.6) + 0.4), layout="constrained")
    axes, table = figure.subplots(down, across, squeeze=False).ravel(), []
    for extra in axes[len(cells) :]:
        extra.remove()
    names = what_differs([cell.config for cell in cells])
    for i, (ax, cell) in enumerate(zip(axes, cells, strict=False)):
        rates, row = rates_of(cell)
        title = textwrap.wrap(literal(names[i]), int(14 * width / across))
        once = i % across == 0 or labels[i] != labels[i - 1]  # for alike neighbours
        texts = labels[i] if once else [""] * len(labels[i])
        show_tiled(ax, images[i], "\n".join([*title, rates]), columns, texts)
        table += [row | {"row": label} for label in labels[i]]
    epochs = ", ".join(sorted({str(cell.config.num_epochs) for cell in cells}))
    about = f"{cells[0].config.data_name}, {epochs} epochs; test images; rates in nats, means over "
    say(figure, f"{about}{len(cells[0].images(N_RATES)[0]):,} of them")
    return Drawing(figure, table)


def show_tiled(ax: Axes, images: Tensor, title: str, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Shows images (n, C, H, W) in one picture, with texts at its columns and rows."""
    picture = tiled(images, len(columns), 1.0).permute(1, 2, 0).cpu().numpy()
    show(ax, picture, title)
    for axis, size, texts in ((ax.xaxis, picture.shape[1], columns), (ax.yaxis, picture.shape[0], rows)):
        step = (size - 2) / len(texts)
        axis.set_ticks([1 + step * (k + 0.5) for k in range(len(texts))], texts)


@functools.cache  # every figure says them
def rates_of_units(cell: Loaded) -> tuple[Tensor, Tensor]:
    """The rates of dimensions of z, (*z_shape,), and of y, (*y_shape,): nats, means over images."""
    x, _ = cell.images(N_RATES)
    z = cell.encode(x, seed=0).z
    return cell.model.q_z(x).rate_of_units().mean(0), cell.model.q_y(z, x).kl_of_units(cell.model.p_y(z)).mean(0)


def rates_of(cell: Loaded) -> tuple[str, dict]:
    """A cell's rates, as figures say them, and as the beginning of a row of their data."""
    rate_z, rate_y = (rates.sum().item() for rates in rates_of_units(cell))
    row = {"run": cell.run.path.name, "beta_y": cell.config.beta_y, "beta_z": cell.config.beta_z}
    return f"R(z) {rate_z:.3g}, R(y|z) {rate_y:.3g}", row | {"R(z) (nats)": rate_z, "R(y|z) (nats)": rate_y}


def between(cell: Loaded, n: int) -> Rows:
    """Walks in z from each of n images to the next: with y of p(y|z), or own kept."""
    x, _ = cell.images(n + 1)
    q, rows = cell.encode(x), []
    for i in range(len(x) - 1):
        z = cell.interpolate(q.z[i], q.z[i + 1], ALONG)
        noise = cell.model.noise(1, torch.Generator(cell.device).manual_seed(i)).y
        owns = {"y drawn": noise[0], "y of the left": q.own[i], "y of the right": q.own[i + 1]}
        for label, own in owns.items():
            walk = cell.decode(z, own.expand(ALONG, *own.shape))
            rows.append((label, torch.cat([x[i : i + 1], walk, x[i + 1 : i + 2]])))
    return rows


def dimensions(cell: Loaded, n: int) -> Rows:
    """Dimensions of the first image's z from -3 to 3, y the mean of p(y|z); by falling rate.

    A convolutional z has channels in place of dimensions, each set everywhere at once.
    """
    z = cell.encode(cell.images(1)[0]).z
    rates, _ = rates_of_units(cell)
    rates = rates.flatten(1).sum(1) if z.dim() > 2 else rates
    values, rows = torch.linspace(-3, 3, ALONG, device=cell.device), []
    for d in rates.argsort(descending=True, stable=True)[:MOST_DIMENSIONS].tolist():
        swept = z.repeat_interleave(ALONG, 0)
        swept[:, d] = values.view(-1, *[1] * (z.dim() - 2))
        rows.append((f"z {d + 1}: {rates[d]:.2f} nats", cell.decode(swept)))
    return rows


def redrawn(cell: Loaded, n: int) -> Rows:
    """n images, each with z kept and y drawn anew: from q(y|z,x), and, without it, from p(y|z)."""
    x, _ = cell.images(n)
    z, rows = cell.encode(x).z, []
    for one, z_of_one in zip(x.split(1), z.split(1), strict=True):
        zs, generator = z_of_one.repeat_interleave(ALONG, 0), torch.Generator(cell.device)
        noise = cell.model.noise(ALONG, generator.manual_seed(len(rows) // 2)).y
        q_y = cell.model.q_y(zs, one.expand(ALONG, *one.shape[1:]))
        for label, of_y in (("y from q(y|z,x)", q_y), ("y from p(y|z)", cell.model.p_y(zs))):
            rows.append((label, torch.cat([one, cell.model.mean_x(of_y.sample(noise))])))
    return rows
