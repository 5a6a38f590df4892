"""Rates on request: betas found on a multi-rate model, or steered while a cell trains on its own."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from datasets.loading import load_data
from models.stack import Stack
from tests.conftest import TINY
from tests.training.test_unfold import cells_of
from utils.files import write_json
from utils.runs import load_model
from utils.training.betas import Betas
from utils.training.targets import Search

CPU = torch.device("cpu")
GRID = ["--beta_y", "0.1:10:3", "--beta_z", "0.5", "2"]
LONGER = ["--conv_channels", "4", "--z_dims", "6", "--num_epochs", "40", "--batch_size", "100", "--device", "cpu"]
LONGER += ["--learning_rate", "7e-4", "--run_batch_name", "m"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a multi-rate model of the digits, in runs/m."""
    root = tmp_path_factory.mktemp("targets")
    torch.set_num_threads(1)
    assert train.main([*LONGER, "--multi_rate", "--force", *GRID, "--runs_dir", str(root / "runs")]) == 0
    return root


@pytest.fixture
def searched(made):
    """A copy of that model, and the search on it."""
    shutil.copytree(made / "runs", "runs")
    _, (source,) = cells_of()
    return Search(load_model(source, CPU), load_data(source.config, "data", CPU), 100)


def test_rates_that_are_asked_for_are_found_on_the_conditioned_model(script, searched):
    """Rates of the model itself, at betas off the grid, lead back to those rates; the table shows them in bits."""
    asked = searched.rates(np.log10([0.4, 1.1]))
    bits = [f"{rate / math.log(2):.6f}" for rate in asked]
    flags = [*LONGER, "--multi_rate", "--force", *GRID, "--rate_unit", "bits"]
    status, out, err = script(train.main, *flags, "--target_rate_y", bits[0], "--target_rate_z", bits[1])
    assert status == 0, err
    (found,) = [r for r in cells_of()[0].values() if r.config.target_rate_z]
    assert found.config.target_rate_y == pytest.approx(asked[0], abs=1e-5)
    rates = searched.rates(np.log10([found.config.beta_y, found.config.beta_z]))
    np.testing.assert_allclose(rates, asked, rtol=0.03, atol=0.01)
    line = next(line for line in out.splitlines() if re.match(rf" +{float(bits[0]):.4g} ", line))
    train_y, test_y = (found.result[split]["kl_y"] / math.log(2) for split in ("train", "test"))
    assert [float(w) for w in line.split()[1:3]] == pytest.approx([train_y, test_y], abs=1e-3)
    assert "(bits per image)" in out


def test_one_rate_leaves_the_other_beta(script, searched):
    asked = searched.rates(np.log10([0.7, 0.5]))[0]
    assert script(train.main, *LONGER, "--multi_rate", "--force", *GRID, "--target_rate_y", f"{asked:.6f}")[0] == 0
    found = {r.config.beta_z: r for r in cells_of()[0].values() if r.config.target_rate_y}
    assert set(found) == {0.5, 2}
    for beta_z, run in found.items():
        assert "Rate_y_" in run.path.name and f"Beta_z_{beta_z}" in run.path.name
        assert searched.rates(np.log10([run.config.beta_y, beta_z]))[0] == pytest.approx(asked, rel=0.01)


def test_rates_out_of_reach_are_refused_with_the_nearest(script, searched):
    known = set(Path("runs/m").iterdir())
    flags = [*LONGER, "--multi_rate", "--force", *GRID, "--target_rate_y", "5000"]
    status, _, err = script(train.main, *flags)
    assert status == 2 and "--target_rate_z, --target_rate_y: not within the range" in err and err.count("\n") == 1
    nearest, beta_y = (float(re.search(rf"{name} ([0-9.]+)", err)[1]) for name in (r"nearest: R\(y\|z\)", "beta_y"))
    assert beta_y == 0.1 and nearest == pytest.approx(searched.rates(np.log10([0.1, 0.5]))[0], rel=1e-3)
    assert set(Path("runs/m").iterdir()) == known


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target_rate_z", "-1"], "--target_rate_z: must be > 0"),
        (["--target_rate_y", "0"], "--target_rate_y: must be > 0"),
        (["--target_rate_z", "3", "--vae_type", "BVAE"], "--target_rate_z: BVAE has no z"),
        (["--target_rate_z", "1.2", "--qz_family", "GumbelSoftmax"], "3 categories hold less than 1.099 nats"),
        (["--target_rate_z", "two"], "--target_rate_z"),
    ],
)
def test_rates_that_cannot_be(flags, message, script):
    status, _, err = script(train.main, *TINY, *flags)
    assert status == 2 and message in err and err.count("\n") == 1 and not Path("runs").exists()


def test_betas_are_steered_to_the_rates_asked_for(script):
    flags = ["--conv_channels", "4", "--z_dims", "6", "--num_epochs", "60", "--batch_size", "100", "--device", "cpu"]
    flags += ["--learning_rate", "2e-3", "--lr_schedule", "tail", "--target_rate_y", "12", "--run_batch_name", "t"]
    assert script(train.main, *flags)[0] == 0
    (run,) = cells_of("t")[0].values()
    assert run.config.target_rate_y == 12 and run.config.beta_y != 1 and run.config.beta_z == 1
    assert run.result["train"]["kl_y"] == pytest.approx(12, rel=0.05)
    test = run.result["test"]
    assert test["loss"] == pytest.approx(-test["ll"] + run.config.beta_y * test["kl_y"] + test["kl_z"], rel=1e-4)
    assert "already complete" in script(train.main, *flags)[1]


def test_steering_is_the_dual_ascent_of_its_docstring():
    """Against a plain loop over one cell: averaged log rates, the clamped error, and nothing before or after."""
    from utils.config import Config

    config = Config(target_rate_y=4.0, num_epochs=10, warmup_epochs=1)
    betas, steps, log_beta, averaged = Betas([config], 1, CPU), 200, 0.0, None
    rng = np.random.default_rng(0)
    for step in range(steps):
        rate = float(rng.uniform(2, 30))
        betas.steer(torch.tensor([[0.0, 0.0, 8 * rate, 8 * 3.0]]), 8, step / steps, steps)
        if 0.1 <= step / steps < 0.9:
            averaged = math.log(rate) if averaged is None else averaged + (math.log(rate) - averaged) / 20
            log_beta += 30 / steps * min(1, max(-1, averaged - math.log(4)))
    assert betas.y.item() == pytest.approx(math.exp(log_beta), rel=1e-4) and betas.z.item() == 1


def test_steering_starts_at_the_betas_of_a_multi_rate_model(script, searched, monkeypatch):
    _, (source,) = cells_of()
    write_json(source.path / "training.json", source.result | {"collapsed": False})  # one this small does collapse
    asked = searched.rates(np.log10([0.4, 1.1]))
    seen = []
    monkeypatch.setattr(
        Stack, "step", lambda self, optimizer, x, noise, y, z: (seen.append((y.item(), z.item())), 1 / 0)
    )
    targets = ["--target_rate_y", f"{asked[0]:.6f}", "--target_rate_z", f"{asked[1]:.6f}", "--warmup_epochs", "0"]
    with pytest.raises(ZeroDivisionError):
        train.main([*LONGER, *targets])
    (start,) = seen
    np.testing.assert_allclose(searched.rates(np.log10(start)), asked, rtol=0.03, atol=0.01)
