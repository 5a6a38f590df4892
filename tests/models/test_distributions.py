"""Likelihoods and families of latents against scipy, torch.distributions, closed forms and sums over all levels."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.testing import assert_allclose
from pytest import approx
from scipy.stats import logistic
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.testing import assert_close

from models.latents import Gaussian, RelaxedOneHot, precision_weighted
from models.likelihoods import MixtureOfLogistics
from models.tables import LIKELIHOODS

LEVELS = torch.arange(256, dtype=torch.float64) / 255


def pixels(name, outputs, sigma=0.1):
    """The distribution of images of one channel that a decoder's outputs mean."""
    return LIKELIHOODS[name](1, sigma)(outputs)


def test_gaussian_with_sigma_071_on_cifar10_images():
    x, mean = torch.rand(4, 3, 32, 32).double(), torch.rand(4, 3, 32, 32).double()
    ll = pixels("GaussianFixedSigma", mean, 0.71).log_prob(x)
    mse = ((x - mean) ** 2).flatten(1).mean(1)
    assert_close(ll, -1770.85 - 3047.01 * mse, atol=0.02, rtol=0)
    expected = scipy.stats.norm(mean, 0.71).logpdf(x).sum((1, 2, 3))
    assert_allclose(ll, expected, rtol=1e-10)


def test_learned_sigma_is_softly_limited():
    likelihood = LIKELIHOODS["GaussianLearnedSigma"](1, 0.5).double()
    x = torch.rand(2, 1, 4, 4).double()
    for log_sigma in (0.0, -3.0, -50.0):
        likelihood.log_sigma.data.fill_(log_sigma)
        sigma = math.exp(-6 + np.logaddexp(0, log_sigma + 6))
        expected = scipy.stats.norm(0.3, sigma).logpdf(x).sum((1, 2, 3))
        assert_allclose(likelihood(torch.full_like(x, 0.3)).log_prob(x).detach(), expected, rtol=1e-9)


def test_bernoulli_of_grey_values():
    logits, x = torch.randn(3, 1, 4, 4).double(), torch.rand(3, 1, 4, 4).double()
    p = torch.sigmoid(logits)
    expected = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    assert_close(pixels("Bernoulli", logits).log_prob(x), expected)
    assert_close(pixels("Bernoulli", logits).mean, p)


def mol(channels, k=4, scale=0.0, spread=1.0):
    """One pixel's mixture, in float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    log_weights = torch.log_softmax(normal(1, k, 1, 1), 1)
    means = spread * normal(1, channels, k, 1, 1)
    coefficients = torch.tanh(normal(1, 3, k, 1, 1)) if channels == 3 else None
    return MixtureOfLogistics(log_weights, means, normal(1, channels, k, 1, 1) * 0.3 + scale, coefficients)


def repeat(mixture, n):
    return MixtureOfLogistics(*[t if t is None else t.expand(n, *t.shape[1:]) for t in mixture])


def mass(first, last, mean, scale):
    """Mass of the levels `first` to `last`, 0 to 255, under a logistic variable in [-1, 1], from either tail."""
    upper = np.where(last == 255, np.inf, (2 * last + 1) / 255 - 1)
    lower = np.where(first == 0, -np.inf, (2 * first - 1) / 255 - 1)
    p = logistic(mean, scale)
    return np.where(lower > mean, p.sf(lower) - p.sf(upper), p.cdf(upper) - p.cdf(lower))


def by_component(mixture):
    """Weights (K,), means and scales (C, K), and coefficients of red for green, red for blue, green for blue."""
    weights, *others = (t if t is None else t[0, ..., 0, 0].numpy() for t in mixture)
    means, log_scales, coefficients = others
    return np.exp(weights), means, np.exp(log_scales), coefficients


@pytest.mark.parametrize("scale", [1.0, -1.5, -6.9])
def test_mol_probabilities_are_those_of_a_plain_sum_of_cdfs(scale):
    """Around the means, where tiny scales leave levels a mass at all, and at both ends; grey ones sum to 1."""
    for spread in (0.3, 3.0):
        grey = repeat(mol(1, scale=scale, spread=spread), 256)
        weights, means, scales, _ = by_component(grey)
        expected = (weights * mass(np.arange(256)[:, None], np.arange(256)[:, None], means[0], scales[0])).sum(1)
        ours = grey.log_prob(LEVELS.reshape(256, 1, 1, 1)).exp()
        assert_allclose(ours, expected, rtol=1e-8, atol=1e-15)
        assert ours.sum().item() == approx(1, abs=1e-6)
    for red, green in ((0, 255), (120, 90), (255, 0), (3, 4)):
        mixture, r, g = mol(3, k=2, scale=scale), 2 * red / 255 - 1, 2 * green / 255 - 1
        mixture.means[:, 0] = r + 0.01
        mixture.means[:, 1] = g - 0.01 - mixture.coefficients[:, 0] * r
        weights, means, scales, c = by_component(mixture)
        blue = np.arange(256)[:, None]
        expected = weights * mass(red, red, means[0], scales[0]) * mass(green, green, means[1] + c[0] * r, scales[1])
        expected = (expected * mass(blue, blue, means[2] + c[1] * r + c[2] * g, scales[2])).sum(1)
        x = torch.stack([LEVELS[red].expand(256), LEVELS[green].expand(256), LEVELS], 1)
        ours = repeat(mixture, 256).log_prob(x.reshape(256, 3, 1, 1)).exp()
        assert_allclose(ours, expected, rtol=1e-6, atol=1e-300)
        assert ours.max() > 1e-10


@pytest.mark.parametrize("scale", [0.0, -2.0, -5.0])
def test_mol_sampling_frequencies_match_the_probabilities(scale):
    mixture, n = mol(1, scale=scale), 200_000
    samples = repeat(mixture, n).sample(torch.Generator().manual_seed(0))
    counts = torch.bincount((samples.flatten() * 255).round().long(), minlength=256)
    p = repeat(mixture, 256).log_prob(LEVELS.reshape(256, 1, 1, 1)).exp()
    gap = (counts.cumsum(0) / n - p.cumsum(0)).abs().max().item()  # Kolmogorov and Smirnov's
    assert gap < scipy.stats.kstwobign.isf(1e-4) / n**0.5
    assert repeat(mixture, 1).mean.item() == approx(samples.mean().item(), abs=4 * samples.std().item() / n**0.5)


def test_mol_colours_are_sampled_from_their_conditionals():
    """Frequencies of (R, G, B), coarsened to the lower or upper half of each colour, against sums over R and G."""
    mixture, n = mol(3, k=2, scale=-1.0), 100_000
    samples = repeat(mixture, n).sample(torch.Generator().manual_seed(1))
    assert (samples * 255 - (samples * 255).round()).abs().max() < 1e-9
    halves = (samples > 0.5).flatten(1).long()
    weights, means, scales, c = by_component(mixture)
    red, green = np.arange(256)[:, None, None], np.arange(256)[:, None]
    r, g = 2 * red / 255 - 1, 2 * green / 255 - 1
    p = weights * mass(red, red, means[0], scales[0]) * mass(green, green, means[1] + c[0] * r, scales[1])
    shifted = means[2] + c[1] * r + c[2] * g
    p = np.stack([(p * mass(*half, shifted, scales[2])).sum(2) for half in ((0, 127), (128, 255))], 2)
    expected = p.reshape(2, 128, 2, 128, 2).sum((1, 3)).ravel()
    counts = torch.bincount(halves @ torch.tensor([4, 2, 1]), minlength=8)
    assert expected.sum() == approx(1, abs=1e-9)
    assert scipy.stats.chisquare(counts, n * expected).pvalue > 1e-4


@pytest.mark.parametrize("scale, spread", [(-3.0, 0.2), (-1.0, 1.0), (0.5, 1.0), (-2.0, 3.0)])
def test_mol_mean_matches_the_samples_mean(scale, spread):
    mixture = mol(3, k=3, scale=scale, spread=spread)
    samples = repeat(mixture, 100_000).sample(torch.Generator().manual_seed(0))
    assert_close(mixture.mean.flatten(), samples.mean(0).flatten(), atol=8e-3, rtol=0)


def test_mol_reads_the_output_channels_in_the_documented_order():
    m = LIKELIHOODS["MoL"](3, 0.1)(torch.arange(100.0).reshape(1, 100, 1, 1))
    assert_close(m.log_weights.flatten(), torch.log_softmax(torch.arange(10.0), 0))
    assert m.means[0, :, 0, 0, 0].tolist() == [10, 40, 70]
    assert m.log_scales[0, :, 0, 0, 0].tolist() == [20, 50, 80]
    assert LIKELIHOODS["MoL"](1, 0.1).outputs == 30


def test_mol_gradient():
    likelihood = LIKELIHOODS["MoL"](3, 0.1)
    out = torch.randn(1, 100, 1, 2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0, 1.0], [0.2, 0.4], [1.0, 0.6]]).double().reshape(1, 3, 1, 2)
    assert torch.autograd.gradcheck(lambda o: likelihood(o).log_prob(x), out)


def test_continuous_bernoulli():
    logits = torch.tensor([-30.0, -4.0, -0.2, -0.0999, 0.0, 1e-4, 0.0999, 0.1001, 2.0, 25.0]).double()
    x = torch.linspace(0, 1, 10).double()
    ours = pixels("ContinuousBernoulli", logits[:, None])
    expected = torch.distributions.ContinuousBernoulli(logits=logits, lims=(0.4999999, 0.5000001))
    assert_close(ours.log_prob(x[:, None]), expected.log_prob(x), rtol=1e-6, atol=1e-6)
    grid = torch.linspace(0, 1, 20_001).double()
    for a, mean in zip(logits, ours.mean.flatten(), strict=True):
        density = pixels("ContinuousBernoulli", a.expand(len(grid), 1)).log_prob(grid[:, None]).exp()
        assert torch.trapezoid(density, grid).item() == approx(1, abs=1e-5)
        assert torch.trapezoid(density * grid, grid).item() == approx(mean.item(), abs=1e-5)


def test_continuous_bernoulli_near_the_uniform():
    a = torch.tensor([-0.0999, 0.01, 0.0999]).double()
    near = pixels("ContinuousBernoulli", a[:, None])
    log_norm = torch.log(torch.sinh(a / 2) / (a / 2))
    assert_close(near.log_prob(torch.full((3, 1), 0.5).double()), -log_norm, rtol=0, atol=1e-11)
    assert_close(near.mean[:, 0], 0.5 + 0.5 / torch.tanh(a / 2) - 1 / a, rtol=0, atol=1e-9)
    logits = torch.tensor([-100.0, -0.1, 0.0, 1e-8, 0.1, 100.0], requires_grad=True)
    ours = pixels("ContinuousBernoulli", logits[:, None])
    x = torch.tensor([0.0, 0.3, 0.5, 0.5, 0.7, 1.0])[:, None]
    (gradient,) = torch.autograd.grad(ours.log_prob(x).sum(), logits)
    assert_close(gradient, (x - ours.mean)[:, 0].detach(), rtol=1e-4, atol=1e-5)


def test_the_floor_is_what_the_best_decoder_reaches():
    """-log p comes down to it where the decoder's output gives a mean of x, and rises to either side."""
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, best in (("Bernoulli", torch.logit(x)), ("GaussianFixedSigma", x)):
        likelihood = LIKELIHOODS[name](1, 0.3)
        assert_close(-likelihood(best).log_prob(x), likelihood.floor(x))
        for shift in (-0.01, 0.01):
            assert (-likelihood(best + shift).log_prob(x) > likelihood.floor(x)).all()
    assert torch.equal(LIKELIHOODS["Bernoulli"](1, 0.1).floor((x > 0.5).double()), torch.zeros(3).double())
    assert LIKELIHOODS["ContinuousBernoulli"](1, 0.1).floor(x) is None


def gaussian(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=g, dtype=torch.float64)
    return Gaussian(mean, torch.rand(shape, generator=g, dtype=torch.float64) + 0.1)


def as_torch(q):
    return Independent(Normal(q.mean, q.std), q.mean.dim() - 1)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)])
def test_gaussian_equals_torch_distributions(shape):
    q, p = gaussian(*shape), gaussian(*shape, seed=1)
    assert_close(q.kl(p), kl_divergence(as_torch(q), as_torch(p)))
    standard = Gaussian(torch.zeros(shape).double(), torch.ones(shape).double())
    assert_close(q.rate(), kl_divergence(as_torch(q), as_torch(standard)))
    assert_close(q.log_prob(p.mean), as_torch(q).log_prob(p.mean))
    assert_close(Gaussian.prior_log_prob(p.mean), as_torch(standard).log_prob(p.mean))
    assert (q.kl(p) > 0).all() and (q.kl(q) == 0).all()
    assert_close(q.kl_of_units(p), kl_divergence(Normal(*q), Normal(*p)))
    assert_close(q.rate_of_units(), kl_divergence(Normal(*q), Normal(*standard)))


def test_gaussian_samples_have_its_moments():
    q = gaussian(1, 3)
    samples = q.sample(Gaussian.noise((100_000, 3), torch.Generator().manual_seed(0)).double())
    assert_close(samples.mean(0), q.mean[0], atol=0.02, rtol=0)
    assert_close(samples.std(0), q.std[0], atol=0.02, rtol=0)


def test_rates_of_extreme_outputs_are_finite():
    for pre in (-1e4, 1e4):
        q = Gaussian.from_outputs(torch.zeros(1, 2), torch.full((1, 2), pre))
        assert q.rate().isfinite().all() and q.rate() > 0


def test_ladder_posterior_adds_precisions():
    a, b = gaussian(4, 3), gaussian(4, 3, seed=1)
    q = precision_weighted(a, b)
    assert_close(q.std**-2, a.std**-2 + b.std**-2)
    assert_close(q.mean * q.std**-2, a.mean * a.std**-2 + b.mean * b.std**-2)
    flat = precision_weighted(Gaussian(a.mean, torch.full_like(a.std, 1e8)), b)
    assert_close(flat, b)


def test_gumbel_rate_is_the_kl_to_the_uniform():
    logits = torch.randn(6, 10, dtype=torch.float64)
    uniform = Categorical(logits=torch.zeros(6, 10, dtype=torch.float64))
    assert_close(RelaxedOneHot(logits).rate(), kl_divergence(Categorical(logits=logits), uniform))
    assert RelaxedOneHot(torch.zeros(1, 7)).rate().abs() < 1e-6
    one_hot = RelaxedOneHot(torch.tensor([[200.0, 0, 0, 0]])).rate()
    assert_close(one_hot, torch.tensor([math.log(4)]))
    assert_close(RelaxedOneHot(logits).rate_of_units().sum(1), RelaxedOneHot(logits).rate())


def test_gumbel_temperature_schedule():
    assert RelaxedOneHot.temperature(0) == 1
    assert RelaxedOneHot.temperature(50) == approx(math.exp(-0.35))
    assert RelaxedOneHot.temperature(200) == 0.4


def test_gumbel_samples_follow_the_categories():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = RelaxedOneHot.noise((100_000, 3), torch.Generator().manual_seed(0))
    q = RelaxedOneHot(logits.expand(100_000, 3))
    hard = q.sample(noise)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert_close(hard.mean(0), torch.softmax(logits[0], 0), atol=0.006, rtol=0)
    soft = q.sample(noise, torch.tensor(0.5))
    assert_close(soft, torch.softmax((logits + noise) / 0.5, 1))
    prior = RelaxedOneHot.from_prior(noise)
    assert_close(prior.mean(0), torch.full((3,), 1 / 3), atol=0.006, rtol=0)


def test_hard_samples_pass_gradients_straight_through():
    logits = torch.zeros(1, 3, requires_grad=True)
    RelaxedOneHot(logits).sample(torch.tensor([[0.0, 1.0, 0.0]]))[0, 1].backward()
    assert logits.grad.abs().sum() > 0
