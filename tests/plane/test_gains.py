"""Gains where the truth is known: equal cells, and cells that are better."""

import numpy as np
import pytest
from pytest import approx

from utils.plane.gains import gain, interval, mixture
from utils.plane.metrics import value_of

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


def gain_of(name, terms, ordinary, rates=None, among=None, seeds=None):
    """The gain of all cells, unless said otherwise, over the ordinary ones, with rates of 0, 1, 2, ..."""
    among, ordinary = np.array(among or [1] * len(terms), bool), np.array(ordinary, bool)
    seeds = seeds or [tuple(range(len(of_cell))) for of_cell in terms]
    return gain(name, terms, seeds, among, ordinary, np.array(rates or range(len(terms)), float))


def simulated(name, make, times, **how):
    """The gains of simulated grids over their diagonals."""
    grids = (make(np.random.default_rng(s), **how) for s in range(times))
    return [gain_of(name, terms, np.eye(round(len(terms) ** 0.5)).ravel()) for terms in grids]


EQUAL = [("recons_acc", accuracies, {}), ("psnr", errors, {"seeds": 4, "spread": 0.2, "n": 100})]
EQUAL += [("recons_acc", accuracies, how) for how in ({"n": 72}, {"cells": 441})]
EQUAL += [("psnr", errors, how) for how in ({}, {"seeds": 2, "spread": 0.2, "n": 100})]
EQUAL += [("mi_z_low", information, {})]


@pytest.mark.parametrize("cases, times", [(2, 60), pytest.param(7, 200, marks=pytest.mark.slow)])
def test_of_equal_cells_95_percent_of_simulations_say_no_difference(cases, times):
    for name, make, how in EQUAL[:cases]:
        gains = simulated(name, make, times, **how)
        assert sum(not g["told"].startswith("no difference") for g in gains) <= times / 20
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
        gains = simulated(name, make, times, **how)
        assert all(g["chosen"] == [1] for g in gains)
        assert sum(g["told"].startswith("yes") for g in gains) >= 0.95 * times
        large = make(np.random.default_rng(1), **{**how, "n": 50_000, "cells": 9}).mean((1, 2))
        true = float(10 * np.log10(large[2] / large[1]) if name == "psnr" else large[1] - large[2])
        assert sum(g["low"] < true < g["high"] for g in gains) >= 0.85 * times
        assert np.mean([g["gain"] for g in gains]) == approx(true, abs=0.3 * true)


def test_the_value_is_the_mean_of_the_two_halves_and_less_is_better_where_it_is():
    terms = [np.full((1, 40), v) for v in (5.0, 3.0, 4.0)]
    numbers = {"value": 3, "se": 0, "gain": 1.5, "low": 1.5, "high": 1.5, "chosen": [1]}
    numbers |= {"diagonal_value": 4.5, "diagonal_rate": 1}  # of ordinary cells with rates of 0 and 2
    assert gain_of("nelbo", terms, [1, 0, 1]) == numbers | {"told": "yes (one seed)"}
    psnr = gain_of("psnr", [v / 100 for v in terms], [1, 0, 1])
    expected = -10 * np.log10(0.03), 10 * np.log10(4.5 / 3)
    assert (psnr["value"], psnr["gain"]) == approx(expected)
    same = gain_of("nelbo", terms, [1, 1, 1])
    assert (same["gain"], same["diagonal_rate"]) == (0, 1) and same["told"].startswith("no diff")
    low = interval(-0.2, [-0.3, -0.1], [-0.2] * 3, (0.1, 0.9), ("yes", "no, worse"))
    assert low["told"] == "no, worse" and low["low"] < -0.2 < low["high"] < 0
    twice = gain_of("nelbo", [np.repeat(v, 2, 0) for v in terms], [1, 0, 0], seeds=["22"] * 3)
    assert (twice["gain"], twice["told"]) == (2, "yes (one seed)")  # a seed twice counts once


def test_choices_are_reported_on_other_images_and_seeds_slowly():
    """By hand, with a cell that has no terms, one with a further seed, and seeds in another order in each cell."""
    rng = np.random.default_rng(1)
    terms, ordinary, rates = list(errors(rng, seeds=3, spread=0.2)), np.eye(7).ravel(), np.arange(CELLS)
    among = rates != 9
    values, others = [], []
    halves = np.array_split(np.random.default_rng(0).permutation(360), 2)
    for here, there in (halves, halves[::-1]):
        for seed in range(3):
            score = np.array([-np.median(np.delete(t, seed, 0)[:, here].mean(1)) for t in terms])
            best = np.where(among, score, -np.inf).argmax()
            way = mixture("psnr", rates, np.where(ordinary, score, np.nan), rates[best])
            values.append(value_of("psnr", terms[best][seed, there].mean()))
            others.append(value_of("psnr", sum(w * terms[i][seed, there].mean() for i, w in way.items())))
    shuffled, seeds = [], []
    for of_cell in terms:
        order = rng.permutation(3)
        shuffled, seeds = [*shuffled, of_cell[order]], [*seeds, tuple(order)]
    shuffled[5], seeds[5] = np.concatenate([shuffled[5], shuffled[5][:1]]), (*seeds[5], "d")
    shuffled[9] = None
    result = gain_of("psnr", shuffled, ordinary, among=among.tolist(), seeds=seeds)
    expected = np.mean(values), np.mean(others)
    assert (result["value"], result["diagonal_value"]) == approx(expected)
    assert "one seed" not in result["told"]
    assert result["gain"] == approx(np.mean(values) - np.mean(others))


def test_what_cannot_be_compared_is_not():
    whole = np.ones((1, 30))
    part, few = np.where(np.arange(30) < 5, whole, np.nan), whole[:, :19]
    for terms, ordinary, among in (
        ([whole, None], [1, 0], None),
        ([whole, np.ones((1, 31))], [1, 0], None),
        ([whole, part], [1, 0], None),
        ([few, few], [1, 0], None),
        ([None, whole], [1, 0], [0, 1]),
        ([whole, whole], [0, 0], None),
        ([whole, whole], [1, 0], [0, 0]),
    ):
        assert gain_of("psnr", terms, ordinary, among=among, seeds="22") == {}
    assert gain_of("psnr", [whole] * 2, [1, 0], among=[0, 1])["diagonal_rate"] == 0
    assert gain_of("psnr", [whole, None], [1, 0], among=[1, 0], seeds="22") != {}


def test_ordinary_cells_beyond_a_budget_count_mixed():
    """The chosen has R of 20, and 18 dB; ordinary ones 15 dB at 10 and 25 dB at 30."""
    terms = [np.full((1, 40), 10 ** (-db / 10)) for db in (15, 18, 25)]
    result = gain_of("psnr", terms, [1, 0, 1], rates=[10, 20, 30], among=[1, 1, 0])
    numbers = result["value"], result["diagonal_rate"], result["diagonal_value"]
    assert numbers == approx((18, 20, -10 * np.log10((10**-1.5 + 10**-2.5) / 2)))
