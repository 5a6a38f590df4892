"""A conditioned model is, at fixed betas, the ordinary one that it unfolds to."""

import math
import pickle

import pytest
import torch
from pytest import approx
from torch.func import functional_call
from torch.nn.functional import interpolate
from torch.testing import assert_close

from models.build import build_model
from models.conditioned import Conditioned
from models.hvae import Noise
from models.stack import TERMS, Stack
from tests.conftest import training_of
from tests.models.test_models import in_double
from utils.config import Config
from utils.seeds import generator
from utils.training.multi_rate import terms_at_points

GREY = (1, 28, 28)
RANGE = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
LOG_BETAS = torch.tensor([[-1.0, 1.0], [0.2, 0.1], [0.9, -1.0]], dtype=torch.float64)
KINDS = {
    "HVAE": {},
    "Gumbel": {"qz_family": "GumbelSoftmax"},
    "vector y": {"linear_y_with_dims": 4},
    "convolutional z": {"use_conv_z": True},
    "LVAE": {"vae_type": "LVAE"},
    "LVAE, convolutional z": {"vae_type": "LVAE", "use_conv_z": True},
    "BVAE": {"vae_type": "BVAE"},
    "fixed sigma": {"dataset": "CIFAR10", "px_y_family_ll": "GaussianFixedSigma"},
    "learned sigma": {"dataset": "CIFAR10", "px_y_family_ll": "GaussianLearnedSigma"},
    "MoL": {"dataset": "CIFAR10", "px_y_family_ll": "MoL"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def conditioned(kind: str = "HVAE") -> tuple[Conditioned, torch.Tensor, Noise]:
    """A model in float64 whose gates are far from doing nothing; three images and their noise."""
    torch.manual_seed(0)
    config = Config(conv_channels=3, z_dims=4, **KINDS[kind])
    model = Conditioned(build_model(config), RANGE, config.image_shape).double()
    with torch.no_grad():
        for p in (*model.gates.parameters(), *model.further):
            p.normal_(0, 0.2)
        for name in model.others:
            model.model.get_parameter(name).fill_(-0.7)
    noise = model.model.noise(3, generator("cpu", 2))
    x = torch.rand(3, *config.image_shape, dtype=torch.float64)
    return model, x, in_double(noise)


@every_kind
def test_at_fixed_betas_it_is_the_ordinary_model(kind):
    model, x, noise = conditioned(kind)
    plain = build_model(Config(conv_channels=3, z_dims=4, **KINDS[kind])).double()
    for log_betas in LOG_BETAS:
        with torch.no_grad():
            plain.load_state_dict(model.weights_at(log_betas))
            both = zip(model(x, noise._replace(log_betas=log_betas.expand(3, 2))), plain(x, noise), strict=True)
        for ours, expected in both:
            assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@every_kind
def test_models_can_be_pickled(kind):
    model, x, noise = conditioned(kind)
    noise = noise._replace(log_betas=LOG_BETAS)
    assert_close(pickle.loads(pickle.dumps(model))(x, noise), model(x, noise), rtol=0, atol=0)


@every_kind
def test_each_image_has_betas_of_its_own(kind):
    """A batch of three pairs of betas is three models, each on its own image; and so are the gradients."""
    model, x, noise = conditioned(kind)
    together = model(x, noise._replace(log_betas=LOG_BETAS)).loss().sum()
    own = [noise._replace(z=noise.z[i : i + 1], y=noise.y[i : i + 1]) for i in range(3)]
    each = [
        functional_call(model.model, model.weights_at(LOG_BETAS[i]), (x[i : i + 1], own[i])).loss().sum()
        for i in range(3)
    ]
    assert_close(together, sum(each), rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in (together, sum(each))]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_further_weights_of_coarse_layers_are_mixed_by_the_betas():
    """Linearly in each log beta and in their product; 0 at the centre, 0.5 at the corners."""
    model = Conditioned(build_model(Config(conv_channels=3, z_dims=4)), torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), GREY)
    fine = {"trunk.0", "trunk.2", "x_branch.0", "x_branch.2", "decoder.1.0", "decoder.1.2"}
    assert {*model.layers} - {*model.mixed} == fine
    for p in model.further:
        torch.nn.init.normal_(p)
    for y, z in ((-1, -1), (1, -1), (0, 0), (0.5, -0.25)):
        folded = model.weights_at(torch.tensor([0.5 + 1.5 * y, 0.5 + 0.5 * z]))
        for i, name in enumerate(model.mixed):
            a, b, c = (p.detach() for p in model.further[3 * i : 3 * i + 3])
            more = folded[f"{name}.weight"].detach() - model.model.get_parameter(f"{name}.weight").detach()
            assert_close(more, 0.5 * (y * a + z * b + y * z * c), rtol=0, atol=1e-5)


def test_without_training_the_betas_change_nothing():
    model = Conditioned(build_model(Config(conv_channels=3, z_dims=4)), RANGE, GREY)
    plain = {name: p.clone() for name, p in model.model.named_parameters()}
    for name, p in model.weights_at(torch.tensor([0.5, -1.0])).items():
        assert torch.equal(p, plain[name])


LOW = [pytest.param(kind, "bf16", marks=[pytest.mark.slow] if kind not in ("HVAE", "MoL") else []) for kind in KINDS]


@pytest.mark.parametrize("kind, precision", [*((kind, "fp32") for kind in KINDS), *LOW])
def test_training_lowers_the_loss_at_every_corner(kind, precision):
    """A few steps on smooth images: the loss falls at the corners of the range and is finite."""
    low, high = (1.0, 1.0) if kind == "BVAE" else (0.1, 10.0)
    ends = {"beta_y": 0.1, "beta_max_y": 10.0, "beta_z": low, "beta_max_z": high, "multi_rate": True}
    fast = {"optimizer": "adam", "learning_rate": 3e-3, "precision": precision}
    config = Config(conv_channels=4, z_dims=4, batch_size=8, **ends, **fast, **KINDS[kind])
    coarse = torch.rand(8, config.image_shape[0], 4, 4, generator=generator("cpu", 0))
    x = interpolate(coarse, config.image_shape[1:], mode="bilinear")
    training, one, noise = training_of(config), torch.ones(1), generator("cpu", 3)
    before = terms_at_points(training.stack.plain(0), x)
    temperature = torch.ones(()) if kind == "Gumbel" else None
    steps = {"MoL": 10, "learned sigma": 120}.get(kind, 40)  # sigma rises first, with all rates, and then falls
    for step in range(steps):
        training.stack.model.spread.fill_(min(1.0, 2 * step / steps))
        training.update(x, training.stack.model.noise(8, noise, temperature), one, one)
    after = terms_at_points(training.stack.plain(0), x)
    assert len(after) == (3 if kind == "BVAE" else 5)  # the corners and the middle
    for name, terms in after.items():
        assert all(math.isfinite(v) for v in terms.values())
        assert terms["loss"] < before[name]["loss"], name


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_gates_do_nothing_on_average(spread):
    """As images weigh: exactly on the grids that are averaged; over drawn betas, by far less than at one of them."""
    model, *_ = conditioned()
    model.spread.fill_(spread)
    middles = 2.6 * torch.tensor([1, 3, 5, 7, 9, 11, 13, 15]).double() / 16 - 1.3  # a margin of 0.3 on either side
    whole = torch.cartesian_prod(middles, middles)
    start = torch.tensor([0.0, -1.0]).double()
    grid = torch.cat([start + spread * (whole - start), whole])
    scales, shifts = (torch.cat(t, -1) for t in zip(*model.scales_and_shifts(grid).values(), strict=True))

    def weigh(log_betas):
        return 10 ** (spread * -0.15 * log_betas[:, :1])

    weights = torch.tensor([0.75, 0.25]).double().repeat_interleave(64)[:, None] * weigh(grid)
    mean = (weights * scales).sum(0) / weights.sum()
    assert_close(mean, torch.ones_like(mean), rtol=1e-6, atol=1e-6)
    assert_close((weights * shifts).sum(0), torch.zeros_like(mean), rtol=1e-5, atol=1e-5)
    log_betas = model.noise(4000, generator("cpu", 0)).log_betas.double()
    drawn = model.scales_and_shifts(log_betas)
    many, weights = torch.cat([scale for scale, _ in drawn.values()], -1) - 1, weigh(log_betas)
    assert (weights / weights.mean() * many).mean(0).square().mean() < 0.02 * many.square().mean()


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_images_weigh_by_their_betas_in_steps_not_in_sums(spread):
    """A step of gradient descent follows the mean of the weighted loss; the sums that it returns are of the loss."""
    model, x, noise = conditioned()
    model.spread.fill_(spread)
    noise = noise._replace(log_betas=LOG_BETAS)
    beta_y, beta_z = (10**LOG_BETAS).unbind(1)
    loss = model(x, noise).loss(beta_y, beta_z)
    weights = beta_y ** (-0.15 * spread)
    gradients = torch.autograd.grad((loss * weights).mean(), [*model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    training = training_of(Config(conv_channels=3, z_dims=4))
    training.stack, one = Stack(model, 1), torch.ones(1, dtype=torch.float64)
    parameters = training.stack.parameters
    training.optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    sums = training.update(x, noise, one, one)
    assert sums[0, TERMS.index("loss")].item() == approx(loss.sum().item(), rel=1e-12)
    for old, new, gradient in zip(before, parameters.values(), gradients, strict=True):
        assert_close(new[0], old - 0.1 * gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spread", [0.0, 0.25, 1.0])
def test_betas_are_drawn_around_the_start_and_then_all_over(spread):
    """A quarter of them from all of it at once."""
    model, *_ = conditioned()
    model.spread.fill_(spread)
    log_betas = model.noise(4000, generator("cpu", 0)).log_betas
    assert (log_betas.abs() <= 1.3 + 1e-6).all()
    start = torch.tensor([0.0, -1.0])
    low, high = torch.tensor([[-1.3, -0.3], [1.3, 2.3]]) * spread + start
    around = ((low - 1e-6 <= log_betas) & (log_betas <= high + 1e-6)).all(1).float().mean().item()
    assert around == approx(0.75 + 0.25 * spread**2, abs=0.02)
    share = torch.tensor([spread, spread, spread, 1.0]).repeat_interleave(1000)[:, None]
    uniform = start + share * (2.6 * torch.rand(4000, 2, generator=generator("cpu", 1)) - 1.3 - start)
    assert_close(log_betas.mean(0), uniform.mean(0), rtol=0, atol=0.06)
    assert_close(log_betas.std(0), uniform.std(0), rtol=0.06, atol=0)
