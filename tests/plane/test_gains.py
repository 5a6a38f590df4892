"""Gains where the truth is known: equal cells, and cells that are better."""

import numpy as np
import pytest
from pytest import approx

from utils.plane.gains import SPLITS, gain, interval, reach

CELLS = 49


def accuracies(rng, n=360, seeds=1, better=0.0, cells=CELLS):
    """0/1 of equally good cells, 0.85 on average over images of different difficulty; cell 1 is better by `better`."""
    p, of_run = rng.beta(3.4, 0.6, n), 0 * rng.normal(size=(cells, seeds, 1))
    of_run[1] += better
    return (rng.random((cells, seeds, n)) < p + of_run).astype(np.float32)


def errors(rng, n=360, seeds=1, spread=0.0, better=0.0, cells=CELLS):
    """Squared errors of equally good cells, that images and noise, and seeds by `spread`, make different."""
    of_image, of_run = rng.normal(size=n), rng.normal(size=(cells, seeds, 1))
    of_run[1] -= better / max(spread, 1e-9)
    return 0.01 * np.exp(0.5 * of_image + 0.2 * rng.normal(size=(cells, seeds, n)) + spread * of_run)


def information(rng, n=360, seeds=1, better=0.0, cells=CELLS):
    """What images add to H(label) - log loss, whose tail is long; cell 1 certifies `better` nats more."""
    losses = np.exp(1.5 * rng.normal(size=n) - 2 + 0.5 * rng.normal(size=(cells, seeds, n)))
    losses[1] -= better
    return np.log(10) - losses


ALARMS = "yes", "no, worse"


def gain_of(name, terms, ordinary, rates=None, among=None, seeds=None):
    """The gain of all cells, unless said otherwise, over the ordinary ones, with rates of 0, 1, 2, ..."""
    among, ordinary = np.array(among or [1] * len(terms), bool), np.array(ordinary, bool)
    seeds = seeds or [tuple(range(len(of_cell))) for of_cell in terms]
    return gain(name, terms, seeds, among, ordinary, np.array(rates or range(len(terms)), float))


def simulated(name, make, times, rates=None, **how):
    """The gains of simulated grids over their diagonals."""
    grids = (make(np.random.default_rng(s), **how) for s in range(times))
    return [gain_of(name, terms, np.eye(round(len(terms) ** 0.5)).ravel(), rates) for terms in grids]


EQUAL = [("recons_acc", accuracies, {}), ("psnr", errors, {"seeds": 4, "spread": 0.2, "n": 100})]
EQUAL += [("recons_acc", accuracies, how) for how in ({"n": 72}, {"cells": 441})]
EQUAL += [("psnr", errors, how) for how in ({}, {"seeds": 2, "spread": 0.2, "n": 100})]
EQUAL += [("mi_z_low", information, {})]


@pytest.mark.parametrize("cases, times", [(2, 60), pytest.param(7, 200, marks=pytest.mark.slow)])
def test_of_equal_cells_95_percent_of_simulations_say_no_difference(cases, times):
    for name, make, how in EQUAL[:cases]:
        gains = simulated(name, make, times, **how)
        assert sum(g["told"].startswith(ALARMS) for g in gains) <= times / 20
        mean, spread = np.mean([g["gain"] for g in gains]), np.std([g["gain"] for g in gains])
        assert abs(mean) < 3 * spread / times**0.5
        if name == "recons_acc":  # what choosing and reporting on the same images claims
            means = [make(np.random.default_rng(s), **how).mean((1, 2)) for s in range(times)]
            assert np.mean([v.max() - v[:: round(len(v) ** 0.5) + 1].max() for v in means]) > 3 * abs(mean) > 0


@pytest.mark.parametrize("times", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_a_true_gain_is_found_as_large_as_it_is(times):
    for name, make, how in (
        ("recons_acc", accuracies, {"better": 0.07, "n": 2000}),
        ("mi_z_low", information, {"better": 0.2, "n": 2000}),
        ("psnr", errors, {"spread": 1e-6, "better": 0.1}),
        ("psnr", errors, {"seeds": 4, "spread": 0.02, "better": 0.2}),
    ):
        gains = simulated(name, make, times, rates=[0, 8, *range(2, CELLS)], **how)  # cell 8 is ordinary
        assert all(1 in g["chosen"] for g in gains)
        assert sum(g["told"].startswith("yes") for g in gains) >= 0.95 * times
        large = make(np.random.default_rng(1), **{**how, "n": 50_000, "cells": 9}).mean((1, 2))
        true = float(10 * np.log10(large[2] / large[1]) if name == "psnr" else large[1] - large[2])
        assert sum(g["low"] < true < g["high"] for g in gains) >= 0.85 * times
        assert np.mean([g["gain"] for g in gains]) == approx(true, abs=0.3 * true)


@pytest.mark.parametrize("times", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_where_trading_is_worth_nothing_no_grid_says_yes(times):
    """PSNR is a function of R alone, so a coarse diagonal has no cell at the best cell's rate, only mixtures."""
    for side, least in ((3, 0.1), (5, 0.1), (7, 0.0), (21, 0.0)):
        by, bz = (b.ravel() for b in np.meshgrid(*[np.geomspace(0.1, 10, side)] * 2, indexing="ij"))
        rates, told = 35 - 8 * np.log10(by) - 6 * np.log10(bz), []
        for draw in range(times):
            noise = errors(np.random.default_rng(draw), cells=side**2)
            terms, among = np.exp(-rates / 15)[:, None, None] * noise, rates <= (25, 35, 45)[draw % 3]
            told.append(gain_of("psnr", terms, by == bz, rates.tolist(), among.tolist()))
        assert sum(g["told"].startswith("yes") for g in told) <= times / 20
        assert np.mean([g["gain"] for g in told]) >= least / 2  # what mixtures alone would say


def test_the_gain_is_that_of_other_images_and_less_is_better_where_it_is():
    terms = [np.full((1, 40), v) for v in (5.0, 3.0, 4.0)]
    # of ordinary cells with rates of 0 and 2: mixed, they have 4.5 at a rate of 1; one between can have 4
    numbers = {"gain": 1.5, "low": 1, "high": 1.5, "chosen": [1]}
    assert gain_of("nelbo", terms, [1, 0, 1]) == numbers | {"told": "yes (one seed)"}
    assert gain_of("psnr", [v / 100 for v in terms], [1, 0, 1])["gain"] == approx(10 * np.log10(4.5 / 3))
    same = gain_of("nelbo", terms, [1, 1, 1])
    assert same["gain"] == 0 and same["told"].startswith("no diff")
    twice = gain_of("nelbo", [np.repeat(v, 2, 0) for v in terms], [1, 0, 0], rates=[1] * 3, seeds=["22"] * 3)
    assert (twice["gain"], twice["told"]) == (2, "yes (one seed)")  # a seed twice counts once
    beyond = gain_of("nelbo", terms, [1, 0, 0])  # nothing is known of ordinary cells of more rate
    assert (beyond["gain"], beyond["told"][:7], "low" in beyond) == (2, "unclear", False)


def test_an_interval_is_students_over_images_and_touches_0_where_only_rounding_keeps_it_from_it():
    """Where all halves choose the same, it is that of all images."""
    for gains, told in ((1e-16, "no difference"), (1e-6, "yes"), (-1e-6, "no, worse")):
        assert interval(*[np.full((SPLITS, 1), gains)] * 2, ("yes", "no, worse"))["told"].startswith(told)
    difference = np.random.default_rng(0).normal(0.5, 1, size=400)
    result = gain_of("recons_acc", [np.zeros((1, 400)), difference[None]], [1, 0], rates=[1, 1])
    assert result["gain"] == approx(difference.mean(), abs=0.03)
    assert (result["high"] - result["low"]) / 2 == approx(2 * difference.std() / 20, rel=0.3)


def test_choices_are_reported_on_other_images_and_seeds_slowly():
    """By hand, with a cell that has no terms, one with a further seed, and seeds in another order in each cell."""
    rng = np.random.default_rng(1)
    terms, ordinary, rates = list(errors(rng, seeds=3, spread=0.2)), np.eye(7).ravel(), np.arange(CELLS)
    among, order, gains = rates != 9, np.random.default_rng(0), []
    for _ in range(SPLITS):
        here = order.permutation(360) < 180
        for seed in range(3):
            score = np.array([-np.median(np.delete(t, seed, 0)[:, here].mean(1)) for t in terms])
            best = np.where(among, score, -np.inf).argmax()
            (way,), _ = reach("psnr", rates, np.where(ordinary, score, np.nan), [rates[best]])
            reported = np.array([t[seed, ~here].mean() for t in terms])
            gains.append(10 * np.log10(way @ reported / reported[best]))
    shuffled, seeds = [], []
    for of_cell in terms:
        order = rng.permutation(3)
        shuffled, seeds = [*shuffled, of_cell[order]], [*seeds, tuple(order)]
    shuffled[5], seeds[5] = np.concatenate([shuffled[5], shuffled[5][:1]]), (*seeds[5], "d")
    shuffled[9] = None
    result = gain_of("psnr", shuffled, ordinary, among=among.tolist(), seeds=seeds)
    assert "one seed" not in result["told"] and result["gain"] == approx(np.mean(gains))


def test_what_cannot_be_compared_is_not():
    whole = np.ones((1, 30))
    part, few = np.where(np.arange(30) < 5, whole, np.nan), whole[:, :19]
    for terms in ([whole, None], [whole, np.ones((1, 31))], [whole, part], [few, few]):
        assert gain_of("psnr", terms, [1, 0], seeds="22") == {}
    for ordinary, among in (([0, 0], [1, 1]), ([1, 0], [0, 0])):
        assert gain_of("psnr", [whole, whole], ordinary, among=among, seeds="22") == {}
    assert gain_of("psnr", [whole, None], [1, 0], among=[1, 0], seeds="22") != {}


def test_ordinary_cells_beyond_a_budget_count_mixed():
    """The chosen has R of 20, and 18 dB; ordinary ones 15 dB at 10 and 25 dB at 30."""
    terms = [np.full((1, 40), 10 ** (-db / 10)) for db in (15, 18, 25)]
    result = gain_of("psnr", terms, [1, 0, 1], rates=[10, 20, 30], among=[1, 1, 0])
    assert result["gain"] == approx(18 + 10 * np.log10((10**-1.5 + 10**-2.5) / 2))
