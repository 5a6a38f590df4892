"""Rank correlations with rates, on planes where they are known."""

import numpy as np
import pytest
import scipy.stats

from tests.plane.planes import AXIS, exponential, plane_of
from utils.plane.cells import Cell, Plane
from utils.plane.drivers import drivers

RATES = ("kl_z", "kl_y", "rate")


def test_a_metric_goes_with_the_rate_that_it_is_a_function_of():
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    for row in rows:
        row |= {"psnr": row["kl_y"] + row["kl_z"], "svm_rbf_acc": np.tanh(row["kl_z"] / 9), "fid": row["kl_y"]}
    found = {row["metric"]: row for row in drivers(plane_of(rows), ["psnr", "svm_rbf_acc", "fid", "is_mean"])}
    assert list(found) == ["psnr", "svm_rbf_acc", "fid"] and {row["n"] for row in found.values()} == {25}
    assert found["psnr"]["rate"] == found["svm_rbf_acc"]["kl_z"] == pytest.approx(1)
    assert found["svm_rbf_acc"]["kl_y"] == pytest.approx(0) and abs(found["psnr"]["kl_z"]) < 0.9
    assert found["fid"]["kl_y"] == pytest.approx(-1)  # less is better


def test_at_equal_rate_is_what_regressions_on_the_total_leave():
    """The partial correlation of ranks is that of residuals, once both are regressed on the ranks of the total."""
    rng = np.random.default_rng(0)
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    for row in rows:
        row["rate"] = row["kl_y"] + row["kl_z"]
        row["psnr"] = row["rate"] + 2 * row["kl_z"] + rng.normal()
        row["fid"] = row["psnr"]  # of which less is better
    z, total, m = (scipy.stats.rankdata([row[name] for row in rows]) for name in ("kl_z", "rate", "psnr"))
    left = [v - np.polyval(np.polyfit(total, v, 1), total) for v in (z, m)]
    expected = scipy.stats.pearsonr(*left)[0]
    found = [row["kl_z_given_rate"] for row in drivers(plane_of(rows), ["psnr", "fid"])]
    assert found == pytest.approx([expected, -expected]) and expected > 0.5


def test_errors_are_over_the_seeds_that_all_cells_share():
    rng = np.random.default_rng(0)
    repeats = [{seed: exponential(by, bz) | {"psnr": rng.random()} for seed in "123"} for by in AXIS for bz in AXIS]
    for runs in repeats:
        for row in runs.values():
            row["rate"] = row["kl_y"] + row["kl_z"]
    plane = Plane([Cell({}, tuple(runs), tuple(runs.values()), tuple(runs)) for runs in repeats])
    (row,) = drivers(plane, ["psnr"])
    for rate in RATES:
        told = [scipy.stats.spearmanr([c[s][rate] for c in repeats], [c[s]["psnr"] for c in repeats])[0] for s in "123"]
        assert (row[rate], row[f"{rate}_se"]) == pytest.approx((np.mean(told), scipy.stats.sem(told)))
    one = plane.cells[0]
    plane.cells[0] = Cell({}, one.runs[:1], one.repeats[:1], one.seeds[:1])
    (row,) = drivers(plane, ["psnr"])
    medians = [cell.median["psnr"] for cell in plane.cells]
    assert row["rate"] == pytest.approx(scipy.stats.spearmanr(plane.values("rate"), medians)[0])
    assert "rate_se" not in row and row["seeds"] == 3


def test_grids_of_other_settings_are_told_apart_and_few_cells_tell_nothing():
    rows = [exponential(by, bz) | {"psnr": bz} for by in AXIS for bz in AXIS]
    plane = plane_of(rows)
    for cell in plane.cells[:5]:
        cell.settings["vae_type"] = "LVAE"
    found = drivers(plane, ["psnr"])
    assert [(row["vae_type"], row["n"]) for row in found] == [("LVAE", 5), ("HVAE", 20)]
    assert found[0]["kl_z"] == pytest.approx(-1) and "kl_y" not in found[0]  # which is the same in all five
    assert drivers(plane_of(rows[:3]), ["psnr"]) == []
    assert drivers(plane_of([row | {"psnr": 20.0} for row in rows]), ["psnr"]) == []
