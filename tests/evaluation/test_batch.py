"""Batches of broken folders and odd values; kills and signals while they are evaluated."""

import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_beta_grid
import eval_beta_single
import plot_eval
import train_classifier
from tests.conftest import start
from tests.evaluation.conftest import FAST, STEP1, four_steps
from utils.errors import UserError
from utils.files import read_arrays, read_json


def test_an_empty_batch_lists_the_others(batch, script):
    status, _, err = script(eval_beta_grid.main, "--run_batch_name", "c")
    assert status == 2 and "(valid: b)" in err and err.count("\n") == 1
    status, _, err = script(eval_beta_single.main, "--run_path", "runs/c")
    assert status == 2 and "runs/c: no config.json" in err


def test_broken_folders_of_every_kind(batch, script):
    good = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())[0]
    whole = (good / "vae.pth").read_bytes()

    def broken(name, change):
        path = shutil.copytree(good, Path("runs/b", name))
        change(path)

    state = torch.load(good / "vae.pth", weights_only=True)
    broken("1-no-config", lambda p: (p / "config.json").unlink())
    broken("2-no-weights", lambda p: (p / "vae.pth").unlink())
    broken("3-truncated", lambda p: (p / "vae.pth").write_bytes(whole[:5000]))
    broken("4-shapes", lambda p: torch.save({k: v[..., :1] for k, v in state.items()}, p / "vae.pth"))
    broken("5-json", lambda p: (p / "config.json").write_text("{"))
    broken("6-same-betas", lambda p: None)
    broken("7-nan", lambda p: torch.save({k: v * math.nan for k, v in state.items()}, p / "vae.pth"))
    broken("8-failed", lambda p: (p / "training.json").write_text('{"status": "failed"}'))
    broken("9-unfinished", lambda p: (p / "resume.pth").write_bytes(b""))
    status, out, err = script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")
    assert status == 1 and "5 of 13 runs evaluated" in out
    failures = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 8 and all(
        any(f"runs/b/{i}-" in line for line in failures) for i in (1, 2, 3, 4, 5, 7, 8, 9)
    )
    rows = {row["run"]: row for row in batch()}
    assert len(rows) == 13 and sum(row["psnr"] != "" for row in rows.values()) == 5
    assert rows["6-same-betas"]["psnr"] == rows[good.name]["psnr"]
    assert [rows[k]["status"] for k in ("1-no-config", "5-json", "8-failed", "9-unfinished")] == [
        *("broken", "broken", "failed", "unfinished")
    ]


@pytest.mark.parametrize(
    "file, text",
    [
        ("metrics.json", '{"steps": 5}'),
        ("metrics.json", '{"steps": null}'),
        ("metrics.json", '{"mi_q_mc": [1]}'),
        ("metrics.json", '{"mi_q_mc": NaN}'),
        ("metrics.json", '{"mi_q_mc": 1e400}'),
        ("metrics.json", "[]"),
        ("training.json", '{"train": []}'),
        ("training.json", '{"status": 3}'),
        ("training.json", "[]"),
        ("config.json", None),
        ("vae.pth", None),
        ("metrics.json", None),
        ("latents.npz", None),
    ],
)
def test_a_file_of_any_other_kind_fails_its_run_alone(file, text, batch, script):
    """None: a folder of that name."""
    path = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())[0]
    (path / file).unlink(missing_ok=True)
    if text is None:
        (path / file).mkdir()
    else:
        (path / file).write_text(text)
    status, out, err = script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")
    assert status == 1 and "3 of 4 runs evaluated" in out
    assert err.startswith(f"failed: {path}") and err.count("\n") == 1
    assert sum(row["psnr"] != "" for row in batch()) == 3
    assert [row["status"] == "broken" for row in batch() if row["run"] == path.name] == [
        file != "latents.npz" and file != "vae.pth"
    ]


@pytest.mark.parametrize("change", ["lost", "cut", "another run's"])
def test_latents_and_components_that_are_lost_are_made_again(change, batch, script):
    first, other = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())[:2]
    both = [*FAST, "--exclude_mi", "--exclude_fid"], [*FAST, "--pca"]
    for flags in both:
        assert script(eval_beta_grid.main, *flags)[0] == 0
    for name, flags in zip(("latents.npz", "pca.npz"), both, strict=True):
        whole = (first / name).read_bytes()
        if change == "another run's":
            shutil.copy(other / name, first / name)
        elif change == "cut":
            (first / name).write_bytes(whole[:1000])
        else:
            (first / name).unlink()
        assert script(eval_beta_grid.main, *flags)[0] == 0
        assert len((first / name).read_bytes()) == len(whole)
        assert all(k in read_arrays(first / name) for k in read_arrays(other / name))


def test_new_weights_drop_the_figures_of_the_old_ones(batch, script):
    four_steps(script)
    first, other = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())[:2]
    shutil.copy(other / "vae.pth", first / "vae.pth")
    assert script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")[0] == 0
    row = next(row for row in batch() if row["run"] == first.name)
    assert row["psnr"] != "" and row["mi_q_mc"] == row["is_mean"] == row["acc_bound"] == row["recons_acc"] == ""
    assert row["ll_se"] != "" and row["mi_z_low"] == row["mi_z_high"] == row["kNN_acc"] == row["kNN_acc_sample"] == ""


@pytest.mark.parametrize("name", ["..", ".", "/", "a/b", "", "classifiers"])
def test_a_batch_is_a_folder_of_runs(name, batch, script):
    for main in (eval_beta_grid.main, plot_eval.main):
        status, _, err = script(main, "--run_batch_name", name, "--device", "cpu")
        assert status == 2 and err.startswith("error: --run_batch_name: must be the name of a folder of runs")


@pytest.mark.parametrize(
    "step, number",
    [(["--get_mi_cal_acc", "--cpu_n", n], number) for n in "12" for number in (signal.SIGTERM, signal.SIGINT)]
    + [(["--n_samples", "2000", "--with_classifier"], number) for number in (signal.SIGTERM, signal.SIGINT)],
)
def test_signals_end_it_at_once_and_the_same_command_continues(step, number, batch, script):
    script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")
    process = start("eval_beta_grid.py", *FAST, *step, PYTHONUNBUFFERED="1")
    while "runs of b" not in process.stdout.readline():
        pass
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)  # which would wait for workers that live on
    if "4 of 4 runs evaluated" not in out:  # it may have been done already
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
        assert "interrupted; rerun to continue: python " in err and "Traceback" not in err, err
    assert script(eval_beta_grid.main, *FAST, *step)[0] == 0
    assert all(row["lr_acc_mean" if step[0] == "--get_mi_cal_acc" else "is_mean"] != "" for row in batch())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_samples", "9"], "--n_samples: must be a whole number >= 10"),
        (["--n_samples", "1" + "0" * 25], "--n_samples: must be at most"),
        (["--y_samples", "0"], "--y_samples: must be a whole number >= 1"),
        (["--cpu_n", "-1"], "--cpu_n: must be a whole number >= 1"),
        (["--iw_samples", "x"], "--iw_samples: must be a whole number >= 1"),
    ],
)
def test_odd_values(flags, message, batch, script):
    status, _, err = script(eval_beta_grid.main, *FAST, *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_killed_and_repeated_does_only_what_is_missing(batch, script):
    script(eval_beta_grid.main, *STEP1)
    expected = Path("runs/b/eval_results.csv").read_bytes()
    for path in Path("runs/b").rglob("metrics.json"):
        path.unlink()
    process = start("eval_beta_grid.py", *STEP1)
    end = time.monotonic() + 60
    while not list(Path("runs/b").rglob("metrics.json")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in Path("runs/b").rglob("metrics.json") if "fid" in read_json(p)["steps"]}
    assert script(eval_beta_grid.main, *STEP1)[0] == 0
    assert Path("runs/b/eval_results.csv").read_bytes() == expected
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_results_that_hold_code_are_refused(batch, script):
    script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")
    path = next(Path("runs/b").rglob("latents.npz"))
    with np.load(path) as arrays:
        hostile = {**arrays, "labels": np.array([Hostile()] * 360, dtype=object)}
    np.savez(path, **hostile)
    status, _, err = script(eval_beta_single.main, "--run_path", path.parent, "--device", "cpu")
    assert status == 2 and f"{path}: missing, damaged or stale" in err
    with pytest.raises(UserError, match="missing or damaged"):
        read_arrays(path)
    assert not Path("executed").exists()


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_classifiers_that_cannot_be_used(batch, script):
    good = Path("runs/classifiers/Digits")

    def refused(message, *flags):
        status, out, err = script(eval_beta_grid.main, *STEP1, *flags)
        assert status == 2 and message in err and err.count("\n") == 1, err

    refused("bogus.pth: no trained classifier", "--classifier_path", good / "bogus.pth")
    other = Path(shutil.copytree(good, "other"))
    settings = read_json(other / "config.json")
    (other / "config.json").write_text(json.dumps(settings | {"dataset": "SVHN"}))
    refused("labels SVHN, not Digits", "--classifier_path", other)
    (other / "config.json").write_text(json.dumps(settings))
    state = torch.load(good / "classifier.pth", weights_only=True)
    torch.save({k: v * math.nan for k, v in state.items()}, other / "classifier.pth")
    refused("holds weights that are not finite", "--classifier_path", other)
    (good / "classifier.pth").write_bytes((good / "classifier.pth").read_bytes()[:1000])
    flags = ["--device", "cpu", "--num_epochs", "2"]
    status, _, err = script(train_classifier.main, *flags)
    assert status == 2 and "classifier.pth: damaged" in err
    (good / "classifier.pth").unlink()
    for state in ({}, {"epoch": 1, "model": {}, "optimizer": {}, "scheduler": {}}):
        torch.save(state, good / "resume.pth")
        status, _, err = script(train_classifier.main, *flags)
        assert status == 2 and "resume.pth: damaged; --overwrite starts from scratch" in err and err.count("\n") == 1
    status, _, err = script(train_classifier.main, *flags[:2], "--overwrite", "--learning_rate", "1e30")
    assert status == 2 and "--learning_rate: the loss is not finite in epoch 1" in err
    assert not (good / "classifier.pth").exists()
