"""The loss above the best possible, of a data set of which that is known."""

import csv
import json
import re
from pathlib import Path

import pytest
from pytest import approx
from scipy.stats import sem

import eval_beta_grid
import train
from datasets import gaussian
from tests.evaluation.conftest import FAST, RATES
from utils.evaluation.metrics import per_image

RUN = [*FAST, "--dataset", "Gaussian", "--conv_channels", "4", "--num_epochs", "1", "--batch_size", "50"]
LINE = r"(?:beta_y (\S+), beta_z (\S+): )?(\S+) \+- (\S+) nats above the best possible loss on these images, (\S+)"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(gaussian, "N_TRAIN", 200)
    monkeypatch.setattr(gaussian, "N_TEST", 150)


def test_a_training_ends_with_it_and_an_evaluation_measures_it(passes):
    """At betas of 0.5 and 2, whose optimum has 0.5."""
    last = passes(train.main, *RUN, "--beta_y", "2", "--beta_z", "0.5").splitlines()[-1]
    *_, excess, se, best = re.fullmatch(LINE, last).groups()
    passes(eval_beta_grid.main, *RATES)
    with open("runs/b/eval_results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    path, source = Path("runs/b", row["run"]), gaussian.Gaussian()
    _, (images, _) = source.read(Path())
    least = source.optimum(0.5, 0.2).loss_of(images / 255)
    terms = {name: values.astype(float) for name, values in per_image(path).items()}
    above = 2 * terms["kl_y"] + 0.5 * terms["kl_z"] - terms["ll"] - least
    assert float(row["above_bound"]) == approx(above.mean(), abs=1e-3) and above.mean() > 10
    assert float(row["above_bound_se"]) == approx(sem(above), rel=1e-3)
    test = json.loads((path / "training.json").read_text())["test"]
    assert test["loss"] - test["above_bound"] == approx(least.mean(), abs=1e-3)
    assert (float(excess), float(best)) == approx((test["above_bound"], least.mean()), abs=0.006)
    assert float(se) == approx(sem(above), rel=0.2)


def test_each_unfolded_and_each_steered_cell_has_that_of_its_own_betas(passes):
    grid = ["--beta_y", "0.5", "2", "--beta_z", "1", "--multi_rate", "--force"]
    lines = passes(train.main, *RUN, *grid).splitlines()[-2:]
    found = [tuple(map(float, re.fullmatch(LINE, line).groups())) for line in lines]
    source = gaussian.Gaussian()
    x = source.read(Path())[1][0] / 255
    for (beta_y, beta_z, *_, best), beta in zip(found, (0.5, 1), strict=True):
        assert best == approx(source.optimum(beta, 0.2).loss_of(x).mean(), abs=0.006)
        assert min(beta_y, beta_z) == beta
    steered = [
        "--vae_type",
        "BVAE",
        "--run_name",
        "s",
        "--target_rate_y",
        "5",
        "--batch_size",
        "4",
        "--num_epochs",
        "2",
    ]
    last = passes(train.main, *RUN, *steered).splitlines()[-1]
    (path,) = Path("runs/b").glob("s-*")
    beta = json.loads((path / "config.json").read_text())["beta_y"]
    assert beta != 1  # steered
    assert float(re.fullmatch(LINE, last)[5]) == approx(source.optimum(beta, 0.2).loss_of(x).mean(), abs=0.006)


def test_it_is_left_out_where_it_is_not_known(passes):
    for flags in (["--px_y_family_ll", "Bernoulli"], ["--beta_y", "0"]):
        assert "above the best" not in passes(train.main, *RUN, *flags)
    passes(eval_beta_grid.main, *RATES)
    with open("runs/b/eval_results.csv", newline="") as file:
        assert {row["above_bound"] for row in csv.DictReader(file)} == {""}
