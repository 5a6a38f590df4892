"""The benchmarks run, and say what they measured."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.conftest import TINY
from utils.benchmark import __main__ as benchmark
from utils.benchmark import grid, layers, pipeline, plane
from utils.benchmark.profile import Operators
from utils.runs import Run

SMALL = ["--dataset", "MNIST", "--conv_channels", "2", "--z_dims", "2", "--batch_size", "8", "--n", "2"]


@pytest.mark.parametrize(
    "what, images, lines",
    [
        ("step", 40, ["1 cell, plain", "2 cells, channels_last", "first step"]),
        ("grid", 40, ["like the paper's code", "2 cells stacked", "the grid in", "GB/s", "whole epochs", "grid takes"]),
        ("plane", 40, ["multi-rate training", "unfolding: ", "hours for a map", "multi-rate training, 4 x 500 epochs"]),
        ("layers", 40, ["trunk.0: 1 x 28 x 28 -> 2 x 14 x 14", "plain, forward", "im2col, gradient w.r.t. weights"]),
        ("profile", 40, ["a step takes", "convolution_backward 8x4x14x14 8x1x28x28", "others"]),
        ("loader", 24, ["JPEG files of 500 x 375", "the loader decodes"]),
        ("evaluate", 60, ["is, fid_classifier  ", "mi_y  ", "svm_linear, qy_mu", "kNN, y", "hours for the steps, and"]),
        ("pipeline", 60, ["s a cell", "step 1, samples: IS", "step 3, simple classifiers", "figures and tables"]),
        ("growth", 60, ["power", "svm_linear, y", "classes, of 60 images", "figures, tables"]),
        ("mi", 200, ["plain loop", "gaussian_mi", "peak memory"]),
        ("probes", 100, ["saga, 5 seeds", "svm_linear"]),
        ("inception", 100, ["plain loop", "inception_score"]),
        ("classifiers", 4, ["small_conv_net, 4 images", "as evaluated"]),
    ],
)
def test_benchmarks_run(what, images, lines, script, monkeypatch):
    monkeypatch.setattr(pipeline, "plots", lambda cells: time.sleep(0.001))  # takes seconds; see below
    flags = ["--images", images, "--cells", "1", "2", "--device", "cpu"]
    status, out, err = script(benchmark.main, what, *SMALL, *flags)
    assert status == 0, err
    assert "threads, torch" in out.splitlines()[0] and all(line in out for line in lines), out


def test_figures_of_a_made_batch_are_drawn():
    pipeline.plots(2)  # raises if plot_eval.py fails


def test_operators_are_counted_with_their_work():
    """By hand: 2 operations a product, 4 bytes a number that is read or written."""
    a, b, x, w = torch.ones(8, 16), torch.ones(16, 4), torch.ones(2, 3, 8, 8), torch.ones(5, 3, 4, 4)
    with Operators(torch.device("cpu")) as operators:
        a @ b
        torch.nn.functional.conv2d(x, w, stride=2, padding=1)
        torch.exp(a)
        torch.exp(a)
    work = {key: [call[1:] for call in calls] for key, calls in operators.calls.items()}
    assert work["mm", "8x16 16x4"] == [(2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))]
    assert work["convolution", "2x3x8x8 5x3x4x4"][0][0] == 2 * (2 * 4 * 4) * w.numel()
    assert work["exp", "8x16"] == [(0, 4 * 2 * 8 * 16)] * 2


def test_the_paper_grids_hours_follow_from_its_steps(script, monkeypatch):
    """A step of 36 ms: 441 models x 500 epochs x 5 steps of it take 11.0 hours; epochs of 0.36 s, 22.05."""
    monkeypatch.setattr(grid, "measure", lambda candidates, n, device, warmup=3: {k: [0.036] * 2 for k in candidates})
    monkeypatch.setattr(grid, "whole_epochs", lambda *_: (3600.0, [0.3, 0.36, 0.4]))
    out = script(benchmark.main, "grid", *SMALL, "--images", "40", "--cells", "1", "--device", "cpu")[1]
    assert "20000.0 models x epochs per hour, the grid in      11.0 hours" in out
    assert "0.36 s (n = 3, 0.30 .. 0.40), first epoch 3600.0 s" in out
    total = (
        "the grid takes 23.05 hours; a loop like the paper's code, without evaluation, logging and checkpoints, takes "
    )
    assert out.endswith(f"\n{total}11.03 hours: 0.5 x\n")


def test_the_hours_of_a_map_follow_from_its_steps(script, monkeypatch):
    """A step of 36 ms: 500 epochs x 5 steps take 90 s; unfolding 3.6 s, 441 times, 26 minutes."""
    monkeypatch.setattr(plane, "measure", lambda candidates, n, device: {k: [0.036] * 2 for k in candidates})
    monkeypatch.setattr(plane, "each_cell", lambda *_: ([3.6] * 2, [7.2] * 2))
    out = script(benchmark.main, "plane", *SMALL, "--images", "40", "--cells", "1", "--device", "cpu")[1]
    hours = {line[:40].strip(): line[40:].split() for line in out.splitlines()[-6:]}
    assert hours == {
        "like the paper's code": ["1.23", "11.03"],
        "own trainings": ["1.23", "11.03"],
        "own trainings by Muon": ["1.23", "11.03"],
        "multi-rate training, 1 x 500 epochs": ["0.07", "0.47"],
        "multi-rate training, 4 x 500 epochs": ["0.15", "0.54"],
        "evaluating, step 1, of either": ["0.10", "0.88"],
    }


def test_im2col_is_the_convolution():
    for layer in (torch.nn.Conv2d(3, 5, 4, 2, 1), torch.nn.ConvTranspose2d(3, 5, 5, 2, 2, 1)):
        x = torch.randn(2, 3, 8, 8)
        right = layer(x)
        got = layers.by_im2col(layer, right.shape[2:], dict(layer.named_parameters()), x)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_what_a_precision_changes_beside_the_seed(script):
    grid = [*TINY, "--beta_y", "1", "--run_batch_name", "b"]
    for flags in (["--seed", "1", "2", "3"], ["--seed", "1", "2", "--precision", "bf16"]):
        assert script(train.main, *grid, *flags)[0] == 0
    status, out, _ = script(benchmark.main, "precision", "runs/b", "--device", "cpu")
    rows = [line.replace("- fp32", "difference").split() for line in out.splitlines()[2:5]]
    assert status == 0 and [r[2:4] for r in rows] == [["fp32", "3"], ["bf16", "2"], ["difference", "2"]]
    losses = {"fp32": {}, "bf16": {}}
    for path in Path("runs/b").iterdir():
        run = Run.open(path)
        losses[run.config.precision][run.config.seed] = run.result["test"]["loss"]
    fp32, difference = [*losses["fp32"].values()], [losses["bf16"][seed] - losses["fp32"][seed] for seed in (1, 2)]
    for row, values, spread in ((rows[0], fp32, np.std(fp32, ddof=1)), (rows[2], difference, np.std(difference))):
        assert float(row[4]) == pytest.approx(np.mean(values), abs=1e-3)
        assert float(row[6]) == pytest.approx(spread, abs=1e-3)  # of two, the standard error is np.std
    status, _, err = script(benchmark.main, "precision", "runs/none", "--device", "cpu")
    assert status == 2 and "needs a folder of finished runs" in err


@pytest.mark.parametrize(
    "argv, why",
    [
        (["step", "--convolutions", "plain", "kernels"], "--convolutions: kernels need an NVIDIA GPU"),
        (["step", "runs/b"], "runs/b: only `precision` takes a folder of runs"),
        (["loader", "--images", "20", "--batch_size", "16"], "--images: must be at least two batches (32), got 20"),
    ],
)
def test_what_makes_no_sense_is_refused(argv, why, script):
    status, _, err = script(benchmark.main, *argv, "--device", "cpu")
    assert status == 2 and err.startswith(f"error: {why}") and err.count("\n") == 1


def test_runs_that_differ_otherwise_are_not_compared(script):
    for flags in (["--seed", "1", "2"], ["--learning_rate", "1e-3", "--num_epochs", "1"]):
        assert script(train.main, *TINY, "--run_batch_name", "b", *flags)[0] == 0
    status, _, err = script(benchmark.main, "precision", "runs/b", "--device", "cpu")
    assert status == 2 and "differ in more than betas, seed and precision" in err


def test_streams_are_refused_without_a_gpu(script):
    status, _, err = script(benchmark.main, "streams", "--device", "cpu")
    assert status == 2 and "--device: streams need a GPU" in err
