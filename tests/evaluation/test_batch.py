"""Batches of broken folders and odd values; kills and signals while they are evaluated."""

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import plot_eval
import train_classifier
from eval_beta_grid import main as grid
from eval_beta_single import main as single
from tests.conftest import start
from tests.evaluation.conftest import FAST, PROBES, RATES, STEP1, rows, runs
from utils.evaluation.batch import failures_in, worker_processes
from utils.files import read_json


def folder_at(name):
    """A change of a run's folder: a folder in place of a file."""

    def change(path):
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()

    return change


TEXTS = """config {
training {"status": "failed"}
training {"train": []}
training {"status": 3}
training []
metrics {"mi_q_mc": [1]}
metrics {"mi_q_mc": NaN}
metrics {"mi_q_mc": 1e400}
metrics []
metrics {"steps": 5}"""


def test_broken_runs_of_every_kind_fail_alone(batch, script):
    good, w = runs()[0], "vae.pth"
    state = torch.load(good / w, weights_only=True)
    changes = {
        "no config": lambda p: (p / "config.json").unlink(),
        "no weights": lambda p: (p / w).unlink(),
        "truncated": lambda p: os.truncate(p / w, 5000),
        "shapes": lambda p: torch.save({k: v[..., :1] for k, v in state.items()}, p / w),
        "nan": lambda p: torch.save({k: v * math.nan for k, v in state.items()}, p / w),
        "unfinished": lambda p: (p / "resume.pth").write_bytes(b""),
        **{name: folder_at(name) for name in ("config.json", w, "metrics.json", "latents.npz")},
    }
    for line in TEXTS.split("\n"):
        file, text = line.split(maxsplit=1)
        changes[line] = lambda p, file=file, text=text: (p / f"{file}.json").write_text(text)
    names = {kind: f"broken-{i}." for i, kind in enumerate(changes)}
    for kind, change in changes.items():
        change(shutil.copytree(good, Path("runs/b", names[kind])))
    shutil.copytree(good, Path("runs/b/same-betas"))
    status, out, err = script(grid, *RATES)
    assert status == 1 and f"5 of {5 + len(changes)} runs evaluated" in out
    failures = err.strip().splitlines()  # a line each
    assert len(failures) == len(changes) and all(line.startswith("failed: ") for line in failures)
    assert all(any(name in line for line in failures) for name in names.values())
    table = {row["run"]: row for row in rows()}
    assert len(table) == 5 + len(changes) and sum(row["psnr"] != "" for row in table.values()) == 5
    assert table["same-betas"]["psnr"] == table[good.name]["psnr"]
    expected = dict.fromkeys(changes, "broken") | {'training {"status": "failed"}': "failed"}
    expected |= dict.fromkeys((w, "latents.npz", "truncated", "shapes", "nan"), "finished")
    expected |= dict.fromkeys(("no weights", "unfinished"), "unfinished")
    assert {kind: table[name]["status"] for kind, name in names.items()} == expected


def test_what_is_lost_cut_or_of_other_weights_is_made_again(evaluated, passes):
    path, other = runs()[:2]
    for name, flags in (("latents.npz", RATES), ("pca.npz", [*FAST, "--pca"])):
        whole = (path / name).read_bytes()
        for damage in (b"", whole[:1000], (other / name).read_bytes()):
            (path / name).write_bytes(damage)
            passes(grid, *flags)
            assert (path / name).read_bytes() == whole
    shutil.copy(other / "vae.pth", path / "vae.pth")
    passes(grid, *RATES)
    row = next(row for row in rows() if row["run"] == path.name)
    assert row["psnr"] != "" and row["ll_se"] != ""
    gone = ("mi_q_mc", "is_mean", "acc_bound", "recons_acc", "mi_z_low", "mi_z_high", "kNN_acc", "kNN_acc_sample")
    assert {row[column] for column in gone} == {""}


def test_a_batch_is_a_folder_of_runs(refused):
    for name in ("classifiers", "b"):
        Path("runs", name).mkdir(parents=True)
    assert "(valid: b)" in refused(grid, "--run_batch_name", "c")
    assert "runs/c: no config.json" in refused(single, "--run_path", "runs/c")
    for name in ("..", ".", "/", "a/b", "", "classifiers"):
        for main in (grid, plot_eval.main):
            err = refused(main, "--run_batch_name", name, "--device", "cpu")
            assert err.startswith("error: --run_batch_name: must be the name of a folder of runs")


def test_the_tasks_of_an_array_leave_a_whole_table_whoever_is_last(batch, monkeypatch, passes):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, n in (("0", 2), ("1", 4)):
        monkeypatch.setenv("RANK", rank)
        assert "2 of 2 runs evaluated" in passes(grid, *RATES)
        assert sum(row["psnr"] != "" for row in rows()) == n


def test_workers_that_are_killed_or_interrupted():
    """One that is killed costs the runs whose jobs it had; Ctrl-C ends all, and leaves no hook behind."""
    problems, hook, begin = {}, threading.excepthook, time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_processes(1) as submit:
        for job in ((int, "x"), (os._exit, 1)):
            with failures_in(problems, Path(job[0].__name__)):
                submit(*job).result()
        assert submit(len, "next").result() == 4
        submit(time.sleep, 100)
        raise KeyboardInterrupt
    assert threading.excepthook is hook and time.monotonic() - begin < 50
    assert "int: ValueError: " in problems[Path("int")]
    assert "_exit: a worker process was killed" in problems[Path("_exit")]


def test_a_signal_ends_it_at_once_and_the_same_command_continues(batch, script, passes):
    """It takes long since a process and its worker start."""
    script(grid, *RATES)
    process = start("eval_beta_grid.py", *PROBES, PYTHONUNBUFFERED="1")
    while "runs of b" not in process.stdout.readline():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)  # which would wait for workers that live on
    if "4 of 4 runs evaluated" not in out:  # it may have been done already
        assert process.returncode == 143, err
        assert "interrupted; rerun to continue: python " in err and "Traceback" not in err, err
    passes(grid, *PROBES)
    assert all(row["lr_acc_mean"] != "" for row in rows())


def test_odd_values(refused):
    for flag, value in (("n_samples", "9"), ("n_samples", "1" + "0" * 25), ("y_samples", "0"), ("cpu_n", "-1")):
        assert refused(grid, *FAST, f"--{flag}", value).startswith(f"error: --{flag}: must be ")


def test_classifiers_that_cannot_be_used(batch, refused):
    good, other = Path("runs/classifiers/Digits"), Path("other")
    shutil.copytree(good, other)
    step1 = [grid, *STEP1, "--classifier_path"]
    assert "bogus.pth: no trained classifier" in refused(*step1, good / "bogus.pth")
    state = torch.load(good / "classifier.pth", weights_only=True)
    torch.save({k: v * math.nan for k, v in state.items()}, other / "classifier.pth")
    assert "not finite" in refused(*step1, other)
    settings = read_json(good / "config.json") | {"dataset": "SVHN"}
    (other / "config.json").write_text(json.dumps(settings))
    assert "labels SVHN, not Digits" in refused(*step1, other)
    training = [train_classifier.main, "--device", "cpu", "--num_epochs", "1"]
    (good / "classifier.pth").write_bytes(b"PK")
    assert "classifier.pth: damaged" in refused(*training)
    (good / "classifier.pth").unlink()
    torch.save({"epoch": 1, "model": {}, "optimizer": {}, "scheduler": {}}, good / "resume.pth")
    assert "resume.pth: damaged; --overwrite" in refused(*training)
    err = refused(*training, "--overwrite", "--learning_rate", "1e30")
    assert "--learning_rate: the loss is not finite in epoch 1" in err
    assert not (good / "classifier.pth").exists()
