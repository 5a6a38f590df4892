"""What only a GPU can show; without one these are skipped."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import train
from tests.conftest import TINY
from utils.config import Config
from utils.runs import Run
from utils.seeds import generator
from utils.training.schedule import fastest, use_precision
from utils.training.training import Setup, Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BETAS = (0.1, 1.0, 10.0)


@pytest.fixture
def gpu():
    use_precision("fp32")
    return torch.device("cuda:0")


def ten_steps(device, config, m=3, **setup):
    """Sums (10, M, 4) of ten steps on one batch each, the seventh of which is smaller, and the training."""
    configs = [dataclasses.replace(config, beta_y=y, beta_z=z) for y, z in zip(BETAS, BETAS[::-1], strict=True)][:m]
    training = Training([Run.of(c, "runs") for c in configs], [None] * m, Setup(device, **setup))
    training.begin_epoch(10)
    g, history = generator(device, 0), []
    for i in range(10):
        n = 16 if i == 6 else config.batch_size
        x = torch.rand(n, *config.image_shape, generator=g, device=device)
        history.append(training.step(x, n).clone())
    return torch.stack(history), training


@pytest.mark.parametrize("compile", ["auto", "on"])
@pytest.mark.parametrize("settings", [{}, {"vae_type": "LVAE"}, {"use_conv_z": True}, {"px_y_family_ll": "MoL"}])
def test_the_captured_step_is_the_plain_one(gpu, compile, settings, capsys):
    config = Config(dataset="CIFAR10", batch_size=64, conv_channels=32, z_dims=32, **settings)
    fast, training = ten_steps(gpu, config, compile=compile)
    assert training.fast != training.update and "note" not in capsys.readouterr().out
    assert_close(fast, ten_steps(gpu, config, compile="off")[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precisions_stay_close(gpu, precision):
    exact = ten_steps(gpu, Config(dataset="CIFAR10", batch_size=64), compile="off")[0]
    use_precision(precision)
    config = Config(dataset="CIFAR10", batch_size=64, precision=precision)
    assert_close(ten_steps(gpu, config)[0], exact, rtol=0.02, atol=0.5)


def test_the_fastest_is_found(gpu, capsys):
    assert fastest(Config(dataset="CIFAR10", batch_size=64), 441, gpu) in (1, 8)
    assert "note" not in capsys.readouterr().out


def test_a_grid_trains_alike_captured_and_as_written(gpu, script):
    losses = {}
    for how in ("auto", "off"):
        flags = [*TINY[:-1], "cuda", "--batch_size", "100", "--beta_y", "1", "2", "3"]
        status, out, _ = script(train.main, *flags, "--compile", how, "--runs_dir", how)
        assert status == 0 and "cannot be captured" not in out
        losses[how] = [json.loads(p.read_text())["test"]["loss"] for p in sorted(Path(how).rglob("training.json"))]
    assert losses["auto"] == approx(losses["off"], rel=1e-3) and len(losses["auto"]) == 3
