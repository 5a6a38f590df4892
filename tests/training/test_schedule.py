"""Which cells train together, how many, and what happens when the memory does not hold them."""

from pathlib import Path

import pytest
import torch
from utils.training.engine import Engine

import train
from datasets.loading import Data
from models.stack import Stack
from tests.conftest import TINY
from utils.config import Config
from utils.files import load_tensors
from utils.runs import Run
from utils.training import schedule
from utils.training.schedule import Trainer


def test_out_of_memory_halves_the_chunk(script, monkeypatch):
    step, sizes = Stack.step, []

    def small_memory(self, *args):
        sizes.append(self.m)
        if self.m > 2:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", small_memory)
    status, out, _ = script(train.main, *TINY, "--beta_y", "1:5:5", "--cells_at_once", "5")
    assert status == 0 and "halving" in out and len(list(Path("runs/singles").iterdir())) == 5
    assert [m for m in sizes if m > 2] == [5, 3]


def test_out_of_memory_leaves_alone_what_has_ended(script, monkeypatch):
    """One cell has failed and one is finished when the memory runs out: the others go on from their states."""
    grid = [*TINY, "--num_epochs", "3", "--beta_y", "1", "2", "3", "4", "--cells_at_once", "4", "--save_every", "1"]
    step, failing = Stack.step, []

    def poisoned(self, optimizer, x, noise, beta_y, beta_z):
        n = int(next(iter(optimizer.state.values()))["step"])
        if n == 7 and self.m == 4:
            raise torch.OutOfMemoryError("out of memory")
        if self.m == 4 and n == 1:
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
            failing.append(n)
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", poisoned)
    status, out, _ = script(train.main, *grid)
    assert status == 1 and failing and out.count("halving") == 1 and out.count("resuming at epoch 2") == 2
    assert sorted(Run.open(p).status for p in Path("runs/singles").iterdir()) == ["failed"] + ["finished"] * 3


def test_bf16_cells_are_not_stacked_on_a_cpu(script):
    """torch's autocast lets stacked convolutions stay in float32 there, so they would not be what one cell is."""
    status, _, err = script(train.main, *TINY, "--precision", "bf16", "--cells_at_once", "2")
    assert status == 2 and err.startswith("error: --cells_at_once: with bf16 a CPU trains one cell at a time, got 2")


def test_chunks_are_of_one_size_and_share_an_engine(script, monkeypatch):
    """Seven cells, at most three at once: 3, 2 and 2, for which the engine of three is kept."""
    built, init = [], Engine.__init__

    def counted(self, config, m, *args, **kwargs):
        built.append(m)
        init(self, config, m, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", counted)
    grid = [*TINY, "--beta_y", "1:7:7"]
    assert script(train.main, *grid, "--cells_at_once", "3")[0] == 0
    assert built == [3]
    assert script(train.main, *grid, "--cells_at_once", "1", "--runs_dir", "alone")[0] == 0
    paths = list(Path("runs/singles").iterdir())
    assert len(paths) == 7
    for path in paths:
        alone = load_tensors(Path("alone/singles", path.name, "vae.pth"))
        torch.testing.assert_close(load_tensors(path / "vae.pth"), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, size, chunks", [(441, 64, [63] * 7), (20, 8, [7, 7, 6]), (5, 9, [5]), (3, 1, [1, 1, 1])])
def test_sizes_of_chunks(n, size, chunks):
    args = train.parse_args(["--cells_at_once", str(size)])
    args.device = torch.device("cpu")
    trainer, taken = Trainer(Data(range(100), range(9), 10), args, None, Config()), []
    while sum(taken) < n:
        taken.append(trainer.size_for(Config(), n - sum(taken)))
    assert taken == chunks


def test_a_step_is_captured_on_a_gpu_and_compiled_if_asked_for(monkeypatch):
    """On a GPU the number of cells is found once, by steps; what is asked for stands."""

    def trainer(device, *flags):
        args = train.parse_args(["--device", "cpu", *flags])
        args.device = torch.device(device)
        return Trainer(Data(range(50_000), range(9), 10), args, None, Config(dataset="CIFAR10"))

    def how(t):
        return t.compile, t.capture, t.size

    assert how(trainer("cuda")) == (False, True, None)
    assert how(trainer("cpu")) == (False, False, 1)
    assert how(trainer("cpu", "--compile", "on")) == (True, False, 1)
    assert how(trainer("cuda", "--compile", "on")) == (True, True, None)
    assert how(trainer("cuda", "--compile", "off", "--cells_at_once", "7")) == (False, False, 7)
    assert how(trainer("cuda", "--data_parallel")) == (False, True, 1)
    asked = []
    monkeypatch.setattr(schedule, "fastest", lambda config, most, device: asked.append(most) or 8)
    measured = trainer("cuda")
    assert measured.size_for(Config(), 441) == 8 and measured.size_for(Config(), 392) == 8 and asked == [441]
