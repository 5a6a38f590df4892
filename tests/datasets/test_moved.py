"""Runs outlive where their images and their batch lie."""

import csv
import shutil
from pathlib import Path

import pytest

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY, weights
from tests.datasets.files import write_folder
from utils.runs import Run

FLAGS = ["--image_size", "28", "--image_channels", "1"]
EVALUATE = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_mi", "--exclude_fid"]


@pytest.fixture
def pets(script):
    """The run folder of a model of a folder of images."""
    write_folder(Path("pets"), n=15)
    status, _, err = script(train.main, *TINY, "--dataset", "pets", *FLAGS)
    assert status == 0, err
    (path,) = Path("runs/singles").iterdir()
    return path


@pytest.mark.parametrize(
    "place, flags",
    [("data/pets", []), ("disk/pets", ["--data_dir", "disk"]), ("disk/cats", ["--dataset", "disk/cats"])],
)
def test_a_run_whose_images_moved_is_evaluated(place, flags, pets, script):
    Path(place).parent.mkdir()
    shutil.move("pets", place)
    status, _, err = script(eval_beta_grid.main, *EVALUATE, *flags)
    assert status == 0, err
    with open("runs/singles/eval_results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["dataset"] == "pets" and float(row["loss"]) > 0
    status, out, err = script(plot_eval.main, "--run_batch_name", "singles", "--device", "cpu", *flags)
    assert status == 0 and "no reconstructions" not in out, err


def test_images_that_are_gone_are_asked_for(pets, script):
    shutil.move("pets", "elsewhere")
    status, _, err = script(eval_beta_grid.main, *EVALUATE)
    assert status == 1 and "--data_dir (the folder that it is in) or --dataset tells" in err


def test_other_images_of_the_same_name_are_told_apart(pets, script):
    extra = next(Path("pets").rglob("*.png"))
    shutil.copy(extra, extra.with_name("another.png"))
    status, _, err = script(eval_beta_grid.main, *EVALUATE)
    assert status == 1 and "does not hold the images that the run was trained on" in err
    status, _, err = script(train.main, *TINY, "--dataset", "pets", *FLAGS)
    assert status == 2 and "trained on other images" in err and err.count("\n") == 1
    assert script(train.main, *TINY, "--dataset", "pets", *FLAGS, "--overwrite")[0] == 0
    assert script(eval_beta_grid.main, *EVALUATE)[0] == 0


def test_a_training_goes_on_where_images_and_batch_have_moved_to(pets, script, monkeypatch):
    longer = [*TINY[:4], "--num_epochs", "4", "--batch_size", "100", "--save_every", "1", "--device", "cpu", *FLAGS]
    assert script(train.main, *longer, "--dataset", "pets", "--run_batch_name", "whole")[0] == 0
    real, calls = Run.save_state, []

    def last(self, state):
        real(self, state)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Run, "save_state", last)
        assert script(train.main, *longer, "--dataset", "pets", "--run_batch_name", "cut")[0] == 130
    Path("disk").mkdir()
    shutil.move("pets", "disk/pets")
    shutil.move("runs/cut", "runs/renamed")
    status, out, err = script(train.main, *longer, "--dataset", "disk/pets", "--run_batch_name", "renamed")
    assert status == 0 and "resuming at epoch" in out, err
    (a,), (b,) = (list(Path("runs", name).iterdir()) for name in ("whole", "renamed"))
    assert weights(a) == weights(b)
