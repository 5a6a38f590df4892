"""Batches with cells of a multi-rate model, separately trained cells, and rates that were asked for."""

import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose
from pytest import approx

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.plane.planes import rows_of, write_csv, write_terms
from utils.cli import grid_configs
from utils.plane import figures
from utils.plane.advice import training
from utils.plane.excess import areas, by_trainings, excess_rows
from utils.plane.explorer import lines_of
from utils.plane.reading import read_plane
from utils.runs import Run

BATCH = Path("runs/b")
SETTINGS = ["multi_rate", "source", "target_rate_y", "target_rate_z", "num_epochs", "refine_epochs"]
SETTINGS += ["optimizer", "loss"]


def test_kinds_and_rates_that_were_asked_for_are_kept_apart():
    """A plane of separate cells, unfolded ones, and two seeds of a target, which is one cell of other betas each."""
    unfolded = [row | {"multi_rate": "True", "source": "a"} for row in rows_of()]
    target = {"target_rate_y": 60.0, "target_rate_z": 8.0, "kl_z": 8.2, "beta_z": 0.3}
    seeds = [{"run": f"t{s}", "seed": s, "source": s, "beta_y": 0.2 + s, "kl_y": 61 + s} for s in (2, 3)]
    searched = [unfolded[0] | target | of_seed for of_seed in seeds]
    plane = read_plane(write_csv([*rows_of(), *unfolded, *searched], header=SETTINGS))
    assert len(plane.cells) == 51 and plane.unfolded.sum() == 26 and np.isfinite(plane.targets).all(1).sum() == 1
    assert {kind: len(part.cells) for kind, part in plane.grids.items()} == {"": 25, "multi_rate": 25}
    (cell,) = [c for c in plane.cells if len(c.runs) == 2]
    assert cell.median["beta_y"] == approx(2.7) and cell.median["kl_y"] == 63.5
    assert plane.differing == ["multi_rate"]
    (ax, *_) = figures.rate_planes(plane, ["psnr"]).figure.axes
    round_ones, squares = (c.get_offsets() for c in ax.collections if len(c.get_offsets()) >= 25)
    assert len(round_ones) == 25 and len(squares) == 26
    crosses = [line.get_xydata() for line in ax.lines if line.get_label() == "asked for"]
    assert_allclose(crosses, [[[8.0, 60.0]]])
    assert [[8.0, 60.0], [8.2, 63.5]] in [line.get_xydata().tolist() for line in ax.lines]


def test_a_real_batch_of_both_kinds(passes):
    """Their heat maps are two figures; the advice's command trains the very cell separately."""
    grid = [*TINY, "--beta_y", "0.1", "10", "--run_batch_name", "b"]
    passes(train.main, *grid)
    passes(train.main, *grid, "--multi_rate", "--learning_rate", "5e-4", "--force")
    batch = ["--run_batch_name", "b", "--device", "cpu"]
    passes(eval_beta_grid.main, *batch, "--exclude_mi", "--exclude_fid")
    out = passes(plot_eval.main, *batch, "--format", "png", "--metrics", "psnr")
    assert sorted("multi_rate" in p.stem for p in Path("runs/b/figures").glob("heat_maps*.png")) == [False, True]
    unfolded = [c for c in read_plane(Path("runs/b/eval_results.csv")).cells if c.settings["multi_rate"] == "True"]
    for cell in unfolded:
        (config,) = grid_configs(train.parse_args(shlex.split(training(cell, BATCH))[2:]))
        (run,) = [Run.open(Path("runs/b", name)) for name in cell.runs]
        assert config.warmup_epochs == config.default_warmup == 0
        differences = ["warmup_epochs", "multi_rate", "data_digest", "sharing", "source"]
        assert config.differs_in(run.config) == differences
    assert "--learning_rate 0.0005" in training(unfolded[0], BATCH)
    assert "--vae_type" not in training(unfolded[0], BATCH)
    assert max(map(len, out.splitlines())) <= 100
    advised = [line for line in out.replace(" \\\n    ", " ").splitlines() if line.startswith("python train.py")]
    assert set(advised) <= {training(cell, BATCH) for cell in unfolded}
    assert all(line in Path("runs/b/figures/report.html").read_text() for line in advised)
    plane = read_plane(Path("runs/b/eval_results.csv"))
    like = [passes(train.main, "--like", f"runs/b/{cell.runs[0]}").strip() for cell in plane.cells]
    expected = [text if "--multi_rate" in text else "" for text in like]
    assert lines_of(plane)["made by"]["texts"] == expected and any(expected)


def test_the_excess_is_the_difference_of_the_losses(passes):
    """Known losses: separate cells 100 and 102 in two seeds, unfolded 105 and 109 at (1, 1), none elsewhere."""
    row = {"status": "finished", "ll": -90.0, "kl_y": 5.0, "kl_z": 5.0, "psnr": 20.0, "beta_y": 1, "beta_z": 1}
    row |= {"num_epochs": 4}
    own = [row | {"run": f"o{s}", "seed": s, "loss": 98 + 2 * s} for s in (1, 2)]
    shared = row | {"multi_rate": "True"}
    unfolded = [shared | {"run": f"m{s}", "seed": s, "loss": 101 + 4 * s, "source": s} for s in (1, 2)]
    unfolded += [shared | {"run": "m3", "seed": 1, "loss": 7, "source": 1, "beta_z": 10}]
    muon = own[0] | {"run": "u1", "optimizer": "muon", "loss": 90}  # a training of another kind, compared by itself
    groups = by_trainings(excess_rows(read_plane(write_csv([*own, *unfolded, muon], header=SETTINGS))))
    assert {own: row["excess"] for (_, own), (row,) in groups.items()} == {"4 epochs, adam": 6, "4 epochs, muon": 17}
    refined = unfolded[0] | {"run": "f1", "refine_epochs": 1, "loss": 102}
    groups = by_trainings(excess_rows(read_plane(write_csv([*own, refined, *unfolded], header=SETTINGS))))
    kinds = {"4 + 1 epochs, adam": 1, "4 epochs, adam": 6}
    assert {shared: row["excess"] for (shared, _), (row,) in groups.items()} == kinds
    (row,) = excess_rows(read_plane(write_csv([*own, *unfolded], header=SETTINGS)))
    assert row["excess"] == 6 and row["se"] == approx(math.sqrt((2 + 8) / 2))
    out = passes(plot_eval.main, "--run_batch_name", "b", "--format", "png", "--metrics", "psnr")
    assert "+6.00 nats on average" in " ".join(out.split())
    assert Path("runs/b/figures/excess.png").is_file()
    line = Path("runs/b/figures/excess.csv").read_text().splitlines()[1]
    assert line.startswith("4,4,adam,adam,1.0,1.0,107.0,101.0,6.0")


def test_the_area_of_the_map_is_that_of_its_corners(passes):
    """As the table of FashionMNIST in docs/multi_rate.md has it: 710 of 1,813 nats^2; others of half the rates."""
    rates = {  # R(y|z), R(z) of unfolded and separate cells
        (0.1, 0.1): (50.1, 8.7, 37.5, 24.2), (0.1, 10): (83.0, 0.0, 103.5, 0.0), (1, 1): (7.1, 8.6, 3.5, 11.1),
        (10, 0.1): (0.3, 20.3, 0.2, 38.8), (10, 10): (0.5, 3.7, 0.2, 3.1),
    }  # fmt: skip
    rows, shared = [], {"multi_rate": "True", "optimizer": "muon"}
    for (beta_y, beta_z), (kl_y, kl_z, own_y, own_z) in rates.items():
        row = {"status": "finished", "loss": 9, "ll": -5, "num_epochs": 4, "beta_y": beta_y, "beta_z": beta_z}
        for seed, times in ((1, 0.9), (2, 1.1)):
            name = f"{beta_y}-{beta_z}-{seed}"
            of_seed = row | {"seed": seed, "kl_y": times * kl_y, "kl_z": times * kl_z}
            rows.append(of_seed | shared | {"run": f"m{name}", "source": seed})
            rows.append(row | {"run": f"a{name}", "seed": seed, "kl_y": own_y / 2, "kl_z": own_z / 2})
            rows.append(row | {"run": f"u{name}", "seed": seed, "kl_y": own_y, "kl_z": own_z, "optimizer": "muon"})
    write_csv(rows, header=SETTINGS)
    out = " ".join(passes(plot_eval.main, "--run_batch_name", "b", "--format", "png", "--metrics", "ll").split())
    assert re.findall("separately trained ones .4 epochs, ([a-z]+).:.*?; area of the map (.*?%.)", out) == [
        ("muon", "717 +- 142 of 1,813 +- 0 nats^2 (40 %)"),
        ("adam", "717 +- 142 of 453 +- 0 nats^2 (158 %)"),
    ]
    without = [row for row in rows if (row["seed"] == 1) == (row["beta_y"] < 1)]
    for few in (rows[6:], without):  # of all seeds, or of each some, a corner is missing
        none = areas(read_plane(write_csv(few, header=SETTINGS)))
        assert [len(of) for pair in none.values() for of in pair] == [0] * 4


def test_of_one_seed_each_the_error_of_the_excess_is_that_of_the_shared_images():
    rng, row = np.random.default_rng(0), {"status": "finished", "num_epochs": 4, "seed": 1, "beta_y": 2, "beta_z": 3}
    ll, more = 100 * rng.normal(size=500), rng.normal(size=(3, 500)) * [[1], [1], [2]]
    rows = []
    for run, of_run, sort in (("own", 0.0, {}), ("unfolded", 1.0, {"multi_rate": "True", "source": 1})):
        terms = dict(zip(("ll", "kl_y", "kl_z"), of_run * more + [ll, 0 * ll, 0 * ll], strict=True))
        write_terms(Path("runs/b", run), mse=ll, **terms)
        rows.append(row | sort | {"run": run, "kl_y": 1, "kl_z": 1, "loss": 9})
    path = write_csv(rows, header=SETTINGS)
    (row,) = excess_rows(read_plane(path))
    expected = np.std(2 * more[1] + 3 * more[2] - more[0], ddof=1) / 500**0.5
    assert row["se"] == approx(expected, rel=1e-3) and expected < 0.4  # of unpaired images it would be 6
    shutil.rmtree("runs/b/own")
    assert math.isnan(excess_rows(read_plane(path))[0]["se"])
