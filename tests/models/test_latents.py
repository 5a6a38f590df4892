"""Families of latents against torch.distributions and closed forms."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from models.latents import Gaussian, RelaxedOneHot, precision_weighted


def gaussian(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=g, dtype=torch.float64)
    return Gaussian(mean, torch.rand(shape, generator=g, dtype=torch.float64) + 0.1)


def as_torch(q):
    return Independent(Normal(q.mean, q.std), q.mean.dim() - 1)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)])
def test_gaussian_equals_torch_distributions(shape):
    q, p = gaussian(*shape), gaussian(*shape, seed=1)
    torch.testing.assert_close(q.kl(p), kl_divergence(as_torch(q), as_torch(p)))
    standard = Gaussian(torch.zeros(shape).double(), torch.ones(shape).double())
    torch.testing.assert_close(q.rate(), kl_divergence(as_torch(q), as_torch(standard)))
    torch.testing.assert_close(q.log_prob(p.mean), as_torch(q).log_prob(p.mean))
    torch.testing.assert_close(Gaussian.prior_log_prob(p.mean), as_torch(standard).log_prob(p.mean))
    assert (q.kl(p) > 0).all() and (q.kl(q) == 0).all()


def test_gaussian_sample_has_its_moments():
    q = gaussian(1, 3)
    noise = Gaussian.noise((100_000, 3), torch.Generator().manual_seed(0)).double()
    samples = q.sample(noise)
    torch.testing.assert_close(samples.mean(0), q.mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std(0), q.std[0], atol=0.02, rtol=0)


def test_rates_of_extreme_outputs_are_finite():
    for pre in (-1e4, 1e4):
        q = Gaussian.from_outputs(torch.zeros(1, 2), torch.full((1, 2), pre))
        assert q.rate().isfinite().all() and q.rate() > 0


def test_ladder_posterior_adds_precisions():
    a, b = gaussian(4, 3), gaussian(4, 3, seed=1)
    q = precision_weighted(a, b)
    torch.testing.assert_close(q.std**-2, a.std**-2 + b.std**-2)
    torch.testing.assert_close(q.mean * q.std**-2, a.mean * a.std**-2 + b.mean * b.std**-2)
    flat = precision_weighted(Gaussian(a.mean, torch.full_like(a.std, 1e8)), b)
    torch.testing.assert_close(flat, b)


def test_gumbel_rate_is_the_kl_to_the_uniform():
    logits = torch.randn(6, 10, dtype=torch.float64)
    uniform = Categorical(logits=torch.zeros(6, 10, dtype=torch.float64))
    torch.testing.assert_close(RelaxedOneHot(logits).rate(), kl_divergence(Categorical(logits=logits), uniform))
    assert RelaxedOneHot(torch.zeros(1, 7)).rate().abs() < 1e-6
    one_hot = RelaxedOneHot(torch.tensor([[200.0, 0, 0, 0]])).rate()
    torch.testing.assert_close(one_hot, torch.tensor([math.log(4)]))


def test_gumbel_temperature_schedule():
    assert RelaxedOneHot.temperature(0) == 1
    assert RelaxedOneHot.temperature(50) == pytest.approx(math.exp(-0.35))
    assert RelaxedOneHot.temperature(200) == 0.4


def test_gumbel_samples_follow_the_categories():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = RelaxedOneHot.noise((100_000, 3), torch.Generator().manual_seed(0))
    q = RelaxedOneHot(logits.expand(100_000, 3))
    hard = q.sample(noise)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(hard.mean(0), torch.softmax(logits[0], 0), atol=0.006, rtol=0)
    soft = q.sample(noise, torch.tensor(0.5))
    torch.testing.assert_close(soft, torch.softmax((logits + noise) / 0.5, 1))
    prior = RelaxedOneHot.from_prior(noise)
    torch.testing.assert_close(prior.mean(0), torch.full((3,), 1 / 3), atol=0.006, rtol=0)


def test_hard_samples_pass_gradients_straight_through():
    logits = torch.zeros(1, 3, requires_grad=True)
    RelaxedOneHot(logits).sample(torch.tensor([[0.0, 1.0, 0.0]]))[0, 1].backward()
    assert logits.grad.abs().sum() > 0
