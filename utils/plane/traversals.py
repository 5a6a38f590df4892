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
from utils.errors import UserError
from utils.explore import Loaded, load
from utils.files import check_writable, to_csv, write_atomic
from utils.images import tiled
from utils.names import what_differs
from utils.plane.drawing import COLUMN, TEXT, Drawn, rendered, say
from utils.runs import is_cell

STEPS = 7  # images of a walk, and of a sweep from -3 to 3
MOST = 8  # dimensions of z that are swept: those of the largest rates
N_RATES = 1000  # test images over which rates are averaged
SIDE_BY_SIDE = 3  # cells, across a page
Rows = list[tuple[str, Tensor]]  # what each row shows, and its images (n, C, H, W)
WALK = ("image", *[""] * (STEPS // 2), "walk", *[""] * (STEPS // 2), "image")  # what the columns show
SWEEP = [f"{v:g}" for v in torch.linspace(-3, 3, STEPS).tolist()]
AGAIN = ("image", *[""] * (STEPS // 2), "y drawn", *[""] * (STEPS // 2))


def traverse(args) -> int:
    """Draws the traversals of the runs in `args.traverse` into `args.out`, or figures/traversals in their batch.

    Prints the files; returns the exit status. Raises UserError for runs whose z has no continuous dimensions, or that
    are of different data.
    """
    paths = [path for path in map(Path, args.traverse) if len(args.traverse) == 1 or is_cell(path)]  # of a shell's *
    cells = [load(path, args.data_dir, args.device, args.dataset) for path in paths]
    for cell in cells:
        if cell.model.family is not Gaussian or not cell.model.z_shape[0]:
            why = "a category" if cell.model.z_shape[0] else "not there"
            raise UserError(f"--traverse: {cell.run.path}: its z is {why}, so that there is nothing to sweep")
        if cell.config.data_name != cells[0].config.data_name:
            names = f"{cell.config.data_name}, {cells[0].run.path} of {cells[0].config.data_name}"
            raise UserError(f"--traverse: {cell.run.path} is of {names}; cells side by side need the same images")
    folder = Path(args.out) if args.out else cells[0].run.path.resolve().parent / "figures" / "traversals"
    check_writable(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)
    print("written:")
    for name, rows, columns in (
        ("between", between, WALK),
        ("dimensions", dimensions, SWEEP),
        ("redrawn", redrawn, AGAIN),
    ):
        figure, told = side_by_side(cells, rows, args.images, columns)
        files = rendered(figure, args.format) | {"csv": to_csv(told, told[0]).encode()}
        for form, content in files.items():
            write_atomic(folder / f"{name}.{form}", content)
            print(f"  {folder / f'{name}.{form}'}", flush=True)
    return 0


def side_by_side(
    cells: Sequence[Loaded], rows_of: Callable[[Loaded, int], Rows], n: int, columns: Sequence[str]
) -> Drawn:
    """A figure of the same rows for each cell, one panel a cell, under what tells the cells apart and their rates."""
    names, found = what_differs([cell.config for cell in cells]), [rows_of(cell, n) for cell in cells]
    pictures = [tiled(torch.cat([images for _, images in rows]), len(rows[0][1]), 1.0) for rows in found]
    across = min(len(cells), SIDE_BY_SIDE)
    down, width = math.ceil(len(cells) / across), COLUMN if len(cells) == 1 else TEXT
    height = (width / across - 0.8) * max(p.shape[1] / p.shape[2] for p in pictures)
    figure = Figure((width, down * (height + 0.6) + 0.4), layout="constrained")
    panels, told = figure.subplots(down, across, squeeze=False).ravel(), []
    for extra in panels[len(cells) :]:
        extra.remove()
    for i, (ax, cell, name, rows, picture) in enumerate(zip(panels, cells, names, found, pictures, strict=False)):
        high, wide = ((size - 2) / of for size, of in zip(picture.shape[1:], (len(rows), len(columns)), strict=True))
        ax.imshow(picture.clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        labels = [label for label, _ in rows]
        shown = i % across == 0 or labels != [label for label, _ in found[i - 1]]
        ax.set_yticks([1 + high * (k + 0.5) for k in range(len(rows))] if shown else [], labels if shown else [])
        ax.set_xticks([1 + wide * (k + 0.5) for k in range(len(columns))], columns)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        rate_z, rate_y = (rates.sum().item() for rates in rates_of_units(cell))
        ax.set_title(
            "\n".join([*textwrap.wrap(name, int(14 * width / across)), f"R(z) {rate_z:.3g}, R(y|z) {rate_y:.3g}"])
        )
        known = {"run": cell.run.path.name, "beta_y": cell.config.beta_y, "beta_z": cell.config.beta_z}
        told += [{**known, "R(z) (nats)": rate_z, "R(y|z) (nats)": rate_y, "row": label} for label in labels]
    data, epochs = cells[0].config.dataset, ", ".join(sorted({str(cell.config.num_epochs) for cell in cells}))
    say(
        figure,
        f"{data}, {epochs} epochs; test images; rates in nats, means over {len(cells[0].images(N_RATES)[0]):,} of them",
    )
    return Drawn(figure, told)


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
        z = cell.interpolate(q.z[i], q.z[i + 1], STEPS)
        noise = cell.model.noise(1, torch.Generator(cell.device).manual_seed(i)).y
        owns = {"y drawn": noise[0], "y of the left": q.own[i], "y of the right": q.own[i + 1]}
        for label, own in owns.items():
            walk = cell.decode(z, own.expand(STEPS, *own.shape))
            rows.append((label, torch.cat([x[i : i + 1], walk, x[i + 1 : i + 2]])))
    return rows


def dimensions(cell: Loaded, n: int) -> Rows:
    """Dimensions of the first image's z from -3 to 3, stds of the prior, y the mean of p(y|z); by falling rate.

    A convolutional z has channels in place of dimensions, each set everywhere at once.
    """
    z = cell.encode(cell.images(1)[0]).z
    rates, _ = rates_of_units(cell)
    rates = rates.flatten(1).sum(1) if z.dim() > 2 else rates
    values, rows = torch.linspace(-3, 3, STEPS, device=cell.device), []
    for d in rates.argsort(descending=True, stable=True)[:MOST].tolist():
        swept = z.repeat(STEPS, *[1] * (z.dim() - 1))
        swept[:, d] = values.view(-1, *[1] * (z.dim() - 2))
        rows.append((f"z {d + 1}: {rates[d]:.2f} nats", cell.decode(swept)))
    return rows


def redrawn(cell: Loaded, n: int) -> Rows:
    """n images, each with z kept and y drawn again and again: from q(y|z,x), and from p(y|z), without the image."""
    x, _ = cell.images(n)
    z, rows = cell.encode(x).z, []
    for i in range(len(x)):
        one, zs = x[i : i + 1], z[i : i + 1].repeat(STEPS, *[1] * (z.dim() - 1))
        p_y, noise = cell.model.p_y(zs), cell.model.noise(STEPS, torch.Generator(cell.device).manual_seed(i)).y
        q_y = cell.model.q_y(zs, one.expand(STEPS, *one.shape[1:]))
        for label, y in (("y from q(y|z,x)", q_y.sample(noise)), ("y from p(y|z)", p_y.sample(noise))):
            rows.append((label, torch.cat([one, cell.model.mean_x(y)])))
    return rows
