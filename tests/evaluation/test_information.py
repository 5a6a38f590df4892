"""Mutual information and the accuracy bound against closed forms, numerical integration and slow versions."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from sklearn.metrics import mutual_info_score

from utils.evaluation import information
from utils.evaluation.information import accuracy_bound, discrete_mi, entropy, gaussian_mi, log_mixtures

SVHN = np.repeat(np.arange(10), [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595])


def draws(means, stds, seed=0):
    g = torch.Generator().manual_seed(seed)
    return means + stds * torch.randn(means.shape, generator=g, dtype=torch.float64)


def slow_log_mixtures(samples, means, stds, labels):
    """The definition, image by image."""
    rows = []
    for s, label in zip(samples, labels, strict=True):
        log_p = torch.distributions.Normal(means, stds).log_prob(s).sum(-1)  # (N, S)
        log_p = log_p.logsumexp(1) - math.log(means.shape[1])
        others = log_p[torch.arange(len(log_p)) != len(rows)]
        rows.append(torch.stack([log_p.logsumexp(0), log_p[labels == label].logsumexp(0), others.logsumexp(0)]))
    return torch.stack(rows)


@pytest.mark.parametrize("std", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("mixture", [1, 3])
def test_log_densities_equal_a_direct_loop(std, mixture, monkeypatch):
    monkeypatch.setattr(information, "ROWS", 70)
    monkeypatch.setattr(information, "COLUMNS", 100)
    g = torch.Generator().manual_seed(0)
    n, d = 300, 8
    means = torch.rand(n, mixture, d, generator=g, dtype=torch.float64) * 6 - 3
    stds = std * (0.5 + torch.rand(n, mixture, d, generator=g, dtype=torch.float64))
    labels = torch.randint(0, 7, (n,), generator=g)
    samples = draws(means[:, 0], stds[:, 0])
    fast = log_mixtures(samples, means, stds, (labels,))
    torch.testing.assert_close(fast, slow_log_mixtures(samples, means, stds, labels), rtol=0, atol=1e-6)


def test_mixtures_of_more_components_than_a_block_holds(monkeypatch):
    monkeypatch.setattr(information, "COLUMNS", 2)
    means = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    stds, labels, samples = torch.ones_like(means), torch.tensor([0, 1, 0, 1, 1]), means[:, 0]
    fast = log_mixtures(samples, means, stds, (labels,))
    torch.testing.assert_close(fast, slow_log_mixtures(samples, means, stds, labels), rtol=0, atol=1e-12)


def test_a_class_far_away_keeps_its_density():
    """Its sum relative to the largest underflows; the value must not."""
    means = torch.tensor([[[0.0]], [[100.0]]]).double()
    stds = torch.ones(2, 1, 1).double()
    samples = torch.zeros(2, 1).double()
    log_own = log_mixtures(samples, means, stds, (torch.tensor([0, 1]),))[1, 1].item()
    assert log_own == pytest.approx(scipy.stats.norm(100, 1).logpdf(0), rel=1e-12)


def test_gaussians_far_apart_give_the_labels_entropy():
    labels = torch.arange(1000) % 5
    means = (1000.0 * labels)[:, None, None].double().expand(-1, 1, 3)
    stds = torch.ones_like(means)
    mi = gaussian_mi(draws(means[:, 0], stds[:, 0]), means, stds, labels)
    assert mi.mi == pytest.approx(math.log(5), abs=1e-6) and mi.null < 0.05


def test_independent_labels_with_broad_posteriors_give_zero():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(2000, 1, 2, generator=g).double() * 0.1
    stds = torch.ones_like(means)
    mi = gaussian_mi(draws(means[:, 0], stds[:, 0]), means, stds, torch.randint(0, 10, (2000,), generator=g))
    assert abs(mi.mi) < 0.01 and abs(mi.null) < 0.01


def test_narrow_posteriors_saturate_and_the_null_tells():
    g = torch.Generator().manual_seed(0)
    means, labels = torch.randn(500, 1, 4, generator=g).double(), torch.arange(500) % 10
    mi = gaussian_mi(means[:, 0], means, torch.full_like(means, 1e-3), labels)
    assert mi.mi == pytest.approx(math.log(10), abs=1e-3) and mi.null == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.parametrize("gap", [0.5, 1.0, 3.0])
def test_two_classes_in_one_dimension_equal_numerical_integration(gap):
    n = 4000
    labels = torch.arange(n) % 2
    means = (gap * (2 * labels - 1)).double()[:, None, None]
    stds = torch.ones_like(means)
    mi = gaussian_mi(draws(means[:, 0], stds[:, 0]), means, stds, labels)

    def integrand(t):
        p = [scipy.stats.norm(m, 1).pdf(t) for m in (-gap, gap)]
        total = sum(p) / 2
        return sum(v / 2 * math.log(v / total) for v in p if v > 0)

    expected = scipy.integrate.quad(integrand, -gap - 8, gap + 8)[0]
    assert abs(mi.mi - expected) < 3 * mi.se


def test_mixture_posteriors_equal_numerical_integration():
    """q(y|x) is a mixture of two Gaussians, as for y: samples of either component, classes +-1."""
    n = 4000
    labels = torch.arange(n) % 2
    centre = (2.0 * labels - 1).double()
    means = torch.stack([centre - 0.7, centre + 0.7], 1)[:, :, None]
    stds = torch.full_like(means, 0.8)
    component = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(3))
    samples = draws(means[torch.arange(n), component], stds[:, 0])
    mi = gaussian_mi(samples, means, stds, labels)

    def density(t, m):
        return (scipy.stats.norm(m - 0.7, 0.8).pdf(t) + scipy.stats.norm(m + 0.7, 0.8).pdf(t)) / 2

    def integrand(t):
        p = [density(t, m) for m in (-1, 1)]
        return sum(v / 2 * math.log(v / (sum(p) / 2)) for v in p if v > 0)

    assert abs(mi.mi - scipy.integrate.quad(integrand, -9, 9)[0]) < 3 * mi.se


def test_memory_and_shape_do_not_depend_on_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(333, 2, 3, generator=g)
    stds, labels = torch.rand(333, 2, 3, generator=g) + 0.1, torch.arange(333) % 4
    whole = gaussian_mi(means[:, 0], means, stds, labels)
    monkeypatch.setattr(information, "ROWS", 50)
    monkeypatch.setattr(information, "COLUMNS", 64)
    assert gaussian_mi(means[:, 0], means, stds, labels) == pytest.approx(whole, rel=1e-12)


def test_discrete_information_equals_sklearn():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 1000)
    b = (a + rng.integers(0, 3, 1000)) % 7
    assert discrete_mi(a, b) == pytest.approx(mutual_info_score(a, b))
    assert discrete_mi(a, a) == pytest.approx(entropy(a))
    assert entropy(a) == pytest.approx(scipy.stats.entropy(np.bincount(a)))


def grid_bound(mi, labels):
    """The largest a of a fine grid whose residual uncertainty is enough."""
    k = len(np.unique(labels))
    a = np.linspace(1 / k, 1, 2_000_001)[:-1]
    h2 = -a * np.log(a) - (1 - a) * np.log1p(-a)
    possible = entropy(labels) - h2 - (1 - a) * (math.log(k - 1) if k > 2 else 0) <= mi
    return a[possible].max() if possible.any() else 1 / k


@pytest.mark.parametrize("labels", [np.arange(2), np.arange(10), np.arange(100), SVHN], ids=["2", "10", "100", "SVHN"])
def test_accuracy_bound_equals_a_fine_grid_search(labels):
    h = entropy(labels)
    for mi in np.linspace(0, h, 12)[:-1]:
        assert accuracy_bound(mi, labels) == pytest.approx(grid_bound(mi, labels), abs=2e-6)
    assert accuracy_bound(h, labels) == 1 and accuracy_bound(h + 1, labels) == 1
    bounds = [accuracy_bound(mi, labels) for mi in np.linspace(0, h, 50)]
    assert (np.diff(bounds) > 0).all()


def test_accuracy_bound_known_values():
    assert accuracy_bound(0.0, np.arange(10)) == pytest.approx(0.1)
    assert accuracy_bound(0.0, SVHN) == pytest.approx(0.239, abs=1e-3)
    assert accuracy_bound(1.0, np.arange(10)) == pytest.approx(0.689, abs=1e-3)
    assert accuracy_bound(1.0, SVHN) == pytest.approx(0.715, abs=1e-3)
    assert accuracy_bound(0.5, np.zeros(9, dtype=int)) == 1
