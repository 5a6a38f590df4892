"""What runs on a GPU, rehearsed on a pretended one (tests/pretended.py): every kind of model, and all that is done."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import _disable_current_modes

import eval_beta_grid
import plot_eval
import train
import train_classifier
from datasets.batches import Resident
from datasets.loading import Data
from models.hvae import HVAE
from models.tables import LIKELIHOODS
from tests import pretended
from tests.conftest import GRID, TINY
from tests.pretended import CPU, Graph, Refused
from tests.reliability.trials import first
from utils.config import Config
from utils.explore import load
from utils.runs import Run
from utils.training import capture
from utils.training.classifier import trained
from utils.training.schedule import use_precision
from utils.training.training import Setup, Training

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch built with CUDA")
SMALL = {"conv_channels": 4, "z_dims": 3, "batch_size": 4, "num_epochs": 2, "lr_schedule": "cosine"}
RANGE = {"multi_rate": True, "beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0}
KINDS = {name: {"vae_type": name} for name in ("HVAE", "LVAE", "BVAE")}
KINDS |= {"conv_z": {"use_conv_z": True}, "LVAE conv_z": {"vae_type": "LVAE", "use_conv_z": True}}
KINDS |= {
    "linear_y": {"linear_y_with_dims": 8},
    "steered": {"target_rate_z": 1.0},
    "Gumbel": {"qz_family": "GumbelSoftmax"},
}
KINDS |= {"LVAE Gumbel": {"vae_type": "LVAE", "qz_family": "GumbelSoftmax"}}
KINDS |= {name: {"px_y_family_ll": name} for name in LIKELIHOODS if name != Config().px_y_family_ll}
KINDS |= {"multi-rate BVAE": RANGE | {"vae_type": "BVAE", "beta_z": 1.0, "beta_max_z": 1.0}}
KINDS |= {
    f"multi-rate {kind}": RANGE | KINDS[kind] for kind in ("HVAE", "conv_z", "Gumbel", "GaussianLearnedSigma", "MoL")
}
WAYS = [("muon", "bf16", 2), ("adam", "fp32", 2), ("muon", "fp32", 1), ("adam", "bf16", 1)]
CASES = [(kind, WAYS[(i + shift) % 4]) for shift in range(4) for i, kind in enumerate(KINDS)]
KINDS["large"] = {"dataset": "ImageNet"}
CLASSIFIER = ["--dataset", "Digits", "--num_epochs", "1", "--device", "cuda"]
CASES.append(("large", WAYS[2]))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(capture, "WARM_UP", 1)
    monkeypatch.setattr(capture, "failed", False)
    with pretended.one(monkeypatch) as device:
        yield device


def begun(config: Config, device: torch.device, m: int = 1, state: dict | None = None, **setup) -> Training:
    """A training of m cells, new or from a checkpoint."""
    use_precision(config.precision)
    training = Training([Run.of(config, "runs")] * m, [state] * m, Setup(device, **setup))
    training.begin_epoch(3)
    return training


def images(config: Config, device: torch.device, n: int = 10) -> Resident:
    """In batches of 4; of the last, 2."""
    noise = torch.randint(256, (n, *config.image_shape), generator=torch.Generator().manual_seed(0))
    return Resident(noise.byte(), torch.arange(n) % 10, device)


def epoch(training: Training, n: int = 10) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Trains an epoch and evaluates: the steps' sums, the means, a PSNR. Reads nothing after the first of both."""
    config, split = training.config, images(training.config, training.device, n)
    data = Data(split, split, 10)
    for x, _ in split.batches(config.batch_size, (config.seed, training.epoch)):
        training.step(x, len(x))
        if training.steps_done == 1:
            training.evaluate(data)
            Graph.reads.clear()
    means = training.evaluate(data)
    assert not Graph.reads, f"the host waits for the GPU in {Graph.reads}"
    return training.history.cpu(), means.cpu(), training.stack.plain(0).psnr([(x, None)])


def on_cpu(config: Config, m: int, state: dict | None = None, **images) -> tuple[torch.Tensor, torch.Tensor, float]:
    """As `epoch`, of a training on the CPU, without pretence."""
    with _disable_current_modes():
        return epoch(begun(config, CPU, m, state), **images)


def rehearse(config: Config, gpu: torch.device, m: int) -> None:
    """Two epochs on the GPU, the first captured, are those of the CPU; so is the second, there, from its checkpoint."""
    ours = begun(config, gpu, m)
    close = {"rtol": 0.02, "atol": 0.1} if config.precision == "bf16" else {"rtol": 1e-4, "atol": 1e-3}
    assert_close(epoch(ours), on_cpu(config, m), **close)
    assert ours.fast != ours.update, "the step was not captured"
    assert ours.fast_sums != ours.stack.sums, "the evaluation was not captured"
    ours.epoch, ours.steps_done = 1, 0
    state = ours.state(0)
    assert all(t.device == CPU for of in (state, state["weights"]) for t in of.values() if isinstance(t, torch.Tensor))
    assert_close(epoch(begun(config, gpu, m, state, compile="off"), n=6), on_cpu(config, m, state, n=6), **close)


@pytest.mark.parametrize("case", first(len(KINDS) - 1, *CASES), ids=str)
def test_a_training_on_a_gpu_is_that_on_a_cpu(case, gpu):
    kind, (optimizer, precision, m) = case
    config = Config(optimizer=optimizer, precision=precision, **SMALL, **KINDS[kind])
    rehearse(config, gpu, 1 if config.is_conditioned else m)


def test_muon_launches_at_most_half_as_many_kernels_again_as_adam(gpu):
    for kind, m in itertools.product(("HVAE", "conv_z", "linear_y", "multi-rate HVAE"), (1, 2)):
        launches = {}
        for optimizer in ("adam", "muon"):
            config = Config(dataset="CIFAR10", batch_size=4, optimizer=optimizer, **KINDS[kind])
            training = begun(config, gpu, 1 if config.is_conditioned else m, compile="off")
            training._set_spread(1.0)
            x = torch.rand(4, 3, 32, 32, device=gpu)
            before = Graph.launches
            training.step(x, 4)
            launches[optimizer] = Graph.launches - before
        assert 100 < launches["adam"] < launches["muon"] <= 1.5 * launches["adam"], (kind, m, launches)


def test_stacked_convolutions_are_of_the_precision_too(gpu, monkeypatch):
    """All but those of output layers; on a CPU, stacked ones are in float32."""
    dtypes, real = {1: [], 2: []}, pretended.pretended

    def noting(func, args, kwargs):
        if func is torch.ops.aten.convolution.default:
            dtypes[training.stack.m].append(args[0].dtype)
        return real(func, args, kwargs)

    monkeypatch.setattr(pretended, "pretended", noting)
    for m in dtypes:
        training = begun(Config(precision="bf16", **SMALL), gpu, m, compile="off")
        training.step(torch.rand(4, *training.config.image_shape, device=gpu), 4)
    assert dtypes[1] == dtypes[2] and set(dtypes[1]) == {torch.bfloat16, torch.float32}


def test_captured_steps_and_evaluations_launch_little_themselves(gpu):
    """Noise, betas and learning rates, and copies of these to where the graphs read them."""
    launches = []
    for compile in ("off", "auto"):
        training = begun(Config(**SMALL), gpu, compile=compile)
        split, x = images(training.config, gpu, 8), torch.rand(4, *training.config.image_shape, device=gpu)
        for _ in range(2):  # the first time they are captured
            before = Graph.launches
            training.step(x, 4)
            of_step = Graph.launches - before
            training.evaluate(Data(split, split, 10))
        launches.append((of_step, Graph.launches - before - of_step))
    assert all(captured <= 0.15 * eager for eager, captured in zip(*launches, strict=True)), launches


def plant(monkeypatch, fault) -> None:
    """Has a forward pass make a fault of the images."""
    real = HVAE.forward
    monkeypatch.setattr(HVAE, "forward", lambda self, x, noise: (fault(x), real(self, x, noise))[1])


FAULTS = {
    "a number read": lambda x: x.sum().item(),
    "a copy to the CPU": lambda x: x.cpu(),
    "an array": lambda x: x.numpy(),
    "a tensor of the CPU": lambda x: x + torch.ones(x.shape),
    "a generator of the CPU": lambda x: torch.rand(2, generator=torch.Generator(), device=x.device),
    "a size that the device knows": lambda x: x[x > 0.5],
    "a tensor from the CPU": lambda x: torch.ones(2).to(x.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, gpu, monkeypatch):
    plant(monkeypatch, FAULTS[fault])
    with pytest.raises((AssertionError, Refused)):
        rehearse(Config(**SMALL), gpu, 1)


def test_a_gpu_without_bf16_trains_none(gpu, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    err = refused(train.main, *TINY[:-1], "cuda", "--precision", "bf16")
    assert err == "error: --precision: this GPU has no bf16; try tf32 or fp32\n"
    config, seen, real = Config(), [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *how, enabled: seen.append(enabled) or real(*how, enabled=enabled))
    data, settings = Data(images(config, gpu), images(config, gpu), 10), {"num_epochs": 1, "batch_size": 20, "seed": 2}
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        trained(config, data, settings | {"learning_rate": 0.1}, Path(), gpu)
        Path("resume.pth").unlink()
    assert seen == [False, True]


NO_ROOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free"
)


def test_out_of_memory_is_one_line_wherever_it_comes(gpu, monkeypatch, refused):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError(NO_ROOM)

    monkeypatch.setattr(train_classifier, "make", no_room)
    assert refused(train_classifier.main, *CLASSIFIER) == f"error: --device: {NO_ROOM}\n"
    monkeypatch.setattr(Training, "update", no_room)
    err = refused(train.main, *TINY[:-1], "cuda", "--cells_at_once", "1")
    assert err.startswith("error: --batch_size: out of GPU memory; try ") and NO_ROOM in err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2**34))
    err = refused(train.main, *TINY[:-1], "cuda")
    assert err == "error: Digits: needs 1,423,224 bytes of memory, the GPU has free 1,000\n"


@pytest.mark.slow
def test_all_that_is_done_on_a_gpu_ends_well(gpu, passes, capfd):
    """Trainings of a grid and of a multi-rate model, the classifier, all steps of the evaluation, figures, `load`."""
    on_gpu = [*TINY[:-1], "cuda"]
    out = passes(train.main, *on_gpu, "--beta_y", "1", "2", "--optimizer", "muon")
    assert "cells at once: " in out and "note: " not in out
    passes(train.main, *on_gpu, "--multi_rate", "--force", "--run_batch_name", "m", *GRID)
    passes(train_classifier.main, *CLASSIFIER)
    for batch, n in (("singles", 2), ("m", 6)):
        out = passes(eval_beta_grid.main, "--run_batch_name", batch, "--all", "--device", "cuda", "--n_samples", "64")
        assert f"{n} of {n} runs evaluated" in out
        passes(plot_eval.main, "--run_batch_name", batch, "--device", "cuda")
    paths = sorted(Path("runs/singles").glob("*/vae.pth"))
    passes(plot_eval.main, "--traverse", paths[0].parent, "--device", "cuda")
    passes(plot_eval.main, "--latents", paths[0].parent, "--device", "cuda")
    passes(train.main, *on_gpu, "--init_from", paths[0].parent, "--num_epochs", "3")
    run = load(paths[0].parent, device="cuda")
    q = run.encode(run.images(8)[0])
    assert run.decode(q.z, seed=1).device == run.sample(4).device == gpu
    run.show(run.decode(run.interpolate(q.z[0], q.z[1])))
