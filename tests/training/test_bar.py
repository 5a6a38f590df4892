"""The progress of a grid: one bar, a line for each cell that is done."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

import train
from tests.conftest import ROOT, TINY
from utils import distributed
from utils.training.bar import GridBar

GRID = [*TINY, "--num_epochs", "3", "--batch_size", "100", "--beta_y", "0.1", "1", "5"]


def in_a_terminal(*argv, **variables) -> str:
    """What a script shows in a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {k: v for k, v in {**os.environ, **variables}.items() if k != "TQDM_DISABLE"}

    def lead():  # so that the terminal is this process's own
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    where = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([sys.executable, *map(str, argv)], env=env, preexec_fn=lead, **where)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_grid_has_one_bar_and_a_line_for_each_cell(variables):
    shown = in_a_terminal(ROOT / "train.py", *GRID, **variables)
    bars = re.findall(
        r"(\d+)%\|.{16}\| cell (\d)/3, beta_y (\S+), beta_z 1 · epoch (\d)/3(?: · loss \S+)? · (.+?) left", shown
    )
    assert {(cell, beta) for _, cell, beta, *_ in bars} == {("1", "0.1"), ("2", "1"), ("3", "5")}
    shares = [int(share) for share, *_ in bars]
    assert shares == sorted(shares) and shares[-1] == 100 and bars[-1][3:] == ("3", "0 s")
    ends = [
        (m.start(), m[1])
        for m in re.finditer(r"finished: beta_y (\S+), beta_z 1 · loss [\d.]+, R\(y\|z\) \S+, R", shown)
    ]
    assert [beta for _, beta in ends] == ["0.1", "1", "5"]
    assert shown.index("cell 3/3") > ends[1][0]  # each as soon as its cell is done


def test_a_single_cell_has_no_line_and_a_resumed_one_starts_where_it_was(script, interrupted, monkeypatch):
    seen = []
    real = GridBar.begin

    def noting(self, chunk, steps):
        real(self, chunk, steps)
        seen.append(self.bar.desc)

    monkeypatch.setattr(GridBar, "begin", noting)
    flags = [*GRID, "--save_every", "1"]
    interrupted(15 * 3 + 15 + 4, *flags)  # in the second epoch of the second cell
    seen.clear()
    status, out, err = script(train.main, *flags)
    assert status == 0 and out.count("finished: ") == 2, err
    assert seen == [
        "cell 1/2, beta_y 1, beta_z 1 · epoch 1/3",
        "cell 2/2, beta_y 5, beta_z 1 · epoch 0/3",
    ]
    out = script(train.main, *TINY, "--run_batch_name", "one")[1]
    assert "finished: " not in out and seen[-1] == "epoch 0/2"


def test_a_process_in_the_background_draws_no_bar(monkeypatch):
    """The bar of the one in front is drawn in that terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(distributed.sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp())
    assert type(distributed.progress([])) is distributed.Bar
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp() + 1)
    assert type(distributed.progress([])) is distributed.Lines
