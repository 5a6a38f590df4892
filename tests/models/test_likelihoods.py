"""Likelihoods against scipy, closed forms, and sums over all pixel values."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from models.likelihoods import MixtureOfLogistics
from models.tables import LIKELIHOODS

LEVELS = torch.arange(256, dtype=torch.float64) / 255


def test_gaussian_with_sigma_071_on_cifar10_images():
    x, mean = torch.rand(4, 3, 32, 32).double(), torch.rand(4, 3, 32, 32).double()
    ll = LIKELIHOODS["GaussianFixedSigma"](3, 0.71)(mean).log_prob(x)
    mse = ((x - mean) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ll, -1770.85 - 3047.01 * mse, atol=0.02, rtol=0)
    expected = scipy.stats.norm(mean, 0.71).logpdf(x).sum((1, 2, 3))
    np.testing.assert_allclose(ll, expected, rtol=1e-10)


def test_learned_sigma_is_softly_limited():
    likelihood = LIKELIHOODS["GaussianLearnedSigma"](1, 0.5).double()
    x = torch.rand(2, 1, 4, 4).double()
    for log_sigma in (0.0, -3.0, -50.0):
        likelihood.log_sigma.data.fill_(log_sigma)
        sigma = math.exp(-6 + np.logaddexp(0, log_sigma + 6))
        expected = scipy.stats.norm(0.3, sigma).logpdf(x).sum((1, 2, 3))
        np.testing.assert_allclose(likelihood(torch.full_like(x, 0.3)).log_prob(x).detach(), expected, rtol=1e-9)


def test_bernoulli_of_grey_values():
    logits, x = torch.randn(3, 1, 4, 4).double(), torch.rand(3, 1, 4, 4).double()
    p = torch.sigmoid(logits)
    expected = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    distribution = LIKELIHOODS["Bernoulli"](1, 0.1)(logits)
    torch.testing.assert_close(distribution.log_prob(x), expected)
    torch.testing.assert_close(distribution.mean, p)


def mol(channels, k=4, scale=0.0, spread=1.0, seed=0):
    """One pixel's mixture, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    log_weights = torch.log_softmax(normal(1, k, 1, 1), 1)
    means = spread * normal(1, channels, k, 1, 1)
    coefficients = torch.tanh(normal(1, 3, k, 1, 1)) if channels == 3 else None
    return MixtureOfLogistics(log_weights, means, normal(1, channels, k, 1, 1) * 0.3 + scale, coefficients)


def repeat(mixture, n):
    return MixtureOfLogistics(*[t if t is None else t.expand(n, *t.shape[1:]) for t in mixture])


@pytest.mark.parametrize("scale", [1.0, -1.0, -3.0, -6.9])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_mol_probabilities_of_a_grey_pixel_sum_to_one(scale, spread):
    mixture = mol(1, scale=scale, spread=spread)
    p = repeat(mixture, 256).log_prob(LEVELS.reshape(256, 1, 1, 1)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)


def slow_mass(level, mean, scale):
    """Mass of one of the 256 levels under a logistic variable in [-1, 1], from the CDF."""
    centre = 2 * level / 255 - 1
    upper = 1.0 if level == 255 else scipy.stats.logistic.cdf(centre + 1 / 255, mean, scale)
    return upper - (0.0 if level == 0 else scipy.stats.logistic.cdf(centre - 1 / 255, mean, scale))


@pytest.mark.parametrize("scale", [1.0, -1.5, -6.9])
@pytest.mark.parametrize("red, green", [(0, 255), (120, 90), (255, 0), (3, 4)])
def test_mol_sums_over_blue_to_the_probability_of_red_and_green(scale, red, green):
    mixture = mol(3, k=2, scale=scale)
    mixture.means[:, 0] = 2 * red / 255 - 1 + 0.01  # so that tiny scales leave them a mass at all
    mixture.means[:, 1] = 2 * green / 255 - 1 - 0.01 - mixture.coefficients[:, 0] * (2 * red / 255 - 1)
    x = torch.stack([torch.full((256,), red / 255), torch.full((256,), green / 255), LEVELS], 1).reshape(256, 3, 1, 1)
    total = repeat(mixture, 256).log_prob(x.double()).exp().sum().item()
    expected = 0.0
    for k in range(2):
        m, s, c = (t[0, :, k, 0, 0].numpy() for t in (mixture.means, mixture.log_scales.exp(), mixture.coefficients))
        weight = mixture.log_weights[0, k, 0, 0].exp().item()
        expected += weight * slow_mass(red, m[0], s[0]) * slow_mass(green, m[1] + c[0] * (2 * red / 255 - 1), s[1])
    assert total == pytest.approx(expected, abs=1e-6)


def test_mol_sums_over_green_and_blue_to_the_probability_of_red():
    mixture = mol(3, k=3, scale=-1.0)
    green, blue = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    many = repeat(mixture, 256 * 256)
    for red in (0, 100, 255):
        x = torch.stack([torch.full_like(green, red / 255), green, blue], -1).reshape(-1, 3, 1, 1)
        means, scales = mixture.means[0, 0, :, 0, 0].numpy(), mixture.log_scales[0, 0, :, 0, 0].exp().numpy()
        weights = mixture.log_weights[0, :, 0, 0].exp().numpy()
        expected = sum(w * slow_mass(red, m, s) for w, m, s in zip(weights, means, scales, strict=True))
        assert many.log_prob(x).exp().sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, -2.0, -5.0])
def test_mol_sampling_frequencies_match_the_probabilities(scale):
    mixture, n = mol(1, scale=scale), 200_000
    samples = repeat(mixture, n).sample(torch.Generator().manual_seed(0))
    counts = torch.bincount((samples.flatten() * 255).round().long(), minlength=256)
    p = repeat(mixture, 256).log_prob(LEVELS.reshape(256, 1, 1, 1)).exp()
    bins = torch.cumsum(p * n, 0).div(20, rounding_mode="floor").long()  # neighbours together, >= about 20 in each
    observed = torch.zeros(int(bins.max()) + 1).double().index_add(0, bins, counts.double())
    expected = torch.zeros_like(observed).index_add(0, bins, p * n)
    full = expected > 5
    rest = [observed[~full].sum().item()], [expected[~full].sum().item()]
    assert rest[0][0] <= rest[1][0] + 6 * (rest[1][0] + 1) ** 0.5
    _, p_value = scipy.stats.chisquare(observed[full], expected[full] / expected[full].sum() * observed[full].sum())
    assert p_value > 1e-4
    assert repeat(mixture, 1).mean.item() == pytest.approx(samples.mean().item(), abs=4 * samples.std().item() / n**0.5)


def test_mol_colours_are_sampled_from_their_conditionals():
    """Frequencies of (R, G, B), coarsened to the lower or upper half of each colour, against summed probabilities."""
    mixture, n = mol(3, k=2, scale=-1.0), 100_000
    samples = repeat(mixture, n).sample(torch.Generator().manual_seed(1))
    bins = ((samples > 0.5).flatten(1).long() * torch.tensor([4, 2, 1])).sum(1)
    assert (samples * 255 - (samples * 255).round()).abs().max() < 1e-9
    p = torch.zeros(8, dtype=torch.float64)
    green, blue = (t.flatten() for t in torch.meshgrid(LEVELS, LEVELS, indexing="ij"))
    many = repeat(mixture, 256 * 256)
    for red in LEVELS:
        mass = many.log_prob(torch.stack([red.expand_as(green), green, blue], 1)[..., None, None]).exp()
        index = 4 * (red > 0.5).long() + 2 * (green > 0.5).long() + (blue > 0.5).long()
        p.index_add_(0, index, mass)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    _, p_value = scipy.stats.chisquare(torch.bincount(bins, minlength=8).tolist(), (p / p.sum() * n).tolist())
    assert p_value > 1e-4


@pytest.mark.parametrize("scale, spread", [(-3.0, 0.2), (-1.0, 1.0), (0.5, 1.0), (-2.0, 3.0)])
def test_mol_mean_matches_the_samples_mean(scale, spread):
    for seed in range(3):
        mixture, n = mol(3, k=3, scale=scale, spread=spread, seed=seed), 100_000
        samples = repeat(mixture, n).sample(torch.Generator().manual_seed(0))
        torch.testing.assert_close(mixture.mean.flatten(), samples.mean(0).flatten(), atol=8e-3, rtol=0)


def test_mol_reads_the_output_channels_in_the_documented_order():
    likelihood = LIKELIHOODS["MoL"](3, 0.1)
    out = torch.arange(100.0).reshape(1, 100, 1, 1)
    m = likelihood(out)
    torch.testing.assert_close(m.log_weights.flatten(), torch.log_softmax(torch.arange(10.0), 0))
    assert m.means[0, :, 0, 0, 0].tolist() == [10, 40, 70]
    assert m.log_scales[0, :, 0, 0, 0].tolist() == [20, 50, 80]
    assert LIKELIHOODS["MoL"](1, 0.1).outputs == 30


def test_mol_gradient():
    likelihood = LIKELIHOODS["MoL"](3, 0.1)
    out = torch.randn(2, 100, 2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randint(0, 256, (2, 3, 2, 2)).double() / 255
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0
    assert torch.autograd.gradcheck(lambda o: likelihood(o).log_prob(x), out)


def test_the_continuous_bernoulli_equals_torchs_and_integrates_to_one():
    logits = torch.tensor([-30.0, -4.0, -0.2, -0.0999, 0.0, 1e-4, 0.0999, 0.1001, 2.0, 25.0]).double()
    x = torch.linspace(0, 1, 10).double()
    pixels = LIKELIHOODS["ContinuousBernoulli"](1, 0.1)(logits[:, None, None, None])
    expected = torch.distributions.ContinuousBernoulli(logits=logits, lims=(0.4999999, 0.5000001))
    torch.testing.assert_close(pixels.log_prob(x[:, None, None, None]), expected.log_prob(x), rtol=1e-6, atol=1e-6)
    grid = torch.linspace(0, 1, 20_001).double()
    for a, mean in zip(logits, pixels.mean.flatten(), strict=True):
        density = LIKELIHOODS["ContinuousBernoulli"](1, 0.1)(a.expand(len(grid), 1)).log_prob(grid[:, None]).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)
        assert torch.trapezoid(density * grid, grid).item() == pytest.approx(mean.item(), abs=1e-5)


def test_the_continuous_bernoulli_has_finite_gradients():
    logits = torch.tensor([-100.0, -0.1, 0.0, 1e-8, 0.1, 100.0], requires_grad=True)
    pixels = LIKELIHOODS["ContinuousBernoulli"](1, 0.1)(logits[:, None])
    x = torch.tensor([0.0, 0.3, 0.5, 0.5, 0.7, 1.0])[:, None]
    (gradient,) = torch.autograd.grad(pixels.log_prob(x).sum(), logits)
    torch.testing.assert_close(gradient, (x - pixels.mean)[:, 0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Bernoulli", "GaussianFixedSigma"])
def test_the_floor_is_what_the_best_decoder_reaches(name):
    """-log p by gradient descent on the decoder's output comes down to it, and not below."""
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likelihood = LIKELIHOODS[name](1, 0.3)
    outputs = torch.zeros_like(x, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200)

    def loss():
        optimizer.zero_grad()
        total = -likelihood(outputs).log_prob(x).sum()
        total.backward()
        return total

    optimizer.step(loss)
    torch.testing.assert_close(-likelihood(outputs).log_prob(x), likelihood.floor(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(LIKELIHOODS["Bernoulli"](1, 0.1).floor((x > 0.5).double()), torch.zeros(3).double())
    assert LIKELIHOODS["ContinuousBernoulli"](1, 0.1).floor(x) is None
