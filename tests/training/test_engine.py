"""The fast step equals the plain one; the chunk's size is found; bfloat16 stays out of what must be exact."""

import dataclasses

import pytest
import torch

from models.build import build_model
from models.hvae import Terms
from models.stack import Stack
from models.tables import LIKELIHOODS, MODELS
from utils.config import Config
from utils.errors import is_out_of_memory
from utils.seeds import generator
from utils.training import engine as engine_module
from utils.training.engine import Differs, Engine, check_same, fastest

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


@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_a_compiled_step_gives_the_plain_gradients(mode, monkeypatch):
    """With the code that inductor generates, which takes it longer than five seconds, and without."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=mode, **how))
    stack, plain = (Stack(build_model(TINY).double(), 2) for _ in range(2))
    for name, p in plain.parameters.items():
        stack.parameters[name].data.copy_(p.data)
    stack.compile(8)
    loss, grads = gradients(stack, stack.fast_terms)
    expected, right = gradients(plain, plain.terms)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2])
def test_large_images_are_computed_in_channels_last_memory(m):
    config = Config(dataset="ImageNet", conv_channels=1, batch_size=2)
    model = build_model(config).double()
    stack, layouts, g = Stack(model, m), [], generator("cpu", 0)
    x, noise = torch.rand(2, 3, 256, 256, dtype=torch.float64, generator=g), model.noise(2, g)
    noise = noise._replace(z=noise.z.double(), y=noise.y.double())
    expected = model(x, noise)
    model.trunk[0].register_forward_hook(lambda _, given, out: layouts.append(given[0].stride(1)))
    for terms, right in zip(stack.terms(x, noise), expected, strict=True):
        torch.testing.assert_close(terms, right.expand(m, 2), rtol=1e-10, atol=1e-10)
    assert layouts == [1]


def ten_steps(**how):
    engine, betas = Engine(TINY, 2, CPU, **how), (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.1]))
    engine.restart(2)
    return torch.stack([engine.step(*batch(engine.stack, i), *betas).clone() for i in range(10)]), engine


def replaying(step, device):
    """Stands in for a CUDA graph: its replay makes the step again, on the tensors that it was given."""
    for _ in range(3):
        step()
    result = step()
    return lambda: result.copy_(step()), result


@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_step_is_fed_by_copies_and_starts_from_where_it_was(compile, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    monkeypatch.setattr(engine_module, "record", replaying)
    history, engine = ten_steps(compile=compile, capture=True)
    assert engine.replay is not None and engine.adam_steps == 10
    torch.testing.assert_close(history, ten_steps()[0], rtol=1e-5, atol=1e-3)


def test_a_captured_step_is_recorded_anew_for_muon(monkeypatch):
    monkeypatch.setattr(engine_module, "record", replaying)
    histories = []
    for how in ({}, {"capture": True}):
        engine = Engine(dataclasses.replace(TINY, optimizer="muon"), 2, CPU, **how)
        engine.restart(2)
        betas, sums = (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.1])), []
        for i in range(10):
            engine.orthogonalise(i >= 4)
            sums.append(engine.step(*batch(engine.stack, i), *betas).clone())
        histories.append(torch.stack(sums))
    assert engine.replay is not None
    torch.testing.assert_close(*histories, rtol=1e-5, atol=1e-3)
    adams = ten_steps()[0]
    torch.testing.assert_close(histories[0][:4], adams[:4], rtol=1e-5, atol=1e-3)
    assert (histories[0][5:] - adams[5:]).abs().max() > 0.1


ENDS = {"multi_rate": True, "beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0}
KINDS = [{"vae_type": name} for name in MODELS] + [{"px_y_family_ll": name} for name in LIKELIHOODS]
KINDS += [{"qz_family": "GumbelSoftmax"}, ENDS, ENDS | {"px_y_family_ll": "GaussianLearnedSigma"}]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(str(v) for v in settings.values()))
def test_the_step_of_every_kind_of_model_can_be_captured(settings, monkeypatch, capsys):
    """A learned sigma is one number a model, of which the comparison with the plain step made an error."""
    monkeypatch.setattr(engine_module, "record", replaying)
    engine = Engine(Config(**{"conv_channels": 2, "z_dims": 3, "batch_size": 8} | settings), 2, CPU, capture=True)
    engine.restart(2)
    x, noise, ones = torch.rand(8, 1, 28, 28), engine.stack.model.noise(8, generator(CPU, 0)), torch.ones(2)
    assert engine.step(x, noise, ones, ones).isfinite().all()
    assert engine.replay is not None and capsys.readouterr().out == ""


def test_smaller_batches_are_neither_captured_nor_compiled(monkeypatch):
    monkeypatch.setattr(engine_module, "record", replaying)
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)  # when it is called is what is tried
    engine, ones = Engine(TINY, 1, CPU, compile=True, capture=True), torch.ones(1)
    x, noise = batch(engine.stack)
    few = x[:3], noise._replace(z=noise.z[:3], y=noise.y[:3]), ones, ones
    engine.step(*few)
    assert engine.replay is None and engine.to_prepare
    engine.step(x, noise, ones, ones)
    assert engine.replay is not None
    monkeypatch.setattr(engine, "replay", lambda: pytest.fail("replayed for a batch of another size"))
    monkeypatch.setattr(engine.stack, "compiled", lambda *_: pytest.fail("compiled for a batch of another size"))
    engine.step(*few)
    assert engine.adam_steps == 3


def wrong(step, device):
    replay, result = replaying(step, device)
    return lambda: (replay(), result.mul_(1.1)), result


def wrong_gradients(step, device):
    replay, result = replaying(lambda: (step(), [p.grad.mul_(1.1) for p in ENGINE[0].stack.parameters.values()])[0], 0)
    return replay, result


def impossible(step, device):
    step()
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


ENGINE = []


@pytest.mark.parametrize(
    "fails, why", [(wrong, "its result differs"), (wrong_gradients, "its result differs"), (impossible, "not perm")]
)
def test_a_step_that_cannot_be_captured_or_comes_out_wrong_is_left_as_it_was(fails, why, monkeypatch, capsys):
    monkeypatch.setattr(engine_module, "record", fails)
    engine, ones = Engine(TINY, 2, CPU, capture=True), torch.ones(2)
    ENGINE[:] = [engine]
    engine.restart(2)
    history = torch.stack([engine.step(*batch(engine.stack, i), ones, ones) for i in range(3)])
    plain = Engine(TINY, 2, CPU)
    plain.restart(2)
    assert torch.equal(history, torch.stack([plain.step(*batch(plain.stack, i), ones, ones) for i in range(3)]))
    out = capsys.readouterr().out
    assert out.startswith("note: the step cannot be captured") and why in out and out.count("\n") == 1


@pytest.mark.parametrize("low, least", [(False, 1e-3), (True, 0.05)])
def test_what_counts_as_the_same(low, least, monkeypatch):
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    right = [torch.ones(2, 4), torch.ones(2, 10, 5), torch.full((2, 3), 1e-3)]
    ill = [t.clone() for t in right]
    ill[1][0, 3] = torch.nan
    check_same(ill, ill, low)  # of a model whose gradient is not finite

    def differs(index, factor):
        try:
            check_same([t * factor if i == index else t for i, t in enumerate(right)], right, low)
        except Differs:
            return True
        return False

    for index in (0, 1):  # the sums, and the gradients that make up most of the norm
        assert differs(index, 1 + 1.1 * least) and not differs(index, 1 + 0.9 * least)
    assert differs(2, 0) and differs(2, torch.nan) and not differs(2, 1.3 if low else 1.005)


def test_out_of_memory_is_known_however_it_is_wrapped(monkeypatch):
    def out_of_memory(step, device):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("capture failed due to a previous error")  # noqa: B904

    monkeypatch.setattr(engine_module, "record", out_of_memory)
    engine, ones = Engine(TINY, 2, CPU, capture=True), torch.ones(2)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(*batch(engine.stack), ones, ones)
    assert not is_out_of_memory(RuntimeError("another one"))


def test_what_cannot_be_compiled_runs_eagerly(monkeypatch, capsys):
    def impossible(*_):
        raise RuntimeError("no compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: impossible)
    assert torch.equal(ten_steps(compile=True)[0], ten_steps()[0])
    out = capsys.readouterr().out
    assert out == "note: the step cannot be compiled, continuing without: no compiler found\n"


def test_a_compiled_step_that_differs_is_not_used(monkeypatch, capsys):
    def wrongly(f, fullgraph):
        return lambda *inputs: Terms(*(1.1 * t for t in f(*inputs)))

    monkeypatch.setattr(torch, "compile", wrongly)
    assert torch.equal(ten_steps(compile=True)[0], ten_steps()[0])
    assert capsys.readouterr().out.startswith("note: the step cannot be compiled, continuing without: its result diff")


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


def test_an_engine_fits_other_betas_and_seeds_and_most_of_its_cells():
    engine = Engine(TINY, 4, CPU)
    fields = dict(conv_channels=2, z_dims=3, batch_size=8)
    assert engine.fits(Config(**fields, beta_y=3.0, beta_z=0.1, seed=5, run_name="a", run_batch_name="b"), 4)
    assert engine.fits(Config(**fields), 3)
    assert not engine.fits(Config(**fields), 2) and not engine.fits(Config(**fields), 5)
    assert not engine.fits(Config(**fields, learning_rate=1e-3), 4)
    assert not engine.fits(Config(**{**fields, "conv_channels": 4}), 4)


class Timed:
    """An engine whose step takes `fixed` seconds and 1 a cell, in a memory for so many cells."""

    now, fixed, memory = 0.0, 0.0, 99

    def __init__(self, config, m, device, capture):
        if m > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        self.m = m

    def step(self, *_):
        Timed.now += self.fixed + self.m


@pytest.mark.parametrize(
    "most, fixed, memory, best", [(441, 10, 99, 8), (441, 0, 99, 1), (441, 10, 7, 1), (3, 10, 99, 3), (1, 10, 0, 1)]
)
def test_one_cell_at_once_or_eight(most, fixed, memory, best, monkeypatch, capsys):
    monkeypatch.setattr(engine_module, "Engine", Timed)
    monkeypatch.setattr(engine_module, "free", lambda device: None)
    monkeypatch.setattr(engine_module, "clock", lambda device: Timed.now)
    monkeypatch.setattr(Timed, "fixed", fixed)
    monkeypatch.setattr(Timed, "memory", memory)
    assert fastest(TINY, most, CPU) == best
    assert capsys.readouterr().out.startswith(f"cells at once: {best} ")


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
