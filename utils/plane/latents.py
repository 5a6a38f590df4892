"""Where test images lie in z: means by class, single posteriors, and what points of z decode to."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch.distributions import Normal

from datasets.loading import Data
from models.latents import Gaussian
from utils.errors import UserError
from utils.explore import Loaded
from utils.plane.drawing import GREY, MARKERS, TEXT, Drawing, Output, bar_of, legend, literal, say, styled
from utils.plane.traversals import N_RATES, check_images, rates_of, rates_of_units, show_tiled, write_drawings

N_ELLIPSES = 60  # test images whose posteriors are drawn
ALONG = 15  # decoded points along each of two dimensions
MOST_CELLS = 50  # below each other
MOST_CLASSES = 20  # that are told apart by colour and marker
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"]  # those that Petroff (2021) found easiest to tell
COLOURS += ["#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]


class View(NamedTuple):
    """Posteriors of z in a plane: its axes, means (N, 2), covariances (N, 2, 2)."""

    axes: tuple[str, str]
    means: np.ndarray
    covariances: np.ndarray


@styled
def draw_latents(cells: Sequence[Loaded], out: Output) -> None:
    """Draws z of the test images of cells. Raises UserError where it cannot be drawn."""
    if len(cells) > MOST_CELLS:
        raise UserError(f"--latents: draws at most {MOST_CELLS} runs at once, got {len(cells)}")
    for cell in cells:
        has = math.prod(cell.model.z_shape), len(cell.data.test)
        if min(has) < 2:
            what = "needs two dimensions of z and two test images, has {} and {}".format(*has)
            raise UserError(f"--latents: {cell.run.path}: {what}")
    check_images("--latents", cells)
    write_drawings(out, {"latents": drawing_of(cells)})


def drawing_of(cells: Sequence[Loaded]) -> Drawing:
    """Two panels for each cell: dimensions of z, PCA, what they decode to; or categories."""
    figure, table = Figure((TEXT, 0.6 + 3.7 * len(cells)), layout="constrained"), []
    n = len(cells[0].images(N_RATES)[0])
    about = f"{cells[0].config.data_name}; {n:,} test images; rates in nats."
    if any(cell.model.family is Gaussian for cell in cells):
        about += " Points: means of q(z|x) by class; ellipses: q(z|x) of single images, to one standard deviation; "
        about += "dashed: p(z), likewise."
    say(figure, about)
    for part, cell in zip(figure.subfigures(len(cells), 1, squeeze=False).ravel(), cells, strict=True):
        rates, row = rates_of(cell)
        part.suptitle(f"{textwrap.fill(literal(cell.run.path.name), 100)}\n{rates}", fontsize=8)
        axes, draw = part.subplots(1, 2), draw_views if cell.model.family is Gaussian else draw_categories
        table += [row | of_panel for of_panel in draw(axes, cell)]
    legend(figure, figure.axes, most=10, markerscale=1.5)
    return Drawing(figure, table)


def draw_views(axes: Sequence[Axes], cell: Loaded) -> list[dict]:
    """Draws means and single posteriors in planes of z; where there is but one, the manifold."""
    seen, (_, labels) = views(cell), cell.images(N_RATES)
    for ax, view in zip(axes, seen, strict=False):
        draw_posteriors(ax, view, labels.cpu().numpy(), cell.data.n_classes, names_of(cell.data))
    if len(seen) == 1:
        draw_manifold(axes[1], cell)
    return [
        {"x": view.axes[0], "y": view.axes[1], "class": names_of(cell.data)[label] if cell.data.labelled else ""}
        | {"mean x": x, "mean y": y, "var x": of_both[0, 0], "cov": of_both[0, 1], "var y": of_both[1, 1]}
        for view in seen
        for label, (x, y), of_both in zip(labels.tolist(), view.means, view.covariances, strict=True)
    ]


def names_of(data: Data) -> Sequence[str]:
    """The names of the classes; of a built-in data set, their numbers."""
    return data.folder.classes if data.folder else list(map(str, range(data.n_classes)))


def views(cell: Loaded) -> list[View]:
    """The plane of the two dimensions of the largest rates, and, of more, that of a PCA."""
    q, rates = cell.model.q_z(cell.images(N_RATES)[0]), rates_of_units(cell)[0]
    mean, std = (t.flatten(1).cpu().double().numpy() for t in q)
    shape, rates = rates.shape, rates.flatten().cpu().double().numpy()
    two = sorted(np.argsort(-rates, kind="stable")[:2].tolist())
    names = []
    for d in two:
        channel, *place = (int(i) + 1 for i in np.unravel_index(d, shape))
        where = f" at row {place[0]}, column {place[1]}" if place else ""
        names.append(f"z {channel}{where}: {rates[d]:.3g} nats, {rates[d] / rates.sum():.0%} of R(z)")
    planes = [(names, np.eye(len(rates))[two])]
    if len(rates) > 2:
        components, shares = pca(mean)
        names = [f"PC {i}: {share:.0%} of the variance of means" for i, share in enumerate(shares, 1)]
        planes.append((names, components))
    return [View(axes, mean @ w.T, np.einsum("id,nd,jd->nij", w, std**2, w)) for axes, w in planes]


def pca(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two principal components (2, D) of means (N, D), and their shares of the variance."""
    _, stds, components = np.linalg.svd(mean - mean.mean(0), full_matrices=False)
    total, components = (stds**2).sum(), components[:2]
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1))
    return components * signs, stds[:2] ** 2 / total if total > 0 else np.zeros(2)


def draw_posteriors(ax: Axes, view: View, labels: np.ndarray, n_classes: int, names: Sequence[str]) -> None:
    """Draws means by class, ellipses of the first posteriors, and the prior's circle."""
    several = 1 < n_classes <= MOST_CLASSES
    colours = np.array(COLOURS)[labels % len(COLOURS)]
    if n_classes > MOST_CLASSES:
        norm = Normalize(0, n_classes - 1)
        colours = colormaps["viridis"](norm(labels))
        bar_of(ax.figure, ax, "viridis", norm, label="class")
    for label in np.unique(labels) if several else [None]:
        of_class = labels == label if several else ...
        marker = MARKERS[label % len(MARKERS)][0] if several else "."
        look = {"marker": marker, "s": 8, "lw": 0, "alpha": 0.7, "label": literal(names[label]) if several else None}
        ax.scatter(*view.means[of_class].T, c=colours[of_class], **look)
    for mean, covariance, colour in list(zip(view.means, view.covariances, colours, strict=True))[:N_ELLIPSES]:
        ax.add_patch(ellipse(mean, covariance, ec=colour, lw=0.6))
    ax.add_patch(ellipse(np.zeros(2), np.eye(2), ec=GREY, lw=1, ls="--"))
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    ax.set_xlabel(view.axes[0])
    ax.set_ylabel(view.axes[1])


def ellipse(mean: np.ndarray, covariance: np.ndarray, **look) -> Ellipse:
    """The points at one standard deviation from the mean (2,)."""
    variances, (_, (x, y)) = (e.T for e in np.linalg.eigh(covariance))
    width, height = 2 * np.sqrt(variances[::-1])
    return Ellipse(mean, width, height, angle=math.degrees(math.atan2(y, x)), fill=False, **look)


def manifold(cell: Loaded) -> tuple[list[float], torch.Tensor]:
    """Quantiles of the prior, and what pairs decode to, from the largest z 2 down, along z 1."""
    values = Normal(0.0, 1.0).icdf((torch.arange(ALONG) + 0.5) / ALONG)
    z = torch.cartesian_prod(values.flip(0), values).flip(1).to(cell.device)
    return values.tolist(), cell.decode(z.view(-1, *cell.model.z_shape))


def draw_manifold(ax: Axes, cell: Loaded) -> None:
    """Draws what points of a z of two dimensions decode to, where they lie among the means."""
    values, images = manifold(cell)
    texts = [f"{value:.1f}" if k % 2 else "" for k, value in enumerate(values)]
    show_tiled(ax, images, "decoded: quantiles of p(z), mean of p(y|z)", texts, texts[::-1])
    ax.set_xlabel("z 1")
    ax.set_ylabel("z 2")


def draw_categories(axes: Sequence[Axes], cell: Loaded) -> list[dict]:
    """Draws how often each class is in each category of z, and what the categories decode to."""
    x, labels = cell.images(N_RATES)
    q, classes = cell.model.q_z(x).mean, labels.unique().tolist()
    shares = torch.stack([q[labels == label].mean(0) for label in classes]).cpu().numpy()
    shown = axes[0].imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axes[0].figure.colorbar(shown, ax=axes[0], label="mean of q(z|x)")
    if cell.data.labelled and len(classes) <= MOST_CLASSES:
        axes[0].set_yticks(range(len(classes)), [literal(names_of(cell.data)[label]) for label in classes])
    axes[0].set_xlabel("category of z, from 0")
    axes[0].set_ylabel("class" if cell.data.labelled else "all images")
    images = cell.decode(torch.eye(shares.shape[1], device=cell.device))
    columns = [""] * math.ceil(math.sqrt(shares.shape[1]))
    show_tiled(axes[1], images, "decoded: each category, mean of p(y|z)", columns, [""])
    return [
        {"class": label if cell.data.labelled else "", "category": i, "share": share}
        for label, of_class in zip(classes, shares.tolist(), strict=True)
        for i, share in enumerate(of_class)
    ]
