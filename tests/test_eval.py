"""The evaluation scripts as their users see them: the chain on a small real batch, broken folders, kills."""

import csv
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
import train
import train_classifier
from tests.conftest import TINY, start
from tests.datasets.files import write_cifar10, write_svhn
from tests.test_models import REFERENCE
from utils.config import Config
from utils.errors import UserError
from utils.files import read_arrays, read_json
from utils.metrics import inception_score
from utils.probes import fit_probe

FAST = ["--device", "cpu", "--run_batch_name", "b"]
STEP1 = [*FAST, "--exclude_mi", "--with_classifier", "--n_samples", "200"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a quick classifier and a batch `b` of four small but real models."""
    root = tmp_path_factory.mktemp("made")
    runs = ["--runs_dir", str(root / "runs"), "--device", "cpu"]
    torch.set_num_threads(1)
    assert train_classifier.main([*runs, "--num_epochs", "2"]) == 0
    settings = ["--conv_channels", "4", "--z_dims", "6", "--num_epochs", "25", "--batch_size", "100"]
    settings += ["--learning_rate", "0.002"]
    grid = ["--beta_y", "0.1", "5", "--beta_z", "0.1", "5", "--run_batch_name", "b"]
    assert train.main([*runs, *settings, *grid]) == 0
    return root


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


def test_the_whole_chain_and_the_relations_between_its_figures(batch, script):
    for status, _, err in four_steps(script):
        assert status == 0, err
    rows = batch()
    assert len(rows) == 4
    expected_empty = {"bpd", "ll_iw", "iw_samples", "fid", "mi_q", "mi_p", "run_name", "image_size", "image_channels"}
    expected_empty |= {c for c in rows[0] if c.endswith("_standardized")} | {"fid_features", "fid_samples"}
    for row in rows:
        assert {k for k, v in row.items() if v == ""} == expected_empty
        v = {k: float(row[k]) for k in row if k not in expected_empty and row[k].lstrip("-")[:1].isdigit()}
        assert v["loss"] == pytest.approx(-v["ll"] + v["beta_y"] * v["kl_y"] + v["beta_z"] * v["kl_z"], rel=1e-6)
        assert v["D"] == -v["ll"] and v["kl_y"] >= 0 and v["kl_z"] >= 0
        h = math.log(10)
        for mi in ("mi_q_mc", "mi_q_mc_y"):
            assert -3 * v[mi + "_se"] <= v[mi] <= h + 3 * v[mi + "_se"] + 0.01
        assert v["mi_q_mc"] <= v["kl_z"] + 4 * v["mi_q_mc_se"] + 0.1
        assert v["mi_lr_lb"] <= math.log(10) and v["mi_lr_lb_y"] <= math.log(10)
        with np.load(Path("runs/b", row["run"], "latents.npz")) as latents:  # samples of z keep to the bounds of z
            noise = np.random.default_rng(0).standard_normal(latents["qz_mu"].shape)
            z, labels = latents["qz_mu"] + latents["qz_std"] * noise, latents["labels"]
        probe = fit_probe("lr", z, labels, "", standardize=False)
        assert probe["mi_lr_lb"] <= v["mi_q_mc"] + 4 * v["mi_q_mc_se"] + 0.1
        assert probe["lr_acc_mean"] <= v["acc_bound"] + 3 * math.sqrt(0.25 / 72)
        assert 1 <= v["is_mean"] <= 10 and v["is_mean"] == pytest.approx(v["is_div"] * v["is_sharp"], rel=0.05)
        assert 0 <= v["recons_acc"] <= 1 and 0 <= v["recons_pred_entropy"] <= h and 0 <= v["clsfr_ece"] <= 1
        assert v["psnr"] > 5 and v["fid_classifier"] >= 0 and 0 <= v["active_z"] <= 6
        assert row["fid_classifier_features"].startswith("Digits classifier") and v["fid_classifier_samples"] == 200
    cell = {(float(r["beta_y"]), float(r["beta_z"])): r for r in rows}
    assert float(cell[0.1, 0.1]["kl_y"]) > float(cell[5.0, 0.1]["kl_y"])  # each beta moves its own rate
    assert float(cell[0.1, 0.1]["kl_z"]) > float(cell[0.1, 5.0]["kl_z"])
    for row in rows:
        with np.load(Path("runs/b", row["run"], "latents.npz")) as latents:
            assert latents["qz_mu"].shape == (360, 6) and latents["qy_std"].shape == (360, 4, 4, 4)
            assert all(latents[k].dtype == np.float32 for k in ("qz_mu", "qz_std", "qy_mu", "qy_std"))
        with np.load(Path("runs/b", row["run"], "pca.npz")) as pca:
            assert pca["projections"].shape == (360, 3)


def test_same_seed_same_numbers_and_nothing_is_done_twice(batch, script, monkeypatch):
    four_steps(script)
    first = {p: p.read_bytes() for p in Path("runs/b").rglob("*") if p.suffix in (".json", ".csv", ".npz")}
    with monkeypatch.context() as m:
        m.setattr(eval_beta_grid, "record", None)
        assert all(status == 0 for status, _, _ in four_steps(script))
    assert {p: p.read_bytes() for p in first} == first
    for p in first:
        if p.name in ("metrics.json", "latents.npz"):
            p.unlink()
    four_steps(script)
    for p, content in first.items():
        if p.suffix != ".npz":
            assert p.read_bytes() == content, p


def test_a_changed_setting_makes_only_its_step_stale(batch, script):
    script(eval_beta_grid.main, *STEP1)
    before = [row["psnr"] for row in batch()]
    script(eval_beta_grid.main, *STEP1[:-1], "100", "--iw_samples", "3")
    rows = batch()
    assert [row["n_samples"] for row in rows] == ["100"] * 4 and [row["psnr"] for row in rows] == before
    for row in rows:  # the bound is at least the ELBO's, which one sample of it estimates
        elbo = float(row["ll"]) - float(row["kl_y"]) - float(row["kl_z"])
        assert float(row["ll_iw"]) >= elbo - 0.5


def test_each_step_tells_when_the_one_before_is_missing(batch, script):
    path = next(p for p in Path("runs/b").iterdir() if p.is_dir())
    status, _, err = script(eval_beta_single.main, "--run_path", path, "--device", "cpu")
    assert status == 2 and "run eval_beta_grid.py --exclude_mi first" in err and err.count("\n") == 1
    status, _, err = script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc")
    assert status == 1 and err.count("run eval_beta_grid.py --exclude_mi first") == 4
    shutil.rmtree("runs/classifiers")
    status, _, err = script(eval_beta_grid.main, *STEP1)
    assert status == 2 and "train_classifier.py" in err and err.count("\n") == 1


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
    status, out, _ = script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc")
    assert status == 0 and "note: no acc_bound: it needs the mutual information" in out


def test_a_step_leaves_the_others_figures_alone(made, script):
    shutil.copytree(made / "runs/classifiers", "runs/classifiers")
    assert script(train.main, *TINY, "--qz_family", "GumbelSoftmax", "--run_batch_name", "b")[0] == 0
    assert script(eval_beta_grid.main, *FAST, "--with_classifier", "--n_samples", "50")[0] == 0
    (path,) = (p for p in Path("runs/b").iterdir() if p.is_dir())
    before = read_json(path / "metrics.json")
    assert {"mi_p", "fid_classifier", "is_mean"} <= set(before)
    status, out, _ = script(eval_beta_single.main, "--run_path", path, "--device", "cpu")
    assert status == 0 and "note: mi_p" in out
    assert script(eval_beta_grid.main, *FAST, "--exclude_mi")[0] == 0
    assert read_json(path / "metrics.json") == before


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
        assert status == 2 and "resume.pth: damaged, --overwrite starts anew" in err and err.count("\n") == 1
    status, _, err = script(train_classifier.main, *flags[:2], "--overwrite", "--learning_rate", "1e30")
    assert status == 2 and "--learning_rate: the loss is not finite in epoch 1" in err
    assert not (good / "classifier.pth").exists()


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


def test_runs_of_the_papers_code_evaluate_unchanged(script):
    write_cifar10(Path("data"))
    write_svhn(Path("data"))
    shutil.copytree(REFERENCE, "runs/golden")
    Path("runs/golden/README.md").unlink()
    status, _, err = script(
        eval_beta_grid.main, "--run_batch_name", "golden", "--device", "cpu", "--exclude_fid", "--data_dir", "data"
    )
    assert status == 0, err
    with open("runs/golden/eval_results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    gauss = rows["hvae_fixed_cifar_gauss"]
    with np.load("runs/golden/hvae_fixed_cifar_gauss/latents.npz") as latents:
        assert latents["qz_mu"].shape == (20, 8)
    # scored with the sigma it was trained with: ll = -1770.85 - 3047.01 MSE, and the MSE of a [0, 1] image is below 1
    assert -1770.85 - 3047.01 < float(gauss["ll"]) < -1770.85
    assert rows["hvae_fixed_cifar_mol"]["bpd"] != "" and gauss["bpd"] == ""
    assert all(row["mi_q_mc"] != "" and row["mi_q_mc_y"] != "" for row in rows.values())


@pytest.mark.parametrize(
    "flags, empty",
    [
        (["--qz_family", "GumbelSoftmax", "--z_dims", "7"], {"mi_q_mc"}),
        (["--use_conv_z"], {"mi_q"}),
        (["--vae_type", "LVAE"], {"mi_q"}),
        (["--vae_type", "LVAE", "--use_conv_z"], {"mi_q"}),
        (["--vae_type", "BVAE"], {"mi_q", "mi_q_mc", "acc_bound", "lr_acc_mean"}),
        (["--linear_y_with_dims", "5"], {"mi_q"}),
    ],
)
def test_every_kind_of_run_goes_through_all_steps(flags, empty, made, script):
    shutil.copytree(made / "runs/classifiers", "runs/classifiers")
    assert script(train.main, *TINY, *flags, "--run_batch_name", "b")[0] == 0
    for extra in (
        ["--with_classifier", "--n_samples", "50", "--iw_samples", "2"],
        ["--get_mi_cal_acc"],
        ["--recons_acc", "--pca"],
    ):
        status, out, err = script(eval_beta_grid.main, *FAST, *extra)
        assert status == 0, err
    with open("runs/b/eval_results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    for column in ("mi_q_mc", "mi_q", "mi_q_mc_y", "acc_bound", "lr_acc_mean", "lr_acc_mean_y", "ll_iw", "is_mean"):
        assert (row[column] == "") == (column in empty), column
    assert (row["mi_p"] != "") == ("GumbelSoftmax" in flags)


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


def test_samples_are_clamped_before_any_metric_sees_them(batch, script, monkeypatch):
    from utils.evaluation import Bench, Subject

    run = eval_beta_grid.open_run(next(p for p in Path("runs/b").iterdir() if p.is_dir()))
    subject = Subject(run, Bench(torch.device("cpu"), "data", "runs", n_samples=300))
    seen = []
    monkeypatch.setattr(type(subject.model), "p_x", lambda self, y: Wild(len(y)))
    subject.samples("samples", lambda x: seen.append((x.min().item(), x.max().item())) or x)
    assert seen and all(low >= 0 and high <= 1 for low, high in seen)


class Wild:
    def __init__(self, n):
        self.n = n

    def sample(self, generator):
        return torch.randn(self.n, 1, 28, 28) * 3


# --- the classifier ---


def test_the_classifier_resumes_bit_for_bit_and_is_found(script):
    flags = ["--device", "cpu", "--num_epochs", "2", "--batch_size", "500"]
    process = start("train_classifier.py", *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    folder = Path("runs/classifiers/Digits")
    assert 0 < read_json(folder / "config.json")["test_accuracy"] <= 1
    status, out, _ = script(train_classifier.main, *flags)
    assert status == 0 and "already complete" in out
    status, _, err = script(train_classifier.main, *flags, "--seed", "3")
    assert status == 2 and "--seed (2)" in err
    process = start("train_classifier.py", *flags, "--runs_dir", "killed")
    end = time.monotonic() + 60
    while not Path("killed/classifiers/Digits/resume.pth").exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    again = start("train_classifier.py", *flags, "--runs_dir", "killed")
    out, err = again.communicate()
    assert again.returncode == 0 and "resuming at epoch" in out, err
    assert Path("killed/classifiers/Digits/classifier.pth").read_bytes() == (folder / "classifier.pth").read_bytes()


@pytest.mark.parametrize("dataset", ["SVHN", "CIFAR10"])
def test_colour_classifiers_train(dataset, script):
    {"SVHN": write_svhn, "CIFAR10": write_cifar10}[dataset](Path("data"), n=2)
    status, out, err = script(train_classifier.main, "--dataset", dataset, "--num_epochs", 1, "--device", "cpu")
    assert status == 0, err
    model, _ = train_classifier.load_classifier(
        Path("runs/classifiers", dataset), Config(dataset=dataset), torch.device("cpu")
    )
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "Imagenet"], "--dataset: unknown 'Imagenet'; did you mean ImageNet?"),
        (["--image_size", "32"], "--image_size: is for a folder of images"),
        (["--learning_rate", "0"], "--learning_rate: must be > 0"),
        (["--num_epochs", "0"], "--num_epochs: must be a whole number >= 1"),
        (["--dataset", "SVHN"], "SVHN: not found; looked in"),
    ],
)
def test_bad_input_to_the_classifier(flags, message, script):
    status, _, err = script(train_classifier.main, *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1 and not Path("runs").exists()


def test_augmentation_moves_and_mirrors_each_image_on_its_own():
    x = torch.zeros(64, 1, 8, 8)
    x[:, :, 3, 2] = 1
    g = torch.Generator().manual_seed(0)
    places = train_classifier.augmented(x, 2, False, g).flatten(1).argmax(1)
    rows, columns = places // 8, places % 8
    assert set(rows.tolist()) == {1, 2, 3, 4, 5} and set(columns.tolist()) == {0, 1, 2, 3, 4}
    both = train_classifier.augmented(x, 0, True, g).flatten(1).argmax(1) % 8
    assert set(both.tolist()) == {2, 5}
    untouched = train_classifier.augmented(x, 0, False, g)
    assert torch.equal(untouched, x)


def test_is_of_the_chain_is_the_library_function():
    assert inception_score(torch.full((100, 2), math.log(0.5)))["is_mean"] == pytest.approx(1)
