"""Slopes on surfaces where they are known."""

import math

import numpy as np
import pytest

from tests.plane.planes import AXIS, exponential, plane_of
from utils.plane.slopes import slopes


def test_slopes_at_an_optimum_equal_the_betas():
    found = slopes(plane_of([exponential(by, bz) for by in AXIS for bz in AXIS]))
    for s in found:
        assert (s.ratio_y, s.ratio_z) == pytest.approx((1, 1), abs=1e-9) and not s.far_off
        assert s.excess == pytest.approx(0, abs=1e-9)


def test_slopes_of_a_smooth_surface_on_a_fine_grid():
    """D = R.A.R / 2 - b.R, not separable: at an optimum R = A^-1 (b - beta)."""
    a, b = np.array([[1.0, 0.3], [0.3, 2.0]]), np.array([30.0, 50.0])
    rows = []
    for by in 10 ** np.linspace(0, 0.2, 4):
        for bz in 10 ** np.linspace(0, 0.2, 4):
            r = np.linalg.solve(a, b - np.array([by, bz]))
            rows.append({"beta_y": by, "beta_z": bz, "kl_y": r[0], "kl_z": r[1], "ll": -(r @ a @ r / 2 - b @ r)})
    found = slopes(plane_of(rows))
    told = [r for s in found for r in (s.ratio_y, s.ratio_z) if math.isfinite(r)]
    assert len(told) > 16 and told == pytest.approx([1] * len(told), rel=0.02)


def test_slopes_that_are_not_the_betas_are_seen():
    found = slopes(plane_of([exponential(by, bz, slope=3.0) for by in AXIS for bz in AXIS]))
    for s in found:
        told = [r for r in (s.ratio_y, s.ratio_z) if math.isfinite(r)]
        assert s.far_off and told == pytest.approx([3] * len(told), abs=1e-9)
    assert sum(s.excess > 0 for s in found) > 10  # neighbours do better at a cell's own betas


@pytest.mark.parametrize("bad", [[12], [0], [6, 8, 18], [10, 11, 12]])
@pytest.mark.parametrize("worse", [60, 200])
def test_under_trained_cells_are_found_and_no_others(bad, worse):
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    for i in bad:
        rows[i]["ll"] -= worse
    found = slopes(plane_of(rows))
    assert [i for i, s in enumerate(found) if s.far_off] == bad
    for i, s in enumerate(found):
        assert s.excess > 20 if i in bad else s.excess == pytest.approx(0, abs=1e-9)


def test_slopes_are_not_told_where_rates_do_not_change():
    rows = [exponential(by, 1.0) | {"beta_z": bz, "kl_z": 0.0} for by in AXIS for bz in AXIS]
    found = slopes(plane_of(rows))
    assert all(math.isnan(s.ratio_z) and math.isfinite(s.ratio_y) for s in found)
    assert all(math.isnan(s.ratio_y) for s in slopes(plane_of([exponential(1, 1)])))
    diagonal = slopes(plane_of([exponential(b, b) for b in AXIS]))  # only both slopes together could be told
    assert all(math.isnan(s.ratio_y) and math.isnan(s.ratio_z) for s in diagonal)


def test_slopes_use_the_training_images_where_there_are_any():
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    rows = [{f"train_{k}" if k in ("ll", "kl_y", "kl_z") else k: v for k, v in row.items()} for row in rows]
    rows = [row | {"kl_y": 1.0, "kl_z": 1.0, "ll": math.nan} for row in rows]
    assert all(s.ratio_y == pytest.approx(1, abs=1e-9) for s in slopes(plane_of(rows)))
