"""Batches against each other, where it is known which is better and by how much."""

import math
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from pytest import approx

import plot_eval
from tests.plane.planes import grid, plane_of, read_csv, write_csv, write_terms
from utils.plane.advice import advice
from utils.plane.compare import comparisons, groups
from utils.plane.drawing import literal
from utils.plane.reading import read_plane

SETTINGS = ["dataset", "px_y_family_ll", "sigma"]


def batch(name, gain=0.0, draw=0, of_seeds=None, **settings):
    """Cells whose PSNR rises with the rate, better by `gain` dB and what each seed adds, with terms of 200 images."""
    rng, rows = np.random.default_rng(draw), []
    of_image = 0.5 * np.random.default_rng(99).normal(size=200)
    for seed, of_seed in (of_seeds or {2: 0.0}).items():
        for i, beta in enumerate((0.1, 1.0, 10.0)):
            mse = 10 ** (-(25 - 3 * i + gain + of_seed) / 10) * np.exp(of_image + 0.05 * rng.normal(size=200))
            row = {"run": f"r{i}-{seed}", "seed": seed, "beta_y": beta, "beta_z": beta, "kl_y": 40.0 - 15 * i}
            row |= {"kl_z": 5.0, "psnr": -10 * math.log10(mse.mean()), "ll": 10 * gain - 200 - 20 * i, "is_mean": 2.0}
            row |= {"status": "finished", "dataset": "Digits", "px_y_family_ll": "Bernoulli", "sigma": 0.03}
            rows.append(row | settings)
            write_terms(Path("runs", name, row["run"]), mse=mse)
    return read_plane(write_csv(rows, name, header=SETTINGS))


def compared(a, b, name="psnr"):
    """The comparison over all rates, and at three of these."""
    return comparisons(groups({"a": a, "b": b}, [name]))


def test_a_gain_at_equal_rate_is_told_with_its_error():
    a, b = batch("a"), batch("b", gain=0.5, draw=1)
    (every, *single), (back, *_) = compared(a, b), compared(b, a)
    assert every["rate"] == "15 to 45 nats" and len(single) == 3
    assert every["gain"] == approx(0.5, abs=0.05) and every["low"] < 0.5 < every["high"]
    assert every["high"] - every["low"] < 0.1  # paired; unpaired, 0.5 x 4.3 dB of 200 images are 0.8 dB
    assert back["gain"] == approx(-every["gain"])
    assert (every["told"], back["told"]) == ("better (one seed)", "worse (one seed)")
    (loss, *_) = compared(a, b, "nelbo")  # less is better
    assert loss["gain"] == approx(5) and loss["told"] == "untested"
    hand = np.trapezoid([row["other"] - row["value"] for row in single]) / 2
    assert every["gain"] == approx(hand, abs=0.02)


def test_seeds_widen_the_interval_by_what_they_differ_in():
    """0.3 dB, with seeds that add up to 0.5 dB: others in each batch, or the same to both, in another order."""
    spread = {1: -0.5, 2: 0.0, 3: 0.5}
    a, b = batch("a", of_seeds=spread), batch("b", gain=0.3, draw=1, of_seeds={1: 0.3, 2: 0.2, 3: -0.5})
    (apart, *_) = compared(a, b)
    assert apart["told"].startswith("no difference") and apart["high"] - apart["low"] > 0.5
    (paired, *_) = compared(a, batch("c", gain=0.3, draw=1, of_seeds=dict(reversed(spread.items()))))
    assert paired["told"] == "better" and paired["high"] - paired["low"] < 0.1


@pytest.mark.parametrize("times, sizes", [(10, 1), pytest.param(100, 2, marks=pytest.mark.slow)])
def test_equal_batches_of_other_sizes_are_told_to_be_equal(times, sizes):
    """PSNR is the same function of R in both, known at 5 and 49 rates, or 9 and 441."""
    told = []
    for draw, (few, many) in product(range(times), ((5, 49), (9, 441))[:sizes]):
        rng, planes = np.random.default_rng(draw), []
        of_image = 0.5 * rng.normal(size=200)
        for n in (few, many):
            rates = np.linspace(10, 50, n)
            terms = np.exp(of_image - rates[:, None] / 15 + 0.2 * rng.normal(size=(n, 200)))
            rows = [{"kl_y": r, "kl_z": 0, "beta_y": r, "beta_z": r, "psnr": 0} for r in rates]
            rows = [row | {"psnr": -10 * math.log10(t.mean())} for row, t in zip(rows, terms, strict=True)]
            planes.append(plane_of(rows))
            planes[-1].per_image = [[{"mse": t}] for t in terms]
        told += [row["told"] for row in compared(*planes)[:1] + compared(*planes[::-1])[:1]]
    assert sum(text.startswith(("better", "worse")) for text in told) <= len(told) / 20 and "untested" not in told


def test_ranges_that_overlap_where_one_batch_has_no_cell_are_compared_at_the_others_cells():
    a, b = (
        plane_of([{"beta_y": r, "beta_z": r, "kl_y": r, "kl_z": 5.0, "psnr": r} for r in rates])
        for rates in ((1.0, 20.0, 45.0), (5.0, 10.0, 19.0))
    )
    assert [row["rate"] for row in compared(a, b)] == [f"{rate} nats" for rate in ("10 to 24", 10, 15, 24)]


def test_what_cannot_be_compared_is_apart():
    a, b, c = batch("a"), batch("b", dataset="MNIST"), batch("c", px_y_family_ll="GaussianFixedSigma")
    assert [list(part) for part in groups({"a": a, "b": b}, ["psnr"]).values()] == [["a"], ["b"]] and not compared(a, b)
    assert [list(part) for part in groups({"a": a, "c": c}, ["psnr", "nelbo"]).values()] == [["a", "c"], ["a"], ["c"]]
    assert len(groups({"a": a, "d": batch("d", sigma=0.7)}, ["nelbo"])) == 1  # of Bernoulli, which has none
    assert not compared(a, batch("e"), "is_mean")  # does not mix


def test_the_advice_compares_densities_with_densities():
    """Two likelihoods in one batch: each has its own best cell, and ordinary ones of its kind."""
    rows = [row | {"nelbo": row["kl_y"] + row["kl_z"] - row["ll"], "psnr": 20.0 + i} for i, row in enumerate(grid())]
    other = [row | {"nelbo": row["nelbo"] - 1000, "psnr": row["psnr"] + 9} for row in rows]
    kinds = [{"px_y_family_ll": name} for name in ("Bernoulli", "GaussianLearnedSigma") for _ in rows]
    advised = advice(plane_of(rows + other, *kinds))
    likely = {row["px_y_family_ll"]: row for row in advised if row["metric"] == "nelbo"}
    assert len(likely) == 2 and all(abs(row["gain"]) < 100 for row in likely.values())
    assert [row["px_y_family_ll"] for row in advised if row["metric"] == "psnr"] == ["GaussianLearnedSigma"]


def test_two_batches_are_drawn_and_told(passes, refused):
    """Names are drawn as they are: dollars, a first `_`, also with a matplotlibrc that asks for LaTeX."""
    batch("_$a_and_$b"), batch("b", gain=0.5, draw=1), batch("c", dataset="$x_$y")
    with matplotlib.rc_context({"text.usetex": True}):
        out = passes(plot_eval.main, "--run_batch_name", "_$a_and_$b", "b", "c", "--format", "png")
    assert literal("_$a") == r" _\$a" and literal("a_b") == "a_b"
    assert "note: not in every batch" in out
    (line,) = [line for line in out.splitlines() if "15 to 45 nats" in line and "psnr" in line]
    assert " | b     |" in line and " | 0.51 |" in line and max(map(len, out.splitlines())) <= 100
    folder = Path("runs/_$a_and_$b/figures")
    assert {p.name for p in folder.iterdir()} == {
        f"compare_b_c{e}" for e in (".png", ".csv", "_table.csv", "_table.md")
    }
    drawn = {(row["batch"], row["of"]) for row in read_csv(folder / "compare_b_c.csv")}
    assert drawn == {("_$a_and_$b", "Digits"), ("b", "Digits"), ("dataset $x_$y", "$x_$y")}
    assert "runs/nope/eval_results.csv" in refused(plot_eval.main, "--run_batch_name", "b", "nope")
