"""plot_eval.py --traverse: pictures of what z encodes and what y adds."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from pytest import approx
from torch.testing import assert_close

import plot_eval
from models.build import build_model
from tests.conftest import random_data
from tests.datasets.files import write_cifar10
from tests.plane.planes import read_csv
from utils.config import Config, what_differs
from utils.explore import Loaded, load
from utils.plane.drawing import COLUMN, TEXT
from utils.plane.traversals import SWEEP, between, dimensions, rates_of_units, redrawn, side_by_side
from utils.runs import Run

PNG = ["--format", "png", "--device", "cpu"]


@pytest.mark.parametrize("flags", [["--linear_y_with_dims", "3"], ["--vae_type", "LVAE", "--use_conv_z"]])
def test_runs_side_by_side(flags, trained, passes):
    """Also with what else a shell's * finds in a batch."""
    paths = trained(*flags, "--beta_y", "0.1", "5")
    folder = Path("runs/singles/figures/traversals")
    out = passes(plot_eval.main, "--traverse", *paths, folder.parent, *PNG, "--images", 2)
    names = {f"{name}.{form}" for name in ("between", "dimensions", "redrawn") for form in ("png", "csv")}
    assert {p.name for p in folder.iterdir()} == names and all(str(p) in out for p in folder.iterdir())
    assert all(Image.open(p).width == 200 * TEXT for p in folder.glob("*.png"))
    rows = {(row["run"], row["beta_y"]) for row in read_csv(folder / "dimensions.csv")}
    assert rows == {(path.name, beta) for path, beta in zip(paths, ("0.1", "5.0"), strict=True)}


def test_the_rows_are_what_they_say(trained):
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
    assert_close(rates_of_units(cell)[0], rates)
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
    assert table[0]["R(z) (nats)"] == approx(rates.sum().item())


def test_a_convolutional_z_is_swept_by_channels():
    config = Config(use_conv_z=True, conv_channels=2)
    model = build_model(config).requires_grad_(False)
    cell = Loaded(Run(Path("x"), config), config, model, random_data(config), torch.device("cpu"))
    rates, rows = rates_of_units(cell)[0].sum((1, 2)), dimensions(cell, 1)
    assert len(rows) == min(8, len(rates))
    assert rows[0][0] == f"z {rates.argmax() + 1}: {rates.max():.2f} nats"


def test_what_cannot_be_drawn_is_one_line(trained, refused):
    (good,) = trained()
    (categories,) = trained("--qz_family", "GumbelSoftmax", batch="g")
    (without,) = trained("--vae_type", "BVAE", batch="v")
    write_cifar10(Path("data"), n=20)
    (other,) = trained("--dataset", "CIFAR10", batch="c")
    for paths, names in (
        ([categories], [categories, "category"]),
        ([without], [without, "not there"]),
        ([good, other], [good, "Digits", other, "CIFAR10"]),
        (["nowhere"], ["nowhere", "config.json"]),
        ([], ["--traverse"]),
    ):
        err = refused(plot_eval.main, "--traverse", *paths, *PNG)
        assert all(str(name) in err for name in names)
    err = refused(plot_eval.main)
    assert "--run_batch_name" in err and "--traverse" in err


def test_names_are_what_differs():
    a, b = Config(beta_y=0.1), Config(beta_y=0.1, vae_type="LVAE", seed=3)
    assert what_differs([a]) == ["beta_y 0.1, beta_z 1"]
    assert what_differs([a, b]) == [
        f"vae_type {kind}, beta_y 0.1, beta_z 1, seed {s}" for kind, s in (("HVAE", 2), ("LVAE", 3))
    ]
    assert what_differs([a, Config(beta_y=0.1, warmup_epochs=7)])[1] == "warmup_epochs 7, beta_y 0.1, beta_z 1"
