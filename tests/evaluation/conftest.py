"""A small real batch for the tests of the evaluation."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

import eval_beta_grid
import eval_beta_single
import train
import train_classifier
from utils.locks import locked

FAST = ["--device", "cpu", "--run_batch_name", "b"]


STEP1 = [*FAST, "--exclude_mi", "--with_classifier", "--n_samples", "200"]


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id):
    """A folder with a quick classifier and a batch `b` of four small but real models; shared by all workers."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "made"
    root.mkdir(exist_ok=True)
    with locked(root, 600):
        if not (root / "done").exists():
            make(root)
            (root / "done").touch()
    return root


def make(root: Path) -> None:
    runs = ["--runs_dir", str(root / "runs"), "--device", "cpu"]
    torch.set_num_threads(1)
    assert train_classifier.main([*runs, "--num_epochs", "2"]) == 0
    settings = ["--conv_channels", "4", "--z_dims", "6", "--num_epochs", "25", "--batch_size", "100"]
    settings += ["--learning_rate", "0.002"]
    grid = ["--beta_y", "0.1", "5", "--beta_z", "0.1", "5", "--run_batch_name", "b"]
    assert train.main([*runs, *settings, *grid]) == 0


@pytest.fixture
def batch(made):
    """A copy of it in the current folder; returns a reader of the batch's CSV."""
    shutil.copytree(made / "runs", "runs")

    def rows():
        with open("runs/b/eval_results.csv", newline="") as file:
            return list(csv.DictReader(file))

    return rows


def four_steps(script):
    results = [script(eval_beta_grid.main, *STEP1)]
    for path in sorted(Path("runs/b").iterdir()):
        if path.is_dir():
            results.append(script(eval_beta_single.main, "--run_path", path, "--device", "cpu"))
    results.append(script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc", "--cpu_n", 2))
    results.append(script(eval_beta_grid.main, *FAST, "--recons_acc", "--pca"))
    return results
