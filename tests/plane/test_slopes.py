"""Slopes on surfaces where they are known."""

import math
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pytest import approx
from scipy.stats import linregress

from datasets.gaussian import Gaussian
from tests.plane.planes import AXIS, exponential, grid, plane_of
from utils.plane.cells import Cell, Plane
from utils.plane.slopes import slopes


def ratios(rows):
    """Slopes over betas, of those that are told."""
    return [row[f"slope_{x}"] / row[f"beta_{x}"] for row in rows for x in "yz" if f"slope_{x}" in row]


def test_slopes_at_an_optimum_equal_the_betas():
    rows = slopes(plane_of(grid()))
    assert_allclose(ratios(rows), np.ones(50))
    assert all(row["excess"] == approx(0, abs=1e-9) and not row["far_off"] for row in rows)
    columns = ["run", "beta_y", "beta_z", "slope_y", "slope_z", "excess", "se_y", "se_z", "far_off"]
    assert all(list(row) == columns for row in rows)  # those of the figure's data, in their order
    rows = [{f"train_{k}" if k in ("ll", "kl_y", "kl_z") else k: v for k, v in row.items()} for row in grid()]
    rows = [row | {"kl_y": 1.0, "kl_z": 1.0, "ll": math.nan} for row in rows]  # those of training images count
    assert_allclose(ratios(slopes(plane_of(rows))), np.ones(50))


def test_slopes_that_are_not_the_betas_are_seen():
    rows = slopes(plane_of([exponential(by, bz, slope=3.0) for by in AXIS for bz in AXIS]))
    assert all(row["far_off"] for row in rows) and np.allclose(ratios(rows), 3)
    assert sum(row["excess"] > 0 for row in rows) > 10  # neighbours do better at a cell's own betas


@pytest.mark.parametrize("worse", [60, 200])
@pytest.mark.parametrize("bad", [[12], [0], [6, 8, 18], [10, 11, 12]])
def test_under_trained_cells_are_found_and_no_others(bad, worse):
    rows = grid()
    for i in bad:
        rows[i]["ll"] -= worse
    for i, row in enumerate(slopes(plane_of(rows))):
        assert bool(row["far_off"]) == (i in bad)
        assert row["excess"] > 20 if i in bad else row["excess"] == approx(0, abs=1e-9)


def test_cells_of_other_settings_are_no_neighbours_even_if_their_names_are_cut_off_alike():
    """Of two grids, each at its optimum, one is 40 nats worse."""
    rows = grid() + grid(ll=lambda row: row["ll"] - 40)
    one, other = ({"dataset": 130 * "a" + end} for end in "bc")
    result = slopes(plane_of(rows, *[one] * 25, *[other] * 25))
    assert len(result) == 50 and not any(row["far_off"] or row["excess"] > 1e-9 for row in result)


def test_slopes_are_not_told_where_rates_do_not_change():
    rows = slopes(plane_of([exponential(by, 1.0) | {"beta_z": bz, "kl_z": 0.0} for by in AXIS for bz in AXIS]))
    assert all("slope_y" in row and "slope_z" not in row for row in rows)
    assert not ratios(slopes(plane_of([exponential(1, 1)])))
    assert not ratios(slopes(plane_of([exponential(b, b) for b in AXIS])))  # only the sum of the two could be told


def noisy(noise, seeds, axis, rng, of_rates=0.0, **surface):
    """Cells of optima whose D is off by `noise` nats, and whose rates move along the surface by `of_rates`."""
    cells, names = [], tuple(map(str, range(seeds)))
    for by, bz in product(axis, axis):
        repeats = []
        for e, y, z in rng.normal(size=(seeds, 3)):
            row = exponential(by, bz, **surface)
            row["ll"] += noise * e + of_rates * (by * y + bz * z)
            row["kl_y"], row["kl_z"] = row["kl_y"] + of_rates * y, row["kl_z"] + of_rates * z
            repeats.append(row)
        cells.append(Cell({}, names, tuple(repeats), names))
    return Plane(cells)


@pytest.mark.parametrize("share", [1 / 2, pytest.param(1, marks=pytest.mark.slow)])
def test_of_exact_optima_with_noise_at_most_5_percent_are_far_off(share):
    """Two standard errors for Student's quantiles and no noise in the excess gave up to 50 %."""
    for seeds, (noise, of_rates) in product((1, 3), ((0.5, 0.3), (2, 0), (10, 0), (40, 0))):
        rng = np.random.default_rng(1)
        for axis, times in (([0.1, 1, 10], round(60 * share)), (AXIS, round(20 * share))):
            planes = [noisy(noise, seeds, axis, rng, of_rates) for _ in range(times)]
            assert np.mean([bool(row["far_off"]) for plane in planes for row in slopes(plane)]) <= 0.05


def test_wrong_slopes_and_under_trained_cells_are_found_through_noise():
    rng, wrong = np.random.default_rng(1), []
    for _ in range(10):
        rows = slopes(noisy(1.0, 3, AXIS, rng, slope=3.0))
        wrong += [bool(row["far_off"]) for row in rows if min(row["beta_y"], row["beta_z"]) > 0.5]
        plane = noisy(1.0, 1, AXIS, rng)
        plane.cells[12].repeats[0]["ll"] -= 60
        assert slopes(plane)[12]["far_off"]
    assert np.mean(wrong) > 0.9


def test_an_offset_of_a_seed_is_no_noise():
    """Seeds whose losses differ by 100 nats in all cells alike: differences within a seed are exact."""
    plane = noisy(0, 2, AXIS, np.random.default_rng(1))
    for cell in plane.cells:
        cell.repeats[1]["ll"] -= 100
    rows = slopes(plane)
    assert_allclose(ratios(rows), np.ones(50))
    assert all(row["se_y"] < 1e-6 and not row["far_off"] for row in rows)
    cell = plane.cells[12]
    plane.cells[12] = Cell(cell.settings, cell.runs[:1], cell.repeats[:1], cell.seeds[:1])
    assert_allclose(ratios(slopes(plane)), np.ones(50))


def test_standard_errors_are_those_of_a_regression_with_an_intercept():
    """Against scipy's, in a grid of one axis."""
    rows = [exponential(by, 1.0) for by in AXIS[:3]]
    for row, e in zip(rows, (0.4, -0.3, 0.1), strict=True):
        row["ll"] += e
    m = [(AXIS[1] - by) / math.log(AXIS[1] / by) if by != AXIS[1] else 0.0 for by in AXIS[:3]]
    x = [mean * (row["kl_y"] - rows[1]["kl_y"]) for mean, row in zip(m, rows, strict=True)]
    line, row = linregress(x, [row["ll"] for row in rows]), slopes(plane_of(rows))[1]
    assert [row["slope_y"], row["se_y"]] == approx([AXIS[1] * line.slope, AXIS[1] * line.stderr])


@pytest.mark.parametrize("on_diagonal", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_at_a_known_optimum_no_cell_is_far_off(n, on_diagonal):
    """At equal betas any layer may have the rate, else one has all of it."""
    rows = []
    for beta_y, beta_z in product(np.geomspace(0.1, 10, n), repeat=2):
        best = Gaussian().optimum(min(beta_y, beta_z), 0.2)
        share = on_diagonal if beta_y == beta_z else float(beta_z < beta_y)
        rates = {"kl_y": (1 - share) * best.rate, "kl_z": share * best.rate}
        rows.append({"beta_y": beta_y, "beta_z": beta_z, **rates, "ll": -best.D})
    result = slopes(plane_of(rows))
    assert not any(row["far_off"] for row in result) and all(0.7 < ratio < 1.05 for ratio in ratios(result))
    for row in rows:  # of too little rate: it would pay to use the layer
        row["ll"] *= 6
    assert n == 2 or sum(bool(row["far_off"]) for row in slopes(plane_of(rows))) >= len(rows) // 3
