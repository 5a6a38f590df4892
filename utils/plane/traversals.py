"""What z encodes and what y adds, in pictures: walks from one image to another, dimensions of z swept, y drawn anew.

Chosen cells stand side by side, so that one sees information move from y to z as the betas change. What y adds to z,
`own`, is explained in utils/explore.py.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.latents import Gaussian
from utils.config import what_differs
from utils.errors import UserError
from utils.explore import Loaded
from utils.files import check_writable
from utils.images import tiled
from utils.plane.drawing import COLUMN, TEXT, Drawing, say, styled, write_drawing

ALONG = 7  # images of a walk, and of a sweep from -3 to 3
MOST_DIMENSIONS = 8  # of z that are swept: those of the largest rates
N_RATES = 1000  # test images over which rates are averaged
SIDE_BY_SIDE = 3  # cells, across a page
Rows = list[tuple[str, Tensor]]  # what each row shows, and its images (n, C, H, W)
GAP = [""] * (ALONG // 2)
WALK, AGAIN = ["image", *GAP, "walk", *GAP, "image"], ["image", *GAP, "y drawn", *GAP]  # what the columns show
SWEEP = [f"{v:g}" for v in torch.linspace(-3, 3, ALONG).tolist()]


@styled
def traverse(cells: Sequence[Loaded], folder: Path, formats: Sequence[str], n: int) -> None:
    """Draws traversals of n images by cells side by side into a folder, and prints the files.

    Raises UserError for runs whose z has no continuous dimensions, or that are of different data.
    """
    first = cells[0]
    for cell in cells:
        if cell.model.family is not Gaussian or not cell.model.z_shape[0]:
            why = "a category" if cell.model.z_shape[0] else "not there"
            raise UserError(f"--traverse: {cell.run.path}: its z is {why}, so that there is nothing to sweep")
        if cell.config.data_name != first.config.data_name:
            names = f"{cell.config.data_name}, {first.run.path} of {first.config.data_name}"
            raise UserError(f"--traverse: {cell.run.path} is of {names}; cells side by side need the same images")
    check_writable(folder, "--out")
    print("written:")
    for rows_of, columns in ((between, WALK), (dimensions, SWEEP), (redrawn, AGAIN)):
        name, drawing = rows_of.__name__, side_by_side(cells, rows_of, n, columns)
        write_drawing(folder, name, formats, drawing, {column: column for column in drawing.rows[0]})
        for form in (*formats, "csv"):
            print(f"  {folder / name}.{form}", flush=True)


def side_by_side(
    cells: Sequence[Loaded], rows_of: Callable[[Loaded, int], Rows], n: int, columns: Sequence[str]
) -> Drawing:
    """A figure of the same rows for each cell, one panel a cell, under what tells the cells apart and their rates."""
    rows = [rows_of(cell, n) for cell in cells]
    labels = [[label for label, _ in of_cell] for of_cell in rows]
    pictures = [tiled(torch.cat([images for _, images in of_cell]), len(of_cell[0][1]), 1.0) for of_cell in rows]
    across = min(len(cells), SIDE_BY_SIDE)
    down, width = math.ceil(len(cells) / across), COLUMN if len(cells) == 1 else TEXT
    height = (width / across - 0.8) * max(p.shape[1] / p.shape[2] for p in pictures)
    figure = Figure((width, down * (height + 0.6) + 0.4), layout="constrained")
    axes, table = figure.subplots(down, across, squeeze=False).ravel(), []
    for extra in axes[len(cells) :]:
        extra.remove()
    names = what_differs([cell.config for cell in cells])
    for i, (ax, cell, name, picture) in enumerate(zip(axes, cells, names, pictures, strict=False)):
        high, wide = ((size - 2) / n for size, n in zip(picture.shape[1:], (len(rows[i]), len(columns)), strict=True))
        ax.imshow(picture.clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        ticks = labels[i] if i % across == 0 or labels[i] != labels[i - 1] else []
        ax.set_yticks([1 + high * (k + 0.5) for k in range(len(ticks))], ticks)
        ax.set_xticks([1 + wide * (k + 0.5) for k in range(len(columns))], columns)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        rate_z, rate_y = (rates.sum().item() for rates in rates_of_units(cell))
        title = textwrap.wrap(name, int(14 * width / across))
        ax.set_title("\n".join([*title, f"R(z) {rate_z:.3g}, R(y|z) {rate_y:.3g}"]))
        row = {"run": cell.run.path.name, "beta_y": cell.config.beta_y, "beta_z": cell.config.beta_z}
        row |= {"R(z) (nats)": rate_z, "R(y|z) (nats)": rate_y}
        table += [row | {"row": label} for label in labels[i]]
    epochs = ", ".join(sorted({str(cell.config.num_epochs) for cell in cells}))
    about = f"{cells[0].config.dataset}, {epochs} epochs; test images; rates in nats, means over "
    say(figure, f"{about}{len(cells[0].images(N_RATES)[0]):,} of them")
    return Drawing(figure, table)


@functools.cache  # every figure says them
def rates_of_units(cell: Loaded) -> tuple[Tensor, Tensor]:
    """The rate of each dimension of z, (*z_shape,), and of y given z, (*y_shape,): nats, means over test images."""
    x, _ = cell.images(N_RATES)
    z = cell.encode(x, seed=0).z
    return cell.model.q_z(x).rate_of_units().mean(0), cell.model.q_y(z, x).kl_of_units(cell.model.p_y(z)).mean(0)


def between(cell: Loaded, n: int) -> Rows:
    """Walks in z from each of n images to the next: y drawn from p(y|z), the same noise all along, or own kept."""
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
    """Dimensions of the first image's z from -3 to 3, stds of the prior, y the mean of p(y|z); by falling rate.

    A convolutional z has channels in place of dimensions, each set everywhere at once.
    """
    z = cell.encode(cell.images(1)[0]).z
    rates, _ = rates_of_units(cell)
    rates = rates.flatten(1).sum(1) if z.dim() > 2 else rates
    values, rows = torch.linspace(-3, 3, ALONG, device=cell.device), []
    for d in rates.argsort(descending=True, stable=True)[:MOST_DIMENSIONS].tolist():
        swept = z.repeat(ALONG, *[1] * (z.dim() - 1))
        swept[:, d] = values.view(-1, *[1] * (z.dim() - 2))
        rows.append((f"z {d + 1}: {rates[d]:.2f} nats", cell.decode(swept)))
    return rows


def redrawn(cell: Loaded, n: int) -> Rows:
    """n images, each with z kept and y drawn again and again: from q(y|z,x), and from p(y|z), without the image."""
    x, _ = cell.images(n)
    z, rows = cell.encode(x).z, []
    for i in range(len(x)):
        one, zs = x[i : i + 1], z[i : i + 1].repeat(ALONG, *[1] * (z.dim() - 1))
        p_y, noise = cell.model.p_y(zs), cell.model.noise(ALONG, torch.Generator(cell.device).manual_seed(i)).y
        q_y = cell.model.q_y(zs, one.expand(ALONG, *one.shape[1:]))
        for label, y in (("y from q(y|z,x)", q_y.sample(noise)), ("y from p(y|z)", p_y.sample(noise))):
            rows.append((label, torch.cat([one, cell.model.mean_x(y)])))
    return rows
