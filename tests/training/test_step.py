"""The fast step equals the plain one; the number of cells at once; bfloat16 stays out of what must be exact."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from models.build import build_model
from models.hvae import Terms
from models.stack import Stack
from models.tables import LIKELIHOODS, MODELS
from tests.conftest import random_data, training_of
from utils.config import Config
from utils.errors import is_out_of_memory
from utils.seeds import generator
from utils.training import capture, schedule
from utils.training.capture import check_same
from utils.training.schedule import fastest
from utils.training.training import Setup

CPU = torch.device("cpu")
TINY = Config(conv_channels=2, z_dims=3, batch_size=8, num_epochs=1)
PAIR = [dataclasses.replace(TINY, beta_y=y, beta_z=z) for y, z in ((0.5, 3.0), (2.0, 0.1))]
NOTE = "note: the step cannot be "


@pytest.fixture
def capturing(monkeypatch):
    """Has updates captured as on a GPU, by a function in place of CUDA's."""

    def begin(record):
        monkeypatch.setattr(Setup, "capture", True)
        monkeypatch.setattr(capture, "failed", False)
        monkeypatch.setattr(capture, "record", record)

    return begin


def images(i: int, n: int = 8, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=generator("cpu", i)).to(dtype)


def ten_steps(*configs: Config, muon_after: int = 0, **setup):
    """The sums of ten steps, the seventh of a smaller batch, and the training."""
    training, history = training_of(*(configs or PAIR), **setup), []
    training.begin_epoch(10)
    for i in range(10):
        if i == muon_after > 0:
            training._set_spread(0.5)
        n = 3 if i == 6 else 8
        history.append(training.step(images(i, n), n).clone())
    return torch.stack(history), training


def replaying(step, device):
    """Stands in for a CUDA graph: its replay makes the step again, on the tensors that it was given."""
    for _ in range(3):
        step()
    result = step()
    return lambda: result.copy_(step()), result


@pytest.mark.parametrize("compile", ["auto", "on"])
def test_a_captured_step_is_the_eager_one(compile, capturing, monkeypatch):
    """Also one that is compiled; smaller batches are neither."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    expected, _ = ten_steps()
    capturing(replaying)
    history, training = ten_steps(compile=compile)
    assert training.fast != training.update and training.state(0)["adam_steps"] == 10
    assert_close(history, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_step_gives_the_plain_gradients():
    """With the code that inductor generates, which takes it half a minute."""
    noise = build_model(TINY).noise(8, generator("cpu", 0))
    noise, results = noise._replace(z=noise.z.double(), y=noise.y.double()), []
    for how in (torch.compile, lambda terms: terms):
        torch.manual_seed(2)
        stack = Stack(build_model(TINY).double(), 2)
        loss = how(stack.terms)(images(0, dtype=torch.float64), noise).loss(torch.tensor([[0.5], [2.0]]))
        results.append([loss, *torch.autograd.grad(loss.mean(1).sum(), [*stack.parameters.values()])])
    assert_close(*results, rtol=1e-12, atol=1e-12)


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
        assert_close(terms, right.expand(m, 2), rtol=1e-10, atol=1e-10)
    assert layouts == [1]


ENDS = {"multi_rate": True, "beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0}


def test_a_captured_step_is_captured_anew_for_muon(capturing):
    config = dataclasses.replace(TINY, optimizer="muon", num_epochs=10, **ENDS)
    adams, _ = ten_steps(dataclasses.replace(config, optimizer="adam"), muon_after=4)
    plain, _ = ten_steps(config, muon_after=4)
    capturing(replaying)
    captured, training = ten_steps(config, muon_after=4)
    assert training.fast != training.update
    assert_close(captured, plain, rtol=1e-4, atol=1e-2)
    assert_close(plain[:4], adams[:4], rtol=1e-5, atol=1e-3)
    assert (plain[5:] - adams[5:]).abs().max() > 0.1


KINDS = [{"vae_type": name} for name in MODELS] + [{"px_y_family_ll": name} for name in LIKELIHOODS]
KINDS += [{"qz_family": "GumbelSoftmax"}, ENDS, ENDS | {"px_y_family_ll": "GaussianLearnedSigma"}]


def test_the_step_of_every_kind_of_model_can_be_captured(capturing, capsys):
    """A learned sigma is one number a model, of which the comparison with the plain step made an error."""
    capturing(replaying)
    for settings in KINDS:
        config = Config(**{"conv_channels": 2, "z_dims": 3, "batch_size": 8} | settings)
        training = training_of(config, config)
        training.begin_epoch(1)
        assert training.step(images(0), 8).isfinite().all()
        assert training.fast != training.update and capsys.readouterr().out == "", settings


TRAINING = []  # that the next three are about


def wrong_sums(step, device):
    replay, result = replaying(step, device)
    return lambda: (replay(), result.mul_(1.1)), result


def wrong_gradients(step, device):
    return replaying(lambda: (step(), [p.grad.mul_(1.1) for p in TRAINING[-1].stack.parameters.values()])[0], device)


def wrong_update(step, device):
    """The weights move by a tenth more than they should."""
    replay, result = replaying(step, device)

    def replay_wrongly():
        before = [p.detach().clone() for p in TRAINING[-1].stack.parameters.values()]
        replay()
        for p, old in zip(TRAINING[-1].stack.parameters.values(), before, strict=True):
            p.data += 0.1 * (p.data - old)

    return replay_wrongly, result


def impossible(step, device):
    step()
    raise RuntimeError("not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("record", [wrong_sums, wrong_gradients, wrong_update, impossible])
def test_a_step_that_is_captured_wrongly_is_not_used(record, capturing, monkeypatch, capsys):
    capturing(record)
    real = capture.prepared
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.training.prepared", lambda training, *_: training.update)
        expected, _ = ten_steps()
    monkeypatch.setattr("utils.training.training.prepared", lambda t, *how: (TRAINING.append(t), real(t, *how))[1])
    assert torch.equal(ten_steps()[0], expected)
    out, why = capsys.readouterr().out, "not permitted" if record is impossible else "its result differs"
    assert out.startswith(f"{NOTE}captured") and why in out and out.count("\n") == 1


def test_after_a_failure_no_step_is_captured(capturing, capsys):
    """Another would fail, too, and hold memory that no one frees."""
    tried = []
    capturing(lambda step, device: tried.append(step) or impossible(step, device))
    for _ in range(2):
        ten_steps()
    assert len(tried) == 1 and capsys.readouterr().out.count(NOTE) == 1


@pytest.mark.parametrize("record", [replaying, wrong_sums, impossible])
def test_an_evaluation_is_captured_as_it_is_written(record, capturing, capsys):
    """Or, with a note, not at all: its means stay. Of weights that change after it was captured."""

    def means() -> list[torch.Tensor]:
        training, result = training_of(*PAIR), []
        for _ in range(2):
            result.append(training.evaluate(random_data(TINY, 20)))
            for p in training.stack.parameters.values():
                p.data *= 1.1
        assert (training.fast_sums != training.stack.sums) == (training.setup.capture and record is replaying)
        return result

    expected = means()
    capturing(record)
    assert all(map(torch.equal, means(), expected)) and not torch.equal(*expected)
    assert capsys.readouterr().out.count("note: the evaluation cannot be captured") == (record is not replaying)


def test_a_step_that_is_compiled_wrongly_is_not_used(monkeypatch, capsys):
    def no_compiler(*_):
        raise RuntimeError("no compiler found\nand more")

    expected, _ = ten_steps()
    for compiled, why in (
        (lambda f: no_compiler, "no compiler found\n"),
        (lambda f: lambda *inputs: Terms(*(1.1 * t for t in f(*inputs))), "its result differs"),
    ):
        monkeypatch.setattr(torch, "compile", lambda f, compiled=compiled, **_: compiled(f))
        assert torch.equal(ten_steps(compile="on")[0], expected)
        assert capsys.readouterr().out.startswith(f"{NOTE}compiled, continuing without: {why}")


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
        except ValueError:
            return True
        return False

    for index in (0, 1):  # the sums, and the gradients that make up most of the norm
        assert differs(index, 1 + 1.1 * least) and not differs(index, 1 + 0.9 * least)
    assert differs(2, 0) and differs(2, torch.nan) and not differs(2, 1.3 if low else 1.005)


def test_out_of_memory_is_known_however_it_is_wrapped(capturing):
    def out_of_memory(step, device):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("capture failed due to a previous error")  # noqa: B904

    capturing(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        ten_steps()
    assert not is_out_of_memory(RuntimeError("another one"))


@pytest.mark.parametrize(
    "most, fixed, memory, best", [(441, 10, 99, 8), (441, 0, 99, 1), (441, 10, 7, 1), (3, 10, 99, 3), (1, 10, 0, 1)]
)
def test_one_cell_at_once_or_eight(most, fixed, memory, best, monkeypatch, capsys):
    """Steps take so many fixed seconds and 1 a cell, in a memory for so many cells."""

    def seconds(config, m, x):
        if m > memory:
            raise torch.OutOfMemoryError("out of memory")
        return fixed + m

    monkeypatch.setattr(schedule, "_seconds_of_a_step", seconds)
    assert fastest(TINY, most, CPU) == best
    assert capsys.readouterr().out.startswith(f"cells at once: {best} ")


def test_steps_are_timed_without_folders():
    assert schedule._seconds_of_a_step(TINY, 2, images(0)) > 0


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
        assert_close(a.mean(), b.mean(), rtol=0.02, atol=0.02)


def test_bf16_trains_to_the_rates_of_fp32():
    """The loss falls as far, and small rates are not lost (plain autocast takes 30 to 40 % off R(y|z))."""
    figures = []
    for precision in ("fp32", "bf16"):
        config = Config(conv_channels=4, z_dims=3, precision=precision, learning_rate=3e-3, batch_size=32)
        training, x = training_of(config), images(0).repeat(4, 1, 1, 1)
        training.begin_epoch(60)
        sums = [training.step(x, 32) for _ in range(60)]
        figures.append(sums[-1][0] / 32)
    assert_close(figures[1], figures[0], rtol=0.05, atol=0.05)


def test_memory_that_cannot_be_given_back_stays(monkeypatch):
    """The allocator of an older torch believes that a capture that failed goes on, and asserts that it does not."""
    empty = Mock(side_effect=RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED"))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    schedule.free(torch.device("cuda"))
    assert empty.called
