"""Information on the label against closed forms, integration and slow versions; its bracket."""

from math import exp, inf, log, nan, sqrt

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm, sem
from sklearn.metrics import mutual_info_score

from tests.reliability.trials import first
from utils.evaluation import information
from utils.evaluation.information import (
    MutualInformation,
    accuracy_bound,
    channel_bound,
    channel_bracket,
    discrete_mi,
    gaussian_mi,
    upper_end,
)
from utils.evaluation.probes import entropy, fit_probe, label_entropy

SVHN = np.repeat(np.arange(10), [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595])
K = 4  # classes of the synthetic latents


def draws(means, stds):
    g = torch.Generator().manual_seed(0)
    return means + stds * torch.randn(means.shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("n, mixture, columns", [(60, 1, 20), (60, 3, 20), (5, 3, 2)])
@pytest.mark.parametrize("std", [1e-3, 0.1, 2.0])
def test_the_estimate_and_its_bound_equal_a_direct_loop(std, n, mixture, columns, monkeypatch):
    """In blocks; the smallest holds fewer columns than a mixture has components."""
    monkeypatch.setattr(information, "ROWS", 14)
    monkeypatch.setattr(information, "COLUMNS", columns)
    g = torch.Generator().manual_seed(0)
    means = torch.rand(n, mixture, 8, generator=g).double() * 6 - 3
    stds = std * (0.5 + torch.rand(n, mixture, 8, generator=g).double())
    labels = torch.arange(n) % 3
    samples = draws(means[:, 0], stds[:, 0])
    values, uppers, without = [], [], []
    for i in range(n):
        log_p = torch.distributions.Normal(means, stds).log_prob(samples[i]).sum(2)
        log_p = log_p.logsumexp(1).numpy() - log(mixture)
        same, others = log_p[labels == labels[i]], np.delete(log_p, i)
        of_class = logsumexp(same) - log(len(same))
        values.append(of_class - logsumexp(log_p) + log(n))
        uppers.append(of_class - logsumexp(others) + log(n - 1))
        others_of_class = others[np.delete((labels == labels[i]).numpy(), i)]
        ratio = np.exp(logsumexp(others_of_class) - log(max(1, len(same) - 1)) - logsumexp(others) + log(n - 1))
        without.append(log(ratio * (1 - 1 / n) + 1 / n))
    mi = gaussian_mi(samples, means, stds, labels)
    means = [np.mean(uppers, where=labels.numpy() == k) for k in labels.unique().tolist()]
    errors = sem(values), max(sem(uppers), sem([*uppers, *means, *means]))
    assert (mi.mi, mi.upper) == approx((np.mean(values), np.mean(uppers)), abs=1e-6)
    assert mi.bias == approx((np.mean(values) - np.mean(without)) / 2, abs=1e-6)
    assert (mi.se, mi.upper_se) == approx(errors, rel=1e-5, abs=1e-9)


def test_a_class_far_away_keeps_its_density():
    """Its sum relative to the largest underflows; the value must not."""
    means, stds = torch.tensor([[[0.0]], [[100.0]]]).double(), torch.ones(2, 1, 1).double()
    samples, labels = torch.zeros(2, 1).double(), torch.tensor([0, 1])
    log_p = information.log_mixtures(samples, means, stds, (labels,), torch.arange(2))
    assert log_p[1, 1].item() == approx(norm(100, 1).logpdf(0), rel=1e-12)


@pytest.mark.parametrize("gap, shifts, std", [(0.5, [0.0], 1.0), (3.0, [0.0], 1.0), (1.0, [-0.7, 0.7], 0.8)])
def test_two_classes_in_one_dimension_equal_numerical_integration(gap, shifts, std):
    """Around -gap and gap; the last posterior is a mixture of two Gaussians, as of y."""
    n, g = 4000, torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 2
    means = (gap * (2.0 * labels - 1))[:, None, None] + torch.tensor(shifts).double()[:, None]
    component = torch.randint(0, len(shifts), (n,), generator=g)
    samples = draws(means[torch.arange(n), component], std)
    mi = gaussian_mi(samples, means, torch.full_like(means, std), labels)

    def integrand(t):
        p = [norm.pdf(t, m + np.array(shifts), std).mean() for m in (-gap, gap)]
        return sum(v / 2 * log(v / (sum(p) / 2)) for v in p if v > 0)

    assert abs(mi.mi - quad(integrand, -gap - 8, gap + 8)[0]) < 3 * mi.se


def test_discrete_information_equals_sklearn():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 1000)
    b = (a + rng.integers(0, 3, 1000)) % 7
    assert discrete_mi(a, b) == approx(mutual_info_score(a, b))
    assert discrete_mi(a, a) == approx(entropy(a))
    assert entropy(a) == approx(scipy_entropy(np.bincount(a)))


def test_the_bound_of_a_category_drawn_from_its_probabilities():
    labels = np.arange(1000) % K
    certain, right = np.eye(K)[labels], 0.9 + 0.1 / K
    assert channel_bound(certain, labels) == approx((log(999 / 249), 0), abs=1e-12)  # 250 of a class, less the own
    assert channel_bound(np.full((1000, 7), 1 / 7), labels) == approx((0, 0), abs=1e-12)
    expected = log(K) + right * log(right) + (1 - right) * log((1 - right) / (K - 1))
    assert channel_bound(0.9 * certain + 0.1 / K, labels)[0] == approx(expected, abs=(K - 1) / 1000)  # symmetric
    assert channel_bound(np.eye(2)[[0, 0, 1]], np.array([0, 0, 1]))[0] == inf  # nothing else is in its category


def test_the_entropy_of_labels_is_corrected_for_their_number():
    rng, p = np.random.default_rng(0), np.array([0.6, 0.3, 0.1])
    drawn = [label_entropy(rng.choice(3, 100, p=p)) for _ in range(2000)]
    (mean, error), (spread, _) = np.mean(drawn, 0), np.std(drawn, 0)
    assert mean == approx(scipy_entropy(p), abs=0.003) and error == approx(spread, rel=0.1)
    assert label_entropy(np.arange(100) % K) == approx((log(K), 0), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 100, "SVHN"])
def test_accuracy_bound_equals_a_fine_grid_search(classes):
    labels = SVHN if classes == "SVHN" else np.arange(classes)
    h, k = label_entropy(labels)[0], len(np.unique(labels))
    grid = np.linspace(1 / k, 1, 2_000_001)[:-1]
    h2 = -grid * np.log(grid) - (1 - grid) * np.log1p(-grid)
    needed = h - h2 - (1 - grid) * (log(k - 1) if k > 2 else 0)  # nats, for an accuracy
    for mi in np.linspace(0, h, 12)[:-1]:
        expected = grid[needed <= mi].max() if (needed <= mi).any() else grid[0]
        assert accuracy_bound(mi, labels) == approx(expected, abs=2e-6)
    assert accuracy_bound(h, labels) == 1 and accuracy_bound(h + 1, labels) == 1
    assert (np.diff([accuracy_bound(mi, labels) for mi in np.linspace(0, h, 50)]) > 0).all()
    assert accuracy_bound(0.5, 0 * labels) == 1  # of one class


class Latents:
    """N images; posteriors average to unit variance; the first coordinate is around the class's centre."""

    def __init__(self, n: int, rate: float, d: int, seed: int, informative: bool = True):
        rng = np.random.default_rng(seed)
        self.labels, self.std = np.arange(n) % K, exp(-rate / d)
        between = 0.7 * (1 - self.std**2) * informative  # variance of the centres
        self.centres = (np.arange(K) - 1.5) * sqrt(between / 1.25)
        self.within = sqrt(1 - between)
        self.means = rng.normal(size=(n, d)) * sqrt(1 - self.std**2)
        self.means[:, 0] = self.centres[self.labels] + rng.normal(size=n) * sqrt(self.within**2 - self.std**2)
        self.samples = self.means + self.std * rng.normal(size=(n, d))
        self.rates = 0.5 * (self.means**2 + self.std**2 - 1).sum(1) - d * log(self.std)

    @property
    def truth(self) -> float:
        """I(z; label), by numerical integration."""

        def integrand(t):
            p = norm(self.centres, self.within).pdf(t)
            return float((p / K * np.log(p / p.mean())).sum())

        return quad(integrand, -7, 7, limit=200)[0]

    def estimate(self) -> MutualInformation:
        samples, means, labels = map(torch.tensor, (self.samples, self.means[:, None], self.labels))
        return gaussian_mi(samples, means, torch.full_like(means, self.std), labels)

    def bracket(self, train: "Latents", mi: MutualInformation):
        """Lower and upper end with standard errors, accuracy of the probe on samples."""
        data = (train.samples, train.labels), (self.samples, self.labels)
        probe, _ = fit_probe("lr", *data, "", standardize=True)
        low = max(0.0, entropy(self.labels) - probe["lr_nll"]), probe["lr_nll_se"]
        rate = self.rates.mean(), sem(self.rates)
        high = upper_end(self.labels, rate, (mi.upper, mi.upper_se))
        return *low, *high, probe["lr_acc_mean"]


@pytest.mark.parametrize("d, rate", [(1, 0.1), (2, 1.0), (4, 4.0), (8, "ln N"), (8, "3 ln N")])
@pytest.mark.parametrize("n_and_seed", first(2, (360, 0), (2000, 0), (360, 1), (360, 2), (360, 3), (10_000, 0)))
def test_the_bracket_holds_the_truth_and_the_estimate_says_when_it_does_not(n_and_seed, d, rate):
    n, seed = n_and_seed
    rate = {"ln N": log(n), "3 ln N": 3 * log(n)}.get(rate, rate)
    test, train = Latents(n, rate, d, seed), Latents(n, rate, d, seed + 100)
    assert test.rates.mean() == approx(rate, rel=0.1)
    mi = test.estimate()
    low, low_se, high, high_se, accuracy = test.bracket(train, mi)
    assert low - 3 * low_se <= test.truth <= high + 3 * high_se
    assert high - low < 0.9 * entropy(test.labels) and low > 0 and high <= entropy(test.labels)
    if rate <= 1:  # few posteriors are narrow, so that leaving one of many out costs hardly anything
        assert high - test.truth <= 3 * high_se + 10 * exp(rate) / n
    assert accuracy <= accuracy_bound(high, test.labels) + 3 * sqrt(0.25 / n)
    if rate > log(n) - 2:  # the estimate claims nearly all of H(label), whatever the truth
        assert mi.is_saturated and mi.mi > test.truth + 3 * mi.se
    elif not mi.is_saturated:
        assert abs(mi.mi - test.truth) < 5 * mi.se


@pytest.mark.parametrize("n", first(1, 1000, 360, 10_000))
@pytest.mark.parametrize("rate", [1e-4, 5.0, 20.0])
def test_latents_that_know_nothing_of_the_label(rate, n):
    """Collapsed ones, where everything says 0; ones of other things, where the lower end does."""
    test, train = Latents(n, rate, 6, 0, informative=False), Latents(n, rate, 6, 1, informative=False)
    mi = test.estimate()
    low, low_se, high, high_se, accuracy = test.bracket(train, mi)
    assert low <= 3 * low_se and low < 0.02 and abs(accuracy - 1 / K) < 4 * sqrt(0.19 / n)
    if rate < 1:
        assert 0 <= high < 2e-3 and not mi.is_saturated and abs(mi.mi) < 2e-3
        assert accuracy_bound(high, test.labels) < 1 / K + 0.04
    else:
        assert mi.is_saturated or mi.mi < 0.1
        assert mi.mi > 0.5 or rate < 20


@pytest.mark.parametrize("trials", first(1, 20, 200))
@pytest.mark.parametrize("n, d, rate", [(360, 2, 0.5), (360, 4, 4.0), (360, 8, 20.0), (1000, 1, 2.0)])
def test_the_information_on_the_image_is_between_its_ends(n, d, rate, trials):
    """The label's, and what a class's own spread and the other dimensions, all Gaussian, add."""
    of, covered, ends = Latents(n, rate, d, 0), [], []
    truth = of.truth + log(of.within / of.std) - (d - 1) * log(of.std)
    for of in (Latents(n, rate, d, seed) for seed in range(trials)):
        (low, low_se), (high, high_se) = (mi := of.estimate()).image_low, mi.image_high
        covered.append((low - 1.96 * low_se <= truth, truth <= high + 1.96 * high_se))
        ends.append((low, high))
    low, high = np.mean(ends, 0)
    assert (np.mean(covered, 0) >= 0.93).all() and low <= log(n) + 1e-9
    assert high - low < 0.2 or rate > 2
    assert log(n) - low < 0.1 or rate < 20


def test_the_information_of_categories_on_the_image():
    q = np.random.default_rng(0).dirichlet(np.ones(5), 3000)
    (low, low_se), (high, high_se) = channel_bracket(q)
    mean_divergence = (q * np.log(5 * q)).sum(1)
    assert low == approx(mean_divergence.mean(), abs=3e-3) and low < high < low + 2e-3
    assert (low_se, high_se) == approx((sem(mean_divergence),) * 2, rel=0.03)
    assert np.abs(channel_bracket(np.full((20, 5), 0.2))).max() < 1e-12


@pytest.mark.parametrize("trials", first(1, 6, 200))
@pytest.mark.parametrize("n", first(1, 360, 2000))
@pytest.mark.parametrize("d, rates", [(1, (0.5, 2.5, 3.5)), (4, (0.5, 2.5, 3, 3.5)), (8, (0.1, 1, 2.5, 3, 3.5, 5))])
def test_the_estimate_is_saturated_where_it_is_biased(d, rates, n, trials):
    """By more than three errors, and never by less than one."""
    for rate in rates:
        latents = [Latents(n, rate, d, seed) for seed in range(trials)]
        estimates = [one.estimate() for one in latents]
        bias, flagged = (
            np.mean(values) for values in zip(*((mi.mi, mi.is_saturated) for mi in estimates), strict=True)
        )
        biased_by = (bias - latents[0].truth) / np.mean([mi.se for mi in estimates])
        assert flagged >= 0.95 if biased_by > 3 else flagged <= 0.05 or biased_by > 1


def test_a_sharp_z_that_tells_the_label_is_not_saturated():
    test = Latents(360, 3.0, 2, 0)
    test.means[:, 0] += 50 * test.labels
    test.samples[:, 0] += 50 * test.labels
    mi = test.estimate()
    assert mi.mi == approx(log(K)) and not mi.is_saturated


def test_the_upper_end_is_the_smallest_bound():
    labels = np.arange(100) % K
    assert upper_end(labels, (9.0, 0.1), (3.0, 0.2)) == label_entropy(labels)
    assert upper_end(labels, (1.0, 0.1), (0.5, 0.2)) == (0.5, 0.2)
    assert upper_end(labels, (1.0, 0.1), (nan, nan)) == (1.0, 0.1)
    assert upper_end(labels, (0.1, 0.01), (-0.2, 0.2)) == (0.0, 0.2)
