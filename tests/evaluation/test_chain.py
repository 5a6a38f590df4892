"""The four steps on a small real batch: what the metrics are, and that nothing is computed twice."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import eval_beta_grid
import eval_beta_single
import train
import train_classifier
from datasets.loading import load_data
from tests.conftest import TINY
from tests.datasets.files import write_cifar10, write_svhn
from tests.evaluation.conftest import FAST, STEP1, four_steps
from tests.models.test_models import REFERENCE
from utils.evaluation.batch import gather, open_run
from utils.evaluation.metrics import inception_score
from utils.evaluation.per_image import per_image
from utils.files import read_json


def test_the_whole_chain_and_the_relations_between_its_figures(batch, script):
    for status, _, err in four_steps(script):
        assert status == 0, err
    rows = batch()
    assert len(rows) == 4
    config = open_run(Path("runs/b", rows[0]["run"])).config
    pixels = next(load_data(config, "data", torch.device("cpu")).test.batches(360))[0].flatten(1).double().numpy()
    expected_empty = {
        "data_digest",
        *("beta_max_y", "beta_max_z", "target_rate_y", "target_rate_z", "init_from", "source"),
        "bpd",
        "bpd_se",
        "ll_iw",
        "ll_iw_se",
        "iw_samples",
        "fid",
        "mi_q",
        "mi_p",
        "is_mean_se",
        "run_name",
        "image_size",
        "image_channels",
    }
    expected_empty |= {c for c in rows[0] if "_paper" in c} | {"kid", "kid_se"}
    expected_empty |= {f"fid_{end}" for end in ("se", "floor", "features", "samples")}
    for row in rows:
        assert {k for k, v in row.items() if v == ""} == expected_empty
        v = {k: float(row[k]) for k in row if k not in expected_empty and row[k].lstrip("-")[:1].isdigit()}
        assert v["loss"] == pytest.approx(-v["ll"] + v["beta_y"] * v["kl_y"] + v["beta_z"] * v["kl_z"], rel=1e-6)
        assert v["D"] == -v["ll"] and v["kl_y"] >= 0 and v["kl_z"] >= 0
        h = math.log(10)
        for mi in ("mi_q_mc", "mi_q_mc_y"):
            assert -3 * v[mi + "_se"] <= v[mi] <= h + 3 * v[mi + "_se"] + 0.01
        assert v["mi_q_mc"] <= v["kl_z"] + 4 * v["mi_q_mc_se"] + 0.1
        for latent, rate in (("z", v["kl_z"]), ("y", v["kl_z"] + v["kl_y"])):
            assert 0 <= v[f"mi_{latent}_low"] <= v[f"mi_{latent}_high"] + 3 * v[f"mi_{latent}_low_se"]
            assert v[f"mi_{latent}_high"] <= min(h, rate) + 1e-9
        for name in ("lr_acc_mean", "svm_rbf_acc", "svm_linear_acc", "kNN_acc"):  # samples keep to the bound
            assert v[f"{name}_sample"] <= v["acc_bound"] + 3 * v[f"{name}_sample_se"]
        assert v["probe_images"] == 1437
        assert 1 <= v["is_mean"] <= 10 and v["is_mean"] == pytest.approx(v["is_div"] * v["is_sharp"], rel=0.05)
        assert 0 <= v["recons_acc"] <= 1 and 0 <= v["recons_pred_entropy"] <= h and 0 <= v["clsfr_ece"] <= 1
        assert v["psnr"] > 5 and v["fid_classifier"] >= 0 and 0 <= v["active_z"] <= 6
        assert row["fid_classifier_features"].startswith("Digits classifier") and v["fid_classifier_samples"] == 200
        terms = per_image(Path("runs/b", row["run"]))
        assert set(terms) == {"ll", "kl_y", "kl_z", "mse", "recons_acc", "mi_z_low", "mi_y_low"} | {
            f"{name}{tail}"
            for name in ("lr_acc_mean", "svm_rbf_acc", "svm_linear_acc", "kNN_acc", "lr_nll")
            for tail in ("", "_y", "_sample", "_sample_y")
        }
        for name, values in terms.items():
            assert values.shape == (360,) and values.dtype == np.float32
            if name != "mse":
                mean = values.mean(dtype=float)
                assert v[name] == pytest.approx(max(0, mean) if "low" in name else mean, rel=1e-5, abs=1e-6)
                assert scipy.stats.sem(values.astype(float)) == pytest.approx(v[f"{name}_se"], rel=1e-5, abs=1e-9)
        assert -10 * math.log10(terms["mse"].mean(dtype=float)) == pytest.approx(v["psnr"], abs=1e-4)
        halves = [-10 * math.log10(terms["mse"][i::2].mean(dtype=float)) for i in (0, 1)]
        assert abs(halves[0] - halves[1]) < 8 * v["psnr_se"]
        losses = -terms["ll"] + v["beta_y"] * terms["kl_y"] + v["beta_z"] * terms["kl_z"]
        assert scipy.stats.sem(losses) == pytest.approx(v["loss_se"], rel=1e-4)
        assert v["D_floor"] == pytest.approx(253.2, abs=0.05) and v["D_above_floor"] == v["D"] - v["D_floor"] > 0
        floor = scipy.special.entr(pixels).sum(1) + scipy.special.entr(1 - pixels).sum(1)
        assert v["D_above_floor_se"] == pytest.approx(scipy.stats.sem(-terms["ll"] - floor), rel=1e-4)
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
        m.setattr("utils.evaluation.batch.record", None)
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
        assert float(row["ll_iw_se"]) == pytest.approx(float(row["ll_se"]), rel=0.5)  # both mostly of the images


def test_each_step_tells_when_the_one_before_is_missing(batch, script):
    path = next(p for p in Path("runs/b").iterdir() if p.is_dir())
    status, _, err = script(eval_beta_single.main, "--run_path", path, "--device", "cpu")
    assert status == 2 and "run eval_beta_grid.py --exclude_mi first" in err and err.count("\n") == 1
    status, _, err = script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc")
    assert status == 1 and err.count("run eval_beta_grid.py --exclude_mi first") == 4
    shutil.rmtree("runs/classifiers")
    status, _, err = script(eval_beta_grid.main, *STEP1)
    assert status == 2 and "train_classifier.py" in err and err.count("\n") == 1


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


def test_both_protocols_of_the_probes_and_results_from_before(batch, script):
    """A step of one protocol leaves the other's figures alone; those of old batches are the paper's."""
    script(eval_beta_grid.main, *STEP1)
    assert script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc", "--probe_protocol", "paper")[0] == 0
    old = batch()
    assert all(row["svm_rbf_acc_paper"] and row["mi_lr_lb_y_paper"] and not row["svm_rbf_acc"] for row in old)
    for p, se in ((float(row["kNN_acc_paper"]), float(row["kNN_acc_paper_se"])) for row in old):
        assert se == pytest.approx(math.sqrt(p * (1 - p) / 71))
    later = [name for name in old[0] if name.startswith("lr_ece_null") or name.endswith("_paper_se")]  # had no errors
    for path in Path("runs/b").glob("*/metrics.json"):  # as it was written when this was the only protocol
        known = read_json(path)
        known = {k.replace("_paper", ""): v for k, v in known.items() if k not in later} | {"acc_bound": 0.9}
        path.write_text(json.dumps({**known, "steps": {k: v for k, v in known["steps"].items() if "paper" not in k}}))
        terms = per_image(path.parent)
        assert np.isnan(terms["svm_rbf_acc_paper"]).sum() == 288
    gather("runs", "b")
    assert batch() == [row | dict.fromkeys(later, "") for row in old]
    assert script(eval_beta_grid.main, *FAST, "--get_mi_cal_acc", "--probe_images", "500")[0] == 0
    for row, before in zip(batch(), old, strict=True):
        assert row["svm_rbf_acc_paper"] == before["svm_rbf_acc_paper"] and row["svm_rbf_acc"]
        assert row["probe_images"] == "500" and row["acc_bound"] == ""


def test_the_inception_score_is_averaged_over_classifiers(batch, script):
    """Two: its error is half their difference. A further classifier makes only the steps that use it stale."""
    flags = [*FAST, "--exclude_mi", "--exclude_fid", "--with_classifier", "--n_samples", "200"]
    good = Path("runs/classifiers/Digits")
    scores = []
    for seed in (2, 3):
        assert script(train_classifier.main, "--device", "cpu", "--num_epochs", "2", "--seed", seed)[0] == 0
        path = good if seed == 2 else good / "seed_3"
        assert script(eval_beta_grid.main, *flags, "--classifier_path", path / "classifier.pth")[0] == 0
        scores.append([float(row["is_mean"]) for row in batch()])
        assert all(row["n_classifiers"] == "1" and row["is_mean_se"] == "" for row in batch())
    assert script(eval_beta_grid.main, *flags)[0] == 0
    for row, a, b in zip(batch(), *scores, strict=True):
        assert float(row["is_mean"]) == pytest.approx((a + b) / 2) and row["n_classifiers"] == "2"
        assert float(row["is_mean_se"]) == pytest.approx(abs(a - b) / 2)


def test_per_image_terms_of_damaged_foreign_and_outdated_files_are_left_out(batch, script):
    path = next(p for p in Path("runs/b").iterdir() if p.is_dir())
    assert per_image(path) == {} == per_image(Path("nowhere"))
    script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")
    (path / "per_image_foreign.npz").write_bytes(b"?")
    assert set(per_image(path)) == {"ll", "kl_y", "kl_z", "mse"}
    (path / "per_image.npz").write_bytes((path / "latents.npz").read_bytes())
    assert per_image(path) == {}
    (path / "metrics.json").write_text('{"files": 3}')
    assert per_image(path) == {}


def test_samples_are_clamped_before_any_metric_sees_them(batch, script, monkeypatch):
    from utils.evaluation.subject import Bench, Subject

    run = open_run(next(p for p in Path("runs/b").iterdir() if p.is_dir()))
    subject = Subject(run, Bench(torch.device("cpu"), "data", "runs", n_samples=300))
    seen = []
    monkeypatch.setattr(type(subject.model), "p_x", lambda self, y: Wild(len(y)))
    subject.samples(lambda x: seen.append((x.min().item(), x.max().item())) or x)
    assert seen and all(low >= 0 and high <= 1 for low, high in seen)


class Wild:
    def __init__(self, n):
        self.n = n

    def sample(self, generator):
        return torch.randn(self.n, 1, 28, 28) * 3


def test_is_of_the_chain_is_the_library_function():
    assert inception_score(torch.full((100, 2), math.log(0.5)))["is_mean"] == pytest.approx(1)


def test_all_is_the_four_steps(batch, script):
    for result in four_steps(script):
        assert result[0] == 0, result
    expected = batch()
    for name in ("metrics.json", "latents.npz", "pca.npz"):
        for path in Path("runs/b").glob(f"*/{name}"):
            path.unlink()
    flags = [f for f in STEP1 if f not in ("--exclude_mi", "--with_classifier")]
    status, _, err = script(eval_beta_grid.main, *flags, "--all", "--pca", "--cpu_n", 2)
    assert status == 0, err
    assert batch() == expected


def test_step_2_of_several_runs(batch, script):
    """A shell's star also finds the folder of figures; a run that cannot be evaluated does not stop the others."""
    assert script(eval_beta_grid.main, *STEP1)[0] == 0
    Path("runs/b/figures").mkdir()
    paths = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())
    runs = [p for p in paths if p.name != "figures"]
    (runs[0] / "vae.pth").unlink()
    status, out, err = script(eval_beta_single.main, "--run_path", *paths, "--device", "cpu")
    assert status == 1 and err.count("\n") == 1 and f"failed: {runs[0]}: unfinished" in err
    assert [bool(row["mi_q_mc"]) for row in sorted(batch(), key=lambda row: row["run"])] == [False, True, True, True]
    assert all(run.name in out for run in runs[1:])
