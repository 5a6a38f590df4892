"""Flags: what is refused is told in the words of the flag, and what is told can be pasted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.conftest import ROOT, TINY

NO_VALUE = "takes no value; give the flag to turn it on, leave it out otherwise, got"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beta_y", "-1e-3"], "--beta_y: must be > 0 or 0, got -0.001"),
        (["--beta_y", "1", "-.5E+2"], "--beta_y: must be > 0 or 0, got -50.0"),
        (["--sigma", "-inf"], "--sigma: must be a finite number, got -inf"),
        (["--beta_y", "0.1", "--beta_y", "1"], "--beta_y: given twice; several values go after one flag, --beta_y A B"),
        (["--seed=1", "--z_dims", "2", "--seed", "3"], "--seed: given twice; several values go after one flag"),
        (["--use_conv_z", "True"], f"--use_conv_z: {NO_VALUE} 'True'"),
        (["--no_warmup", "False", "--z_dims", "2"], f"--no_warmup: {NO_VALUE} 'False'"),
        (["--use_conv_z", "--standardize"], "--standardize: unknown argument"),
        (["--use_conv_z=1"], f"--use_conv_z: {NO_VALUE} '1'"),
        (["--num_epochs", "2.0"], "--num_epochs: must be a whole number, got '2.0'"),
        (["--sigma", "x"], "--sigma: must be a number, got 'x'"),
    ],
)
def test_flags_that_are_refused(flags, message, script):
    status, _, err = script(train.main, *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_flag_given_twice_where_one_value_counts_is_the_last(script):
    """As shells' aliases and scripts rely on."""
    assert "num_epochs           3" in script(train.main, "--num_epochs", "2", "--num_epochs", "3", "--dry_run")[1]


def test_the_next_command_can_be_pasted(script):
    flags = ["--runs_dir", "my runs", "--run_batch_name", "it's"]
    status, out, _ = script(train.main, *TINY, *flags)
    assert status == 0
    (command,) = re.findall("To evaluate: python train_classifier.py (.*)", out)
    assert shlex.split(command)[:7] == [
        "--dataset",
        "Digits",
        "--runs_dir",
        "my runs",
        "&&",
        "python",
        "eval_beta_grid.py",
    ]
    assert shlex.split(command)[6:] == [
        "eval_beta_grid.py",
        "--run_batch_name",
        "it's",
        "--all",
        "--runs_dir",
        "my runs",
    ]
    (board,) = re.findall("To inspect: python -m utils.board (.*)", out)
    assert shlex.split(board) == ["my runs/it's"]


def test_progress_in_a_file_is_a_line_at_most_every_half_minute(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    flags = [*TINY, "--num_epochs", "8", "--batch_size", "100"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line]
    assert "\r" not in done.stderr and 2 <= len(lines) <= 4 and len(set(lines)) == len(lines)
    assert re.fullmatch(r"100%\|#+\| epoch 8/8 · loss \d+\.?\d* · 0 s left", lines[-1])
