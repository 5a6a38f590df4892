"""Trainings that start from another run: continued exactly, or fine-tuned."""

from pathlib import Path

import pytest
import torch

import train
from tests.conftest import TINY, weights
from utils.files import digest_of, load_tensors
from utils.runs import Run

CPU = torch.device("cpu")


def runs_of(batch="singles", folder="runs"):
    return [Run.open(p.parent) for p in sorted(Path(folder, batch).glob("*/config.json"))]


@pytest.mark.parametrize(
    "flags",
    [[], ["--qz_family", "GumbelSoftmax"], ["--vae_type", "LVAE", "--warmup_epochs", "1"], ["--optimizer", "muon"]],
)
def test_two_and_three_epochs_are_five(script, flags):
    assert script(train.main, *TINY, *flags)[0] == 0
    (two,) = runs_of()
    status, out, err = script(train.main, *TINY, *flags, "--num_epochs", "5")
    assert status == 0 and f"note: {two.path} is this run with fewer epochs; --init_from {two.path}" in out, err
    (five,) = [r for r in runs_of() if r.config.num_epochs == 5]
    more = [*TINY, *flags, "--num_epochs", "5", "--runs_dir", "more", "--init_from"]
    status, out, err = script(train.main, *more, two.path)
    assert status == 0 and "resuming at epoch 2 of 5" in out, err
    (continued,) = runs_of(folder="more")
    assert continued.config == five.config and continued.path.name == five.path.name
    assert weights(continued.path) == weights(five.path)
    moments = [load_tensors(r.path / "adam.pth") for r in (continued, five)]
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(moments[0][key][name], p) for name, p in moments[1][key].items())
    assert continued.result["test"] == five.result["test"]
    assert "already complete" in script(train.main, *more, two.path)[1]


def test_a_batch_is_continued_cell_by_cell(script):
    grid = ["--beta_y", "1", "2", "--beta_z", "0.5"]
    assert script(train.main, *TINY, *grid)[0] == 0
    status, out, err = script(train.main, *TINY, *grid, "--num_epochs", "3", "--dry_run")
    assert status == 0 and "note: runs/singles has 2 of these cells with fewer epochs; --init_from runs/singles" in out
    assert script(train.main, *TINY, *grid, "--num_epochs", "3", "--runs_dir", "whole")[0] == 0
    assert script(train.main, *TINY, *grid, "--num_epochs", "3", "--init_from", "runs/singles")[0] == 0
    for run in runs_of(folder="whole"):
        assert weights(run.path) == weights(Path("runs", *run.path.parts[1:]))
    status, _, err = script(train.main, *TINY, "--beta_y", "7", "--num_epochs", "3", "--init_from", "runs/singles")
    assert status == 2 and "no finished run of fewer epochs for beta_y 7, beta_z 1" in err and err.count("\n") == 1


def test_a_continuation_that_is_killed_goes_on(script, interrupted):
    assert script(train.main, *TINY)[0] == 0
    (two,) = runs_of()
    more = [*TINY, "--num_epochs", "5", "--init_from", two.path]
    assert script(train.main, *more, "--runs_dir", "whole")[0] == 0
    interrupted(6, *more)
    status, out, err = script(train.main, *more)
    assert status == 0 and "resuming at epoch" in out, err
    (five,) = [r for r in runs_of() if r.config.num_epochs == 5]
    assert weights(five.path) == weights(runs_of(folder="whole")[0].path)


def test_fine_tuning_starts_from_the_weights(script):
    assert script(train.main, *TINY)[0] == 0
    (source,) = runs_of()
    tuned = [*TINY, "--beta_y", "3", "--learning_rate", "1e-30", "--init_from", source.path]
    status, _, err = script(train.main, *tuned)
    assert status == 0, err
    (run,) = [r for r in runs_of() if r.config.beta_y == 3]
    digest = digest_of(source.path / "vae.pth")
    assert run.config.init_from == digest and run.path.name.endswith(f"-init_{digest[:8]}")
    before, after = (load_tensors(r.path / "vae.pth") for r in (source, run))
    for name, p in before.items():
        torch.testing.assert_close(after[name], p)


def test_starts_that_cannot_be(script):
    assert script(train.main, *TINY)[0] == 0
    (source,) = runs_of()
    folder = Path("runs/singles")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    def refused(text, *flags):
        status, _, err = script(train.main, *TINY, *flags)
        assert status == 2 and text in err and err.count("\n") == 1, err
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    refused("is neither a run nor a batch of runs", "--init_from", "nowhere")
    refused("another architecture: z_dims 3, not 5", "--z_dims", "5", "--init_from", source.path)
    refused("has 2 epochs; --num_epochs must be larger", "--num_epochs", "1", "--init_from", source.path)
    refused("is trained from the beginning", "--multi_rate", "--beta_y", "1", "2", "--init_from", source.path)
    whole = (source.path / "vae.pth").read_bytes()
    (source.path / "vae.pth").write_bytes(whole[: len(whole) // 2])
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    refused("vae.pth", "--num_epochs", "5", "--init_from", source.path)
    (source.path / "vae.pth").unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    refused("is unfinished", "--num_epochs", "5", "--init_from", source.path)
