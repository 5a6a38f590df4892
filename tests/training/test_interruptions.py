"""Kills, signals and damaged states: the same command continues, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from models.stack import Stack
from tests.conftest import CELL, TINY, start, weights
from tests.reliability.trials import there, times
from tests.training.test_chunk import in_training
from utils.config import Config
from utils.errors import UserError
from utils.files import load_tensors
from utils.runs import Run
from utils.training.schedule import align, position


def wait_for(pattern: str, process, seconds=60) -> bool:
    """Whether a file appeared before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if there(pattern):
            return True
        time.sleep(0.005)
    return bool(there(pattern))


def test_a_compiled_training_continues_bit_for_bit(script, interrupted, undisturbed):
    compiled = [*CELL, "--compile", "on"]
    assert script(train.main, *compiled, "--runs_dir", "whole")[0] == 0
    interrupted(50, *compiled)
    status, out, err = script(train.main, *compiled)
    assert status == 0 and "resuming at epoch" in out, err
    ours, whole = (weights(next(Path(d, "singles").iterdir())) for d in ("runs", "whole"))
    assert ours == whole != undisturbed


@times(50, few=1)
def test_kill_9_at_a_random_moment_then_the_same_command(trial, script, undisturbed):
    process = start("train.py", *CELL)
    assert wait_for("resume.pth", process)
    time.sleep(random.Random(trial).uniform(0, 1.0))
    process.kill()
    process.wait()
    unfinished = bool(there("resume*.pth"))
    again = start("train.py", *CELL)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert ("resuming at epoch" in out) == unfinished
    path = next(Path("runs/singles").iterdir())
    assert weights(path) == undisturbed
    events = EventAccumulator(str(path)).Reload()
    assert [e.step for e in events.Scalars("test/loss")] == list(range(1, 7))


def test_a_kill_between_the_two_renames_of_a_save(script, interrupted, undisturbed):
    interrupted(3 * 15 + 1, *CELL)
    (state,) = Path("runs").rglob("resume.pth")
    state.rename(state.with_name("resume.prev.pth"))
    assert "  unfinished at epoch 3 of 6\n" in script(train.main, *CELL, "--dry_run")[1]
    status, out, err = script(train.main, *CELL)
    assert status == 0 and "resuming at epoch 3 of 6" in out, err
    assert weights(state.parent) == undisturbed


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_tell_how_to_continue(number, status, script, undisturbed):
    process = start("train.py", *CELL)
    assert wait_for("resume.pth", process)
    time.sleep(0.15)
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == status, err
    assert "saved at epoch" in err and "rerun to continue: python" in err and "Traceback" not in err
    assert script(train.main, *CELL)[0] == 0
    assert weights(next(Path("runs/singles").iterdir())) == undisturbed


def test_a_signal_within_an_epoch_is_resumed_within_it(script, monkeypatch, undisturbed):
    step, calls = Stack.step, []

    def counting(self, *args):
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", counting)
    status, _, err = script(train.main, *CELL, "--cells_at_once", "1")
    assert status == 143 and "saved at epoch 1" in err
    state = load_tensors(next(Path("runs").rglob("resume.pth")))
    assert (state["epoch"], state["step"]) == (1, 5)
    assert script(train.main, *CELL)[0] == 0
    assert weights(next(Path("runs/singles").iterdir())) == undisturbed
    assert len(calls) == 6 * 15


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_resume_state_falls_back_to_the_one_before(damage, script, undisturbed):
    process = start("train.py", *CELL)
    assert wait_for("resume.prev.pth", process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    path = next(Path("runs").rglob("resume.pth"))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    status, out, err = script(train.main, *CELL)
    assert status == 0 and f"{path}: damaged" in err and "falling back" in err
    assert weights(path.parent) == undisturbed


@pytest.mark.parametrize("state", [{"a": 1}, {"weights": {}, "epoch": 0}, [1]])
def test_a_foreign_resume_state_is_named(state, script):
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=2, batch_size=500), "runs")
    run.create()
    torch.save(state, run.path / "resume.pth")
    status, _, err = script(train.main, *TINY)
    assert status == 1 and f"{run.path / 'resume.pth'}: damaged" in err


def test_a_signal_in_a_cells_last_step_ends_the_grid(script, monkeypatch):
    step = Stack.step

    def last_step(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", last_step)
    one_step = [*TINY[:4], "--num_epochs", "1", "--batch_size", "2000", "--beta_y", "1:9:5", "--device", "cpu"]
    status, _, err = script(train.main, *one_step, "--overwrite")
    assert status == 143 and "rerun to continue" in err and not err.rstrip().endswith("--overwrite")
    assert len(list(Path("runs/singles").iterdir())) == 1


def test_without_a_whole_resume_state_it_refuses(script):
    process = start("train.py", *CELL)
    assert wait_for("resume.prev.pth", process)
    process.kill()
    process.wait()
    for path in Path("runs").rglob("resume*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    status, _, err = script(train.main, *CELL)
    assert status == 1 and "no undamaged checkpoint is left" in err
    assert script(train.main, *CELL, "--overwrite")[0] == 0


def test_two_processes_on_one_run_folder(script):
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=2, batch_size=500), "runs")
    run.create()
    holder = "import sys, time; sys.path.insert(0, sys.argv[1]); from utils.runs import Run; from pathlib import Path\n"
    holder += "with Run.open(Path(sys.argv[2])).locked():\n    print('held', flush=True); time.sleep(60)"
    Path("holder.py").write_text(holder)
    process = start(Path("holder.py").resolve(), Path(train.__file__).parent, run.path)
    assert process.stdout.readline() == "held\n"
    status, _, err = script(train.main, *TINY)
    assert status == 1 and f"locked by pid {process.pid} on host" in err
    process.kill()
    process.wait()
    assert script(train.main, *TINY)[0] == 0


def test_cells_that_a_kill_left_apart_train_together_again(script, monkeypatch):
    """Three cells saved after the first epoch, one of them also after the second: it goes back."""
    grid = [*CELL, "--beta_y", "1", "2", "3", "--cells_at_once", "3"]
    assert script(train.main, *grid, "--runs_dir", "whole")[0] == 0
    save_state, saves = Run.save_state, []

    def killed(self, state):
        saves.append(self.path)
        if len(saves) > 4:
            raise UserError("killed")
        save_state(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", killed)
        assert script(train.main, *grid)[0] == 2
    states = {path.parent.name: load_tensors(path) for path in Path("runs").rglob("resume.pth")}
    assert sorted(s["epoch"] for s in states.values()) == [1, 1, 2]
    status, out, _ = script(train.main, *grid)
    assert status == 0 and out.count("resuming at epoch 1") == 1 and "epoch 2" not in out
    for path in Path("runs/singles").iterdir():
        assert weights(path) == weights(Path("whole/singles", path.name))


def test_a_cell_that_cannot_go_back_goes_on_by_itself():
    runs, chunk = in_training()
    for epoch in (1, 2):
        chunk.epoch = epoch
        chunk.save()
        chunk.settle()
    cells = [(run, run.load_state()[0]) for run in runs]
    assert align(cells) == cells
    (runs[0].path / "resume.prev.pth").replace(runs[0].path / "resume.pth")
    (runs[1].path / "resume.prev.pth").write_bytes(b"damaged")
    apart = align([(run, run.load_state()[0]) for run in runs])
    assert [position(state) for _, state in apart] == [(1, 0), (2, 0)]
    assert align([(runs[0], None), (runs[1], cells[1][1])])[1][1] is cells[1][1]  # a new cell waits for none


def test_a_kill_in_the_first_save_of_all_leaves_no_cell_ahead():
    runs, _ = in_training()
    first = {"epoch": 1, "step": 0}
    assert align([(runs[0], first), (runs[1], None)]) == [(runs[0], None), (runs[1], None)]
