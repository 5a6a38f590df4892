"""Rank correlations with rates, on planes where they are known."""

import numpy as np
from pytest import approx
from scipy.stats import pearsonr, rankdata, sem, spearmanr

from tests.plane.planes import grid, plane_of
from utils.plane.cells import Cell, Plane
from utils.plane.tables import drivers


def test_a_metric_goes_with_the_rate_that_it_is_a_function_of():
    rows = grid(psnr=lambda r: r["kl_y"] + r["kl_z"], svm_rbf_acc=lambda r: np.tanh(r["kl_z"] / 9))
    plane = plane_of([row | {"fid": row["kl_y"]} for row in rows])
    result = {row["metric"]: row for row in drivers(plane, ["psnr", "svm_rbf_acc", "fid", "is_mean"])}
    assert list(result) == ["psnr", "svm_rbf_acc", "fid"] and {row["n"] for row in result.values()} == {25}
    assert result["psnr"]["rate"] == result["svm_rbf_acc"]["kl_z"] == approx(1)
    assert result["svm_rbf_acc"]["kl_y"] == approx(0) and abs(result["psnr"]["kl_z"]) < 0.9
    assert result["fid"]["kl_y"] == approx(-1)  # less is better


def test_at_equal_rate_is_what_regressions_on_the_total_leave():
    """The partial correlation of ranks is that of residuals, once both are regressed on the ranks of the total."""
    rng = np.random.default_rng(0)
    rows = grid(psnr=lambda row: row["kl_y"] + 3 * row["kl_z"] + rng.normal())
    plane = plane_of([row | {"fid": row["psnr"]} for row in rows])  # of which less is better
    z, total, m = (rankdata(plane.values(name)) for name in ("kl_z", "rate", "psnr"))
    expected = pearsonr(*(v - np.polyval(np.polyfit(total, v, 1), total) for v in (z, m)))[0]
    result = [row["kl_z_given_rate"] for row in drivers(plane, ["psnr", "fid"])]
    assert result == approx([expected, -expected]) and expected > 0.5


def test_errors_are_over_the_seeds_that_all_cells_share():
    rng = np.random.default_rng(0)
    seeds = {seed: plane_of(grid(psnr=lambda _: rng.random())).cells for seed in "123"}
    repeats = [tuple(cell.repeats[0] for cell in of_seeds) for of_seeds in zip(*seeds.values(), strict=True)]
    plane = Plane([Cell({}, tuple("123"), of_cell, tuple("123")) for of_cell in repeats])
    (row,) = drivers(plane, ["psnr"])
    for rate in ("kl_z", "kl_y", "rate"):
        result = [spearmanr(plane.of_seed(rate, seed), plane.of_seed("psnr", seed))[0] for seed in seeds]
        assert (row[rate], row[f"{rate}_se"]) == approx((np.mean(result), sem(result)))
    plane.cells[0] = Cell({}, ("1",), repeats[0][:1], ("1",))
    (row,) = drivers(plane, ["psnr"])
    assert row["rate"] == approx(spearmanr(plane.values("rate"), plane.values("psnr"))[0])
    assert "rate_se" not in row and row["seeds"] == 3


def test_grids_of_other_settings_are_result_apart_and_few_cells_tell_nothing():
    rows = grid(psnr=lambda row: row["beta_z"])
    plane = plane_of(rows, *[{"vae_type": "LVAE"}] * 5, *[{"vae_type": "HVAE"}] * 20)
    result = drivers(plane, ["psnr"])
    assert [(row["vae_type"], row["n"]) for row in result] == [("LVAE", 5), ("HVAE", 20)]
    assert result[0]["kl_z"] == approx(-1) and "kl_y" not in result[0]  # which is the same in all five
    assert drivers(plane_of(rows[:3]), ["psnr"]) == [] == drivers(plane_of(grid(psnr=20.0)), ["psnr"])
