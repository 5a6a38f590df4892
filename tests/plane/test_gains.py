"""Gains where the truth is known: equal cells, and cells that are better."""

import numpy as np
import pytest

from utils.plane.gains import gain, mixture, scores
from utils.plane.metrics import mean_of, metric, score_of, value_of

CELLS, DIAGONAL = 49, np.eye(7, dtype=bool).ravel()
EVERY, RATES = np.ones(CELLS, bool), np.arange(CELLS)


def accuracies(rng, n=360, seeds=1, spread=0.0, better=0.0, cells=CELLS):
    """0/1 of equally good cells, 0.85 on average over images of different difficulty; cell 1 is better by `better`."""
    p = rng.beta(3.4, 0.6, n)
    of_run = spread * rng.normal(size=(cells, seeds, 1))
    of_run[1] += better
    return list((rng.random((cells, seeds, n)) < p + of_run).astype(np.float32))


def errors(rng, n=360, seeds=1, spread=0.0, better=0.0, cells=CELLS):
    """Squared errors of equally good cells, that images and noise, and seeds by `spread`, make different."""
    of_image, of_run = rng.normal(size=n), rng.normal(size=(cells, seeds, 1))
    of_run[1] -= better / max(spread, 1e-9)
    return list(0.01 * np.exp(0.5 * of_image + 0.2 * rng.normal(size=(cells, seeds, n)) + spread * of_run))


def information(rng, n=360, seeds=1, better=0.0, cells=CELLS):
    """What images add to H(label) - log loss, whose tail is long; cell 1 certifies `better` nats more."""
    losses = np.exp(1.5 * rng.normal(size=n) - 2 + 0.5 * rng.normal(size=(cells, seeds, n)))
    losses[1] -= better
    return list(np.log(10) - losses)


def told(name, make, times, **how):
    """The gains that are found in simulations."""
    cells = how.get("cells", CELLS)
    seeds, diagonal = [tuple(range(how.get("seeds", 1)))] * cells, np.eye(round(cells**0.5), dtype=bool).ravel()
    simulated = (make(np.random.default_rng(s), **how) for s in range(times))
    return [gain(name, terms, seeds, np.ones(cells, bool), diagonal, np.arange(cells)) for terms in simulated]


@pytest.mark.parametrize(
    "name, make, how",
    [
        ("recons_acc", accuracies, {}),
        ("recons_acc", accuracies, {"n": 72}),
        ("recons_acc", accuracies, {"cells": 441}),
        ("mi_z_low", information, {}),
        ("psnr", errors, {}),
        ("psnr", errors, {"seeds": 2, "spread": 0.2, "n": 100}),
        ("psnr", errors, {"seeds": 4, "spread": 0.2, "n": 100}),
    ],
)
def test_of_equal_cells_95_percent_of_200_simulations_say_no_difference(name, make, how):
    found = told(name, make, 200, **how)
    assert sum(not g.told.startswith("no difference") for g in found) <= 10
    naive = [np.mean(terms, axis=(1, 2)) for terms in (make(np.random.default_rng(s), **how) for s in range(50))]
    if name == "recons_acc":  # what choosing and reporting on the same images claims
        assert (
            np.mean([v.max() - v[:: round(len(v) ** 0.5) + 1].max() for v in naive])
            > 3 * abs(np.mean([g.gain for g in found]))
            > 0
        )
    assert abs(np.mean([g.gain for g in found])) < 3 * np.std([g.gain for g in found]) / 200**0.5


@pytest.mark.parametrize(
    "name, make, how",
    [
        ("recons_acc", accuracies, {"better": 0.07, "n": 2000}),
        ("mi_z_low", information, {"better": 0.2, "n": 2000}),
        ("psnr", errors, {"spread": 1e-6, "better": 0.1}),
        ("psnr", errors, {"seeds": 4, "spread": 0.02, "better": 0.2}),
    ],
)
def test_a_true_gain_is_found_and_told_as_large_as_it_is(name, make, how):
    found = told(name, make, 40, **how)
    assert sum(g.told.startswith("yes") for g in found) >= 38 and all(g.chosen == (1,) for g in found)
    large = [np.stack(make(np.random.default_rng(s), **{**how, "n": 50_000})).mean((1, 2)) for s in (1, 2)]
    true = [float(v[1] - v[2]) if name != "psnr" else 10 * float(np.log10(v[2] / v[1])) for v in large]
    assert sum(g.low < np.mean(true) < g.high for g in found) >= 34
    assert np.mean([g.gain for g in found]) == pytest.approx(np.mean(true), abs=0.3 * np.mean(true))


def test_the_value_is_the_mean_of_the_two_halves_and_less_is_better_where_it_is():
    n = 40
    terms = [np.full((1, n), v) for v in (5.0, 3.0, 4.0)]
    found = gain("nelbo", terms, [("2",)] * 3, np.ones(3, bool), np.array([True, False, True]), np.arange(3))
    between = (3, 0, 4.5, 1, 1.5, 1.5, 1.5, (1,), 1)  # the ordinary cells have rates of 0 and 2, that chosen 1
    assert found == between and found.told == "yes (one seed)"
    psnr = gain("psnr", [v / 100 for v in terms], [("2",)] * 3, np.ones(3, bool), np.array([1, 0, 1], bool), range(3))
    assert psnr.value == pytest.approx(-10 * np.log10(0.03)) and psnr.gain == pytest.approx(10 * np.log10(4.5 / 3))
    same = gain("nelbo", terms, [("2",)] * 3, np.ones(3, bool), np.ones(3, bool), np.arange(3))
    assert same.gain == 0 and same.told.startswith("no difference") and same.rate == 1
    worse = same._replace(gain=-0.2, low=-0.3, high=-0.1, seeds=3)
    assert worse.told == "no, worse"


@pytest.mark.parametrize(
    "name, most, expected",
    [
        ("recons_acc", 2.0, {0: 2 / 3, 1: 1 / 3}),  # 0.6, of 0.5 at R = 1 and 0.8 at 4
        ("recons_acc", 4.0, {1: 1}),
        ("recons_acc", 99.0, {1: 1}),  # more rate is allowed, and worth nothing
        ("recons_acc", 0.5, {0: 1}),  # none has so little
        ("is_mean", 3.9, {0: 1}),  # does not mix
        ("nelbo", 5.0, {2: 1}),
        ("nelbo", 3.0, {0: 1 / 2, 2: 1 / 2}),
    ],
)
def test_what_cells_reach_within_a_rate(name, most, expected):
    """The best of a fine grid of mixtures of any two of three cells, by hand."""
    rates, value = np.array([1.0, 4.0, 5.0]), np.array([0.5, 0.8, 0.2])
    score = dict(enumerate(-value if name == "nelbo" else value))
    found = mixture(name, score, rates, most)
    assert {i: w for i, w in found.items() if w} == pytest.approx(expected)
    shares = [(w, i, j) for w in np.linspace(0, 1, 1201) for i in range(3) for j in range(3) if w in (0, 1) or most > 1]
    if metric(name).mixes and most >= 1:
        reached = [w * score[i] + (1 - w) * score[j] for w, i, j in shares if w * rates[i] + (1 - w) * rates[j] <= most]
        assert sum(w * score[i] for i, w in found.items()) == pytest.approx(max(reached), abs=1e-3)


def test_values_and_the_terms_behind_them():
    for name, value, mean in (("psnr", 20.0, 0.01), ("nelbo", 3.0, 3.0), ("recons_acc", 0.8, 0.8)):
        assert value_of(name, np.array(mean)) == pytest.approx(value) and mean_of(name, value) == pytest.approx(mean)
    assert score_of("psnr", 0.01) > score_of("psnr", 0.02) and score_of("nelbo", 1) > score_of("nelbo", 2)
    assert score_of("recons_acc", 0.8) > score_of("recons_acc", 0.7)


def test_what_cannot_be_compared_is_not():
    def found(terms, among=(True, True)):
        return gain("psnr", terms, [("2",)] * 2, np.array(among), np.array([True, False]), range(2))

    whole = np.ones((1, 30))
    assert found([whole, None]) is None and found([whole, np.ones((1, 31))]) is None
    assert found([whole[:, :19]] * 2) is None and found([whole] * 2, (False, False)) is None
    assert gain("psnr", [whole] * 2, [("2",)] * 2, np.ones(2, bool), np.zeros(2, bool), range(2)) is None
    assert found([None, whole], (False, True)) is None and found([whole] * 2, (False, True)).rate == 0
    part = whole.copy()
    part[0, 5:] = np.nan
    assert found([whole, part]) is None and found([whole, None], (True, False)) is not None


def test_ordinary_cells_beyond_a_budget_count_mixed():
    """The chosen has R of 20, and 18 dB; ordinary ones 15 dB at 10 and 25 dB at 30, half of each 17.6."""
    terms = [np.full((1, 40), 10 ** (-db / 10)) for db in (15, 18, 25)]
    found = gain("psnr", terms, [("2",)] * 3, np.array([1, 1, 0], bool), np.array([1, 0, 1], bool), [10, 20, 30])
    half = -10 * np.log10((10**-1.5 + 10**-2.5) / 2)
    assert found.value == pytest.approx(18) and found.rate == 20 and found.other == pytest.approx(half)


def test_a_seed_that_a_cell_has_twice_counts_once():
    terms = [np.full((2, 40), v) for v in (5.0, 3.0, 1.0)]
    found = gain("nelbo", terms, [("2", "2")] * 3, np.ones(3, bool), np.array([1, 0, 0], bool), range(3))
    assert found.value == 1 and found.gain == 4 and found.chosen == (2,)


@pytest.mark.parametrize("name, make, seeds", [("psnr", errors, 1), ("psnr", errors, 3), ("lr_nll", accuracies, 2)])
def test_scores_choose_and_tell_what_the_gain_does(name, make, seeds):
    """Also with a cell without terms, which is not among those chosen from, and one with a further seed."""
    terms, of_cell = make(np.random.default_rng(1), seeds=seeds, spread=0.2), [tuple("abc"[:seeds])] * CELLS
    terms[5], of_cell[5] = np.concatenate([terms[5], terms[5][:1]]), (*of_cell[5], "d")
    terms[9] = None
    among = EVERY & (RATES != 9)
    found, (chosen, reported) = gain(name, terms, of_cell, among, DIAGONAL, RATES), scores(name, terms, of_cell)
    assert chosen.shape == reported.shape == (2 * seeds, CELLS) and np.isnan(chosen[:, 9]).all()
    value, other = [], []
    for score, means in zip(chosen, reported, strict=True):
        first = max(np.flatnonzero(among), key=lambda i: (score[i], -RATES[i]))  # noqa: B023
        way = mixture(name, {i: score[i] for i in np.flatnonzero(among & DIAGONAL)}, RATES, RATES[first])
        value.append(value_of(name, means[first]))
        other.append(value_of(name, np.array(sum(w * means[i] for i, w in way.items()))))
    assert np.mean(value) == pytest.approx(found.value) and np.mean(other) == pytest.approx(found.other)
    (none, nothing) = scores(name, [None] * CELLS, of_cell)
    assert none.shape == nothing.shape == (0, CELLS)
