"""Trainings: failures, schedules, saving, kills, damaged states; what continues does so bit for bit."""

import math
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

import train
from tests.conftest import CELL, TINY, all_weights, in_training, training_of, weights
from tests.reliability.trials import ended, first, there, times, training
from utils.config import Config
from utils.errors import UserError
from utils.files import digest_of, load_tensors
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training.betas import rate_weights
from utils.training.multi_rate import next_spread
from utils.training.optimizers import lr_factor
from utils.training.schedule import align, position
from utils.training.training import Training

CPU = torch.device("cpu")
OTHERS = [["--qz_family", "GumbelSoftmax"], ["--vae_type", "LVAE", "--warmup_epochs", "1"], ["--optimizer", "muon"]]
ENDS = {"multi_rate": True, "beta_y": 0.1, "beta_max_y": 10.0, "beta_z": 0.1, "beta_max_z": 10.0}


def test_a_cell_whose_loss_is_not_finite_fails_alone(script, passes, monkeypatch):
    """By itself, and beside another one."""
    update, pair = Training.update, [*TINY, "--beta_y", "1", "2", "--cells_at_once", "2", "--runs_dir"]

    def poisoned(self, x, noise, beta_y, beta_z):
        if (self.epoch, self.steps_done) == (1, 1):
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
        return update(self, x, noise, beta_y, beta_z)

    passes(train.main, *pair, "healthy")
    monkeypatch.setattr(Training, "update", poisoned)
    for flags in ([*TINY, "--beta_y", "2", "--runs_dir", "alone"], [*pair, "ill"]):
        status, out, _ = script(train.main, *flags)
        assert status == 1 and "failed at epoch 2, step 2: loss inf" in out
    one, two = (next(Path("ill/singles").glob(f"*Beta_y_{n}*")) for n in (1, 2))
    assert weights(one) == weights(Path("healthy/singles", one.name))
    result = Run.open(two).result
    assert (result["status"], result["epoch"], result["terms"]["loss"]) == ("failed", 2, "inf")
    load_model(Run.open(two), CPU)
    status, out, err = script(train.main, *pair, "ill")
    assert status == 1 and "failed before" in out and "--overwrite" in err


def test_every_step_has_noise_and_images_of_its_own(passes, monkeypatch):
    """The same for all cells of a grid."""
    steps, update = [], Training.update

    def noting(self, x, noise, *betas):
        steps.append((self.epoch, *(t.sum().item() for t in (x, noise.z, noise.y))))
        return update(self, x, noise, *betas)

    monkeypatch.setattr(Training, "update", noting)
    passes(train.main, *TINY, "--beta_y", "1", "2")
    cell, other = steps[:6], steps[6:]
    assert cell == other and [epoch for epoch, *_ in cell] == [0, 0, 0, 1, 1, 1]
    for values in zip(*(rest for _, *rest in cell), strict=True):
        assert len(set(values)) == 6


def test_perfect_reconstructions_have_an_infinite_psnr(passes, monkeypatch):
    monkeypatch.setattr("models.hvae.HVAE.psnr", lambda self, batches: float("inf"))
    assert "   inf " in passes(train.main, *TINY)


def test_warmup_weights(passes, monkeypatch):
    assert [rate_weights(Config(warmup_epochs=4), e)[1] for e in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rate_weights(Config(warmup_epochs=0), 0) == (1, 1)
    assert rate_weights(Config(warmup_epochs=4, num_epochs=10, **ENDS), 1) == (1, 0.25)
    betas, update = [], Training.update

    def watching(self, x, noise, beta_y, beta_z):
        betas.append((beta_y.item(), beta_z.item()))
        return update(self, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Training, "update", watching)
    flags = [*TINY, "--batch_size", "2000", "--vae_type", "LVAE", "--beta_y", "3", "--num_epochs"]
    passes(train.main, *flags, "10")
    passes(train.main, *flags, "5", "--no_warmup")
    assert betas == [(0, 0), (1.5, 0.5), *[(3, 1)] * 8, *[(3, 1)] * 5]


@pytest.mark.parametrize("schedule, start", [("constant", 10), ("cosine", 0), ("tail", 7)])
def test_the_learning_rate_follows_its_schedule(schedule, start):
    """As torch's scheduler: constant, then down to 0 along a cosine; four times as large once betas spread."""
    configs = [Config(lr_schedule=schedule, sharing=sharing, **ENDS) for sharing in (1, 2)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, 10 - start))
    for step in range(10):
        usual = optimizer.param_groups[0]["lr"]
        for spread, factors in ((0.0, [1.0, 0.25]), (0.1, [3.5, 1.0])):
            rates = [lr_factor(config, step / 10, spread) for config in configs]
            assert rates == approx([factor * usual for factor in factors], abs=1e-12)
        if step >= start:
            optimizer.step()
            falling.step()


def test_betas_spread_once_z_is_in_use_or_late():
    """A categorical z is in use at half of what it can hold."""

    def spreads(rates, **settings):
        config, spread, result = Config(num_epochs=20, **settings, **ENDS), 0.0, []
        for epoch, rate in enumerate(rates, start=1):
            spread = next_spread(config, epoch, spread, torch.tensor([[300.0, -290.0, 8.0, rate]]))
            result.append(spread)
        return result

    third = 1 / 3
    assert spreads((0.69, 0.7), z_dims=4, qz_family="GumbelSoftmax") == approx([0, third])  # of ln 4 = 1.386
    rates = (0.5, 1.9, 2.1, 5.0, 1.0, math.nan, *[0.0] * 5)
    assert spreads(rates, z_dims=3) == approx([0, 0, third, *[2 * third] * 6, 1, 1])


def test_until_betas_spread_steps_are_adams():
    training = training_of(Config(conv_channels=2, z_dims=3, **ENDS))
    assert not training.optimizer.on and training.stack.model.spread == 0
    training._set_spread(0.2)
    assert training.optimizer.on and training.stack.model.spread == approx(0.2)


def a_step(training):
    x = torch.rand(4, 1, 28, 28, generator=generator("cpu", 0))
    training.update(x, training.stack.model.noise(4, generator("cpu", 1)), training.betas.y, training.betas.z)


def test_a_state_is_of_the_moment_of_its_save(monkeypatch):
    runs, training = in_training()
    a_step(training)
    expected, may_write, save_state = [training.stack.cell(m) for m in range(2)], threading.Event(), Run.save_state
    monkeypatch.setattr(Run, "save_state", lambda *args: may_write.wait(60) and save_state(*args))
    training.save()
    a_step(training)  # while it waits to be written
    assert not training.saver.pending.done() and not training.saver.is_due(1)
    may_write.set()
    training.saver.settle()
    for run, trained in zip(runs, expected, strict=True):
        state = run.load_state()[0]
        assert all(torch.equal(state["weights"][name], p) for name, p in trained.items()) and state["adam_steps"] == 1
        assert sum(p.numel() for p in trained.values()) * 3 * 4 < (run.path / "resume.pth").stat().st_size < 200_000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_writing_starts_no_threads_beside_the_trainings_own():
    """torch's operations on the saver's thread would; a CPU's training then took 18 % longer."""
    torch.set_num_threads(2)
    _, training = in_training(1, conv_channels=32, z_dims=32)
    a_step(training)
    before = len(os.listdir("/proc/self/task"))
    training.save()
    training.saver.settle()
    assert len(os.listdir("/proc/self/task")) <= before + 1


def test_what_goes_wrong_while_writing_is_told_later(monkeypatch):
    _, training = in_training()
    monkeypatch.setattr(Run, "save_state", Mock(side_effect=UserError("disk full")))
    training.save()
    with pytest.raises(UserError, match="disk full"):
        training.saver.settle()
    training.saver.settle()


def test_a_state_of_another_kind_of_device_is_refused():
    (run,), training = in_training(1)
    training.begin_epoch(3)
    training.steps_done = 1
    training.noise = Mock(get_state=lambda: torch.zeros(16, dtype=torch.uint8))  # so long is a GPU's
    training.save()
    training.saver.settle()
    with pytest.raises(UserError, match="resume it on a GPU"):
        Training([run], [run.load_state()[0]], training.setup)


@pytest.mark.slow
def test_a_compiled_training_continues_bit_for_bit(passes, interrupted, undisturbed):
    compiled = [*CELL, "--compile", "on"]
    passes(train.main, *compiled, "--runs_dir", "whole")
    interrupted(50, *compiled)
    assert "resuming at epoch" in passes(train.main, *compiled)
    assert all_weights() == all_weights("whole") and undisturbed not in all_weights().values()


ENDS_OF_A_PROCESS = [(signal.SIGKILL, []), (signal.SIGTERM, []), (signal.SIGKILL, ["--threads", "2"])]
ENDS_OF_A_PROCESS += [(signal.SIGINT, []), (signal.SIGUSR1, [])]  # the latter is SLURM's warning


@pytest.mark.parametrize("case", first(1, *ENDS_OF_A_PROCESS))
@times(50)
def test_a_process_ended_at_a_random_moment_goes_on(case, trial, passes, undisturbed):
    """The second signal must not disturb the exit. Slow, as processes start for each."""
    number, threads = case
    expected = [undisturbed]
    if threads:  # which sum in another order; the training goes on by as many
        passes(train.main, *CELL, *threads, "--runs_dir", "whole")
        torch.set_num_threads(1)
        expected = [*all_weights("whole").values()]
    process = training(*CELL, *threads)
    time.sleep(random.Random(trial).uniform(0, 1.0))
    process.send_signal(number)
    process.send_signal(number)
    status, _, err = ended(process)
    assert status in (0, -9 if number == signal.SIGKILL else 128 + number)  # it may have been done
    assert status <= 0 or "saved at epoch" in err and "rerun to continue: python" in err
    unfinished = bool(there("resume*.pth"))
    assert ("resuming at epoch" in passes(train.main, *CELL)) == unfinished
    assert [*all_weights().values()] == expected
    events = EventAccumulator(str(there("vae.pth")[0].parent)).Reload()
    assert [e.step for e in events.Scalars("test/loss")] == list(range(1, 7))


def test_states_that_are_damaged_or_half_renamed(script, passes, interrupted, undisturbed):
    """The one before is taken. Many trainings are continued, which takes long."""
    interrupted(3 * 15 + 1, *CELL)
    shutil.copytree("runs", "renamed")  # as by a kill between the two renames of a save
    (damaged,), (renamed,) = there("resume.pth"), there("resume.pth", "renamed")
    renamed.unlink()
    damaged.write_bytes(damaged.read_bytes()[:5000])
    status, out, err = script(train.main, *CELL)
    assert status == 0 and "resuming at epoch 2 of 6" in out and f"{damaged}: damaged" in err
    flags = [*CELL, "--runs_dir", "renamed"]
    assert "  unfinished at epoch 2 of 6\n" in passes(train.main, *flags, "--dry_run")
    assert "resuming at epoch 2 of 6" in passes(train.main, *flags)
    assert weights(damaged.parent) == weights(renamed.parent) == undisturbed


def test_a_signal_in_a_cells_last_step_ends_the_grid(script, at_step):
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    one_step = [*TINY, "--num_epochs", "1", "--batch_size", "2000", "--beta_y", "1:9:5"]
    status, _, err = script(train.main, *one_step, "--overwrite")
    assert status == 143 and "rerun to continue" in err and not err.rstrip().endswith("--overwrite")
    assert len(list(Path("runs/singles").iterdir())) == 1


def test_cells_that_a_kill_left_apart_train_together_again(script, passes, monkeypatch):
    """Both saved after the first epoch, one of them also after the second: it goes back."""
    grid = [*TINY, "--num_epochs", "3", "--save_every", "1", "--beta_y", "1", "2", "--cells_at_once", "2"]
    passes(train.main, *grid, "--runs_dir", "whole")
    save_state, calls = Run.save_state, []

    def killed(self, state):
        calls.append(state)
        if len(calls) > 3:
            raise UserError("killed")
        save_state(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", killed)
        assert script(train.main, *grid)[0] == 2
    assert sorted(load_tensors(path)["epoch"] for path in there("resume.pth")) == [1, 2]
    assert re.findall("resuming at epoch .", passes(train.main, *grid)) == ["resuming at epoch 1"]
    assert all_weights() == all_weights("whole")


def test_a_cell_that_cannot_go_back_goes_on_by_itself():
    runs, training = in_training()
    ahead = {"epoch": 1, "step": 0}  # a kill in the first save of all leaves no cell so
    assert align([(runs[0], ahead), (runs[1], None)]) == [(runs[0], None), (runs[1], None)]
    for training.epoch in (1, 2):
        training.save()
        training.saver.settle()
    cells = [(run, run.load_state()[0]) for run in runs]
    assert align(cells) == cells
    (runs[0].path / "resume.prev.pth").replace(runs[0].path / "resume.pth")
    (runs[1].path / "resume.prev.pth").write_bytes(b"damaged")
    apart = align([(run, run.load_state()[0]) for run in runs])
    assert [position(state) for _, state in apart] == [(1, 0), (2, 0)]
    assert align([(runs[0], None), (runs[1], cells[1][1])])[1][1] is cells[1][1]  # a new cell waits for none


@pytest.mark.parametrize("flags", first(3, *OTHERS, []))
def test_two_and_three_epochs_are_five(passes, trained, flags):
    (two,) = trained(*flags)
    note = f"note: {two} is this run with fewer epochs; --init_from {two}"
    assert note in passes(train.main, *TINY, *flags, "--num_epochs", "5")
    five = Run.open(next(Path("runs/singles").glob("*Epochs_5-*")))
    more = [*TINY, *flags, "--num_epochs", "5", "--runs_dir", "more", "--init_from", two]
    assert "resuming at epoch 2 of 5" in passes(train.main, *more)
    continued = Run.open(next(Path("more/singles").iterdir()))
    assert continued.config == five.config and continued.path.name == five.path.name
    assert weights(continued.path) == weights(five.path)
    moments = [load_tensors(run.path / "adam.pth") for run in (continued, five)]
    assert [len(state.pop("sessions")) for state in moments] == [2, 1]
    assert_close(*moments, rtol=0, atol=0)
    assert continued.result["test"] == five.result["test"] and "already complete" in passes(train.main, *more)


def test_a_batch_is_continued_cell_by_cell_and_after_a_kill(passes, refused, interrupted, trained):
    """Several batches are trained, which takes long."""
    grid = ["--beta_y", "1", "2", "--beta_z", "0.5"]
    trained(*grid)
    longer = [*TINY, *grid, "--num_epochs", "4", "--save_every", "1"]
    assert "2 of these cells with fewer epochs; --init_from runs/singles" in passes(train.main, *longer, "--dry_run")
    passes(train.main, *longer, "--runs_dir", "whole")
    start = ["--init_from", "runs/singles"]
    interrupted(5, *longer, *start)
    assert "resuming at epoch 3" in passes(train.main, *longer, *start)
    assert all_weights("whole").items() <= all_weights().items()
    lacking = refused(train.main, *TINY, "--beta_y", "7", "--num_epochs", "4", *start)
    assert "no finished run of fewer epochs for beta_y 7, beta_z 1" in lacking


def test_fine_tuning_starts_from_the_weights(passes, trained):
    (source,) = trained()
    passes(train.main, *TINY, "--beta_y", "3", "--learning_rate", "1e-30", "--init_from", source)
    digest = digest_of(source / "vae.pth")
    run = Run.open(next(Path("runs/singles").glob(f"*Beta_y_3.0*-init_{digest[:8]}")))
    assert run.config.init_from == digest
    before, after = (load_tensors(path / "vae.pth") for path in (source, run.path))
    assert_close(after, before)


def test_starts_that_cannot_be(refused, trained):
    (source,) = trained()

    def is_refused(text, *flags):
        before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
        assert text in refused(train.main, *TINY, *flags)
        assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before

    start = ["--init_from", source]
    is_refused("nowhere", "--init_from", "nowhere")
    is_refused("z_dims 3, not 5", "--z_dims", "5", *start)
    is_refused("--num_epochs must be larger", "--num_epochs", "1", *start)
    is_refused("multi-rate", "--multi_rate", "--beta_y", "1", "2", *start)
    (source / "vae.pth").write_bytes((source / "vae.pth").read_bytes()[:9000])
    is_refused("vae.pth", "--num_epochs", "5", *start)
    (source / "vae.pth").unlink()
    is_refused("is unfinished", "--num_epochs", "5", *start)
