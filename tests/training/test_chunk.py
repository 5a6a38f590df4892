"""Cells in training: failures, saving, the end."""

import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from models.stack import Stack
from tests.conftest import TINY, weights
from utils.config import Config
from utils.errors import UserError
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training.chunk import Chunk
from utils.training.engine import Engine
from utils.training.loop import lr_factor, rate_weights


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_cell_whose_loss_is_not_finite_fails_alone(at_once, script, monkeypatch, trained):
    def rows(paths):
        return {p.name: weights(p) for p in paths if "Beta_y_2.0" not in p.name}

    grid = ["--beta_y", "1", "2", "3", "--cells_at_once", str(at_once)]
    healthy = trained(*grid, batch="healthy")
    step = Stack.step

    def poisoned(self, optimizer, x, noise, beta_y, beta_z):
        if next(iter(optimizer.state.values()))["step"] == 4:  # the second of the three steps in the second epoch
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", poisoned)
    status, out, _ = script(train.main, *TINY, *grid, "--run_batch_name", "ill")
    assert status == 1 and "failed at epoch 2, step 2: loss inf" in out
    paths = sorted(Path("runs/ill").iterdir())
    assert rows(paths) == rows(healthy)
    ill = next(Run.open(p) for p in paths if "Beta_y_2.0" in p.name)
    assert ill.status == "failed" and ill.result["epoch"] == 2 and ill.result["terms"]["loss"] == "inf"
    load_model(ill, torch.device("cpu"))
    status, out, err = script(train.main, *TINY, *grid, "--run_batch_name", "ill")
    assert status == 1 and "failed before" in out and "--overwrite retrains it" in err


def in_training(n_cells=2):
    runs = [Run.of(Config(conv_channels=2, z_dims=3, batch_size=4, beta_y=1.0 + i), "runs") for i in range(n_cells)]
    for run in runs:
        run.create()
    chunk = Chunk(runs, [None] * n_cells, Engine(runs[0].config, n_cells, torch.device("cpu")))
    return runs, chunk


def a_step(chunk):
    x = torch.rand(4, 1, 28, 28, generator=generator("cpu", 0))
    chunk.engine.step(x, chunk.stack.model.noise(4, generator("cpu", 1)), chunk.betas.y, chunk.betas.z)


def test_a_state_is_of_the_moment_of_its_save_and_not_of_its_writing(monkeypatch):
    runs, chunk = in_training()
    a_step(chunk)
    expected, may_write, save_state = [chunk.stack.cell(m) for m in range(2)], threading.Event(), Run.save_state

    def slow(self, state):
        assert may_write.wait(60)
        save_state(self, state)

    monkeypatch.setattr(Run, "save_state", slow)
    chunk.save()
    a_step(chunk)  # while it waits to be written
    assert not chunk.saving.done() and not chunk.cheap_to_save(0.0)
    may_write.set()
    chunk.settle()
    for run, trained in zip(runs, expected, strict=True):
        state = run.load_state()[0]
        assert all(torch.equal(state["weights"][name], p) for name, p in trained.items()) and state["adam_steps"] == 1
        assert sum(p.numel() for p in trained.values()) * 3 * 4 < (run.path / "resume.pth").stat().st_size < 200_000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_writing_starts_no_threads_beside_the_trainings_own():
    """torch's operations on the saver's thread would; a CPU's training then took 18 % longer."""
    run = Run.of(Config(conv_channels=32, z_dims=32, batch_size=4), "runs")
    run.create()
    torch.set_num_threads(2)
    chunk = Chunk([run], [None], Engine(run.config, 1, torch.device("cpu")))
    a_step(chunk)
    before = len(os.listdir("/proc/self/task"))
    chunk.save()
    chunk.settle()
    assert len(os.listdir("/proc/self/task")) <= before + 1


def test_what_goes_wrong_while_writing_is_told_at_the_next_occasion(monkeypatch):
    def full(self, state):
        raise UserError("disk full")

    _, chunk = in_training()
    monkeypatch.setattr(Run, "save_state", full)
    chunk.save()
    with pytest.raises(UserError, match="disk full"):
        chunk.settle()
    chunk.settle()


def test_perfect_reconstructions_have_an_infinite_psnr(script, monkeypatch):
    monkeypatch.setattr("models.hvae.HVAE.psnr", lambda self, batches: float("inf"))
    status, out, _ = script(train.main, *TINY)
    assert status == 0 and "   inf " in out


def test_warmup_weights(script, monkeypatch):
    assert [rate_weights(Config(warmup_epochs=4), e)[1] for e in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rate_weights(Config(warmup_epochs=0), 0) == (1, 1)
    ends = {"multi_rate": True, "beta_max_y": 2.0, "beta_max_z": 2.0}
    assert rate_weights(Config(warmup_epochs=4, **ends), 1) == (1, 0.25)
    seen, step = [], Stack.step

    def watching(self, optimizer, x, noise, beta_y, beta_z):
        seen.append((beta_y.item(), beta_z.item()))
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", watching)
    flags = [*TINY[:4], "--num_epochs", "10", "--batch_size", "2000", "--vae_type", "LVAE", "--beta_y", "3"]
    assert script(train.main, *flags)[0] == 0
    assert seen == [(0, 0), (1.5, 0.5), *[(3, 1)] * 8]
    seen.clear()
    assert script(train.main, *flags, "--no_warmup")[0] == 0
    assert seen == [(3, 1)] * 10


@pytest.mark.parametrize("schedule, start", [("constant", 10), ("cosine", 0), ("tail", 7)])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_learning_rate_follows_its_schedule(schedule, start, spread):
    """As torch's scheduler: constant, then down to 0 along a cosine; 3.5 times as large once betas spread."""
    config = Config(lr_schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.5 if spread else 1.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, 10 - start))
    for step in range(10):
        assert lr_factor(config, step / 10, spread) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        if step >= start:
            optimizer.step()
            falling.step()


def test_a_state_within_an_epoch_of_another_kind_of_device_is_refused():
    (run,), chunk = in_training(1)
    chunk.step, chunk.history = 1, torch.zeros(3, 1, 4)
    chunk.noise = SimpleNamespace(get_state=lambda: torch.zeros(16, dtype=torch.uint8))  # so long is a GPU's
    chunk.save()
    chunk.settle()
    with pytest.raises(UserError, match="saved within an epoch on a GPU; resume it on a GPU"):
        Chunk([run], [run.load_state()[0]], chunk.engine)


def test_a_categorical_z_is_in_use_at_half_of_what_it_can_hold():
    ends = {"multi_rate": True, "beta_y": 0.1, "beta_max_y": 10.0, "beta_z": 0.1, "beta_max_z": 10.0}
    config = Config(conv_channels=2, z_dims=4, qz_family="GumbelSoftmax", num_epochs=20, **ends)
    chunk = Chunk([Run.of(config, "runs")], [None], Engine(config, 1, torch.device("cpu")))
    for rate, spread in ((0.69, 0), (0.7, 1 / 3)):  # of ln 4 = 1.386 nats
        chunk.widen(torch.tensor([[300.0, -290.0, 8.0, rate]]))
        assert chunk.spread == pytest.approx(spread)


def test_betas_spread_once_z_is_in_use_or_half_of_the_training_is_over():
    ends = {"multi_rate": True, "beta_y": 0.1, "beta_max_y": 10.0, "beta_z": 0.1, "beta_max_z": 10.0}
    config = Config(conv_channels=2, z_dims=3, num_epochs=20, **ends)
    chunk = Chunk([Run.of(config, "runs")], [None], Engine(config, 1, torch.device("cpu")))
    spreads = []
    for rate in (0.5, 1.9, 2.1, 5.0, 1.0, math.nan):
        chunk.epoch += 1
        chunk.widen(torch.tensor([[300.0, -290.0, 8.0, rate]]))
        spreads.append(chunk.spread)
        assert chunk.engine.optimizer.on == (rate != 0.5 and rate != 1.9)  # until then, steps are Adam's
    assert spreads == pytest.approx([0, 0, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    chunk.epoch = 10
    for _ in range(9):
        chunk.widen(torch.zeros(1, 4))
    assert chunk.spread == 1
