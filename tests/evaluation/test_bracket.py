"""The bracket of I(latent; label) on synthetic latents of known information, from collapsed ones to narrow ones."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from scipy.special import logsumexp

from utils.evaluation.information import MutualInformation, accuracy_bound, channel_mi, gaussian_mi, upper_end
from utils.evaluation.probes import entropy, fit_probe

K = 4


class Latents:
    """N images whose posteriors N(m, std^2) average to unit variance; the first dimension depends on the label.

    Given the label, a sample's first coordinate is Gaussian around the class's centre, the others are not told apart.
    """

    def __init__(self, n: int, rate: float, d: int, seed: int, informative: bool = True):
        rng = np.random.default_rng(seed)
        self.labels, self.std = np.arange(n) % K, math.exp(-rate / d)
        between = 0.7 * (1 - self.std**2) * informative  # variance of the centres
        self.centres = (np.arange(K) - 1.5) * math.sqrt(between / 1.25)
        self.within = math.sqrt(1 - between)
        self.means = rng.normal(size=(n, d)) * math.sqrt(1 - self.std**2)
        self.means[:, 0] = self.centres[self.labels] + rng.normal(size=n) * math.sqrt(self.within**2 - self.std**2)
        self.samples = self.means + self.std * rng.normal(size=(n, d))
        self.rates = 0.5 * (self.means**2 + self.std**2 - 1).sum(1) - d * math.log(self.std)

    @property
    def truth(self) -> float:
        """I(z; label), by numerical integration."""

        def integrand(t):
            p = scipy.stats.norm(self.centres, self.within).pdf(t)
            return float((p / K * np.log(p / p.mean())).sum())

        return scipy.integrate.quad(integrand, -7, 7, limit=200)[0]

    def estimate(self) -> MutualInformation:
        samples, means, labels = (
            torch.tensor(self.samples),
            torch.tensor(self.means)[:, None],
            torch.tensor(self.labels),
        )
        return gaussian_mi(samples, means, torch.full_like(means, self.std), labels)

    def bracket(self, train: "Latents", mi: MutualInformation):
        """Lower end and its standard error, upper end and its standard error, accuracy of the probe on samples."""
        probe, _ = fit_probe("lr", (train.samples, train.labels), (self.samples, self.labels), "", standardize=True)
        low = max(0.0, entropy(self.labels) - probe["lr_nll"])
        rate = self.rates.mean(), scipy.stats.sem(self.rates)
        return low, probe["lr_nll_se"], *upper_end(self.labels, rate, (mi.upper, mi.upper_se)), probe["lr_acc_mean"]


CASES = [(360, seed) for seed in range(4)] + [(10_000, 0)]


@pytest.mark.parametrize("d, rate", [(1, 0.1), (2, 1.0), (4, 4.0), (8, "ln N"), (8, "3 ln N")])
@pytest.mark.parametrize("n, seed", CASES)
def test_the_bracket_holds_the_truth_and_the_estimate_says_when_it_does_not(n, seed, d, rate):
    rate = {"ln N": math.log(n), "3 ln N": 3 * math.log(n)}.get(rate, rate)
    test, train = Latents(n, rate, d, seed), Latents(n, rate, d, seed + 100)
    assert test.rates.mean() == pytest.approx(rate, rel=0.1)
    mi = test.estimate()
    low, low_se, high, high_se, accuracy = test.bracket(train, mi)
    assert low - 3 * low_se <= test.truth <= high + 3 * high_se
    assert high - low < 0.9 * entropy(test.labels) and low > 0 and high <= entropy(test.labels)
    if rate <= 1:  # few posteriors are narrow, so that leaving one of many out costs hardly anything
        assert high - test.truth <= 3 * high_se + 10 * math.exp(rate) / n
    assert accuracy <= accuracy_bound(high, test.labels) + 3 * math.sqrt(0.25 / n)
    if rate > math.log(n) - 2:  # the estimate claims nearly all of H(label), whatever the truth
        assert mi.is_saturated(rate, n) and mi.mi > test.truth + 3 * mi.se
    elif not mi.is_saturated(rate, n):
        assert abs(mi.mi - test.truth) < 4 * mi.se + rate * math.exp(rate) / n


def test_a_collapsed_y_says_nothing():
    """Four samples of z make its posterior a mixture of four all but equal Gaussians, those of all other images."""
    n, rng = 1000, np.random.default_rng(0)
    labels, means = np.arange(n) % K, 1e-3 * rng.normal(size=(n, 4, 6))
    samples = means[:, 0] + rng.normal(size=(n, 6))
    mi = gaussian_mi(*(torch.tensor(v) for v in (samples, means, np.ones_like(means), labels)))
    rate = 0.5 * (means**2).sum(2).mean()
    high, _ = upper_end(labels, (rate, 0.0), (mi.upper, mi.upper_se))
    assert 0 <= high <= rate < 1e-5 and abs(mi.mi) < 1e-3 and not mi.is_saturated(rate, n)


@pytest.mark.parametrize("n", [360, 10_000])
@pytest.mark.parametrize("rate", [1e-4, 5.0, 20.0])
def test_latents_that_know_nothing_of_the_label(rate, n):
    """Collapsed ones, where everything says 0; and informative ones of other things, where the lower end does."""
    test, train = Latents(n, rate, 6, 0, informative=False), Latents(n, rate, 6, 1, informative=False)
    mi = test.estimate()
    low, low_se, high, high_se, accuracy = test.bracket(train, mi)
    assert low <= 3 * low_se and low < 0.02 and abs(accuracy - 1 / K) < 4 * math.sqrt(0.19 / n)
    if rate < 1:
        assert 0 <= high < 2e-3 and not mi.is_saturated(rate, n) and abs(mi.mi) < 2e-3
        assert accuracy_bound(high, test.labels) < 1 / K + 0.04
    else:
        assert mi.is_saturated(rate, n) or mi.mi < 0.1
        assert mi.mi > 0.5 or rate < 20


def test_the_bracket_of_a_mixture_posterior():
    """As of y: each posterior is a mixture of 4 Gaussians, around the image's own mean."""
    n, rng = 1000, np.random.default_rng(0)
    test = Latents(n, 2.0, 2, 0)
    spread = 0.4 * rng.normal(size=(n, 4, 2)) * [0, 1]  # in the dimension that does not know the label
    means = torch.tensor(test.means[:, None] + spread)
    samples = torch.tensor(test.samples + spread[:, 0])
    mi = gaussian_mi(samples, means, torch.full_like(means, test.std), torch.tensor(test.labels))
    assert test.truth - 3 * mi.upper_se <= mi.upper < entropy(test.labels)


@pytest.mark.parametrize("rate", [1.0, 12.0])
def test_the_upper_bound_is_that_of_a_plain_double_loop(rate):
    """log q(s | label), own posterior included, less log q(s) of the others; each mean over images one by one."""
    n, rng = 40, np.random.default_rng(0)
    test = Latents(n, rate, 2, 0)
    means = test.means[:, None] + 0.1 * rng.normal(size=(n, 3, 2))

    def log_density(i, j):  # of image j's posterior at image i's sample
        return logsumexp([scipy.stats.norm(m, test.std).logpdf(test.samples[i]).sum() for m in means[j]]) - math.log(3)

    log_p = np.array([[log_density(i, j) for j in range(n)] for i in range(n)])
    expected = []
    for i in range(n):
        same = test.labels == test.labels[i]
        others = np.delete(log_p[i], i)
        expected.append(logsumexp(log_p[i, same]) - math.log(same.sum()) - logsumexp(others) + math.log(n - 1))
    expected = np.array(expected)
    mi = gaussian_mi(*(torch.tensor(v) for v in (test.samples, means, np.full_like(means, test.std), test.labels)))
    assert mi.upper == pytest.approx(expected.mean(), rel=1e-6)
    assert mi.upper_se == pytest.approx(scipy.stats.sem(expected), rel=1e-6)


def test_the_upper_end_is_the_smallest_bound():
    labels = np.arange(100) % K
    assert upper_end(labels, (9.0, 0.1), (3.0, 0.2)) == (entropy(labels), 0.0)
    assert upper_end(labels, (1.0, 0.1), (0.5, 0.2)) == (0.5, 0.2)
    assert upper_end(labels, (1.0, 0.1), (math.nan, math.nan)) == (1.0, 0.1)
    assert upper_end(labels, (0.1, 0.01), (-0.2, 0.2)) == (0.0, 0.2)


def test_information_of_a_category_and_the_label():
    labels = np.arange(1000) % K
    certain = np.eye(K)[labels]
    assert channel_mi(certain, labels) == pytest.approx(math.log(K))
    assert channel_mi(np.full((1000, 7), 1 / 7), labels) == pytest.approx(0, abs=1e-12)
    noisy = 0.9 * certain + 0.1 / K  # a symmetric channel
    right = 0.9 + 0.1 / K
    expected = math.log(K) + right * math.log(right) + (1 - right) * math.log((1 - right) / (K - 1))
    assert channel_mi(noisy, labels) == pytest.approx(expected)
