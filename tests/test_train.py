"""train.py as its users see it: flags, run folders, grids."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import utils.files
from tests.conftest import TINY, weights
from utils.errors import UserError
from utils.files import load_tensors
from utils.runs import Run, load_model


def test_a_run_folder_holds_all_that_is_promised(trained):
    (path,) = trained()
    run = Run.open(path)
    assert run.status == "finished" and run.config.z_dims == 3
    state = torch.load(path / "vae.pth", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    load_model(run, torch.device("cpu"))
    result = json.loads((path / "training.json").read_text())
    test = result["test"]
    assert test["loss"] == pytest.approx(-test["ll"] + test["kl_y"] + test["kl_z"], rel=1e-6)
    assert test["kl_y"] >= 0 and test["kl_z"] >= 0
    events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
    for split in ("train", "test"):
        for name in ("loss", "ll", "kl_y", "kl_z"):
            assert [e.step for e in events.Scalars(f"{split}/{name}")] == [1, 2]
    assert events.Scalars("test/loss")[-1].value == pytest.approx(test["loss"], rel=1e-6)
    assert [e.step for e in events.Scalars("test/psnr")] == [1, 2]
    assert events.Scalars("test/psnr")[-1].value == pytest.approx(test["psnr"], abs=1e-3)  # 360 images, all of them
    assert {"reconstructions", "samples"} <= set(events.Tags()["images"])
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(name in hparams for name in (b"beta_y", b"beta_z", b"seed", b"vae_type"))
    assert not [p for p in path.iterdir() if p.name.startswith("resume") or p.name.endswith(".tmp")]


def test_a_finished_run_again_changes_nothing(trained, script):
    (path,) = trained()
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    status, out, _ = script(train.main, *TINY)
    assert status == 0 and "already complete" in out
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_overwrite_trains_anew(trained, script):
    (path,) = trained()
    digest = weights(path)
    flags = [*TINY, "--learning_rate", "0.01"]
    status, _, err = script(train.main, *flags)
    assert status == 2 and "--learning_rate 0.0009" in err and err.count("\n") == 1
    status, _, err = script(train.main, *flags, "--overwrite")
    assert status == 0 and weights(path) != digest
    assert Run.open(path).config.learning_rate == 0.01


def test_one_command_equals_the_bash_loop(trained, script):
    loop = {}
    for beta_y in ("0.1", "10"):
        for beta_z in ("1", "5"):
            for path in trained("--beta_y", beta_y, "--beta_z", beta_z, batch="loop"):
                loop[path.name] = load_tensors(path / "vae.pth")
    grid = ["--beta_y", "0.1", "10", "--beta_z", "1", "5"]
    for batch, flags in (("at_once", ["--cells_at_once", "4"]), ("single", ["--cells_at_once", "1"])):
        paths = trained(*grid, *flags, batch=batch)
        assert {p.name for p in paths} == set(loop)
        for path in paths:
            for name, p in load_tensors(path / "vae.pth").items():
                tolerance = {"rtol": 1e-4, "atol": 1e-4} if batch == "at_once" else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(p, loop[path.name][name], **tolerance)


def test_a_finished_run_that_is_damaged_is_named(trained, script):
    (path,) = trained()
    (path / "vae.pth").write_bytes((path / "vae.pth").read_bytes()[:20])
    status, _, err = script(train.main, *TINY)
    assert status == 2 and f"{path / 'vae.pth'}: damaged" in err and err.count("\n") == 1


def test_a_folder_without_its_config_is_refused_unless_overwritten(trained, script):
    (path,) = trained()
    (path / "config.json").unlink()
    status, _, err = script(train.main, *TINY)
    assert status == 2 and "holds files but no config.json" in err
    assert script(train.main, *TINY, "--overwrite")[0] == 0
    assert Run.open(path).status == "finished"


def test_several_seeds_train_the_grid_once_for_each(trained):
    paths = trained("--seed", "2", "3", "--beta_y", "1", "2")
    assert len(paths) == 4 and sum(p.name.endswith("-seed_3") for p in paths) == 2


def test_dry_run_writes_nothing(script):
    status, out, _ = script(train.main, *TINY, "--dry_run", "--beta_y", "0.1:10:3")
    assert status == 0 and "  beta_y 10, beta_z 1   new\n" in out and not Path("runs").exists()


def test_the_papers_command_with_its_trailing_backslash(script):
    command = shlex.split(
        "--vae_type HVAE --dataset CIFAR10 --num_epochs 500 --batch_size 256 --conv_channels 32 --z_dims 32 "
        "--px_y_family_ll GaussianFixedSigma --sigma 0.71 --beta_y 1.0 --beta_z 1.0 --run_batch_name cifar"
    )
    status, out, _ = script(train.main, *command, " ", "--dry_run")
    assert status == 0 and "475,811" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beta_y", "-1"], "--beta_y: must be > 0 or 0, got -1.0"),
        (["--beta_z", "nan"], "--beta_z: must be a finite number, got nan"),
        (["--beta_z", "inf"], "--beta_z: must be a finite number, got inf"),
        (["--beta_y", "a"], "--beta_y: must be a number or LO:HI:N, got 'a'"),
        (["--beta_y", "0:1:3"], "--beta_y: LO:HI:N needs 1e-6 <= LO < HI and N from 2 to 1000, got '0:1:3'"),
        (["--sigma", "0"], "--sigma: must be > 0, got 0.0"),
        (["--sigma", "nan"], "--sigma: must be a finite number, got nan"),
        (["--learning_rate", "-0.1"], "--learning_rate: must be > 0, got -0.1"),
        (["--z_dims", "0"], "--z_dims: must be >= 1, got 0"),
        (["--conv_channels", "0"], "--conv_channels: must be >= 1, got 0"),
        (["--num_epochs", "0"], "--num_epochs: must be >= 1, got 0"),
        (["--batch_size", "-3"], "--batch_size: must be >= 1, got -3"),
        (["--batch_size", "1.5"], "--batch_size: must be a whole number, got '1.5'"),
        (["--seed", "-1"], "--seed: must be > 0 or 0, got -1"),
        (["--linear_y_with_dims", "0"], "--linear_y_with_dims: must be -1 (off) or >= 2, got 0"),
        (["--vae_type", "HVEA"], "--vae_type: unknown 'HVEA'; did you mean HVAE? (valid: HVAE, LVAE, BVAE)"),
        (["--dataset", "Cifar10"], "--dataset: unknown 'Cifar10'; did you mean CIFAR10?"),
        (["--px_y_family_ll", "mol"], "--px_y_family_ll: unknown 'mol'; did you mean MoL?"),
        (["--qz_family", "x"], "--qz_family: unknown 'x' (valid: DiagonalGaussian, GumbelSoftmax)"),
        (["--beta-y", "1"], "--beta-y: unknown argument; did you mean --beta_y?"),
        (["--use_conv_z", "--qz_family", "GumbelSoftmax"], "--qz_family: GumbelSoftmax needs a vector z"),
        (["--dataset", "ImageNet", "--vae_type", "LVAE"], "--vae_type: LVAE supports up to 128 pixels"),
        (["--dataset", "SVHN", "--px_y_family_ll", "Bernoulli"], "--px_y_family_ll: Bernoulli is for grey images"),
        (["--use_conv_z", "--linear_y_with_dims", "8"], "--linear_y_with_dims: goes with a vector z"),
        (["--vae_type", "BVAE", "--beta_z", "1", "2"], "--beta_z: BVAE has no z"),
        (["--warmup_epochs", "3"], "--warmup_epochs: must be at most --num_epochs (2), got 3"),
        (["--warmup_epochs", "1", "--no_warmup"], "--no_warmup: contradicts --warmup_epochs"),
        (["--run_name", "../../x"], "--run_name: must be a plain folder name"),
        (["--run_batch_name", "a/b"], "--run_batch_name: must be a plain folder name"),
        (["--run_batch_name", ""], "--run_batch_name: must be a folder name other than"),
        (["--run_name", "x" * 250], "--run_name: too long for a folder name"),
        (["--run_batch_name", "x" * 300], "--run_batch_name: too long"),
        (["--run_name", "\udcff"], "--run_name: must be a plain folder name"),
        (["--seed", "9" * 30], "--seed: must be at most"),
        (["--batch_size", "9" * 30], "--batch_size: must be at most"),
        (["--z_dims", "9" * 30], "--z_dims: must be at most"),
        (["--conv_channels", "1000000"], "--conv_channels: must be at most 4096, got 1000000"),
        (["--beta_y", "1e39"], "--beta_y: must be at most 1e+30, got 1e+39"),
        (["--beta_y", "1:2:1000000"], "--beta_y: LO:HI:N needs"),
        (["--runs_dir", "x" * 300], "x"),
        (["--runs_dir", "/proc/nowhere"], "/proc"),
        (["--device", "meta"], "--device: meta is not available on this machine"),
        (["--device", "cuda:99"], "--device: cuda:99 is not available on this machine"),
        (["--device", "abc"], "--device: abc is not available on this machine"),
        (["--image_size", "28"], "--image_size: is for a folder of images"),
        (["--dataset", ".", "--image_size", "65"], "--image_size: must be 28, 32, 64, 128, 256 for a folder of images"),
        (["--cells_at_once", "0"], "--cells_at_once: must be a whole number >= 1, got '0'"),
        (["--save_every", "x"], "--save_every: must be a whole number >= 1, got 'x'"),
    ],
)
def test_bad_input_gives_one_line_and_no_folder(flags, message, script):
    status, _, err = script(train.main, *TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists(), err
    assert err.startswith(f"error: {message}")


def test_unwritable_runs_dir(script):
    Path("file").write_text("")
    status, _, err = script(train.main, *TINY, "--runs_dir", "file")
    assert status == 2 and err.count("\n") == 1 and "cannot write there" in err
    if os.getuid() != 0:
        Path("locked").mkdir(mode=0o500)
        status, _, err = script(train.main, *TINY, "--runs_dir", "locked")
        assert status == 2 and "locked: cannot write there" in err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dataset": 3}', '{"dataset": "Digits", "z_dims": "4"}'])
def test_a_corrupted_config_is_named(text, trained, script):
    (path,) = trained()
    (path / "config.json").write_text(text)
    status, _, err = script(train.main, *TINY)
    assert status == 2 and err.count("\n") == 1 and str(path / "config.json") in err


def test_disk_full_while_training_gives_one_line(script, monkeypatch):
    real = utils.files.write_atomic

    def full(path, data):
        if path.name == ".resume.tmp":
            raise UserError(f"{path}: disk full: needs 9 bytes, has 0")
        real(path, data)

    monkeypatch.setattr(utils.files, "write_atomic", full)
    status, _, err = script(train.main, *TINY, "--save_every", "1")
    assert status == 2 and err.splitlines()[-1].endswith("disk full: needs 9 bytes, has 0")
