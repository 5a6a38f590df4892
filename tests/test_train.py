"""train.py as its users see it: flags, run folders, grids."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

import train
from tests.conftest import TINY
from utils.files import load_tensors
from utils.runs import Run, load_model


def test_a_run_folder_holds_all_that_is_promised(trained):
    (path,) = trained()
    run = Run.open(path)
    assert run.status == "finished" and run.config.z_dims == 3
    state = torch.load(path / "vae.pth", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    load_model(run, torch.device("cpu"))
    test = json.loads((path / "training.json").read_text())["test"]
    loss = -test["ll"] + test["kl_y"] + test["kl_z"]
    assert test["loss"] == pytest.approx(loss, rel=1e-6)
    assert test["kl_y"] >= 0 and test["kl_z"] >= 0
    events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("loss", "ll", "kl_y", "kl_z")]
    for name in (*names, "test/psnr"):
        assert [e.step for e in events.Scalars(name)] == [1, 2]
    for name, error in (("loss", 1e-6), ("psnr", 1e-3)):  # of 360 images, all of them
        assert events.Scalars(f"test/{name}")[-1].value == pytest.approx(test[name], rel=error)
    assert {"reconstructions", "samples"} <= set(events.Tags()["images"])
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(name in hparams for name in (b"beta_y", b"beta_z", b"seed", b"vae_type"))
    assert not [*path.glob("resume*"), *path.glob("*.tmp")]


def test_a_finished_run_stays_unless_it_is_overwritten(trained, passes, refused):
    (path,) = trained()
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert "already complete" in passes(train.main, *TINY)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    flags = [*TINY, "--learning_rate", "0.01"]
    assert "--learning_rate 0.0009" in refused(train.main, *flags)
    passes(train.main, *flags, "--overwrite")
    assert (path / "vae.pth").read_bytes() != before["vae.pth"]
    assert Run.open(path).config.learning_rate == 0.01


def test_a_learning_rate_that_is_small_for_muon_is_noted(passes):
    for flags, is_noted in ((["--optimizer", "muon"], True), ([], False)):
        out = passes(train.main, *TINY, *flags, "--learning_rate", "9e-4", "--dry_run")
        assert ("--learning_rate 0.0009 is small for Muon, whose usual one is 0.007" in out) is is_noted


def test_one_command_equals_the_bash_loop(trained):
    for beta_y in ("0.1", "10"):
        paths = trained("--beta_y", beta_y, batch="loop")
    loop = {p.name: load_tensors(p / "vae.pth") for p in paths}
    for at_once, error in (("2", 1e-4), ("1", 0.0)):
        paths = trained("--beta_y", "0.1", "10", "--cells_at_once", at_once, batch=f"by{at_once}")
        weights = {p.name: load_tensors(p / "vae.pth") for p in paths}
        assert_close(weights, loop, rtol=error, atol=error)


def test_a_damaged_finished_run_is_named(trained, passes, refused):
    (path,) = trained()
    for text in ("", "{", "[]", '{"dataset": 3}', '{"dataset": "Digits", "z_dims": "4"}'):
        (path / "config.json").write_text(text)
        assert str(path / "config.json") in refused(train.main, *TINY)
    (path / "config.json").unlink()
    assert f"{path}: holds files but no config.json" in refused(train.main, *TINY)
    passes(train.main, *TINY, "--overwrite")
    assert Run.open(path).status == "finished"
    (path / "vae.pth").write_bytes((path / "vae.pth").read_bytes()[:20])
    assert f"{path / 'vae.pth'}: damaged" in refused(train.main, *TINY)


def test_dry_run_tells_each_cell_of_each_seed_and_writes_nothing(passes):
    out = passes(train.main, *TINY, "--dry_run", "--seed", "2", "3", "--beta_y", "0.1:10:3")
    assert out.count("  beta_y 10, beta_z 1") == 2 and out.count(" new\n") == 6
    assert not Path("runs").exists()


def test_the_results_say_of_which_seed_each_is_where_there_are_several(passes):
    flags = [*TINY, "--beta_y", "0.5", "--target_rate_z", "2", "--num_epochs", "1"]
    out = passes(train.main, *flags, "--seed", "7", "5")
    assert re.findall(r"^ +(seed|\d+) +(?:beta_y|0\.5) ", out, re.M) == ["seed", "7", "5"]
    assert re.findall(r"^ +(seed|\d+) +(?:asked|-) ", out, re.M) == ["seed", "7", "5"]
    assert max(map(len, out.splitlines())) <= 100
    assert "seed " not in passes(train.main, *flags, "--seed", "7").partition("test images")[0].partition("cells")[2]


def test_the_papers_command_with_its_trailing_backslash(passes):
    command = shlex.split(
        "--vae_type HVAE --dataset CIFAR10 --num_epochs 500 --batch_size 256 --conv_channels 32 --z_dims 32 "
        "--px_y_family_ll GaussianFixedSigma --sigma 0.71 --beta_y 1.0 --beta_z 1.0 --run_batch_name cifar"
    )
    assert "475,811" in passes(train.main, *command, " ", "--dry_run")
