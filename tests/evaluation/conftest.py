"""A small real batch for the tests of the evaluation, trained and evaluated once for all of them."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import eval_beta_grid
import eval_beta_single
import train
import train_classifier

CPU = ["--device", "cpu"]
FAST = [*CPU, "--run_batch_name", "b"]
RATES = [*FAST, "--exclude_mi", "--exclude_fid"]
PROBES = [*FAST, "--get_mi_cal_acc", "--probe_images", "500"]
STEP1 = [*FAST, "--exclude_mi", "--with_classifier", "--n_samples", "200"]
TRAIN = "--conv_channels 4 --z_dims 6 --num_epochs 3 --batch_size 20 --learning_rate 0.003 "
TRAIN += "--cells_at_once 4 --beta_y 0.1 5 --beta_z 0.1 5 --run_batch_name b"


def runs(folder="runs") -> list[Path]:
    """The batch's run folders."""
    return sorted(p for p in Path(folder, "b").iterdir() if p.is_dir() and p.name != ".images")


def rows() -> list[dict]:
    """The batch's CSV."""
    with open("runs/b/eval_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def four_steps(folder="runs") -> list[list]:
    """The steps of the evaluation: a script's main and its flags."""
    steps = [
        [eval_beta_grid.main, *STEP1],
        [eval_beta_single.main, *CPU, "--run_path", *map(str, runs(folder))],
        [eval_beta_grid.main, *PROBES],
        [eval_beta_grid.main, *FAST, "--recons_acc", "--pca"],
    ]
    return [[*step, "--runs_dir", str(folder)] for step in steps]


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id):
    """A folder with `runs` and the same `evaluated`: a quick classifier, a batch `b` of four real models."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "made"
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "done").exists():
            where = ["--runs_dir", str(root / "runs"), *CPU]
            torch.set_num_threads(1)
            assert train_classifier.main([*where, "--num_epochs", "1"]) == 0
            assert train.main([*where, *TRAIN.split()]) == 0
            shutil.copytree(root / "runs", root / "evaluated")
            for main, *flags in four_steps(root / "evaluated"):
                assert main(flags) == 0
            (root / "done").touch()
    return root


@pytest.fixture
def batch(made):
    """A copy of the batch, not evaluated yet, as ./runs/b."""
    shutil.copytree(made / "runs", "runs")


@pytest.fixture
def evaluated(made):
    """A copy of the evaluated batch, as ./runs/b."""
    shutil.copytree(made / "evaluated", "runs")
