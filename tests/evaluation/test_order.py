"""The order in which cells are evaluated, and what an evaluation that is stopped leaves."""

from types import SimpleNamespace

import numpy as np

import eval_beta_grid
import train
from tests.conftest import TINY
from tests.plane.planes import read_csv
from utils.evaluation.batch import coarse_first

GRID = ["--beta_y", "0.1", "10", "--beta_z", "0.1", "10", "--run_batch_name", "b"]


def test_every_beginning_of_the_order_fills_the_plane_evenly():
    """Of 7 x 7 cells corners, centre, middles of edges; no cell is then far from one that was."""
    axis = np.geomspace(0.1, 10, 7)
    runs = [
        SimpleNamespace(config=SimpleNamespace(beta_y=y, beta_z=z), seed=s) for s in (1, 2) for y in axis for z in axis
    ]
    ordered = coarse_first(runs)
    assert sorted(map(id, ordered)) == sorted(map(id, runs)) and {run.seed for run in ordered[:49]} == {1}
    at = np.log10([[run.config.beta_y, run.config.beta_z] for run in ordered[:49]]).round(9)
    assert {tuple(p) for p in abs(at[:4])} == {(1, 1)} and at[4].tolist() == [0, 0]
    assert {tuple(p) for p in abs(at[5:9])} == {(0, 1), (1, 0)}
    for n, farthest in ((4, 2**0.5), (5, 1.01), (9, 0.75), (25, 0.48)):
        assert np.linalg.norm(at[:, None] - at[:n], axis=2).min(1).max() <= farthest
    assert (abs(np.sign(at[:25]).sum(0)) <= 5).all()


def test_a_map_that_is_stopped_is_a_coarser_one_and_goes_on(passes, monkeypatch):
    passes(train.main, *TINY, *GRID)
    evaluate = ["--run_batch_name", "b", "--exclude_fid"]
    out = passes(eval_beta_grid.main, *evaluate, "--max_hours", "1e-9")
    lacking = [line.split() for line in out.partition("runs that still lack a step:")[2].splitlines()]
    assert ["rates", "4", "of", "4"] in lacking and ["mi_z", "4", "of", "4"] in lacking
    clock = iter(np.arange(1e6))  # a second passes from look to look
    with monkeypatch.context() as patched:
        patched.setattr("utils.evaluation.batch.monotonic", lambda: float(next(clock)))
        passes(eval_beta_grid.main, *evaluate, "--max_hours", str(11 / 3600))
    rows = read_csv("runs/b/eval_results.csv")
    assert all(row["psnr"] for row in rows) and 0 < sum(row["mi_q_mc"] != "" for row in rows) < 4
    assert "stopped" not in passes(eval_beta_grid.main, *evaluate)
    assert all(row["mi_q_mc"] for row in read_csv("runs/b/eval_results.csv"))
