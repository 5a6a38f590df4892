"""Advice on surfaces where the best is known."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

from tests.plane.planes import AXIS, exponential, grid, plane_of, rows_of, write_csv, write_terms
from utils.config import Config
from utils.plane.advice import ADVICE, advice, headings_of, training
from utils.plane.cells import Cell, Plane
from utils.plane.reading import read_plane
from utils.plane.tables import Table
from utils.runs import Run


def within(plane, **budget):
    """The advice on the cells within a budget."""
    return [row for row in advice(plane, budget) if row["budget"]]


def test_advice_on_a_known_surface():
    """PSNR grows with R(y|z), the accuracy from z peaks at R(z) = 6, the distance falls with the total rate."""
    rows = []
    for by, bz in product(AXIS, AXIS):
        kl_y, kl_z = 10 - 4 * math.log10(by), 6 - 5 * math.log10(bz)
        rows.append({"beta_y": by, "beta_z": bz, "kl_y": kl_y, "kl_z": kl_z, "psnr": 20 + kl_y})
        rows[-1] |= {"lr_acc_mean": 0.9 - 0.1 * abs(kl_z - 6) + 0.01 * kl_y, "fid": 100 - kl_y - kl_z}
    plane = plane_of(rows)
    psnr, acc, fid = advice(plane)
    assert [row["metric"] for row in (psnr, acc, fid)] == ["psnr", "lr_acc_mean", "fid"]
    assert (psnr["beta_y"], psnr["beta_z"], psnr["value"]) == (0.1, 10, 34)  # the lowest total rate of the five
    ordinary = [(16 - 9 * t, 10 ** (-0.1 * (30 - 4 * t))) for t in np.log10(AXIS)]  # rates and squared errors
    pairs = [(a, b, (rb - 15) / (rb - ra)) for ra, a in ordinary for rb, b in ordinary if ra <= 15 < rb]
    mixed = -10 * math.log10(min(share * a + (1 - share) * b for a, b, share in pairs))
    assert psnr["diagonal_value"] == approx(mixed) and psnr["gain"] == approx(34 - mixed)
    assert psnr["diagonal_rate"] == psnr["rate"] == 15 and psnr["told"] == "untested"
    assert (acc["beta_y"], acc["beta_z"], acc["kl_z"]) == (0.1, 1, 6)
    assert acc["diagonal_rate"] == 16 and acc["gain"] == approx(0.04)  # less than the 20 of the best
    assert (fid["beta_y"], fid["beta_z"], fid["value"], fid["gain"]) == (0.1, 0.1, 75, 0)
    psnr, acc, fid = within(plane, rate=17)
    assert (psnr["beta_y"], psnr["beta_z"]) == (0.1, 10) and psnr["budget"] == "R(z) + R(y|z) <= 17 nats"
    assert max(psnr["rate"], acc["rate"], fid["rate"]) <= 17 + 1e-9
    assert fid["value"] > 75 and fid["diagonal_rate"] == 16
    assert within(plane, kl_z=0.5) == [] and all(row["kl_z"] <= 3.5 for row in within(plane, kl_z=3.5))


def test_in_bits_everything_known_in_nats_is_bits():
    rows = grid(psnr=lambda row: 1 / row["beta_y"], nelbo=lambda row: row["kl_y"] + row["kl_z"] - row["ll"])
    nats, bit = plane_of(rows), math.log(2)
    bits = Plane(nats.cells, unit="bits")
    for a, b in zip(within(nats, rate=60.0), within(bits, rate=60.0 / bit), strict=True):
        for name in ("kl_y", "kl_z", "rate", "diagonal_rate"):
            assert b[name] == approx(a[name] / bit) and headings_of(bits)[name].endswith("(bits)")
        per, units = (bit, ("nats", "bits")) if a["metric"] == "nelbo" else (1, ("dB", "dB"))
        assert (b["value"], b["gain"]) == approx((a["value"] / per, a["gain"] / per))
        assert (a["unit"], b["unit"]) == units
        assert b["budget"].endswith("bits") and a["budget"] == "R(z) + R(y|z) <= 60 nats"


def test_advice_without_ordinary_cells_leaves_them_empty():
    (row,) = advice(plane_of([exponential(1, 10) | {"psnr": 3.0}]))
    assert "gain" not in row and "diagonal_rate" not in row and row["command"] == ""
    assert "gain" not in Table([row], ADVICE).markdown()


def test_the_advice_of_a_batch_with_terms_of_single_images():
    """Cells of equal accuracy, whose squared error is least at (0.1, 10): only one of the two is a difference."""
    rng, rows = np.random.default_rng(0), rows_of()
    of_image = rng.normal(size=300)
    for row in rows:
        mse = 0.01 * np.exp(of_image) / (1 + row["beta_z"]) * row["beta_y"] ** 0.1
        correct = (rng.random(300) < 0.85).astype(np.float32)
        row |= {"psnr": -10 * np.log10(mse.mean()), "lr_acc_mean": correct.mean()}
        write_terms(Path("runs/b", row["run"]), mse=mse, lr_acc_mean=correct)
    plane = read_plane(write_csv(rows))
    psnr, acc, generation, _ = advice(plane)
    assert acc["told"].startswith("no difference") and generation["told"] == "untested" and not plane.notes
    assert psnr["told"] == "yes (one seed)" and psnr["low"] < psnr["gain"] < psnr["high"]
    for row in (psnr, acc):  # a cell with its value on all images, beside ordinary ones at its rate
        cell = {(r["beta_y"], r["beta_z"]): r for r in rows}[row["beta_y"], row["beta_z"]]
        assert row["value"] == approx(cell[row["metric"]]) == approx(max(r[row["metric"]] for r in rows))
        assert row["diagonal_rate"] <= row["rate"] == approx(cell["kl_y"] + cell["kl_z"]) and row["se"] > 0
    assert psnr["value"] - psnr["diagonal_value"] > psnr["low"]
    Path("runs/b", rows[0]["run"], "per_image.npz").write_bytes(b"damaged")
    plane = read_plane(Path("runs/b/eval_results.csv"))
    (row, *_), (note,) = advice(plane), plane.notes
    assert row["told"] == "untested" and row["value"] == max(row["psnr"] for row in rows)
    assert "per_image.npz" in note and "1 of 25" in note


TWO = {"vae_type": "LVAE", "run_name": "a b"}
UNFOLDED = {"multi_rate": True, "source": "x", "init_from": "0f"}
EARLIER = UNFOLDED | {"sharing": 1, "learning_rate": 1e-3}
COMMANDS = [
    ({"num_epochs": 7}, "2", (1, 1), " --num_epochs 7"),
    ({}, "252", (10**-0.5, 3), f" --beta_y {10**-0.5} --beta_z 3.0 --seed 2 5"),
    ({"target_rate_z": 8.0}, "4", (0.123456789, 1), " --beta_y 0.123457 --seed 4"),
    (UNFOLDED, "?", (1, 1 / 3), " --optimizer muon --lr_schedule tail --beta_z 0.333333"),
    (EARLIER, "2", (1, 1), " --learning_rate 0.0035 --optimizer muon --lr_schedule tail"),
    (EARLIER | {"optimizer": "adam"}, "2", (1, 1), " --learning_rate 0.001 --lr_schedule tail"),
    (TWO, "", (1, 1), " --vae_type LVAE --run_name 'a b'"),
]


@pytest.mark.parametrize("settings, seeds, betas, flags", COMMANDS)
def test_the_command_of_a_cell(settings, seeds, betas, flags):
    run = Run.of(Config(**settings), "runs")
    run.create()
    row = dict(zip(("beta_y", "beta_z"), map(float, betas), strict=True))
    cell = Cell({}, (run.path.name,), (row,), tuple(seeds))
    assert training(cell, run.path.parent) == f"python train.py{flags}"
    run.with_settings(multi_rate=False, init_from="0f").write_config()  # it began with other weights
    assert training(cell, run.path.parent) == training(cell, Path("elsewhere")) == ""
