"""The fast step equals the plain one; the chunk's size is found; bfloat16 stays out of what must be exact."""

import pytest
import torch

from models import build_model
from models.stack import Stack
from utils import engine as engine_module
from utils.config import Config
from utils.engine import Engine, fastest_size
from utils.seeds import generator

CPU = torch.device("cpu")
TINY = Config(conv_channels=2, z_dims=3, batch_size=8)


def batch(stack, seed=0, dtype=torch.float32):
    g = generator("cpu", seed)
    noise = stack.model.noise(8, g)
    return torch.rand(8, 1, 28, 28, generator=g).to(dtype), noise._replace(z=noise.z.to(dtype), y=noise.y.to(dtype))


def gradients(stack, terms_of):
    x, noise = batch(stack, dtype=torch.float64)
    loss = terms_of(x, noise).loss(torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [0.1]]))
    return loss, torch.autograd.grad(loss.mean(1).sum(), list(stack.parameters.values()))


def test_compiled_equals_plain():
    stack = Stack(build_model(TINY).double(), 2)
    stack.compile()
    loss, grads = gradients(stack, stack.training_terms)
    expected, plain = gradients(stack, stack.terms)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ten_steps_compiled_equal_ten_plain_ones():
    betas = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.1])
    history = {}
    for compile in ("on", "off"):
        engine = Engine(TINY, 2, CPU, compile)
        engine.restart(2)
        history[compile] = torch.stack([engine.step(*batch(engine.stack, i), *betas) for i in range(10)])
    torch.testing.assert_close(history["on"], history["off"], rtol=1e-5, atol=1e-3)


def test_a_restarted_engine_is_a_new_one():
    ones = torch.ones(2)

    def steps(engine):
        return torch.stack([engine.step(*batch(engine.stack, i), ones, ones) for i in range(3)])

    used, new = Engine(TINY, 2, CPU), Engine(TINY, 2, CPU)
    used.restart(7)
    steps(used)
    used.restart(2)
    new.restart(2)
    assert used.adam_steps == 0 and torch.equal(steps(used), steps(new)) and used.adam_steps == 3


def test_an_engine_fits_other_betas_and_seeds_only():
    engine = Engine(TINY, 2, CPU)
    fields = dict(conv_channels=2, z_dims=3, batch_size=8)
    assert engine.fits(Config(**fields, beta_y=3.0, beta_z=0.1, seed=5, run_name="a", run_batch_name="b"), 2, CPU)
    assert not engine.fits(Config(**fields), 3, CPU)
    assert not engine.fits(Config(**fields, learning_rate=1e-3), 2, CPU)
    assert not engine.fits(Config(**{**fields, "conv_channels": 4}), 2, CPU)


@pytest.mark.parametrize(
    "most, memory, sizes, best",
    [
        (1, 99, [1], 1),
        (6, 99, [1, 2, 4, 6], 6),
        (20, 99, [1, 2, 4, 8, 16, 20], 16),
        (100, 99, [1, 2, 4, 8, 16, 32], 16),
        (100, 10, [1, 2, 4, 8], 8),
    ],
)
def test_the_size_grows_while_it_pays_and_fits(most, memory, sizes, best, monkeypatch):
    """A step takes 10 seconds and 1 for each cell, up to 16 cells; more cells make none cheaper."""
    now, tried = [0.0], []

    class Timed:
        def __init__(self, config, m, device, compile):
            if m > memory:
                raise torch.OutOfMemoryError("out of memory")
            tried.append(m)
            self.m, self.stack = m, self

        @property
        def model(self):
            return build_model(TINY)

        def step(self, *_):
            now[0] += 10 + self.m if self.m <= 16 else 1.7 * self.m

    monkeypatch.setattr(engine_module, "Engine", Timed)
    monkeypatch.setattr(engine_module, "clock", lambda device: now[0])
    assert fastest_size(TINY, most, CPU) == best and tried == sizes


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_conv_z": True}, {"linear_y_with_dims": 5}, {"vae_type": "LVAE"}, {"vae_type": "BVAE"}]
    + [{"vae_type": "LVAE", "use_conv_z": True}, {"qz_family": "GumbelSoftmax"}, {"px_y_family_ll": "MoL"}],
)
def test_bf16_ends_with_the_trunks(settings):
    """Everything that a distribution is made of is float32 and computed in it; the trunks are not."""
    config = Config(conv_channels=4, z_dims=3, precision="bf16", **settings)
    torch.manual_seed(0)
    stack = Stack(build_model(config), 1, config.precision)
    x = torch.rand(64, 1, 28, 28)
    noise, model = stack.model.noise(64, generator("cpu", 0)), stack.model
    with torch.autocast("cpu", torch.bfloat16):
        q_z = model.q_z(x)
        z = q_z.sample(noise.z)
        q_y, p_y = model.q_y(z, x), model.p_y(z)
        outputs = model.decoder(q_y.mode)
        low = stack.terms(x, noise)
    tensors = [t for d in (q_z, q_y, p_y) for t in d] + [outputs, *low]
    assert all(t.dtype == torch.float32 for t in tensors)
    exact = stack.terms(x, noise)
    assert not torch.equal(low.ll, exact.ll)  # it is in use
    for a, b in zip(low, exact, strict=True):
        torch.testing.assert_close(a.mean(), b.mean(), rtol=0.02, atol=0.02)


def test_bf16_trains_to_the_rates_of_fp32():
    """The loss falls as far, and small rates are not lost (plain autocast takes 30 to 40 % off R(y|z))."""
    figures = {}
    for precision in ("fp32", "bf16"):
        config = Config(conv_channels=4, z_dims=3, precision=precision, learning_rate=3e-3)
        engine = Engine(config, 1, CPU)
        engine.restart(2)
        x = batch(engine.stack)[0].repeat(4, 1, 1, 1)
        ones = torch.ones(1)
        for i in range(60):
            noise = engine.stack.model.noise(32, generator("cpu", i))
            sums = engine.step(x, noise, ones, ones)
        figures[precision] = sums[0] / 32
    torch.testing.assert_close(figures["bf16"], figures["fp32"], rtol=0.05, atol=0.05)
