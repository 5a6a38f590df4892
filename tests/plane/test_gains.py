"""Gains where the truth is known: equal cells, and cells that are better."""

import numpy as np
import pytest

from utils.plane.gains import gain, scores

CELLS, DIAGONAL = 49, np.eye(7, dtype=bool).ravel()
EVERY, RATES = np.ones(CELLS, bool), np.arange(CELLS)


def accuracies(rng, n=360, seeds=1, spread=0.0, better=0.0):
    """0/1 of equally good cells, 0.85 on average over images of different difficulty; cell 1 is better by `better`."""
    p = rng.beta(3.4, 0.6, n)
    of_run = spread * rng.normal(size=(CELLS, seeds, 1))
    of_run[1] += better
    return list((rng.random((CELLS, seeds, n)) < p + of_run).astype(np.float32))


def errors(rng, n=360, seeds=1, spread=0.0, better=0.0):
    """Squared errors of equally good cells, that images and noise, and seeds by `spread`, make different."""
    of_image, of_run = rng.normal(size=n), rng.normal(size=(CELLS, seeds, 1))
    of_run[1] -= better / max(spread, 1e-9)
    return list(0.01 * np.exp(0.5 * of_image + 0.2 * rng.normal(size=(CELLS, seeds, n)) + spread * of_run))


def told(name, make, times, **how):
    """The gains that are found in simulations."""
    seeds = [tuple(range(how.get("seeds", 1)))] * CELLS
    simulated = (make(np.random.default_rng(s), **how) for s in range(times))
    return [gain(name, terms, seeds, EVERY, DIAGONAL, RATES) for terms in simulated]


@pytest.mark.parametrize(
    "name, make, how",
    [
        ("recons_acc", accuracies, {}),
        ("recons_acc", accuracies, {"n": 72}),
        ("psnr", errors, {}),
        ("psnr", errors, {"seeds": 2, "spread": 0.2, "n": 100}),
        ("psnr", errors, {"seeds": 4, "spread": 0.2, "n": 100}),
    ],
)
def test_of_equal_cells_95_percent_of_200_simulations_say_no_difference(name, make, how):
    found = told(name, make, 200, **how)
    assert sum(g.told for g in found) <= 10
    naive = [np.mean(terms, axis=(1, 2)) for terms in (make(np.random.default_rng(s), **how) for s in range(50))]
    if name == "recons_acc":  # what choosing and reporting on the same images claims
        assert np.mean([v.max() - v[DIAGONAL].max() for v in naive]) > 3 * abs(np.mean([g.gain for g in found])) > 0
    assert abs(np.mean([g.gain for g in found])) < 3 * np.std([g.gain for g in found]) / 200**0.5


@pytest.mark.parametrize(
    "name, make, how",
    [
        ("recons_acc", accuracies, {"better": 0.07, "n": 2000}),
        ("psnr", errors, {"spread": 1e-6, "better": 0.1}),
        ("psnr", errors, {"seeds": 4, "spread": 0.02, "better": 0.2}),
    ],
)
def test_a_true_gain_is_found_and_told_as_large_as_it_is(name, make, how):
    found = told(name, make, 40, **how)
    assert sum(g.told for g in found) >= 38 and all(g.agreed for g in found)
    large = [np.stack(make(np.random.default_rng(s), **{**how, "n": 50_000})).mean((1, 2)) for s in (1, 2)]
    true = [float(v[1] - v[2]) if name == "recons_acc" else 10 * float(np.log10(v[2] / v[1])) for v in large]
    assert sum(g.low < np.mean(true) < g.high for g in found) >= 34
    assert np.mean([g.gain for g in found]) == pytest.approx(np.mean(true), abs=0.3 * np.mean(true))


def test_the_value_is_the_mean_of_the_two_halves_and_less_is_better_where_it_is():
    n = 40
    terms = [np.full((1, n), v) for v in (5.0, 3.0, 4.0)]
    found = gain("nelbo", terms, [("2",)] * 3, np.ones(3, bool), np.array([True, False, True]), np.arange(3))
    assert found == (3, 4, 1, 1, 1, True, 1) and found.told
    psnr = gain("psnr", [v / 100 for v in terms], [("2",)] * 3, np.ones(3, bool), np.array([1, 0, 1], bool), range(3))
    assert psnr.value == pytest.approx(-10 * np.log10(0.03)) and psnr.gain == pytest.approx(10 * np.log10(4 / 3))
    same = gain("nelbo", terms, [("2",)] * 3, np.ones(3, bool), np.ones(3, bool), np.arange(3))
    assert same.gain == 0 and not same.told


def test_what_cannot_be_compared_is_not():
    def found(terms, among=(True, True)):
        return gain("psnr", terms, [("2",)] * 2, np.array(among), np.array([True, False]), range(2))

    whole = np.ones((1, 30))
    assert found([whole, None]) is None and found([whole, np.ones((1, 31))]) is None
    assert found([whole[:, :19]] * 2) is None and found([whole] * 2, (False, True)) is None
    part = whole.copy()
    part[0, 5:] = np.nan
    assert found([whole, part]) is None and found([whole, None], (True, False)) is not None


@pytest.mark.parametrize("name, make, seeds", [("psnr", errors, 1), ("psnr", errors, 3), ("lr_nll", accuracies, 2)])
def test_scores_choose_and_tell_what_the_gain_does(name, make, seeds):
    """Also with a cell without terms, which is not among those chosen from, and one with a further seed."""
    terms, of_cell = make(np.random.default_rng(1), seeds=seeds, spread=0.2), [tuple("abc"[:seeds])] * CELLS
    terms[5], of_cell[5] = np.concatenate([terms[5], terms[5][:1]]), (*of_cell[5], "d")
    terms[9] = None
    among = EVERY & (RATES != 9)
    found, (chosen, reported) = gain(name, terms, of_cell, among, DIAGONAL, RATES), scores(name, terms, of_cell)
    assert chosen.shape == reported.shape == (2 * seeds, CELLS) and np.isnan(chosen[:, 9]).all()
    sign = -1 if name == "lr_nll" else 1
    for group, value in ((among, found.value), (among & DIAGONAL, found.other)):
        best = [max(np.flatnonzero(group), key=lambda i: (sign * score[i], -RATES[i])) for score in chosen]  # noqa: B023
        assert np.mean([row[i] for row, i in zip(reported, best, strict=True)]) == pytest.approx(value)
    (none, nothing) = scores(name, [None] * CELLS, of_cell)
    assert none.shape == nothing.shape == (0, CELLS)
