"""Batches with cells of a multi-rate model, cells trained on their own, and rates that were asked for."""

import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.plane.planes import AXIS, HEADER, plane_of, rows_of, write_csv, write_terms
from utils.cli import grid_configs
from utils.plane import figures
from utils.plane.advice import advice, own_training
from utils.plane.cells import SHARED, read_plane
from utils.plane.excess import pairs
from utils.runs import Run

SETTINGS = ["multi_rate", "source", "target_rate_y", "target_rate_z"]


def mixed(**more):
    """A plane of own cells, of unfolded ones, and of two seeds of a target."""
    unfolded = [row | {"multi_rate": "True", "source": "a", "seed": 2} for row in rows_of()]
    asked = {"multi_rate": "True", "target_rate_y": 60.0, "target_rate_z": 8.0, "vae_type": "HVAE", "z_dims": 8}
    asked |= {"status": "finished", "psnr": 21.0, "is_mean": 3.0, "lr_acc_mean": 0.6, "ll": -100.0, "kl_z": 8.2}
    targets = [
        asked | {"run": f"t{s}", "seed": s, "source": s, "beta_y": 0.2 + s, "beta_z": 0.3, "kl_y": 61 + s}
        for s in (2, 3)
    ]
    return read_plane(write_csv([*rows_of(), *unfolded, *targets], header=HEADER + SETTINGS))


def test_kinds_are_kept_apart():
    plane = mixed()
    assert len(plane.cells) == 51  # the target's seeds are one cell, although their betas differ
    assert plane.unfolded.sum() == 26 and np.isfinite(plane.asked).all(1).sum() == 1
    assert {kind: len(part.cells) for kind, part in plane.grids.items()} == {"": 25, "multi_rate": 25}
    (cell,) = [c for c in plane.cells if len(c.runs) == 2]
    assert cell.median["beta_y"] == pytest.approx(2.7) and cell.median["kl_y"] == 63.5
    assert plane.differing == ["multi_rate"] and "source" not in SHARED


def test_the_rate_plane_shows_both_kinds_and_the_targets():
    plane = mixed()
    (ax, *_) = figures.rate_planes(plane, ["psnr"]).figure.axes
    round_ones, squares = (c.get_offsets() for c in ax.collections if len(c.get_offsets()) >= 25)
    assert len(round_ones) == 25 and len(squares) == 26
    crosses = [line.get_xydata() for line in ax.lines if line.get_label() == "asked for"]
    np.testing.assert_allclose(crosses, [[[8.0, 60.0]]])
    assert [[8.0, 60.0], [8.2, 63.5]] in [line.get_xydata().tolist() for line in ax.lines]


def test_a_real_batch_of_both_kinds(script):
    """Their heat maps are two figures; the advice's command trains the very cell on its own."""
    grid = ["--beta_y", "0.1:10:3", "--beta_z", "0.1:10:3", "--run_batch_name", "b"]
    assert script(train.main, *TINY, *grid)[0] == 0
    shared = [*TINY, *grid, "--multi_rate", "--learning_rate", "5e-4", "--force"]
    assert script(train.main, *shared)[0] == 0
    batch = ["--run_batch_name", "b", "--device", "cpu"]
    assert script(eval_beta_grid.main, *batch, "--exclude_mi", "--exclude_fid")[0] == 0
    status, out, err = script(plot_eval.main, *batch, "--format", "png")
    assert status == 0, err
    assert Path("runs/b/figures/rate_plane.png").is_file()
    maps = sorted("multi_rate" in p.stem for p in Path("runs/b/figures").glob("heat_maps*.png"))
    assert maps == [False, True]
    found = [c for c in read_plane(Path("runs/b/eval_results.csv")).cells if c.settings["multi_rate"] == "True"]
    for cell in found:
        (config,) = grid_configs(train.parse_args(shlex.split(own_training(cell))[2:]))
        (run,) = [Run.open(Path("runs/b", name)) for name in cell.runs]
        others = ("multi_rate", "source", "run_batch_name", "warmup_epochs")
        kept = {k: v for k, v in vars(config).items() if k not in others}
        assert config.warmup_epochs == config.default_warmup == 0 < run.config.warmup_epochs
        assert kept == {k: v for k, v in vars(run.config).items() if k in kept}
    command = own_training(found[0])
    assert "--multi_rate" not in command and "--learning_rate 0.0005" in command and "--vae_type" not in command
    advised = [line for line in out.splitlines() if line.startswith("python train.py")]
    assert set(advised) <= {own_training(c) for c in found}
    assert all(line in Path("runs/b/figures/report.html").read_text() for line in advised)


def test_the_excess_is_the_difference_of_the_losses(script):
    """Known losses: own cells 100 and 102 in two seeds, unfolded 105 and 109 at (1, 1), none elsewhere."""
    row = {"status": "finished", "vae_type": "HVAE", "z_dims": 8, "ll": -90.0, "kl_y": 5.0, "kl_z": 5.0, "psnr": 20.0}
    row |= {"beta_y": 1, "num_epochs": 4}
    own = [row | {"run": f"o{s}", "seed": s, "loss": 98 + 2 * s, "beta_z": 1} for s in (1, 2)]
    one = [
        row | {"run": f"m{s}", "seed": s, "loss": 101 + 4 * s, "multi_rate": "True", "source": s, "beta_z": 1}
        for s in (1, 2)
    ]
    other = [row | {"run": "m3", "seed": 1, "loss": 7, "multi_rate": "True", "source": 1, "beta_z": 10}]
    header = [*HEADER, *SETTINGS, "num_epochs", "loss"]
    muon = own[0] | {"run": "u1", "optimizer": "muon", "loss": 90}  # a training of another kind, compared by itself
    plane = read_plane(write_csv([*own, *one, *other, muon], header=[*header, "optimizer"]))
    found = {pair.trainings: pair for pair in pairs(plane)}
    assert found["4 epochs, adam", "4 epochs, muon"].excess == pytest.approx(17) and len(found) == 2
    plane = read_plane(write_csv([*own, *one, *other], header=header))
    (pair,) = pairs(plane)
    assert pair.excess == pytest.approx(6) and pair.trainings == ("4 epochs, adam", "4 epochs, adam")
    assert pair.se == pytest.approx(math.sqrt((2 + 8) / 2))
    status, out, err = script(plot_eval.main, "--run_batch_name", "b", "--format", "png")
    assert status == 0 and "loss +6.00 nats on average, +6.00 to +6.00; lower in 0 of 1 cells" in out, err
    assert Path("runs/b/figures/excess.png").is_file()
    line = Path("runs/b/figures/excess.csv").read_text().splitlines()[1]
    assert line.startswith("4,4,adam,adam,1.0,1.0,107.0,101.0,6.0")


def test_of_one_seed_each_the_error_of_the_excess_is_that_of_the_shared_images(script):
    rng, row = np.random.default_rng(0), {"status": "finished", "num_epochs": 4, "seed": 1, "beta_y": 2, "beta_z": 3}
    ll, more = 100 * rng.normal(size=500), rng.normal(size=(3, 500))
    rows = []
    for run, of_run, sort in (("own", 0.0, {}), ("unfolded", 1.0, {"multi_rate": "True", "source": 1})):
        terms = dict(zip(("ll", "kl_y", "kl_z"), of_run * more + [ll, 0 * ll, 0 * ll], strict=True))
        write_terms(Path("runs/b", run), mse=ll, **terms)
        rows.append(row | sort | {"run": run, "kl_y": 1, "kl_z": 1, "loss": 9})
    (pair,) = pairs(read_plane(write_csv(rows, header=[*HEADER, *SETTINGS, "num_epochs", "loss"])))
    expected = np.std(2 * more[1] + 3 * more[2] - more[0], ddof=1) / 500**0.5
    assert pair.se == pytest.approx(expected, rel=1e-3) and expected < 0.2  # of unpaired images it would be 6
    shutil.rmtree("runs/b/own")
    (pair,) = pairs(read_plane(Path("runs/b/eval_results.csv")))
    assert math.isnan(pair.se)


def test_cells_trained_on_their_own_need_no_command():
    assert all(row["command"] == "" for row in advice(plane_of(rows_of(AXIS))))
