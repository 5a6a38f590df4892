"""What models reach within a rate: against scipy's convex hull, and a fine grid of mixtures."""

import math

import numpy as np
from pytest import approx
from scipy.spatial import ConvexHull

from tests.plane.planes import plane_of
from utils.plane import figures
from utils.plane.gains import frontier, hull, reach
from utils.plane.metrics import metric, score_of


def test_the_frontier_is_one_side_of_scipys_hull_up_to_the_best():
    rate, value = np.random.default_rng(0).normal(size=(2, 60))
    vertices = ConvexHull(np.stack([rate, value], 1)).vertices
    for score in (value, -value):
        ends = [vertices[rate[vertices].argmin()], vertices[score[vertices].argmax()]]
        chord = np.interp(rate[vertices], rate[ends], score[ends])
        side = vertices[(score[vertices] >= chord - 1e-12) & (rate[vertices] <= rate[ends[1]])]
        assert frontier(rate, score).tolist() == side[rate[side].argsort()].tolist() and len(side) > 2
    rate, score = np.array([(0, 0), (1, 0.1), (1, 0.1), (2, 2), (3, math.nan), (4, 2)]).T  # ties, and one left out
    assert [frontier(rate, score, mixes).tolist() for mixes in (True, False)] == [[0, 3], [0, 1, 3]]


def test_what_cells_reach_within_a_rate():
    """Three cells by hand, and the best of a fine grid of mixtures of any two of them."""
    rates, value = np.array([1.0, 4.0, 5.0]), np.array([0.5, 0.8, 0.2])
    for name, most, expected in (
        ("recons_acc", 2.0, {0: 2 / 3, 1: 1 / 3}),  # 0.6, of 0.5 at R = 1 and 0.8 at 4
        ("recons_acc", 4.0, {1: 1}),
        ("recons_acc", 99.0, {1: 1}),  # more rate is allowed, and worth nothing
        ("recons_acc", 0.5, {0: 1}),  # none has so little
        ("is_mean", 3.9, {0: 1}),  # does not mix
        ("nelbo", 5.0, {2: 1}),
        ("nelbo", 3.0, {0: 1 / 2, 2: 1 / 2}),
    ):
        score = score_of(name, value)
        (weights,), _ = reach(name, rates, score, [most])
        assert weights == approx([expected.get(i, 0) for i in range(3)])
        if metric(name).mixes and most >= 1:
            share, i, j = np.meshgrid(np.linspace(0, 1, 1201), range(3), range(3))
            within = share * rates[i] + (1 - share) * rates[j] <= most
            best = (share * score[i] + (1 - share) * score[j])[within].max()
            assert weights @ score == approx(best, abs=1e-3)
    rates, score = np.array([3.39, 18.2]), np.full(2, 0.9666666666666667)  # equal up to rounding
    assert (reach("recons_acc", rates, score, np.linspace(3.39, 18.19, 100)) == [1, 0]).all()


def test_what_others_can_reach_bounds_every_concave_frontier():
    """Known at few rates, also with points that are not on it; and by hand: lines, plateaus, and no line."""
    rng, at = np.random.default_rng(0), np.linspace(0, 11, 111)
    for scale in (0.5, 3.0, 20.0):
        rates = np.sort(rng.uniform(1, 9, 6))
        frontiers = [1 - np.exp(-r / scale) for r in (rates, at)]
        score = frontiers[0] - [0, 0, 0.3, 0, 0, 0]
        mixed, bound = reach("recons_acc", rates, score, at) @ score
        inside = (rates[0] <= at) & (at <= rates[-1])
        assert (mixed <= frontiers[1] + 1e-9)[inside].all() and (frontiers[1] <= bound + 1e-9)[inside].all()
        assert np.isnan(bound[at > rates[-1]]).all()
    rates, score = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 1.5, 1.2])
    bound = reach("recons_acc", rates, score, [0.5, 1.0, 1.5, 2.25, 2.75, 3.5])[1] @ score
    assert bound.tolist() == [0.0, 0.0, 0.75, 1.25, 1.5, 1.5]


def test_half_and_half_of_two_models_is_mixed_in_squared_errors():
    """Half 22.3 dB and half 13.4 dB is 15.9 dB, not 17.9; D and accuracies mix as they are, inception scores do not."""
    rows = []
    for rate, psnr, distortion in ((10.0, 22.3, 200.0), (2.0, 13.4, 300.0)):
        row = {"kl_z": rate, "kl_y": 0.0, "beta_y": 1 + rate, "beta_z": 1, "psnr": psnr, "D": distortion}
        rows.append(row | {"train_psnr": psnr, "is_mean": psnr, "recons_acc": psnr / 30, "lr_acc_mean": 1 - psnr / 30})
    plane = plane_of(rows)
    half = 10 * math.log10(2 / (10**-2.23 + 10**-1.34))
    for name, value in (("psnr", half), ("train_psnr", half), ("D", 250.0), ("recons_acc", (22.3 + 13.4) / 60)):
        at, values = np.array([list(row.values()) for row in hull(plane, name)]).T
        assert np.interp(6.0, at, values) == approx(value, abs=0.02)
        assert (values[-1], values[0]) == approx(plane.values(name))
    assert {row["lr_acc_mean"] for row in hull(plane, "lr_acc_mean")} == {1 - 13.4 / 30}  # more rate costs no accuracy
    assert not hull(plane, "is_mean") and not hull(plane, "D", np.zeros(2, bool))
    axes = figures.total_rates(plane, ["psnr", "is_mean"]).figure.axes[:2]
    assert [sum("hull" in line.get_label() for line in ax.lines) for ax in axes] == [1, 0]  # none has equal betas
