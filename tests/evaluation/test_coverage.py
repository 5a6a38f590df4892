"""How often the ends of the information on the label, with their errors, hold it: simulations with a known truth."""

from functools import cache, partial
from math import log, nan, pi

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import entr, logsumexp

from datasets.gaussian import Gaussian
from tests.reliability.trials import first
from utils.evaluation.information import accuracy_bound, channel_bound, gaussian_mi, upper_end
from utils.evaluation.probes import fit_latent

EVEN, RARE, SKEWED = (0.1,) * 10, (0.98, 0.02), (0.91, *[0.01] * 9)  # frequencies of classes
LABELS = [(RARE, 200), (SKEWED, 360), (EVEN, 360), ((0.5, 0.5), 360), ((0.01,) * 100, 500)]
STD = 0.6  # of posteriors; a class has a std of 1


def covered(replicate, trials: int, information: float) -> np.ndarray:
    """The share of replicates (values, standard errors) that are not 1.96 errors below the information."""
    return np.mean([value + 1.96 * se >= information - 1e-9 for value, se in map(replicate, range(trials))])


def draw(p: tuple, n: int, gap: float, rng) -> tuple[np.ndarray, ...]:
    """Labels of n images, whose classes are so far apart on a line; means of posteriors, and samples, (n, 1)."""
    labels = rng.choice(len(p), n, p=p)
    means = (gap * labels + (1 - STD**2) ** 0.5 * rng.normal(size=n))[:, None]
    return labels, means, means + STD * rng.normal(size=(n, 1))


@cache
def information(p: tuple, gap: float) -> float:
    """I(z; label) of these classes, by numerical integration."""
    centres = gap * np.arange(len(p))

    def integrand(z):
        log_p = np.log(p) - 0.5 * (z - centres) ** 2 - 0.5 * log(2 * pi)
        total = logsumexp(log_p)
        return float((np.exp(log_p) * (log_p - total - np.log(p))).sum())

    edges = [-8, *(centres[1:] + centres[:-1]) / 2, centres[-1] + 8] if gap else [-8, 8]
    return sum(quad(integrand, a, b)[0] for a, b in zip(edges, edges[1:], strict=False))


def lower(p: tuple, n: int, gap: float, seed: int) -> tuple[float, float]:
    """The lower end and its error, negated."""
    rng = np.random.default_rng(seed)
    (labels, _, z), (labels_train, _, z_train) = (draw(p, m, gap, rng) for m in (n, 2 * n))
    arrays = {"z": z, "labels": labels, "z_train": z_train, "labels_train": labels_train}
    v, _ = fit_latent("lr", arrays, "z", "_sample")
    return -v["mi_z_low"], v.get("mi_z_low_se", nan)


def upper(p: tuple, n: int, gap: float, seed: int) -> tuple[float, float]:
    """The upper end and its error; the rate is not told."""
    labels, means, z = draw(p, n, gap, np.random.default_rng(seed))
    stds = np.full((n, 1, 1), STD)
    mi = gaussian_mi(*map(torch.tensor, (z, means[:, None], stds, labels)))
    return upper_end(labels, (mi.upper, mi.upper_se))


def channel_upper(q: np.ndarray, p: tuple, n: int, seed: int) -> tuple[float, float]:
    """The upper end of a categorical z and its error; an image's q is one-hot, drawn by its label's row."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(p), n, p=p)
    categories = (q.cumsum(1)[labels] < rng.random((n, 1))).sum(1).clip(max=len(p) - 1)
    return upper_end(labels, channel_bound(np.eye(len(p))[categories], labels))


@pytest.mark.parametrize("gap_and_trials", first(1, (12, 20), (12, 200), (1.5, 200), (0, 200)))
@pytest.mark.parametrize("of", first(2, *LABELS[:4]))
def test_the_lower_end(of, gap_and_trials):
    gap, trials = gap_and_trials
    assert covered(partial(lower, *of, gap), trials, -information(of[0], gap)) >= 0.93


@pytest.mark.parametrize("gap_and_trials", first(1, (12, 30), (12, 1000), (1.5, 1000), (0, 1000)))
@pytest.mark.parametrize("p, n", LABELS)
def test_the_upper_end_of_a_gaussian_z(p, n, gap_and_trials):
    gap, trials = gap_and_trials
    assert covered(partial(upper, p, n, gap), trials, information(p, gap)) >= 0.93


@pytest.mark.parametrize("trials", first(1, 30, 1000))
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("p, n", LABELS)
def test_the_upper_end_of_a_categorical_z(p, n, noise, trials):
    """Of the label itself or, with the probability of `noise`, any category."""
    q = (1 - noise) * np.eye(len(p)) + noise / len(p)
    truth = entr(np.array(p) @ q).sum() - np.array(p) @ entr(q).sum(1)
    assert covered(partial(channel_upper, q, p, n), trials, truth) >= 0.93


@pytest.mark.parametrize("beta", [0.1, 0.3, 1, 3, 10, 30])
def test_the_least_loss_of_the_known_plane(beta):
    """Both ends of the information on label and image, accuracy and its bound, of the best model."""
    rng, n, best = np.random.default_rng(0), 2000, Gaussian().optimum(beta, 0.2)
    s = rng.normal(size=(3 * n, 8))  # in units of their stds
    noise = (best.errors / best.variances)[:8] ** 0.5
    means, labels = s * (1 - noise**2) ** 0.5, 2 * (s[:, 0] > 0) + (s[:, 1] > 0)
    z = means + noise * rng.normal(size=s.shape)
    arrays = {"z": z[:n], "labels": labels[:n], "z_train": z[n:], "labels_train": labels[n:]}
    scores, _ = fit_latent("lr", arrays, "z", "_sample")
    stds = np.broadcast_to(noise, (n, 1, 8)).copy()
    mi = gaussian_mi(*map(torch.tensor, (z[:n], means[:n, None], stds, labels[:n])))
    high, se = upper_end(labels[:n], (mi.upper, mi.upper_se))
    assert scores["mi_z_low"] - 3 * scores["mi_z_low_se"] <= best.information <= high + 3 * se
    (low, low_se), (high, se) = mi.image_low, mi.image_high
    assert low - 3 * low_se <= best.rate <= high + 3 * se
    assert abs(scores["lr_acc_mean_sample"] - best.accuracy) <= 3 * scores["lr_acc_mean_sample_se"] + 0.005
    assert best.accuracy <= accuracy_bound(best.information, labels[:n]) + 0.01
    assert mi.is_saturated or abs(mi.mi - best.information) <= 3 * mi.se + mi.bias
