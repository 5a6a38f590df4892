"""train.py as its users see it: run folders, resuming, errors, and everything that can interrupt it."""

import errno
import hashlib
import json
import os
import random
import shlex
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import utils.files
from datasets.loading import Data
from models.stack import Stack
from tests.conftest import TINY, start
from utils.config import Config
from utils.engine import Engine
from utils.errors import UserError
from utils.files import load_tensors, save_tensors, write_atomic
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training import Chunk

TRIALS = [pytest.param(i, marks=[pytest.mark.slow] if i >= 2 else []) for i in range(50)]


def weights(path: Path) -> str:
    return hashlib.sha256((path / "vae.pth").read_bytes()).hexdigest()


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
    assert {"reconstructions", "samples"} <= set(events.Tags()["images"])
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"beta_y" in hparams and b"beta_z" in hparams
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
    assert status == 2 and "--learning_rate 0.0003" in err and err.count("\n") == 1
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
    assert status == 0 and "Beta_y_10.0" in out and not Path("runs").exists()


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
        (["--batch_size", "1.5"], "--batch_size: invalid int value: '1.5'"),
        (["--seed", "-1"], "--seed: must be > 0 or 0, got -1"),
        (["--linear_y_with_dims", "0"], "--linear_y_with_dims: must be -1 (off) or >= 2, got 0"),
        (["--vae_type", "HVEA"], "--vae_type: unknown 'HVEA'; did you mean HVAE? (valid: HVAE, LVAE, BVAE)"),
        (["--dataset", "Cifar10"], "--dataset: unknown 'Cifar10'; did you mean CIFAR10?"),
        (["--px_y_family_ll", "mol"], "--px_y_family_ll: unknown 'mol'; did you mean MoL?"),
        (["--qz_family", "x"], "--qz_family: unknown 'x' (valid: DiagonalGaussian, GumbelSoftmax)"),
        (["--beta-y", "1"], "--beta-y: unknown argument; did you mean --beta_y?"),
        (["--use_conv_z", "--qz_family", "GumbelSoftmax"], "--qz_family: GumbelSoftmax is for a vector z"),
        (["--dataset", "ImageNet", "--vae_type", "LVAE"], "--vae_type: LVAE is for 28 and 32 pixels"),
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
        (["--device", "meta"], "--device: meta is not there on this machine"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there on this machine"),
        (["--device", "abc"], "--device: abc is not there on this machine"),
        (["--image_size", "28"], "--image_size: is for a folder of images"),
        (["--dataset", ".", "--image_size", "64"], "--image_size: must be 28, 32 or 256 for a folder of images"),
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


def test_disk_full_leaves_the_old_file(monkeypatch):
    path = Path("file")
    write_atomic(path, b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: disk full: needs 1,000 bytes, has [\d,]+$"):
        write_atomic(path, b"x" * 1000)
    assert path.read_bytes() == b"old" and len(list(Path().iterdir())) == 1


def test_disk_full_while_training_gives_one_line(script, monkeypatch):
    real = utils.files.write_atomic

    def full(path, data):
        if path.name == ".resume.tmp":
            raise UserError(f"{path}: disk full: needs 9 bytes, has 0")
        real(path, data)

    monkeypatch.setattr(utils.files, "write_atomic", full)
    status, _, err = script(train.main, *TINY, "--save_every", "1")
    assert status == 2 and err.splitlines()[-1].endswith("disk full: needs 9 bytes, has 0")


# --- what interrupts a training ---

LONGER = [*TINY[:4], "--num_epochs", "6", "--batch_size", "100", "--device", "cpu", "--save_every", "1"]


def wait_for(pattern: str, process, seconds=60) -> bool:
    """Whether a file appeared before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if list(Path("runs").rglob(pattern)):
            return True
        time.sleep(0.005)
    return bool(list(Path("runs").rglob(pattern)))


def uninterrupted(script) -> str:
    status, _, err = script(train.main, *LONGER, "--runs_dir", "whole")
    assert status == 0, err
    return weights(next(Path("whole/singles").iterdir()))


@pytest.mark.parametrize("trial", TRIALS)
def test_kill_9_at_a_random_moment_then_the_same_command(trial, script):
    expected = uninterrupted(script)
    process = start("train.py", *LONGER)
    assert wait_for("resume.pth", process)
    time.sleep(random.Random(trial).uniform(0, 1.0))
    process.kill()
    process.wait()
    unfinished = bool(list(Path("runs").rglob("resume.pth")))
    again = start("train.py", *LONGER)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert ("resuming at epoch" in out) == unfinished
    path = next(Path("runs/singles").iterdir())
    assert weights(path) == expected
    events = EventAccumulator(str(path)).Reload()
    assert [e.step for e in events.Scalars("test/loss")] == list(range(1, 7))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_tell_how_to_continue(number, status, script):
    expected = uninterrupted(script)
    process = start("train.py", *LONGER)
    assert wait_for("resume.pth", process)
    time.sleep(0.15)
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == status, err
    assert "saved at epoch" in err and "rerun to continue: python" in err and "Traceback" not in err
    assert script(train.main, *LONGER)[0] == 0
    assert weights(next(Path("runs/singles").iterdir())) == expected


def test_a_signal_within_an_epoch_is_resumed_within_it(script, monkeypatch):
    expected = uninterrupted(script)
    step, calls = Stack.step, []

    def counting(self, *args):
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", counting)
    status, _, err = script(train.main, *LONGER, "--cells_at_once", "1")
    assert status == 143 and "saved at epoch 1" in err
    state = load_tensors(next(Path("runs").rglob("resume.pth")))
    assert (state["epoch"], state["step"]) == (1, 5)
    assert script(train.main, *LONGER)[0] == 0
    assert weights(next(Path("runs/singles").iterdir())) == expected
    assert len(calls) == 6 * 15


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_resume_state_falls_back_to_the_one_before(damage, script):
    expected = uninterrupted(script)
    process = start("train.py", *LONGER)
    assert wait_for("resume.prev.pth", process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    path = next(Path("runs").rglob("resume.pth"))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    status, out, err = script(train.main, *LONGER)
    assert status == 0 and f"{path}: damaged" in err and "falling back" in err
    assert weights(path.parent) == expected


@pytest.mark.parametrize("state", [{"a": 1}, {"weights": {}, "epoch": 0}, [1]])
def test_a_foreign_resume_state_is_named(state, script):
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=2, batch_size=500), "runs")
    run.create()
    torch.save(state, run.path / "resume.pth")
    status, _, err = script(train.main, *TINY)
    assert status == 1 and f"{run.path / 'resume.pth'}: damaged" in err


def test_a_signal_in_a_cells_last_step_ends_the_grid(script, monkeypatch):
    step = Stack.step

    def last_step(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", last_step)
    one_step = [*TINY[:4], "--num_epochs", "1", "--batch_size", "2000", "--beta_y", "1:9:5", "--device", "cpu"]
    status, _, err = script(train.main, *one_step, "--overwrite")
    assert status == 143 and "rerun to continue" in err and not err.rstrip().endswith("--overwrite")
    assert len(list(Path("runs/singles").iterdir())) == 1


def test_perfect_reconstructions_have_an_infinite_psnr(script, monkeypatch):
    monkeypatch.setattr("models.hvae.HVAE.psnr", lambda self, batches: float("inf"))
    status, out, _ = script(train.main, *TINY)
    assert status == 0 and "   inf " in out


def test_without_a_whole_resume_state_it_refuses(script):
    process = start("train.py", *LONGER)
    assert wait_for("resume.prev.pth", process)
    process.kill()
    process.wait()
    for path in Path("runs").rglob("resume*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    status, _, err = script(train.main, *LONGER)
    assert status == 1 and "no whole state is left" in err
    assert script(train.main, *LONGER, "--overwrite")[0] == 0


def test_every_flipped_bit_of_the_weights_is_seen_or_harmless(trained):
    (path,) = trained()
    run, original = Run.open(path), (path / "vae.pth").read_bytes()
    expected = load_tensors(path / "vae.pth")
    rng = random.Random(0)
    tail = original.rindex(b"PK\x01\x02") - 2000  # where the archive's directory is
    places = [rng.randrange(len(original)) for _ in range(60)] + [
        rng.randrange(tail, len(original)) for _ in range(200)
    ]
    for place in [*places, 29]:
        damaged = bytearray(original)
        damaged[place] ^= 1 << rng.randrange(8)
        (path / "vae.pth").write_bytes(damaged)
        try:
            state = load_model(run, torch.device("cpu")).state_dict()
        except UserError as e:
            assert "vae.pth: " in str(e) and "\n" not in str(e)
        else:
            assert all(torch.equal(state[k], v) for k, v in expected.items())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_that_run_code_are_refused(trained):
    (path,) = trained()
    torch.save({"x": Malicious()}, path / "vae.pth")
    with pytest.raises(UserError, match="vae.pth: .*refused"):
        load_model(Run.open(path), torch.device("cpu"))
    assert not Path("executed").exists()


SAVER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.runs import save_tensors
i = 0
while True:
    i += 1
    save_tensors(Path("x.pth"), {{"i": torch.full((20000,), float(i))}})
"""


@pytest.mark.parametrize("trial", TRIALS)
def test_kill_9_inside_a_save_leaves_a_whole_file(trial):
    root = str(Path(train.__file__).parent)
    Path("saver.py").write_text(SAVER.format(root=root))
    save_tensors(Path("x.pth"), {"i": torch.zeros(20000)})
    process = start(Path("saver.py").resolve())
    end = time.monotonic() + 60
    while load_tensors(Path("x.pth"))["i"][0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(trial).uniform(0, 0.3))
    process.kill()
    process.wait()
    values = load_tensors(Path("x.pth"))["i"]
    assert values[0] > 0 and (values == values[0]).all()


def test_two_processes_on_one_run_folder(script):
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=2, batch_size=500), "runs")
    run.create()
    holder = "import sys, time; sys.path.insert(0, sys.argv[1]); from utils.runs import Run; from pathlib import Path\n"
    holder += "with Run.open(Path(sys.argv[2])).locked():\n    print('held', flush=True); time.sleep(60)"
    Path("holder.py").write_text(holder)
    process = start(Path("holder.py").resolve(), Path(train.__file__).parent, run.path)
    assert process.stdout.readline() == "held\n"
    status, _, err = script(train.main, *TINY)
    assert status == 1 and f"locked by pid {process.pid} on host" in err
    process.kill()
    process.wait()
    assert script(train.main, *TINY)[0] == 0


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_cell_whose_loss_is_not_finite_fails_alone(at_once, script, monkeypatch, trained):
    def rows(paths):
        return {p.name: weights(p) for p in paths if "Beta_y_2.0" not in p.name}

    grid = ["--beta_y", "1", "2", "3", "--cells_at_once", str(at_once)]
    healthy = trained(*grid, batch="healthy")
    step = Stack.step

    def poisoned(self, optimizer, x, noise, beta_y, beta_z):
        if next(iter(optimizer.state.values()))["step"] == 4:  # the second of the three steps in the second epoch
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", poisoned)
    status, out, _ = script(train.main, *TINY, *grid, "--run_batch_name", "ill")
    assert status == 1 and "failed at epoch 2, step 2: loss inf" in out
    paths = sorted(Path("runs/ill").iterdir())
    assert rows(paths) == rows(healthy)
    ill = next(Run.open(p) for p in paths if "Beta_y_2.0" in p.name)
    assert ill.status == "failed" and ill.result["epoch"] == 2 and ill.result["terms"]["loss"] == "inf"
    load_model(ill, torch.device("cpu"))
    status, out, err = script(train.main, *TINY, *grid, "--run_batch_name", "ill")
    assert status == 1 and "failed before" in out and "--overwrite trains it anew" in err


def test_out_of_memory_halves_the_chunk(script, monkeypatch):
    step, sizes = Stack.step, []

    def small_memory(self, *args):
        sizes.append(self.m)
        if self.m > 2:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", small_memory)
    status, out, _ = script(train.main, *TINY, "--beta_y", "1:5:5", "--cells_at_once", "5")
    assert status == 0 and "halving" in out and len(list(Path("runs/singles").iterdir())) == 5
    assert [m for m in sizes if m > 2] == [5, 3]


def test_out_of_memory_leaves_alone_what_has_ended(script, monkeypatch):
    """One cell has failed and one is finished when the memory runs out: the others go on from their states."""
    grid = [*TINY, "--num_epochs", "3", "--beta_y", "1", "2", "3", "4", "--cells_at_once", "4", "--save_every", "1"]
    step, failing = Stack.step, []

    def poisoned(self, optimizer, x, noise, beta_y, beta_z):
        n = int(next(iter(optimizer.state.values()))["step"])
        if n == 7 and self.m == 4:
            raise torch.OutOfMemoryError("out of memory")
        if self.m == 4 and n == 1:
            beta_y = torch.where(beta_y == 2, torch.inf, beta_y)
            failing.append(n)
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", poisoned)
    status, out, _ = script(train.main, *grid)
    assert status == 1 and failing and out.count("halving") == 1 and out.count("resuming at epoch 2") == 2
    assert sorted(Run.open(p).status for p in Path("runs/singles").iterdir()) == ["failed"] + ["finished"] * 3


def test_bf16_cells_are_not_stacked_on_a_cpu(script):
    """torch's autocast lets stacked convolutions stay in float32 there, so they would not be what one cell is."""
    status, _, err = script(train.main, *TINY, "--precision", "bf16", "--cells_at_once", "2")
    assert status == 2 and err.startswith("error: --cells_at_once: with bf16 a CPU trains one cell at a time, got 2")


def test_a_state_within_an_epoch_of_another_kind_of_device_is_refused():
    (run,), chunk = in_training(1)
    chunk.step, chunk.history = 1, torch.zeros(3, 1, 4)
    chunk.noise = SimpleNamespace(get_state=lambda: torch.zeros(16, dtype=torch.uint8))  # so long is a GPU's
    chunk.save()
    chunk.settle()
    with pytest.raises(UserError, match="saved within an epoch on a GPU; continue there"):
        Chunk([run], [run.load_state()[0]], chunk.engine)


def test_chunks_are_of_one_size_and_share_an_engine(script, monkeypatch):
    """Seven cells, at most three at once: 3, 2 and 2, for which the engine of three is kept."""
    built, init = [], Engine.__init__

    def counted(self, config, m, *args, **kwargs):
        built.append(m)
        init(self, config, m, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", counted)
    grid = [*TINY, "--beta_y", "1:7:7"]
    assert script(train.main, *grid, "--cells_at_once", "3")[0] == 0
    assert built == [3]
    assert script(train.main, *grid, "--cells_at_once", "1", "--runs_dir", "alone")[0] == 0
    paths = list(Path("runs/singles").iterdir())
    assert len(paths) == 7
    for path in paths:
        alone = load_tensors(Path("alone/singles", path.name, "vae.pth"))
        torch.testing.assert_close(load_tensors(path / "vae.pth"), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, size, chunks", [(441, 64, [63] * 7), (20, 8, [7, 7, 6]), (5, 9, [5]), (3, 1, [1, 1, 1])])
def test_sizes_of_chunks(n, size, chunks):
    args = train.parse_args(["--cells_at_once", str(size), "--device", "cpu"])
    trainer, taken = train.Trainer(Data(range(100), range(9), 10), args, None, n, Config()), []
    while sum(taken) < n:
        taken.append(trainer.size_for(Config(), n - sum(taken)))
    assert taken == chunks


def test_only_long_trainings_on_a_gpu_are_measured_and_compiled(monkeypatch):
    """Decided from the number of steps; `on`, `off` and a named way of convolving overrule it."""

    def trainer(n_cells, *flags, device="cuda", **settings):
        args = train.parse_args(["--device", "cpu", *flags])
        args.device = torch.device(device)
        return train.Trainer(
            Data(range(50_000), range(9), 10), args, None, n_cells, Config(dataset="CIFAR10", **settings)
        )

    def how(t):
        return t.compile, t.capture, t.size, t.route

    assert how(trainer(441)) == (True, True, None, None)
    assert how(trainer(1, num_epochs=2)) == (False, True, train.AT_ONCE, "plain")
    assert how(trainer(441, device="cpu")) == (False, False, 1, "plain")
    data, args = Data(range(9), range(9), 10), train.parse_args(["--device", "cpu"])
    assert train.Trainer(data, args, None, 1, Config(dataset="ImageNet")).route == "channels_last"
    assert how(trainer(441, "--compile", "off", "--cells_at_once", "7")) == (False, False, 7, None)
    assert how(trainer(1, "--compile", "on", num_epochs=2))[:2] == (True, True)
    assert how(trainer(441, "--convolutions", "kernels", "--data_parallel"))[2:] == (1, "kernels")
    asked = []
    monkeypatch.setattr(train, "fastest", lambda config, *a: (asked.append(a), (49, "kernels"))[1])
    measured = trainer(441)
    assert measured.size_for(Config(), 441) == 49 and measured.size_for(Config(), 392) == 49
    assert measured.route == "kernels" and len(asked) == 1 and asked[0][0][-1] == 256


def test_kernels_are_refused_without_a_gpu(script):
    status, _, err = script(train.main, *TINY, "--convolutions", "kernels")
    assert status == 2 and err.startswith("error: --convolutions: kernels need an NVIDIA GPU")
    assert not Path("runs").exists()


# --- states are written while the training goes on ---


def in_training(n_cells=2):
    runs = [Run.of(Config(conv_channels=2, z_dims=3, batch_size=4, beta_y=1.0 + i), "runs") for i in range(n_cells)]
    for run in runs:
        run.create()
    chunk = Chunk(runs, [None] * n_cells, Engine(runs[0].config, n_cells, torch.device("cpu")))
    return runs, chunk


def a_step(chunk):
    x = torch.rand(4, 1, 28, 28, generator=generator("cpu", 0))
    chunk.engine.step(x, chunk.stack.model.noise(4, generator("cpu", 1)), chunk.beta_y, chunk.beta_z)


def test_a_state_is_of_the_moment_of_its_save_and_not_of_its_writing(monkeypatch):
    runs, chunk = in_training()
    a_step(chunk)
    expected, may_write, save_state = [chunk.stack.cell(m) for m in range(2)], threading.Event(), Run.save_state

    def slow(self, state):
        assert may_write.wait(60)
        save_state(self, state)

    monkeypatch.setattr(Run, "save_state", slow)
    chunk.save()
    a_step(chunk)  # while it waits to be written
    assert not chunk.saving.done() and not chunk.cheap_to_save(0.0)
    may_write.set()
    chunk.settle()
    for run, weights in zip(runs, expected, strict=True):
        state = run.load_state()[0]
        assert all(torch.equal(state["weights"][name], p) for name, p in weights.items()) and state["adam_steps"] == 1
        assert sum(p.numel() for p in weights.values()) * 3 * 4 < (run.path / "resume.pth").stat().st_size < 200_000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_writing_starts_no_threads_beside_the_trainings_own():
    """torch's operations on the saver's thread would; a CPU's training then took 18 % longer."""
    run = Run.of(Config(conv_channels=32, z_dims=32, batch_size=4), "runs")
    run.create()
    torch.set_num_threads(2)
    chunk = Chunk([run], [None], Engine(run.config, 1, torch.device("cpu")))
    a_step(chunk)
    before = len(os.listdir("/proc/self/task"))
    chunk.save()
    chunk.settle()
    assert len(os.listdir("/proc/self/task")) <= before + 1


def test_what_goes_wrong_while_writing_is_told_at_the_next_occasion(monkeypatch):
    def full(self, state):
        raise UserError("disk full")

    _, chunk = in_training()
    monkeypatch.setattr(Run, "save_state", full)
    chunk.save()
    with pytest.raises(UserError, match="disk full"):
        chunk.settle()
    chunk.settle()


def test_cells_that_a_kill_left_apart_train_together_again(script, monkeypatch):
    """Three cells saved after the first epoch, one of them also after the second: it goes back."""
    grid = [*LONGER, "--beta_y", "1", "2", "3", "--cells_at_once", "3"]
    assert script(train.main, *grid, "--runs_dir", "whole")[0] == 0
    save_state, saves = Run.save_state, []

    def killed(self, state):
        saves.append(self.path)
        if len(saves) > 4:
            raise UserError("killed")
        save_state(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", killed)
        assert script(train.main, *grid)[0] == 2
    states = {path.parent.name: load_tensors(path) for path in Path("runs").rglob("resume.pth")}
    assert sorted(s["epoch"] for s in states.values()) == [1, 1, 2]
    status, out, _ = script(train.main, *grid)
    assert status == 0 and out.count("resuming at epoch 1") == 1 and "epoch 2" not in out
    for path in Path("runs/singles").iterdir():
        assert weights(path) == weights(Path("whole/singles", path.name))


def test_a_cell_that_cannot_go_back_goes_on_by_itself():
    runs, chunk = in_training()
    for epoch in (1, 2):
        chunk.epoch = epoch
        chunk.save()
        chunk.settle()
    cells = [(run, run.load_state()[0]) for run in runs]
    assert train.align(cells) == cells
    (runs[0].path / "resume.prev.pth").replace(runs[0].path / "resume.pth")
    (runs[1].path / "resume.prev.pth").write_bytes(b"damaged")
    apart = train.align([(run, run.load_state()[0]) for run in runs])
    assert [train.position(state) for _, state in apart] == [(1, 0), (2, 0)]
    assert train.align([(runs[0], None), (runs[1], cells[1][1])])[1][1] is cells[1][1]  # a new cell waits for none


def test_a_kill_in_the_first_save_of_all_leaves_no_cell_ahead():
    runs, _ = in_training()
    first = {"epoch": 1, "step": 0}
    assert train.align([(runs[0], first), (runs[1], None)]) == [(runs[0], None), (runs[1], None)]


def test_warmup_weights(script, monkeypatch):
    from utils.training import rate_weight

    assert [rate_weight(e, 4) for e in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rate_weight(0, 0) == 1
    seen, step = [], Stack.step

    def watching(self, optimizer, x, noise, beta_y, beta_z):
        seen.append((beta_y.item(), beta_z.item()))
        return step(self, optimizer, x, noise, beta_y, beta_z)

    monkeypatch.setattr(Stack, "step", watching)
    flags = [*TINY[:4], "--num_epochs", "10", "--batch_size", "2000", "--vae_type", "LVAE", "--beta_y", "3"]
    assert script(train.main, *flags)[0] == 0
    assert seen == [(0, 0), (1.5, 0.5), *[(3, 1)] * 8]
    seen.clear()
    assert script(train.main, *flags, "--no_warmup")[0] == 0
    assert seen == [(3, 1)] * 10
