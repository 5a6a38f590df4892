"""Several processes give what one gives: cells shared by torchrun or a script, and one cell's batches shared."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

import eval_beta_grid
import train
import train_classifier
from tests.conftest import ROOT, TINY, python
from tests.reliability.trials import first, there, wait_until
from utils.distributed import share
from utils.files import load_tensors
from utils.training.schedule import check_data_parallel

GRID = [*TINY, "--beta_y", "1", "2", "--beta_z", "1", "2"]


def torchrun(name, *argv):
    """Starts a script in two processes."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / name, *argv)


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) == (status == 0), err
    return out, err


def all_weights(runs_dir):
    return {path.parent.name: path.read_bytes() for path in Path(runs_dir).rglob("vae.pth")}


@pytest.fixture
def alone(script):
    assert script(train.main, *GRID, "--runs_dir", "alone", "--run_batch_name", "b")[0] == 0
    return all_weights("alone")


def test_two_ranks_give_the_same_folders_as_one_process(alone, script):
    out, _ = finish(torchrun("train.py", *GRID, "--run_batch_name", "b"))
    assert all_weights("runs") == alone and len(alone) == 4
    assert out.count("The runs are in runs/b") == 1
    for path in Path("runs/b").glob("*/training.json"):  # one table, of all cells
        assert out.count(f"{json.loads(path.read_text())['test']['loss']:10.2f} ") == 1
    flags = ["--run_batch_name", "b", "--device", "cpu", "--exclude_fid"]
    out, _ = finish(torchrun("eval_beta_grid.py", *flags))
    assert out.count("2 of 2 runs evaluated") == 2
    assert script(eval_beta_grid.main, *flags, "--runs_dir", "alone")[0] == 0

    def figures(runs_dir):  # those of the training images hold for the same weights, and seconds are not among them
        return Path(runs_dir, "b", "eval_results.csv").read_text()

    assert figures("runs") == figures("alone")


@pytest.mark.slow
def test_a_killed_ranks_cells_are_completed_by_the_same_command(script):
    slow = [*GRID, "--run_batch_name", "b", "--num_epochs", "10", "--save_every", "1"]
    process = torchrun("train.py", *slow)
    pids = set()

    def both_train():
        texts = [path.read_text() for path in there(".lock")]
        pids.update(int(re.search(r"pid (\d+)", text)[1]) for text in texts if text)
        return len(pids) == 2 and there("resume.pth")

    wait_until(both_train, 60)
    os.kill(max(pids), signal.SIGKILL)
    finish(process, status=1)
    assert len(all_weights("runs")) < 4
    finish(torchrun("train.py", *slow))
    assert script(train.main, *slow, "--runs_dir", "whole")[0] == 0
    assert all_weights("runs") == all_weights("whole") and len(all_weights("runs")) == 4


@pytest.mark.parametrize("more", first(1, [], ["--multi_rate", "--force", "--learning_rate", "1e-4"]))
def test_processes_share_every_batch_of_a_cell(script, more):
    """360 test images leave a last batch of 110: each process has its part, the sum is that of one process."""
    flags = [*TINY, "--beta_y", "0.5", "2", "--batch_size", "250", "--run_batch_name", "b", *more]
    finish(torchrun("train.py", *flags, "--data_parallel"))
    assert script(train.main, *flags, "--runs_dir", "alone")[0] == 0
    paths = list(Path("runs/b").iterdir())
    for path in paths:
        ours, theirs = load_tensors(path / "vae.pth"), load_tensors(Path("alone/b", path.name, "vae.pth"))
        assert ours.keys() == theirs.keys()
        for name, weights in theirs.items():  # as wholes: of a gradient that is almost 0, Adam's steps are rounding
            assert (ours[name] - weights).norm() <= 1e-5 * weights.norm(), name
    assert len(paths) == 2 + bool(more)  # and the multi-rate model


def test_processes_that_share_batches_stop_and_continue_together():
    flags = [*TINY, "--num_epochs", "10", "--batch_size", "100", "--run_batch_name", "b", "--data_parallel"]
    flags += ["--save_every", "2"]
    process = torchrun("train.py", *flags)
    wait_until(lambda: there("resume.pth"), 60)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, status=1)
    assert "rerun to continue" in err and not all_weights("runs")
    out, _ = finish(torchrun("train.py", *flags))
    assert "resuming at epoch" in out
    finish(torchrun("train.py", *flags, "--runs_dir", "whole"))
    assert all_weights("runs") == all_weights("whole") and len(all_weights("runs")) == 1


def test_batches_cannot_be_shared_by_one_process_or_too_many(script, monkeypatch):
    status, _, err = script(train.main, *TINY, "--data_parallel")
    assert status == 2 and err.startswith("error: --data_parallel: needs several processes; start them with torchrun")
    with pytest.raises(Exception, match="--batch_size: leaves a last batch of 1 images for 2 processes"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
        check_data_parallel(1437, 360, 718)


def test_a_classifier_is_trained_by_one_task_of_an_array(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    status, out, _ = script(train_classifier.main, "--dataset", "Digits", "--seed", "1")
    assert status == 0 and out == "RANK 1 of WORLD_SIZE 2: takes 0 of 1 classifiers\n" and not Path("runs").exists()


def test_the_tasks_of_an_array_share_by_their_variables(alone, script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        assert share(list(range(7))) == list(range(7))[int(rank) :: 3]
        assert script(train.main, *GRID, "--run_batch_name", "b")[0] == 0
    assert all_weights("runs") == alone
    for rank in ("3", "-1", "x", ""):
        monkeypatch.setenv("RANK", rank)
        status, _, err = script(train.main, *GRID)
        assert status == 2 and err.startswith("error: RANK and WORLD_SIZE: must be") and err.count("\n") == 1
