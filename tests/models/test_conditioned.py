"""A conditioned model is, at fixed betas, the ordinary one that it unfolds to."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from models.build import build_model
from models.conditioned import Conditioned
from models.stack import TERMS, Stack
from utils.config import Config
from utils.seeds import generator
from utils.training.chunk import COLLAPSED, IN_USE, SPREAD
from utils.training.engine import Engine
from utils.training.loop import terms_at_points

RANGE = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
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


def conditioned(**settings) -> Conditioned:
    """A conditioned model in float64 whose gates are far from doing nothing."""
    torch.manual_seed(0)
    model = Conditioned(build_model(Config(conv_channels=3, z_dims=4, **settings)), RANGE).double()
    with torch.no_grad():
        for p in model.gates.parameters():
            p.normal_(0, 0.2)
        for name in model.others:
            model.model.get_parameter(name).fill_(-0.7)
    return model


def inputs(config: Config, model: Conditioned, n: int) -> tuple:
    """Images and noise in float64."""
    x = torch.rand(n, *config.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = model.model.noise(n, generator("cpu", 2))
    return x, noise._replace(z=noise.z.double(), y=noise.y.double())


@pytest.mark.parametrize("kind", KINDS)
def test_at_fixed_betas_it_is_the_ordinary_model(kind):
    model = conditioned(**KINDS[kind])
    config = Config(conv_channels=3, z_dims=4, **KINDS[kind])
    x, noise = inputs(config, model, 5)
    for log_betas in ((-1.0, -1.0), (0.0, 0.3), (1.0, -0.7)):
        log_betas = torch.tensor(log_betas, dtype=torch.float64)
        with torch.no_grad():
            terms = model(x, noise._replace(log_betas=log_betas.expand(5, 2)))
            plain = build_model(config).double()
            plain.load_state_dict(model.at(log_betas))
            expected = plain(x, noise)
        for a, b in zip(terms, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_betas_of_its_own(kind):
    """A batch of three pairs of betas is three models, each on its own image; and so are the gradients."""
    model = conditioned(**KINDS[kind])
    config = Config(conv_channels=3, z_dims=4, **KINDS[kind])
    x, noise = inputs(config, model, 3)
    log_betas = torch.tensor([[-1.0, 1.0], [0.2, 0.1], [0.9, -1.0]], dtype=torch.float64)
    together = model(x, noise._replace(log_betas=log_betas)).loss().sum()
    own = [noise._replace(z=noise.z[i : i + 1], y=noise.y[i : i + 1]) for i in range(3)]
    each = [functional_call(model.model, model.at(log_betas[i]), (x[i : i + 1], own[i])).loss().sum() for i in range(3)]
    torch.testing.assert_close(together, sum(each), rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in (together, sum(each))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_without_training_the_betas_change_nothing():
    torch.manual_seed(0)
    config = Config(conv_channels=3, z_dims=4)
    model = Conditioned(build_model(config), RANGE)
    plain = {name: p.clone() for name, p in model.model.named_parameters()}
    for name, p in model.at(torch.tensor([0.5, -1.0])).items():
        assert torch.equal(p, plain[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_at_every_corner(kind, precision):
    """A few steps on smooth images, through the engine: the loss falls at the corners of the range and is finite."""
    ends = {"beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0, "multi_rate": True}
    if kind == "BVAE":
        ends |= {"beta_z": 1.0, "beta_max_z": 1.0}
    ends |= {"optimizer": "adam", "learning_rate": 3e-3}  # with which few steps are enough
    config = Config(conv_channels=4, z_dims=4, batch_size=32, precision=precision, **ends | KINDS[kind])
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, config.image_shape[0], 4, 4, generator=g)
    x = torch.nn.functional.interpolate(coarse, config.image_shape[1:], mode="bilinear").clamp(0, 1)
    engine, one, noise = Engine(config, 1, torch.device("cpu")), torch.ones(1), generator("cpu", 3)
    engine.restart(2)
    before = terms_at_points(engine.stack.plain(0), x)
    temperature = engine.stack.model.family.temperature(0)
    temperature = None if temperature is None else torch.tensor(temperature)
    steps = {"MoL": 10, "learned sigma": 120}.get(kind, 40)  # sigma rises first, with all rates, and then falls
    for step in range(steps):
        engine.stack.model.spread.fill_(min(1.0, 2 * step / steps))
        engine.step(x, engine.stack.model.noise(32, noise, temperature), one, one)
    after = terms_at_points(engine.stack.plain(0), x)
    assert len(after) >= 2
    for name, terms in after.items():
        assert all(math.isfinite(v) for v in terms.values())
        assert terms["loss"] < before[name]["loss"], name


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_over_the_betas_that_are_drawn_the_gates_do_nothing_on_average(spread):
    """As images weigh: exactly on the grids that are averaged; over drawn betas, by far less than at one of them."""
    model = conditioned()
    model.spread.fill_(spread)
    middles = 2.6 * torch.tensor([1, 3, 5, 7, 9, 11, 13, 15]).double() / 16 - 1.3  # a margin of 0.3 on either side
    whole = torch.cartesian_prod(middles, middles)
    start = torch.tensor([0.0, -1.0]).double()
    grid = torch.cat([start + spread * (whole - start), whole])
    scales, shifts = (torch.cat(t, -1) for t in zip(*model.scales_and_shifts(grid).values(), strict=True))

    def weigh(log_betas):
        return 10 ** (spread * (log_betas[:, 1:] / 2 - 0.15 * log_betas[:, :1]))

    weights = torch.tensor([0.75, 0.25]).double().repeat_interleave(64)[:, None] * weigh(grid)
    mean = (weights * scales).sum(0) / weights.sum()
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((weights * shifts).sum(0), torch.zeros_like(mean), rtol=1e-5, atol=1e-5)
    log_betas = model.noise(4000, generator("cpu", 0)).log_betas.double()
    drawn = model.scales_and_shifts(log_betas)
    many, weights = torch.cat([scale for scale, _ in drawn.values()], -1) - 1, weigh(log_betas)
    assert (weights / weights.mean() * many).mean(0).square().mean() < 0.02 * many.square().mean()


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_images_weigh_by_their_betas_once_all_are_in_use_and_what_is_reported_does_not(spread):
    """A step of gradient descent follows the mean of the weighted loss; the sums that it returns are of the loss."""
    model = conditioned()
    model.spread.fill_(spread)
    x, noise = inputs(Config(conv_channels=3, z_dims=4), model, 3)
    noise = noise._replace(log_betas=torch.tensor([[-1.0, 1.0], [0.2, 0.1], [0.9, -1.0]], dtype=torch.float64))
    beta_y, beta_z = (10**noise.log_betas).unbind(1)
    loss = model(x, noise).loss(beta_y, beta_z)
    weights = (beta_z.sqrt() / beta_y**0.15) ** spread
    gradients = torch.autograd.grad((loss * weights).mean(), [*model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    stack, one = Stack(model, 1), torch.ones(1, dtype=torch.float64)
    sums = stack.step(torch.optim.SGD(stack.parameters.values(), lr=0.1), x, noise, one, one)
    assert sums[0, TERMS.index("loss")].item() == pytest.approx(loss.sum().item(), rel=1e-12)
    for old, new, gradient in zip(before, stack.parameters.values(), gradients, strict=True):
        torch.testing.assert_close(new[0], old - 0.1 * gradient, rtol=1e-9, atol=1e-10)


def test_betas_are_drawn_from_the_start_and_then_from_the_whole_range_and_15_percent_beyond():
    """A quarter of them from all of it at once."""
    model = conditioned()
    for spread in (0.0, 0.25, 1.0):
        model.spread.fill_(spread)
        log_betas = model.noise(4000, generator("cpu", 0)).log_betas
        assert (log_betas.abs() <= 1.3 + 1e-6).all()
        low, high = torch.tensor([[-1.3, -0.3], [1.3, 2.3]]) * spread + torch.tensor([0.0, -1.0])
        around = ((low - 1e-6 <= log_betas) & (log_betas <= high + 1e-6)).all(1).float().mean().item()
        assert around == pytest.approx(0.75 + 0.25 * spread**2, abs=0.02)
        start = torch.tensor([0.0, -1.0]).expand(4000, 2)
        parts = [torch.full((3000,), spread), torch.full((1000,), 1.0)]
        uniform = start + torch.cat(parts)[:, None] * (
            2.6 * torch.rand(4000, 2, generator=generator("cpu", 1)) - 1.3 - start
        )
        torch.testing.assert_close(log_betas.mean(0), uniform.mean(0), rtol=0, atol=0.06)
        torch.testing.assert_close(log_betas.std(0), uniform.std(0), rtol=0.06, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps_lower_the_loss_at_every_corner(kind):
    """Ten patterns of CIFAR10's shape, or black and white ones of MNIST's for Bernoulli."""
    dataset = {"dataset": "CIFAR10" if "px_y_family_ll" in KINDS[kind] else "MNIST"}
    ends = {"multi_rate": True, "beta_y": 0.1, "beta_max_y": 10.0, "beta_z": 0.1, "beta_max_z": 10.0}
    if kind == "BVAE":
        ends |= {"beta_z": 1.0, "beta_max_z": 1.0}
    config = Config(conv_channels=4, z_dims=8, batch_size=32, learning_rate=2e-3, **{**dataset, **KINDS[kind], **ends})
    g, (c, h, _) = generator("cpu", 0), config.image_shape
    patterns = functional.interpolate(torch.rand(10, c, 4, 4, generator=g), size=h, mode="bilinear")
    images = (patterns if c == 3 else (patterns > 0.5).float())[torch.randint(0, 10, (1280,), generator=g)]
    steps = 400 if kind in ("Gumbel", "MoL") else 200  # they need z after 300
    engine = Engine(config, 1, torch.device("cpu"))
    engine.restart(1)
    stack, one, curves = engine.stack, torch.ones(1), []
    enough = 0.0 if config.vae_type == "BVAE" else min(IN_USE, config.most_rate_z / 2)  # as in Chunk.widen
    spread, kl_z = 0.0, 0.0
    for i in range(steps + 1):
        if i % 100 == 0:
            curves.append(terms_at_points(stack.plain(0), images[:256]))
        x = images[torch.randint(0, 1280, (32,), generator=g)]
        temperature = stack.model.family.temperature(i // 20)
        temperature = None if temperature is None else torch.tensor(temperature)
        if kl_z >= enough or 2 * i >= steps:
            spread = min(1.0, spread + 1 / (SPREAD * steps))
        stack.model.spread.fill_(spread)
        engine.orthogonalise(spread > 0)
        sums = engine.step(x, stack.model.noise(32, g, temperature), one, min(1.0, 10 * i / steps) * one)
        kl_z = sums[0, TERMS.index("kl_z")].item() / 32
    for name, terms in curves[-1].items():
        assert terms["loss"] < curves[0][name]["loss"] - 1, name
    rates = [terms["kl_z" if config.vae_type != "BVAE" else "kl_y"] for terms in curves[-1].values()]
    assert max(rates) > COLLAPSED
