"""What evaluated cells say of those that were not."""

import csv
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pytest import approx

from tests.plane.planes import plane_of
from utils.evaluation.batch import coarse_first
from utils.plane import figures
from utils.plane.advice import advice
from utils.plane.excess import left
from utils.plane.neighbours import interpolated, predictions

AXIS = np.linspace(-1, 1, 7)
AT = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)  # log10 beta_y, beta_z
SURFACES = [
    lambda y, z: np.tanh(2 * y) + 0.5 * np.exp(z),
    lambda y, z: 12 * np.log1p(np.exp(-3 * y)) * (1 + 0.2 * z),
    lambda y, z: 0.8 - 0.3 / (1 + np.exp(4 * z + 2 * y)),
]


NAMES = ("is_mean", "mi_z_low", "svm_rbf_acc", "svm_rbf_acc_y")


def of_seed(seed: str) -> list[dict[str, float]]:
    """The cells of a map of FashionMNIST."""
    with open(Path(__file__).with_name("fashion.csv"), newline="") as file:
        return [{n: float(v) for n, v in row.items() if v} for row in csv.DictReader(file) if row["seed"] == seed]


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_95_percent_of_values_that_are_left_out_are_within_the_intervals(step):
    rng, z = np.random.default_rng(0), []
    for surface in SURFACES:
        for noise in (0.01, 0.05):
            values = surface(*AT.T)
            values = values + noise * values.std() * rng.normal(size=len(values))
            for i in range(0, len(values), step):
                others = np.arange(len(values)) != i
                (mean,), (error,) = interpolated(AT[others], values[others], AT[[i]])
                z.append((values[i] - mean) / error)
    assert 0.92 <= np.mean(np.abs(z) < 1.96) <= (0.98 if step == 1 else 1)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_95_percent_of_the_cells_of_a_map_that_are_left_out_are_within_the_intervals(step):
    """Of three maps of FashionMNIST, of 49 cells each; 2 % may be missing or too many by chance."""
    within = []
    for seed, name in product("123", NAMES):
        rows = of_seed(seed)
        for row in rows[::step]:
            others = [other | ({} if other is not row else {name: math.nan}) for other in rows]
            plane = plane_of(others, *[{"multi_rate": "True"}] * len(rows))
            (mean, error) = (values[rows.index(row)] for values in predictions(plane, name))
            within.append(abs(row[name] - mean) < 1.96 * error)
    assert 0.92 <= np.mean(within) <= (0.98 if step == 1 else 1)


@pytest.mark.parametrize("n", [13, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 20, 25, 33))])
def test_so_are_those_of_a_map_that_was_stopped(n):
    """Of the same maps, after n cells in the order of an evaluation: those of one map miss together, up to 10 %."""
    within = []
    for seed, name in product("123", NAMES):
        rows = of_seed(seed)
        runs = [SimpleNamespace(config=SimpleNamespace(**row)) for row in rows]
        known = [runs.index(run) for run in coarse_first(runs)[:n]]
        some = [row | ({} if i in known else {name: math.nan}) for i, row in enumerate(rows)]
        values, errors = predictions(plane_of(some, *[{"multi_rate": "True"}] * len(rows)), name)
        within += [abs(row[name] - v) < 1.96 * e for row, v, e in zip(rows, values, errors, strict=True) if e > 0]
    assert np.mean(within) >= 0.9 and len(within) > 100


@pytest.mark.filterwarnings("error")
def test_nothing_is_predicted_that_is_no_property_of_a_cell_and_nothing_less_than_0_of_what_is_not():
    """Numbers of images, say, or whether an estimate is saturated."""
    rows = [{"beta_y": 10**y, "beta_z": 10**z, "kl_y": 20 - 9 * y, "kl_z": 9 - 6 * z} for y, z in AT]
    for i, (row, (y, z)) in enumerate(zip(rows, AT, strict=True)):
        if i not in (0, 6, 24, 42, 48):
            row |= {"n_samples": 1280, "mi_q_mc_y_saturated": float(y > 0), "psnr": y, "mi_z_low": max(0, y - z) ** 2}
            row |= {"mi_q_mc": 1.0, "probe_images": 2560 if i < 9 else 10_000}
    plane = plane_of(rows, *[{"multi_rate": "True"}] * 49)
    for name in ("n_samples", "mi_q_mc_y_saturated", "mi_q_mc", "probe_images"):
        assert np.isnan(predictions(plane, name)[0]).all()
    least = {name: np.nanmin(predictions(plane, name)[0]) for name in ("psnr", "mi_z_low")}
    assert least["psnr"] < -0.8 and 0 <= least["mi_z_low"] < 0.1


def batch(multi_rate, missing=range(0, 49, 5)):
    """A map whose PSNR is missing in some cells."""
    rows = [{"beta_y": 10**y, "beta_z": 10**z, "kl_y": 20 - 9 * y, "kl_z": 9 - 6 * z} for y, z in AT]
    rows = [row | ({} if i in missing else {"psnr": SURFACES[0](*AT[i])}) for i, row in enumerate(rows)]
    return plane_of(rows, *[{"multi_rate": str(multi_rate)}] * 49)


def test_cells_of_a_multi_rate_model_that_were_not_evaluated_are_drawn_hollow_and_not_advised():
    plane = batch(True)
    values, errors = predictions(plane, "psnr")
    there = np.flatnonzero(np.isfinite(values))
    assert there.tolist() == list(range(0, 49, 5)) and (errors[there] > 0).all()
    assert np.abs(values - SURFACES[0](*AT.T))[there[1:-1]].max() < 0.05
    figure, rows = figures.rate_planes(plane, ["psnr"])
    hollow = [line for line in figure.axes[0].lines if line.get_label() == figures.PREDICTED]
    assert len(hollow) == 10 == sum(row["what"] == "predicted" for row in rows)
    figure, rows = figures.heat_maps(plane, ["psnr"])
    hollow = [patch for ax in figure.axes for patch in ax.patches if patch.get_label() == figures.PREDICTED]
    assert len(hollow) == 10 == sum(row["what"] == "predicted" for row in rows)
    (row,) = advice(plane)
    cell = next(c for c in plane.cells if (c.median["beta_y"], c.median["beta_z"]) == (row["beta_y"], row["beta_z"]))
    assert "psnr" in cell.median


def test_nothing_is_predicted_where_an_estimate_is_saturated():
    """It was evaluated, and says nothing there."""
    rows = [{"beta_y": 10**y, "beta_z": 10**z, "kl_y": 20 - 9 * y, "kl_z": 9 - 6 * z, "mi_q_mc": y} for y, z in AT]
    for row in rows[:9]:
        row["mi_q_mc_saturated"] = 1.0
    del rows[20]["mi_q_mc"]
    plane = plane_of(rows, *[{"multi_rate": "True"}] * 49)
    assert np.flatnonzero(np.isfinite(predictions(plane, "mi_q_mc")[0])).tolist() == [20]


@pytest.mark.parametrize("multi_rate, missing", [(False, range(0, 49, 5)), (True, range(0, 42)), (True, [])])
def test_nothing_is_predicted_of_separate_trainings_or_from_few_cells(multi_rate, missing):
    assert np.isnan(predictions(batch(multi_rate, missing), "psnr")).all()


def test_what_separate_trainings_of_some_cells_find_left_is_told_of_all():
    """The excess is smooth in the betas; what is interpolated is within its errors, what is known stays."""
    cells = batch(True, []).cells
    settings = [{"multi_rate": "True", "num_epochs": "4"}] * 49
    plane = plane_of([c.median for c in cells] + [cells[0].median | {"beta_y": 9.0}], *settings, {"num_epochs": "4"})
    true, known = 3 + 2 * np.tanh(AT[:, 0] - AT[:, 1]), np.random.default_rng(0).permutation(49)[:16]
    row = {"num_epochs": "4", "own_epochs": "4", "optimizer": "adam", "own_optimizer": "muon", "se": 0.1}
    excess = [row | cells[i].median | {"excess": true[i]} for i in known]
    *found, own = (left(plane, excess).get(cell.runs[0]) for cell in plane.cells)
    values, errors = np.array([list(of_run.values()) for of_run in found]).T
    assert own == {} and values[known] == approx(true[known]) and errors[known] == approx(0.1)
    assert (np.abs(values - true) < np.maximum(3 * errors, 1e-9)).all() and np.median(errors) < 0.3
    assert left(plane, excess[:7]) == left(plane, []) == {}
