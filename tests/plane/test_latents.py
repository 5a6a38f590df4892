"""plot_eval.py --latents and --traverse: what runs say of z and y, against torch's, numpy's and sampling's answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.decomposition import PCA
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import plot_eval
from datasets.batches import Resident
from datasets.loading import Data
from models.build import build_model
from tests.conftest import random_data
from tests.datasets.files import write_cifar10
from tests.plane.planes import read_csv
from utils.config import Config, what_differs
from utils.explore import Loaded, load
from utils.plane.drawing import COLUMN, TEXT
from utils.plane.latents import ALONG, N_ELLIPSES, drawing_of, ellipse, manifold, pca, views
from utils.plane.traversals import SWEEP, between, dimensions, rates_of_units, redrawn, side_by_side
from utils.runs import Run

PNG = ["--format", "png", "--device", "cpu"]
CPU = torch.device("cpu")
WALKS = ["between", "dimensions", "redrawn"]


def cell_of(data: Data | None = None, **settings) -> Loaded:
    """An untrained model, of random images unless told otherwise."""
    torch.manual_seed(0)
    config = Config(conv_channels=2, **settings)
    model = build_model(config).requires_grad_(False)
    return Loaded(Run(Path("runs/b/x"), config), config, model, data or random_data(config, 40), CPU)


@pytest.mark.parametrize(
    "flags, task, names",
    [
        ([], "--latents", ["latents"]),
        (["--linear_y_with_dims", "3"], "--traverse", WALKS),
        (["--vae_type", "LVAE", "--use_conv_z"], "--traverse", WALKS),
    ],
)
def test_runs_beside_each_other(flags, task, names, trained, passes):
    """Also with what else a shell's * finds in a batch."""
    paths = trained(*flags, "--beta_y", "0.1", "5")
    folder = Path("runs/singles/figures", task[2:].replace("traverse", "traversals"))
    out = passes(plot_eval.main, task, *paths, folder.parent, *PNG, "--images", 2)
    assert {p.name for p in folder.iterdir()} == {f"{name}.{form}" for name in names for form in ("png", "csv")}
    assert all(str(p) in out for p in folder.iterdir())
    for name in names:
        assert Image.open(folder / f"{name}.png").width == 200 * TEXT
        rows = read_csv(folder / f"{name}.csv")
        assert {(row["run"], row["beta_y"]) for row in rows} == {(paths[0].name, "0.1"), (paths[1].name, "5.0")}
        assert name != "latents" or len(rows) == 2 * 2 * 360


@pytest.mark.parametrize("settings", [{"z_dims": 2}, {"z_dims": 5}, {"use_conv_z": True}])
def test_views_are_the_dimensions_of_largest_rates_and_a_pca(settings):
    cell = cell_of(**settings)
    q = cell.model.q_z(cell.images(1000)[0])
    rates = kl_divergence(Normal(*q), Normal(0.0, 1.0)).mean(0)
    assert_close(rates_of_units(cell)[0], rates)
    first, *of_pca = views(cell)
    mean, std = (t.flatten(1).double().numpy() for t in q)
    two = sorted(rates.flatten().topk(2).indices.tolist())
    assert_allclose(first.means, mean[:, two])
    assert_allclose(first.covariances, [np.diag(v) for v in std[:, two] ** 2])
    for d, name in zip(two, first.axes, strict=True):
        channel, *place = (rates == rates.flatten()[d]).nonzero()[0].tolist()
        assert name.startswith(f"z {channel + 1} at row {place[0] + 1}, col" if place else f"z {channel + 1}: ")
        assert f"{rates.flatten()[d] / rates.sum():.0%} of R(z)" in name
    assert len(of_pca) == (mean.shape[1] > 2)
    for view in of_pca:
        fitted = PCA(2).fit(mean)
        flips = np.sign((view.means * (mean @ fitted.components_.T)).sum(0))
        w = fitted.components_ * flips[:, None]
        assert_allclose(view.means, mean @ w.T, atol=1e-6)
        assert_allclose(view.covariances[3], w @ np.diag(std[3] ** 2) @ w.T, atol=1e-6)
        assert f"{fitted.explained_variance_ratio_[0]:.0%} of the variance" in view.axes[0]
    assert pca(np.ones((5, 3)))[1].tolist() == [0, 0]  # means that are all one


def test_an_ellipse_has_the_points_at_one_standard_deviation():
    """By samples: 1 - exp(-1/2) of a Gaussian lies within, and its extent along any direction is the std there."""
    mean, root = np.array([1.0, -2.0]), np.array([[2.0, 0.0], [1.2, 0.3]])
    samples = mean + np.random.default_rng(0).standard_normal((100_000, 2)) @ root.T
    of_circle, angles = ellipse(mean, np.cov(samples.T)).get_patch_transform(), np.linspace(0, 2 * np.pi, 1000)
    outline = of_circle.transform(np.stack([np.cos(angles), np.sin(angles)], 1))
    inside = (of_circle.inverted().transform(samples) ** 2).sum(1) < 1
    assert_allclose(inside.mean(), 1 - np.exp(-0.5), atol=0.005)
    for direction in ((1, 0), (0, 1), (0.6, -0.8)):
        assert_allclose(((outline - mean) @ direction).max(), (samples @ direction).std(), rtol=0.01)


def test_the_manifold_lies_as_the_means_do():
    cell = cell_of(z_dims=2)
    values, images = manifold(cell)
    assert_allclose(Normal(0.0, 1.0).cdf(torch.tensor(values)), (np.arange(ALONG) + 0.5) / ALONG, atol=1e-6)
    low, high = values[0], values[-1]
    for i, z in ((0, (low, high)), (ALONG - 1, (high, high)), (-ALONG, (low, low)), (-1, (high, low))):
        assert_close(images[i], cell.decode(torch.tensor([z]))[0])


@pytest.mark.parametrize("n_classes", [0, 10, 20, 100])
def test_classes_are_told_by_colour_and_marker_or_by_a_colour_bar(n_classes):
    """An ellipse has the colour of its image."""
    split = random_data(Config(), 200).train
    labels = torch.arange(200) % max(n_classes, 1)
    split = Resident(split.images, labels, CPU)
    cell = cell_of(Data(split, split, n_classes), z_dims=3)
    figure, rows = drawing_of([cell])
    several = 1 < n_classes <= 20
    assert len(figure.legends) == several and len(figure.axes) == (4 if n_classes > 20 else 2)
    ax = figure.axes[0]
    dots = {(d.get_facecolor()[0].tobytes(), d.get_paths()[0].vertices.tobytes()) for d in ax.collections}
    assert len(dots) == len(ax.collections) == (n_classes if several else 1)
    assert len(ax.patches) == N_ELLIPSES + 1 and len(rows) == 2 * 200
    assert {row["class"] for row in rows} == ({*map(str, range(n_classes))} if n_classes else {""})
    colours = {dots.get_label(): dots.get_facecolor()[0, :3] for dots in ax.collections}
    for patch, label, mean in zip(ax.patches[:-1], cell.images(200)[1], views(cell)[0].means, strict=False):
        assert_allclose(patch.center, mean)
        assert not several or np.allclose(patch.get_edgecolor()[:3], colours[str(label.item())])


def test_categories_are_shown_by_class_and_decoded():
    cell = cell_of(qz_family="GumbelSoftmax", z_dims=3)
    x, labels = cell.images(40)
    figure, rows = drawing_of([cell])
    assert len(rows) == 10 * 3 and len(figure.axes) == 3
    expected = cell.model.q_z(x[labels == 4]).mean.mean(0)
    assert_allclose([row["share"] for row in rows if row["class"] == 4], expected, atol=1e-6)


def test_the_rows_of_traversals_are_what_they_say(trained):
    """Known from the model itself: the first picture of each row, and what must not change along it."""
    (path,) = trained("--z_dims", "4", "--num_epochs", "8", "--batch_size", "100")
    cell = load(path)
    x, _ = cell.images(3)
    z, m = cell.encode(x).z, cell.model
    rows, same = between(cell, 2), m.reconstruct(x)
    assert [label for label, _ in rows] == ["y drawn", "y of the left", "y of the right"] * 2
    for i in range(2):
        left, right = rows[3 * i + 1][1], rows[3 * i + 2][1]
        assert_close(torch.stack([left[1], right[-2]]), same[i : i + 2], rtol=0, atol=1e-5)
        assert torch.equal(left[0], x[i]) and torch.equal(left[-1], x[i + 1])
    rates = m.q_z(cell.images(1000)[0]).rate_of_units().mean(0)
    rows = dimensions(cell, 1)
    order = [int(label.split()[1].rstrip(":")) - 1 for label, _ in rows]
    assert sorted(order) == [0, 1, 2, 3] and (rates[order].diff() <= 0).all()
    z[0, order[0]] = -3
    assert_close(rows[0][1][:1], cell.decode(z[:1]))
    of_q, of_p = (images[1:].var(0).sum() for _, images in redrawn(cell, 1))
    assert of_q < of_p  # the image tells of y more than z alone
    figure, table = side_by_side([cell], dimensions, 1, SWEEP)
    assert figure.axes[0].get_title().startswith("beta_y 1, beta_z 1\nR(z) ")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["-3", "-2", "-1", "0", "1", "2", "3"]
    assert figure.get_suptitle().startswith("Digits, 8 epochs") and figure.get_figwidth() == COLUMN
    assert [row["row"] for row in table] == [label for label, _ in rows]
    assert_allclose(table[0]["R(z) (nats)"], rates.sum().item())


def test_a_convolutional_z_is_swept_by_channels():
    cell = cell_of(use_conv_z=True)
    rates, rows = rates_of_units(cell)[0].sum((1, 2)), dimensions(cell, 1)
    assert len(rows) == min(8, len(rates))
    assert rows[0][0] == f"z {rates.argmax() + 1}: {rates.max():.2f} nats"


def test_what_cannot_be_drawn_is_one_line(trained, refused):
    (good,) = trained()
    (one,) = trained("--z_dims", "1", batch="o")
    (categories,) = trained("--qz_family", "GumbelSoftmax", batch="g")
    (without,) = trained("--vae_type", "BVAE", batch="v")
    write_cifar10(Path("data"), n=20)
    (other,) = trained("--dataset", "CIFAR10", batch="c")
    for task, paths, *words in (
        ("--latents", [one], one, "two dimensions", "has 1"),
        ("--latents", [without], without, "two dimensions", "has 0"),
        ("--latents", [good] * 51, "at most 50 runs", "got 51"),
        ("--latents", [good, "--traverse", good], "--traverse", "--latents"),
        ("--traverse", [categories], categories, "category"),
        ("--traverse", [without], without, "not there"),
        ("--traverse", [], "--traverse"),
        *((task, [good, other], good, "Digits", other, "CIFAR10") for task in ("--latents", "--traverse")),
        *((task, ["nowhere"], "nowhere", "config.json") for task in ("--latents", "--traverse")),
    ):
        err = refused(plot_eval.main, task, *paths, *PNG)
        assert all(str(word) in err for word in words)
    err = refused(plot_eval.main)
    assert "--run_batch_name" in err and "--traverse" in err and not list(Path("runs").rglob("figures"))


def test_names_are_what_differs():
    a, b = Config(beta_y=0.1), Config(beta_y=0.1, vae_type="LVAE", seed=3)
    assert what_differs([a]) == ["beta_y 0.1, beta_z 1"]
    names = ["vae_type HVAE, beta_y 0.1, beta_z 1, seed 2", "vae_type LVAE, beta_y 0.1, beta_z 1, seed 3"]
    assert what_differs([a, b]) == names
    assert what_differs([a, Config(beta_y=0.1, warmup_epochs=7)])[1] == "warmup_epochs 7, beta_y 0.1, beta_z 1"
