"""Runs of earlier versions of this code: this one trains them on to the bytes that theirs gave, and evaluates them.

<commit>.zip holds what make.py trained with that commit: `whole` runs, and `half` ones that were interrupted.
"""

import zipfile
from pathlib import Path

import pytest
import torch

import eval_beta_grid
import plot_eval
import train
from tests.conftest import EVALUATION, all_weights
from tests.reliability.trials import first, there
from tests.training.test_golden import is_machine_of_the_file
from tests.versions.make import FLAGS, KINDS
from utils.files import read_json

FILES = sorted(Path(__file__).parent.glob("*.zip"))
RUNS = [(f, kind) for f in FILES for kind in KINDS if any(n.startswith(kind) for n in zipfile.ZipFile(f).namelist())]
OLD_MAP = [run for run in RUNS if run[0].stem == "ffe71fc" and run[1] == "multi_rate"]
OLDEST = [run for run in RUNS if run[0].stem == "74f2430"]
ORDERED = [
    *OLDEST,
    *sorted((run for run in RUNS if run not in OLDEST), key=lambda run: list(KINDS).index(run[1]), reverse=True),
]
named = {"ids": lambda run: f"{run[0].stem}-{run[1]}"}


@pytest.fixture
def unpacked():
    """Unpacks runs of a kind: their folders, of whole and of interrupted trainings."""

    def unpack(file: Path, kind: str) -> tuple[Path, Path]:
        zipfile.ZipFile(file).extractall()
        return Path(kind, "whole"), Path(kind, "half")

    return unpack


@pytest.mark.parametrize("run", first(6, *ORDERED), **named)
def test_an_interrupted_training_goes_on(run, unpacked, passes):
    whole, half = unpacked(*run)
    flags = [*FLAGS, *KINDS[run[1]]]
    assert "already complete" in passes(train.main, *flags, "--runs_dir", whole)
    assert there("resume.pth", half) and "resuming at epoch" in passes(train.main, *flags, "--runs_dir", half)
    assert len(all_weights(whole)) == len(all_weights(half)) == len(there("training.json", whole))
    if is_machine_of_the_file():
        assert all_weights(half) == all_weights(whole)
    for path in there("training.json", whole):
        ours, theirs = (read_json(p)["test"] for p in (half / path.relative_to(whole), path))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("run", first(1, *OLD_MAP, *(run for run in RUNS if run not in OLD_MAP)), **named)
def test_finished_runs_are_evaluated_plotted_and_unfolded_further(run, unpacked, passes):
    """All that can be done with a map; more than five seconds, since each of its cells is evaluated."""
    whole, _ = unpacked(*run)
    cells = {"ordinary": 1, "stacked": 2, "muon": 1, "multi_rate": 7}[run[1]]
    if run[1] == "multi_rate":
        passes(train.main, *FLAGS, "--multi_rate", "--force", "--beta_y", "0.3", "--runs_dir", whole)
    out = passes(eval_beta_grid.main, *EVALUATION, "--runs_dir", whole)
    assert f"{cells} of {cells} runs evaluated" in out
    passes(plot_eval.main, *EVALUATION[:2], "--runs_dir", whole)
    assert there("report.html", whole)


@pytest.mark.parametrize("run", OLD_MAP, **named)
def test_a_checkpoint_of_newer_code_is_refused(run, unpacked, refused):
    _, half = unpacked(*run)
    (path,) = there("resume.pth", half)
    torch.save(torch.load(path) | {"format": 2}, path)
    err = refused(train.main, *FLAGS, *KINDS[run[1]], "--runs_dir", half)
    assert str(path) in err and "newer" in err and "format 2" in err
