"""Images of a known Gaussian; the best of all models of them, against numerical optima and samples."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.integrate import quad
from scipy.stats import norm

from datasets.gaussian import PIXELS, ROUNDING, STEP_B, STEP_S, Gaussian
from datasets.table import optimum
from tests.conftest import of_documents
from tests.datasets.files import load
from train import main as train
from utils.config import Config

SIGMA, BETAS = 0.2, (0.1, 1.0, 10.0, 40.0)  # which code 8, 6, 3 and 1 of the patterns


def test_the_images_are_the_same_bytes_everywhere():
    """A last digit is 1e-16 of a number, at most 1e-10 of a step: none is that near to where rounding turns."""
    data, source = load("Gaussian"), Gaussian()
    assert data.digest == "85cc157782c83506"
    assert abs(source.exact_coefficients() / STEP_S % 1 - 0.5).min() > 1e-8
    assert abs(source.exact_patterns / STEP_B % 1 - 0.5).min() > 1e-8


def test_the_images_are_the_gaussian_that_the_theory_is_of():
    data, source = load("Gaussian"), Gaussian()
    images = torch.cat([data.train.images, data.test.images]).flatten(1).double().numpy()
    assert images.min() > 0 and images.max() < 255  # no pixel is clipped
    s = (images / 255 - 0.5) @ source.patterns.T
    assert source.patterns @ source.patterns.T == approx(np.eye(8), abs=2e-6)
    assert np.cov(s.T) == approx(np.diag(source.v), abs=0.04)
    assert s.mean(0) == approx(np.zeros(8), abs=0.03)
    rest = ((images / 255 - 0.5 - s @ source.patterns) ** 2).sum(1)
    assert rest.mean() == approx((PIXELS - 8) * ROUNDING, rel=1e-3)
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    assert np.mean(labels == 2 * (s[:, 0] > 0) + (s[:, 1] > 0)) > 0.999  # but for what rounding turns
    assert (len(data.train), len(data.test)) == (20_000, 5_000) and np.bincount(labels).min() > 6000


def loss_of_linear_model(parameters, v, beta_y, beta_z, sigma):
    """The expected loss of encoders, prior p(y|z) and decoder that are linear, of x ~ N(0, diag(v))."""
    a, b, c, f, w, *log_vars = parameters
    q_z, q_y, p_y = (t.exp() for t in log_vars)
    x = torch.diag(v.sqrt())
    z = a @ x  # factors of x; those of z's own noise are sqrt(q_z)
    more = ((b - f) @ z + c @ x, (b - f) * q_z.sqrt())  # by which the mean of q(y|z,x) is off that of p(y|z)
    r_z = 0.5 * (q_z + (z**2).sum(1) - 1 - q_z.log()).sum()
    r_y = 0.5 * ((q_y + sum((t**2).sum(1) for t in more)) / p_y - 1 + (p_y / q_y).log()).sum()
    errors = (x - w @ (b @ z + c @ x), w @ b * q_z.sqrt(), w * q_y.sqrt())
    error = sum((t**2).sum() for t in errors)
    d = len(v) / 2 * math.log(2 * math.pi * sigma**2) + error / (2 * sigma**2)
    return d + beta_y * r_y + beta_z * r_z


@pytest.mark.parametrize("beta_y, beta_z", [(1.0, 1.0), (0.5, 5.0), (5.0, 0.5), (30.0, 20.0)])
def test_linear_models_come_as_near_to_the_bound_as_one_likes(beta_y, beta_z):
    k, sigma = 3, SIGMA
    source = Gaussian(k)
    best = source.optimum(min(beta_y, beta_z), sigma)
    rest = PIXELS - k
    of_rest = rest / 2 * math.log(2 * math.pi * sigma**2) + rest * ROUNDING / (2 * sigma**2)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(k, k, generator=generator, dtype=torch.float64) for _ in range(5)]
    parameters = [t.clone().requires_grad_() for t in (*matrices, *torch.zeros(3, k, dtype=torch.float64))]
    optimizer = torch.optim.LBFGS(parameters, max_iter=400, line_search_fn="strong_wolfe")
    v = torch.tensor(source.v + ROUNDING)

    def closure():
        optimizer.zero_grad()
        loss = loss_of_linear_model(parameters, v, beta_y, beta_z, sigma)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item() + of_rest
    assert -1e-9 < loss - best.loss < 0.05, (loss, best.loss)


def free_energy(s, variance, beta):
    """-beta ln E exp(log N(s; v, sigma^2) / beta) over v ~ N(0, variance), by quadrature."""
    precisions = np.array([1 / variance, 1 / (beta * SIGMA**2)])
    middle, std = s * precisions[1] / precisions.sum(), precisions.sum() ** -0.5

    def exponent(v):
        return -(v**2 * precisions[0] + (s - v) ** 2 * precisions[1]) / 2

    top = exponent(middle)
    integral, _ = quad(lambda v: math.exp(exponent(v) - top), middle - 9 * std, middle + 9 * std)
    constant = math.log(integral / math.sqrt(2 * math.pi * variance)) - math.log(2 * math.pi * SIGMA**2) / (2 * beta)
    return -beta * (constant + top)


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_of_an_image_is_the_free_energy_of_its_coefficients(beta):
    source = Gaussian()
    x = next(load("Gaussian").test.batches(3))[0].numpy()
    s = (x.reshape(3, -1).astype(float) - 0.5) @ source.patterns.T
    unused = ((x.astype(float) - 0.5) ** 2).sum((1, 2, 3)) - (s**2).sum(1)
    expected = unused / (2 * SIGMA**2) - norm(0, SIGMA).logpdf(0) * (PIXELS - 8)
    for i, variance in enumerate(source.v + ROUNDING - beta * SIGMA**2):
        if variance > 0:
            expected += [free_energy(value, variance, beta) for value in s[:, i]]
        else:
            expected -= norm(0, SIGMA).logpdf(s[:, i])
    assert source.optimum(beta, SIGMA).loss_of(x) == approx(expected, abs=1e-6)


def test_on_average_over_the_images_the_loss_is_the_bound():
    x = next(load("Gaussian").train.batches(20_000))[0].numpy()
    for beta in BETAS:
        best = Gaussian().optimum(beta, SIGMA)
        losses = best.loss_of(x)
        assert abs(losses.mean() - best.loss) < 4 * losses.std() / math.sqrt(len(x))


@pytest.mark.parametrize("beta", BETAS)
def test_rate_distortion_psnr_information_and_accuracy_are_those_of_samples(beta):
    """Of the channel v = a s + noise whose error is least at its rate."""
    source, n, rng = Gaussian(), 200_000, np.random.default_rng(0)
    best, variances, d = source.optimum(beta, SIGMA), source.v + ROUNDING, beta * SIGMA**2
    used = variances > d
    s = rng.normal(size=(n, 8)) * np.sqrt(variances)
    share = np.where(used, 1 - d / variances, 0)
    noise = np.sqrt(share * d)
    v = share * s + noise * rng.normal(size=s.shape)
    rates = norm(share * s, noise + ~used).logpdf(v) - norm(0, np.sqrt(share * variances) + ~used).logpdf(v)
    assert rates[:, used].sum(1).mean() == approx(best.rate, abs=0.02)
    rest = (PIXELS - 8) * ROUNDING
    constant = -PIXELS * norm(0, SIGMA).logpdf(0)
    error = ((s - v) ** 2).sum(1).mean() + rest
    assert constant + error / (2 * SIGMA**2) == approx(best.D, abs=0.5)
    assert best.loss == best.D + beta * best.rate
    error = ((s - share * s) ** 2).sum(1).mean() + rest
    assert -10 * math.log10(error / PIXELS) == approx(best.psnr, abs=0.05)
    p = norm.cdf(abs(v[:, :2]) / math.sqrt(d))  # of the more probable sign, given v
    right = (s[:, :2] > 0) == (v[:, :2] > 0)
    assert right.all(1).mean() == approx(best.accuracy, abs=0.005)
    assert np.log(2 * np.where(right, p, 1 - p)).sum(1).mean() == approx(best.information, abs=0.01)


def test_the_best_is_only_told_where_it_is_known():
    config = {"dataset": "Gaussian", "beta_y": 3.0, "beta_z": 0.5}
    assert optimum(Config(**config)).beta == 0.5 and optimum(Config(**config)).sigma == 0.2
    assert optimum(Config(**config, vae_type="LVAE", sigma=0.3)).sigma == 0.3
    assert optimum(Config(dataset="Gaussian", vae_type="BVAE", beta_y=3.0)).beta == 3
    for other in ({"px_y_family_ll": "Bernoulli"}, {"beta_max_y": 5.0, "beta_max_z": 5.0, "multi_rate": True}):
        assert optimum(Config(**config, **other)) is None
    assert optimum(Config(**config | {"beta_z": 0.0})) is None  # rounding would be coded
    assert optimum(Config(**config, sigma=0.05)) is None  # and known
    assert optimum(Config(px_y_family_ll="GaussianFixedSigma")) is None
    for k, beta in product((1, 12), BETAS):
        assert math.isfinite(Gaussian(k).optimum(beta, SIGMA).loss)


@pytest.fixture
def known_plane():
    """The script docs/known_plane.py."""
    return of_documents("known_plane")


def test_the_documents_trainings_are_possible(known_plane, passes):
    for name in known_plane.TRAININGS:
        assert "new" in passes(train, *known_plane.flags(name), "--dry_run"), name


def test_the_documents_script_takes_an_excess_apart(known_plane, monkeypatch, capsys):
    excess = {"Adam": [3], "Muon": [1, 2, 3], "Muon, 64 epochs": [0.5], "unfolded": [2, 3, 4], "LVAE, Muon": [1]}
    excess = dict.fromkeys(known_plane.TRAININGS, [4]) | excess
    few, axis = ("Adam", "Muon, 64 epochs"), (0.1, 1.0, 10.0)
    tests = {
        name: {
            (y, z): [{"above_bound": of_seed + y, "above_bound_se": 0.1, "kl_y": 7, "kl_z": 5.25} for of_seed in of]
            for y, z in product(axis, axis[::2] if name in few else axis)
        }
        for name, of in excess.items()
    }
    monkeypatch.setattr(known_plane, "results", tests.get)
    monkeypatch.setattr(known_plane.subprocess, "run", lambda *_, check: None)
    known_plane.main()
    out = capsys.readouterr().out
    best = optimum(Config(dataset="Gaussian", beta_y=1.0, beta_z=10.0))
    assert f"| 1, 10 | {best.loss:.2f} | 4.00 +- 0.10 | 3.00 +- 0.58 | 4.00 +- 0.58 | 1.50 +- 0.10 | " in out
    rates = "7.0 + 5.2"
    assert f"| 1, 10 | {best.rate:.2f} | {rates} | {rates} | {rates} | {rates}" in out
    assert f"| 1, 1 | {best.rate:.2f} |  | {rates} | {rates} |  | {rates}" in out
    assert "| architecture, at most | 4.20, 10.50 |  |" in out
    assert "| training for 16 epochs, not 64 | 1.50, 1.50 |  |" in out
    assert "| sharing | 1.00 +- 0.00, 1.00 | 1.00 +- 0.00, 1.00 |" in out
    assert "| all, of unfolded cells | 6.70 +- 0.58, 13.00 | 6.70 +- 0.58, 13.00 |" in out
