"""What a training shows: its bar, where cells stand and how long the rest takes (--dry_run), its pictures."""

import contextlib
import errno
import fcntl
import os
import re
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from pytest import approx
from torchvision.utils import make_grid

import train
from datasets.batches import chosen
from datasets.loading import load_data
from tests.conftest import ROOT, TINY
from tests.reliability.trials import first, in_terminal
from utils import distributed, locks
from utils.files import write_json
from utils.images import tiled
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training import console
from utils.training.console import GridBar, standing

GRID = [*TINY, "--beta_y", "0.1", "1", "5", "--save_every", "1"]


@pytest.mark.parametrize("variables", first(1, {}, {"PYTHONUNBUFFERED": "1"}))
def test_a_grid_has_one_bar_and_a_line_for_each_cell(variables):
    """More than five seconds, as libraries are imported in the process that it is of."""
    pid, terminal = in_terminal(ROOT / "train.py", *GRID, **variables)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while data := os.read(terminal, 65536):
            shown += data
    os.close(terminal)
    shown = shown.decode()
    assert os.waitpid(pid, 0)[1] == 0, shown
    bar = r"(\d+)%\|.{16}\| cell (\d)/3, beta_y (\S+), beta_z 1 · epoch (\d)/2(?: · loss \S+)? · (.+?) left"
    bars = re.findall(bar, shown)
    assert {(cell, beta) for _, cell, beta, *_ in bars} == {("1", "0.1"), ("2", "1"), ("3", "5")}
    shares = [int(share) for share, *_ in bars]
    assert shares == sorted(shares) and shares[-1] == 100 and bars[-1][3:] == ("2", "00:00")
    ends = [*re.finditer(r"finished: beta_y (\S+), beta_z 1 · loss [\d.]+, R\(y\|z\) \S+, R", shown)]
    assert [end[1] for end in ends] == ["0.1", "1", "5"]
    assert shown.index("cell 3/3") > ends[1].start()  # each as soon as its cell is done


def test_a_resumed_cell_starts_where_it_was(passes, interrupted, monkeypatch):
    descriptions, real = [], GridBar.begin

    def noting(self, training):
        real(self, training)
        descriptions.append(self.bar.desc)

    interrupted(2 * 3 + 3 + 2, *GRID)  # in the second epoch of the second cell
    monkeypatch.setattr(GridBar, "begin", noting)
    assert passes(train.main, *GRID).count("finished: ") == 2
    assert descriptions == ["cell 1/2, beta_y 1, beta_z 1 · epoch 1/2", "cell 2/2, beta_y 5, beta_z 1 · epoch 0/2"]
    assert "finished: " not in passes(train.main, *TINY, "--run_batch_name", "one")
    assert descriptions[-1] == "epoch 0/2"


def test_the_time_to_go_leaves_out_what_other_trainings_did(passes, interrupted, monkeypatch):
    """Three cells of 2 epochs are continued to 3; one of them is done when the command is repeated."""
    shares, real = [], GridBar._jump

    def noting(self, training, steps):
        real(self, training, steps)
        shares.append(self.bar.n / self.bar.total)

    monkeypatch.setattr(console, "progress", partial(distributed.progress, disable=False))
    monkeypatch.setattr(GridBar, "_jump", noting)
    passes(train.main, *GRID)
    assert shares == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]
    longer = [*GRID, "--num_epochs", "3", "--init_from", "runs/singles"]
    out = passes(train.main, *longer, "--dry_run")
    assert out.count("  new from epoch 2 of 3\n") == 3 and "3 new; 3 epochs left, about " in out
    shares.clear()
    interrupted(5, *longer)
    passes(train.main, *longer)
    assert shares == approx([6 / 9, 7 / 9, 7 / 9, 4 / 6, 5 / 6, 5 / 6, 1])


def test_every_status_and_the_time_to_go(passes, interrupted):
    grid = [*GRID, "--num_epochs", "4"]

    def shown(*flags):
        before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
        out = passes(train.main, *grid, "--dry_run", *flags)
        assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
        return out, dict(re.findall(r"^  (beta_y \S+), beta_z 1  +(.+)$", out, re.M))

    out, cells = shown()
    assert set(cells.values()) == {"new"} and not Path("runs").exists()
    assert "3 new; 12 epochs left; how long they take shows once a cell has been trained" in out
    interrupted(4 * 3 + 2 * 3 + 2, *grid)  # the second cell in its third epoch
    runs = {run.config.beta_y: run for run in map(Run.open, Path("runs/singles").iterdir())}
    assert set(runs) == {0.1, 1.0}
    write_json(runs[0.1].path / "training.json", runs[0.1].result | {"seconds": 400.0})  # a hundred an epoch
    out, cells = shown()
    assert cells == {"beta_y 0.1": "finished", "beta_y 1": "unfinished at epoch 2 of 4", "beta_y 5": "new"}
    assert re.search("1 finished, 1 unfinished, 1 new; 6 epochs left, about 5 min at 5[0-9.]+ s an epoch", out)
    with runs[1.0].locked():
        held = rf"held by pid {os.getpid()} on host \S+, unfinished at epoch 2 of 4"
        assert re.fullmatch(held, shown()[1]["beta_y 1"])
    assert "; all are trained anew; 12 epochs left, about " in shown("--overwrite")[0]
    passes(train.main, *grid)
    assert "3 finished; nothing left to train" in shown()[0]


def test_failed_and_damaged_cells_and_checkpoints_within_an_epoch(trained, passes, monkeypatch):
    (path,) = trained()
    write_json(path / "training.json", {"status": "failed", "epoch": 2, "step": 7, "terms": {}})
    assert standing(Run.open(path)) == ("failed at step 7 of epoch 2", 0, 0)
    (path / "resume.pth").write_bytes(b"no")
    out = passes(train.main, *TINY, "--dry_run")
    assert f"damaged: {path}/resume.pth" in out and (path / "resume.pth").exists()
    monkeypatch.setattr(Run, "read_state", lambda *_: {"epoch": 1, "step": 3, "history": [0] * 4, "seconds": 7.0})
    assert standing(Run.open(path)) == ("unfinished at epoch 1 of 2", 1.75, 7.0)


def test_the_speed_is_that_of_shorter_trainings_beside_it(trained, passes):
    (path,) = trained()
    write_json(path / "training.json", Run.open(path).result | {"seconds": 200.0})
    longer = [*TINY, "--num_epochs", "6", "--beta_y", "0.1", "1", "--dry_run"]
    assert "2 new; 12 epochs left, about 20 min at 100 s an epoch" in passes(train.main, *longer)
    assert "how long they take shows once" in passes(train.main, *longer, "--batch_size", "50")
    for seconds, text in ((40, "40 s"), (90, "2 min"), (720, "12 min"), (12600, "3.5 h"), (181440, "2.1 days")):
        assert distributed.duration(seconds) == text


def test_asking_for_the_holder_keeps_none_from_starting(monkeypatch):
    """And hears of one where the file system has no flock, too."""
    Path(".lock").touch()
    with open(".lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with locks.locked(Path()):
            assert locks.holder(Path()).startswith(f"pid {os.getpid()} ")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with locks.locked(Path()):
        assert locks.holder(Path()).startswith(f"pid {os.getpid()} ")
    assert locks.holder(Path()) is None and locks.holder(Path("nowhere")) is None


def tiles(path, rows):
    """The 28 x 28 images of a picture of 16 columns, (rows * 16, 28, 28) in [0, 1]; the frame is 2 pixels wide."""
    pixels = np.asarray(Image.open(path).convert("L"), np.float32) / 255
    assert pixels.shape == (rows * 30 + 2, 16 * 30 + 2)
    return pixels[2:, 2:].reshape(rows, 30, 16, 30)[:, :28, :, :28].transpose(0, 2, 1, 3).reshape(-1, 28, 28)


def test_pictures_are_the_models_own(tiny, multi_rate):
    """Originals above, reconstructions below; samples from the run's seed; tiled as by torchvision, in eight bits."""
    for n, channels, columns, line in ((16, 1, 8, 2), (5, 3, 3, 1), (2, 1, 2, 1)):
        images = torch.rand(n, channels, 5, 7)
        assert torch.equal(tiled(images, columns, 0.5, line), make_grid(images, columns, line, pad_value=0.5))
    for run in map(Run.open, (*tiny.glob("singles/*"), *multi_rate.glob("m/*"))):
        if run.config.is_conditioned:
            assert (run.path / "samples.png").is_file()
            continue
        model, cpu = load_model(run, torch.device("cpu")), torch.device("cpu")
        images, _ = chosen(load_data(run.config, "data", cpu).test, 16)
        originals, reconstructions = tiles(run.path / "reconstructions.png", 2).reshape(2, 16, 28, 28)
        assert_allclose(originals, images[:, 0], atol=1 / 255)
        assert_allclose(reconstructions, model.reconstruct(images)[:, 0], atol=1.5 / 255)
        samples = model.sample(64, generator=generator("cpu", run.config.seed, "samples"))[:, 0]
        assert_allclose(tiles(run.path / "samples.png", 4), samples, atol=1.5 / 255)
