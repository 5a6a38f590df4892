"""Batches against each other, where it is known which is better and by how much."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

import plot_eval
from tests.plane.planes import HEADER, write_csv, write_terms
from utils.plane.cells import read_plane
from utils.plane.compare import comparisons, groups

SETTINGS = ["dataset", "px_y_family_ll", "sigma"]


def batch(name, gain=0.0, seed=0, seeds=(2,), of_seed=0.0, **settings):
    """Cells whose PSNR rises with the rate, better by `gain` dB, with terms of 200 images."""
    rng, rows = np.random.default_rng(seed), []
    of_image = 0.5 * np.random.default_rng(99).normal(size=200)
    for s in seeds:
        for i, beta in enumerate((0.1, 1.0, 10.0)):
            mse = 10 ** (-(25 - 3 * i + gain + of_seed * rng.normal()) / 10) * np.exp(
                of_image + 0.05 * rng.normal(size=200)
            )
            row = {"run": f"r{i}-{s}", "seed": s, "beta_y": beta, "beta_z": beta, "kl_y": 40.0 - 15 * i, "kl_z": 5.0}
            row |= {"psnr": -10 * math.log10(mse.mean()), "ll": -200.0 - 20 * i, "is_mean": 2.0, "status": "finished"}
            rows.append(row | {"dataset": "Digits", "px_y_family_ll": "Bernoulli", "sigma": 0.03} | settings)
            write_terms(Path("runs", name, row["run"]), mse=mse)
    return read_plane(write_csv(rows, name, header=[*HEADER, *SETTINGS]))


def told(a, b, name="psnr"):
    """The comparison over all rates that both have."""
    return comparisons(groups({"a": a, "b": b}, [name]))


def test_a_gain_at_equal_rate_is_told_with_its_error():
    a, b = batch("a"), batch("b", gain=0.5, seed=1)
    every, *single = told(a, b)
    assert every["rate"] == "15 to 45 nats" and len(single) == 3
    assert (
        every["gain"] == pytest.approx(0.5, abs=0.05)
        and every["low"] < 0.5 < every["high"]
        and every["told"] == "better (one seed)"
    )
    assert every["high"] - every["low"] < 0.1  # paired; unpaired, 0.5 x 4.3 dB of 200 images are 0.8 dB
    assert told(b, a)[0]["gain"] == pytest.approx(-every["gain"]) and told(b, a)[0]["told"] == "worse (one seed)"
    hand = np.trapezoid([b_ - a_ for a_, b_ in [(row["value"], row["other"]) for row in single]]) / 2
    assert every["gain"] == pytest.approx(hand, abs=0.02)


def test_seeds_widen_the_interval():
    a, b = batch("a", seeds=(1, 2, 3), of_seed=0.5), batch("b", gain=0.3, seed=1, seeds=(1, 2, 3), of_seed=0.5)
    assert told(a, b)[0]["told"] == "no difference that these images and seeds show"
    assert told(a, b)[0]["high"] - told(a, b)[0]["low"] > 0.5


def test_what_cannot_be_compared_is_apart():
    a, b = batch("a"), batch("b", dataset="MNIST")
    assert [list(g.planes) for g in groups({"a": a, "b": b}, ["psnr"])] == [["a"], ["b"]] and not told(a, b)
    c = batch("c", px_y_family_ll="GaussianFixedSigma")
    assert [list(g.planes) for g in groups({"a": a, "c": c}, ["psnr", "nelbo"])] == [["a", "c"], ["a"], ["c"]]
    assert len(groups({"a": a, "d": batch("d", sigma=0.7)}, ["nelbo"])) == 1  # of Bernoulli, which has none
    assert not told(a, batch("e"), "is_mean")  # does not mix


def test_two_batches_are_drawn_and_told(script):
    batch("a"), batch("b", gain=0.5, seed=1), batch("c", dataset="MNIST")
    status, out, err = script(plot_eval.main, "--run_batch_name", "a", "b", "c", "--format", "png", "--device", "cpu")
    assert status == 0 and "note: not in every batch" in out, err
    (line,) = [line for line in out.splitlines() if "15 to 45 nats" in line and "psnr" in line]
    assert "better" in line
    folder = Path("runs/a/figures")
    assert {p.name for p in folder.iterdir()} == {
        f"compare_b_c{end}" for end in (".png", ".csv", "_table.csv", "_table.md")
    }
    with open(folder / "compare_b_c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["batch"], r["of"]) for r in rows} >= {("a", "Digits"), ("b", "Digits"), ("c", "MNIST")}
    status, _, err = script(plot_eval.main, "--run_batch_name", "a", "nope", "--device", "cpu")
    assert status == 2 and err.startswith("error: runs/nope/eval_results.csv: cannot be read")
