"""Which cells train together, how many, and what happens when the memory does not hold them."""

import dataclasses
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import train
from tests.conftest import TINY
from utils.files import load_tensors
from utils.runs import Run
from utils.training import schedule
from utils.training.training import Setup, Training


def test_out_of_memory_halves_the_cells_at_once(passes, monkeypatch):
    update, sizes = Training.update, []

    def small_memory(self, *args):
        sizes.append(self.stack.m)
        if self.stack.m > 2:
            raise torch.OutOfMemoryError("out of memory")
        return update(self, *args)

    monkeypatch.setattr(Training, "update", small_memory)
    out = passes(train.main, *TINY, "--beta_y", "1:5:5", "--cells_at_once", "5")
    assert "halving" in out and len(list(Path("runs/singles").iterdir())) == 5
    assert [m for m in sizes if m > 2] == [5, 3]


def test_out_of_memory_leaves_alone_what_has_ended(script, monkeypatch):
    """One cell has failed and one is finished when the memory runs out: the others go on from their states."""
    grid = [*TINY, "--num_epochs", "3", "--beta_y", "1", "2", "3", "4", "--cells_at_once", "4", "--save_every", "1"]
    update = Training.update

    def poisoned(self, x, noise, beta_y, beta_z):
        step = 3 * self.epoch + self.steps_done
        if step == 7 and self.stack.m == 4:
            raise torch.OutOfMemoryError("out of memory")
        if step == 1 and self.stack.m == 4:
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
        return update(self, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Training, "update", poisoned)
    status, out, _ = script(train.main, *grid)
    assert status == 1 and out.count("halving") == 1 and out.count("resuming at epoch 2") == 2
    assert sorted(Run.open(p).status for p in Path("runs/singles").iterdir()) == ["failed"] + ["finished"] * 3


def test_bf16_cells_are_not_stacked_on_a_cpu(script):
    """torch's autocast lets stacked convolutions stay in float32 there, so they would not be what one cell is."""
    status, _, err = script(train.main, *TINY, "--precision", "bf16", "--cells_at_once", "2")
    assert status == 2 and err.startswith("error: --cells_at_once: with bf16 a CPU trains one cell at a time, got 2")


def test_a_cell_at_once_takes_one_open_file_and_no_thread(passes, at_step):
    """So that 256 of them stay within the usual limit of 1,024 open files. 24 are trained, which takes long."""
    cells, threads = 24, []
    before, (soft, hard) = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    at_step(2, lambda: threads.append(threading.active_count()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + cells + 12, hard))
    try:
        one_step = ["--num_epochs", "1", "--batch_size", "900", "--cells_at_once", str(cells)]
        passes(train.main, *TINY, *one_step, "--beta_y", f"1:9:{cells}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert threads[0] < 8


@pytest.fixture
def sizes(monkeypatch):
    """The number of cells of each training that is made."""
    result, real = [], Training.__init__

    def noting(self, runs, *rest):
        result.append(len(runs))
        real(self, runs, *rest)

    monkeypatch.setattr(Training, "__init__", noting)
    return result


def test_seven_cells_three_at_once_are_three_two_and_two(passes, sizes):
    """Seven cells are trained twice, which takes long."""
    grid = [*TINY, "--beta_y", "1:7:7"]
    passes(train.main, *grid, "--cells_at_once", "3")
    assert sizes == [3, 2, 2]
    passes(train.main, *grid, "--cells_at_once", "1", "--runs_dir", "alone")
    paths = list(Path("runs/singles").iterdir())
    assert len(paths) == 7
    for path in paths:
        alone = load_tensors(Path("alone/singles", path.name, "vae.pth"))
        assert_close(load_tensors(path / "vae.pth"), alone, rtol=1e-4, atol=1e-4)


def test_a_step_is_captured_on_a_gpu_unless_asked_otherwise():
    gpu = torch.device("cuda")
    for setup, captured in (
        (Setup(gpu), True),
        (Setup(gpu, compile="on"), True),
        (Setup(gpu, compile="off"), False),
        (Setup(gpu, data_parallel=True), False),
        (Setup(torch.device("cpu"), compile="on"), False),
    ):
        assert setup.capture == captured


def test_on_a_gpu_the_cells_at_once_are_measured_once(monkeypatch):
    """What is asked for stands; of 20 cells by at most eight, seven, seven and six train together.

    Nothing is measured for a single cell; of two seeds the one with more cells counts.
    """
    measured, together = [], []
    monkeypatch.setattr(schedule, "fastest", lambda config, most, device: measured.append(most) or 8)
    monkeypatch.setattr(schedule, "open_cells", lambda runs, *_: ([(run, None) for run in runs], []))
    monkeypatch.setattr(schedule, "train_cells", lambda cells, *_: together.append(len(cells)) or 100)
    args = train.parse_args(["--beta_y", "1:20:20", "--device", "cpu"])
    runs = [Run.of(config, "runs") for config in train.grid_configs(args)]
    schedule.train_all(runs, None, Setup(torch.device("cuda")), {})
    schedule.train_all(runs, None, Setup(torch.device("cuda"), cells_at_once=5), {})
    schedule.train_all(runs[:1], None, Setup(torch.device("cuda")), {})
    assert measured == [20] and together == [7, 7, 6, 5, 5, 5, 5, 1]
    other = [dataclasses.replace(run, config=dataclasses.replace(run.config, seed=3)) for run in runs[:8]]
    schedule.train_all([runs[0], *other], None, Setup(torch.device("cuda")), {})
    assert measured == [20, 8] and together[8:] == [1, 8]
