"""A grid meets what happens in hours: kills, full disks, folders that become read-only, files that were damaged."""

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import eval_beta_grid
import plot_eval
import train
from tests.conftest import CELL, EVALUATION, TINY, all_weights
from tests.reliability.trials import ended, first, kill, launch, needs_mounts, there, times, wait_until
from utils.errors import ENDING_SIGNALS
from utils.files import load_tensors, read_json
from utils.runs import Run, load_model
from utils.training import saving, schedule
from utils.training.training import Training


@pytest.mark.slow
def test_two_processes_on_a_grid_killed_at_random(passes):
    """The same command in two processes, of which one is killed whenever something has been saved; the bytes of one."""
    grid = [*CELL[:4], "--num_epochs", "60", "--batch_size", "400", "--device", "cpu", "--save_every", "2"]
    grid += ["--beta_y", "0.1:10:5", "--beta_z", "0.1:10:4"]
    passes(train.main, *grid, "--runs_dir", "whole")
    chance, kills, before = random.Random(0), 0, 0.0
    pair = [launch("train.py", *grid) for _ in range(2)]
    while kills < 50:
        wait_until(lambda: any(p.stat().st_mtime > before for p in Path("runs").glob("*/NoName*")), 300)  # noqa: B023
        time.sleep(chance.uniform(0, 0.5))
        victim = chance.randrange(2)
        if pair[victim].poll() is None:
            kill(pair[victim])
            kills += 1
        else:
            assert ended(pair[victim])[0] == 0
        assert len(all_weights()) < 20 or kills == 50, f"done before the kills were, after {kills}"
        before = time.time()
        pair[victim] = launch("train.py", *grid)
    for process in pair:
        assert ended(process, 1800)[0] == 0
    passes(train.main, *grid)
    assert all_weights() == all_weights("whole") and len(all_weights()) == 20
    assert not there("resume*") and not there("*.tmp")


MOMENTS = [("batch", signal.SIGTERM), ("save", signal.SIGINT), ("twice", signal.SIGHUP)]
MOMENTS += [(when, n) for when in ("batch", "save", "twice") for n in ENDING_SIGNALS if (when, n) not in MOMENTS]


@pytest.mark.parametrize("moment", first(3, *MOMENTS))
@times(20)
def test_signals_in_a_batch_in_a_save_and_twice(moment, trial, script, passes, monkeypatch, undisturbed):
    (when, number), calls = moment, []
    where, name, last = (Run, "save_state", 4) if when == "save" else (Training, "update", 74)
    real, call = getattr(where, name), random.Random(trial).randint(1, last)

    def watched(*args, **more):
        calls.append(1)
        if len(calls) == call:
            for _ in range(2 if when == "twice" else 1):
                os.kill(os.getpid(), number)
        return real(*args, **more)

    monkeypatch.setattr(where, name, watched)
    status, _, err = script(train.main, *CELL)
    assert status == 128 + number and "saved at epoch" in err and "rerun to continue: python" in err
    state = load_tensors(there("resume.pth")[0])
    assert when == "save" or 15 * state["epoch"] + state["step"] == call  # it stops after that very step
    assert "resuming at epoch" in passes(train.main, *CELL)
    assert [*all_weights().values()] == [undisturbed]
    assert when == "save" or len(calls) == 6 * 15  # none was made twice


@times(20)
def test_kill_9_during_an_evaluation(trial, evaluated, passes):
    """The same command again does what is missing only, and the figures are equal."""
    shutil.copytree(evaluated, "runs")
    table = Path("runs/singles/eval_results.csv")
    expected = table.read_bytes()
    for path in (table, *there("metrics.json"), *there("latents.npz")):
        path.unlink()
    process = launch("eval_beta_grid.py", *EVALUATION)
    wait_until(lambda: there("metrics.json") or process.poll() is not None)
    time.sleep(random.Random(trial).uniform(0, 0.5))
    kill(process)
    complete = [path for path in there("metrics.json") if "mi_y" in read_json(path)["steps"]]
    times = [path.stat().st_mtime_ns for path in complete]
    passes(eval_beta_grid.main, *EVALUATION)
    assert table.read_bytes() == expected and [path.stat().st_mtime_ns for path in complete] == times


@needs_mounts
@pytest.mark.parametrize("left", first(1, 100_000, 0, 200_000, 300_000))
def test_a_disk_that_fills_up_during_a_grid(left, passes):
    """At the first config.json or at a later checkpoint: one line; what is there is whole, and it goes on with room.

    Slow, as a process starts, and the grid is trained twice.
    """
    grid = [*TINY, "--save_every", "1", "--beta_y", "1", "2"]
    small = f"mount -t tmpfs -o size=2500k tmpfs runs && head -c {2_560_000 - left} /dev/zero > runs/filler; "
    small += '"$@"; s=$?; rm runs/filler; cp -a runs after; exit $s'
    Path("runs").mkdir()
    status, _, err = ended(launch("train.py", *grid, prefix=["unshare", "-m", "sh", "-c", small, "sh"]))
    assert status in (1, 2) and err.count("\n") == (1 if left else 2)  # of none, no cell can begin
    for line in err.splitlines():
        assert line.startswith("error: runs/singles/NoName-"), line
        assert re.search(r"disk full: needs [\d,]+ bytes, has [\d,]+$|No space left .*; [\d,]+ bytes are free", line)
    Path("runs").rmdir()
    Path("after").rename("runs")
    assert not [path for path in there(".*.tmp") if path.is_dir()]
    for path in there("config.json"):
        run = Run.open(path.parent)
        run.load_state()
        if run.status == "finished":
            load_model(run, torch.device("cpu"))
    passes(train.main, *grid)
    passes(train.main, *grid, "--runs_dir", "whole")
    assert all_weights() == all_weights("whole") and len(all_weights()) == 2


@contextlib.contextmanager
def as_anyone():
    """Lets permissions hold for this thread and those that it starts, though it may be root's."""
    libc, head, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    libc.capget(head, sets)
    before, sets[0] = sets[0], sets[0] & ~6  # but for CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(head, sets)
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(head, sets)


def test_no_permission_is_told_at_the_start(evaluated, script):
    shutil.copytree(evaluated, "runs")
    for path in (Path("runs"), *Path("runs").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for main, flags, *told in (
        (train.main, [*CELL, "--run_batch_name", "new"], "error: runs: ", "--runs_dir"),
        (eval_beta_grid.main, [*EVALUATION, "--force"], "runs/singles", "Permission denied"),
        (plot_eval.main, EVALUATION[:4], "Permission denied", "choose another --out"),
    ):
        with as_anyone():
            status, _, err = script(main, *flags)
        assert status in (1, 2) and all(text in err for text in told), err


@times(3)
def test_a_run_folder_that_becomes_read_only_half_way(trial, passes, refused, monkeypatch):
    """One line that names it; the last state is whole, and the training goes on once it can."""
    real, saves = Run.save_state, []

    def save_state(self, state):
        saves.append(self.path)
        if len(saves) == 3 + trial:
            self.path.chmod(0o555)
        real(self, state)

    monkeypatch.setattr(Run, "save_state", save_state)
    monkeypatch.setattr(saving, "WRITER", ThreadPoolExecutor(1))
    with as_anyone():
        err = refused(train.main, *CELL)
        assert err.startswith(f"error: {saves[0]}") and "Permission denied" in err
        state, problems = Run.open(saves[0]).load_state()
        assert state["epoch"] == 2 + trial and not problems
        assert "cannot write there" in refused(train.main, *CELL)
        saves[0].chmod(0o755)
        assert f"resuming at epoch {2 + trial} " in passes(train.main, *CELL)


def test_a_read_only_cell_does_not_keep_others_from_training(refused, monkeypatch):
    """It became so after the check at the start: the others are trained, and it is named at the end."""
    real = schedule.train_all

    def later(runs, *rest):
        runs[1].create()
        runs[1].path.chmod(0o555)
        return real(runs, *rest)

    monkeypatch.setattr(schedule, "train_all", later)
    with as_anyone():
        err = refused(train.main, *TINY, "--beta_y", "1", "2", "3")
    assert len(there("vae.pth")) == 2 and err.startswith("error: runs/singles/") and "Permission denied" in err
