"""The four steps on a small real batch: what the metrics are, nothing computed twice; latents."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.special import entr
from scipy.stats import sem
from torch.testing import assert_close

import train
from datasets.batches import Resident
from datasets.loading import load_data
from eval_beta_grid import main as grid
from eval_beta_single import main as single
from models.hvae import Noise
from models.latents import Gaussian
from tests.conftest import TINY
from tests.datasets.files import write_cifar10, write_svhn
from tests.evaluation.conftest import CPU, FAST, PROBES, RATES, STEP1, four_steps, rows, runs
from tests.models.test_models import REFERENCE
from utils.evaluation.batch import gather
from utils.evaluation.metrics import per_image
from utils.evaluation.steps import active_units, units
from utils.files import digest_of, read_arrays, read_json
from utils.runs import Run, load_model

EMPTY = """
beta_max_y beta_max_z target_rate_y target_rate_z init_from source bpd bpd_se ll_iw ll_iw_se iw_samples
fid fid_se fid_floor fid_features fid_samples kid kid_se mi_q mi_p is_mean_se run_name image_size image_channels
networks above_bound above_bound_se refine_epochs sharing mi_y_images recons_images
"""
ACCURACIES = ("lr_acc_mean", "svm_rbf_acc", "svm_linear_acc", "kNN_acc")
H, INF = math.log(10), math.inf
RANGES = {
    **dict.fromkeys(("kl_y", "kl_z", "fid_classifier"), (0, INF)),
    **dict.fromkeys(("recons_acc", "clsfr_ece"), (0, 1)),
    **dict.fromkeys(("active_z", "active_z_rate"), (0, 6)),
    "active_y_rate": (0, 64),
    "recons_pred_entropy": (0, H),
    "is_mean": (1, 10),
    "psnr": (5, INF),
    "fid_classifier_samples": (200, 200),
}


def numbers(row: dict) -> dict[str, float]:
    names = row.keys() - {"commit", "date", "data_digest"}
    return {k: float(row[k]) for k in names if row[k].lstrip("-")[:1].isdigit()}


def data_of(run) -> tuple:
    return load_data(Run.open(run).config, "data", torch.device("cpu"))


def test_the_relations_between_the_figures_of_the_four_steps(evaluated):
    cell = {}
    for row in rows():
        paper = {column for column in row if "_paper" in column}
        assert {k for k, v in row.items() if v == ""} == {*EMPTY.split()} | paper
        assert row["fid_classifier_features"].startswith("Digits classifier")
        v = numbers(row)
        cell[v["beta_y"], v["beta_z"]] = v
        rates = v["beta_y"] * v["kl_y"] + v["beta_z"] * v["kl_z"]
        assert v["loss"] == approx(rates - v["ll"], rel=1e-6)
        assert v["D"] == -v["ll"] and v["probe_images"] == 500
        for mi in ("mi_q_mc", "mi_q_mc_y"):
            se = v[mi + "_se"]
            assert -3 * se - 1e-9 <= v[mi] <= H + 3 * se + 0.01
        assert v["mi_q_mc"] <= v["kl_z"] + 4 * v["mi_q_mc_se"] + 0.1
        for k, rate in (("z", v["kl_z"]), ("y", v["kl_z"] + v["kl_y"])):
            low, se, high = (v[f"mi_{k}_{end}"] for end in ("low", "low_se", "high"))
            assert 0 <= low <= high + 3 * se and high <= min(H, rate) + 1e-9
        assert 0 <= v["mi_zx_low"] <= math.log(360) + 1e-9 and 0 <= v["mi_zx_high"] <= v["kl_z"]
        assert 0 <= v["mi_yx_low"] <= math.log(360) + 1e-9 and 0 <= v["mi_yx_high"] <= v["kl_z"] + v["kl_y"]
        for name in ACCURACIES:  # samples keep to the bound
            assert v[f"{name}_sample"] <= v["acc_bound"] + 3 * v[f"{name}_sample_se"]
        assert v["is_mean"] == approx(v["is_div"] * v["is_sharp"], rel=0.05)
        for name, (least, most) in RANGES.items():
            assert least <= v[name] <= most, name
        assert (v["active_y_rate"] > 0) == (v["kl_y"] > 0.1)
    assert len(cell) == 4
    assert cell[0.1, 0.1]["kl_y"] > cell[5.0, 0.1]["kl_y"]  # each beta moves its own rate
    assert cell[0.1, 0.1]["kl_z"] > cell[0.1, 5.0]["kl_z"]


def test_figures_and_errors_are_those_of_the_terms_of_each_image(evaluated):
    pixels = next(data_of(runs()[0]).test.batches(360))[0].flatten(1).double().numpy()
    floor = (entr(pixels) + entr(1 - pixels)).sum(1)
    tails = ("", "_y", "_sample", "_sample_y")
    names = {name + tail for name in (*ACCURACIES, "lr_nll") for tail in tails}
    names |= {"ll", "kl_y", "kl_z", "mse", "recons_acc", "mi_z_low", "mi_y_low"}
    for row in rows():
        path, v = Path("runs/b", row["run"]), numbers(row)
        terms = per_image(path)
        assert set(terms) == names
        assert {(t.shape, t.dtype.name) for t in terms.values()} == {((360,), "float32")}
        terms = {name: values.astype(float) for name, values in terms.items()}
        mse = terms.pop("mse")
        for name, values in terms.items():
            mean = max(0, values.mean()) if "low" in name else values.mean()
            assert v[name] == approx(mean, rel=1e-5, abs=1e-6)
            assert v[f"{name}_se"] == approx(sem(values), rel=1e-5, abs=1e-9)
        assert v["psnr"] == approx(-10 * math.log10(mse.mean()), abs=1e-4)
        halves = [-10 * math.log10(mse[i::2].mean()) for i in (0, 1)]
        assert abs(halves[0] - halves[1]) < 8 * v["psnr_se"]
        losses = v["beta_y"] * terms["kl_y"] + v["beta_z"] * terms["kl_z"] - terms["ll"]
        assert v["loss_se"] == approx(sem(losses), rel=1e-4)
        assert v["D_floor"] == approx(253.2, abs=0.05)
        assert v["D_above_floor"] == v["D"] - v["D_floor"] > 0
        assert v["D_above_floor_se"] == approx(sem(-terms["ll"] - floor), rel=1e-4)
        latents, pca = (read_arrays(path / f"{name}.npz") for name in ("latents", "pca"))
        assert latents["qz_mu"].shape == (360, 6)
        assert latents["qy_std"].shape == (360, 4, 4, 4)
        assert {a.dtype.name for k, a in latents.items() if k[0] == "q"} == {"float32"}
        assert pca["projections"].shape == (360, 3)


def test_nothing_is_done_twice_and_all_at_once_is_the_same(evaluated, script, passes, monkeypatch):
    files = [p for p in Path("runs/b").rglob("*") if p.suffix in (".json", ".csv", ".npz")]
    before = {p: p.read_bytes() for p in files}
    with monkeypatch.context() as m:
        m.setattr("utils.evaluation.run.EvaluatedRun.record", None)
        assert all(script(*step)[0] == 0 for step in four_steps())
    assert {p: p.read_bytes() for p in files} == before
    for path in files:
        if path.name not in ("config.json", "training.json"):
            path.unlink()
    passes(grid, *PROBES, "--n_samples", "200", "--all", "--pca")
    table = Path("runs/b/eval_results.csv")
    assert table.read_bytes() == before[table]


def test_a_changed_setting_makes_only_its_step_stale(evaluated, passes):
    before = rows()
    passes(single, *CPU, "--run_path", *runs(), "--y_samples", "1")
    for old, new in zip(before, rows(), strict=True):
        assert new["mi_q_mc_y"] != old["mi_q_mc_y"]
    passes(grid, *STEP1[:-1], "100", "--iw_samples", "3")
    for old, row in zip(before, rows(), strict=True):
        assert row["n_samples"] == "100" and row["psnr"] == old["psnr"]
        v = numbers(row)  # the bound is at least the ELBO's, which one sample of it estimates
        assert v["ll_iw"] >= v["ll"] - v["kl_y"] - v["kl_z"] - 0.5
        assert v["ll_iw_se"] == approx(v["ll_se"], rel=0.5)  # both mostly of the images


def test_each_step_tells_when_the_one_before_is_missing(batch, script, refused):
    how = "run eval_beta_grid.py --exclude_mi first"
    assert how in refused(single, "--run_path", runs()[0], *CPU)
    paper = ["--get_mi_cal_acc", "--probe_protocol", "paper"]
    status, _, err = script(grid, *FAST, *paper)
    assert status == 1 and err.count(how) == 4
    shutil.rmtree("runs/classifiers")
    assert "train_classifier.py" in refused(grid, *STEP1)


def test_runs_of_the_papers_code_evaluate_unchanged(passes):
    write_cifar10(Path("data"))
    write_svhn(Path("data"))
    shutil.copytree(REFERENCE, "runs/b")
    Path("runs/b/README.md").unlink()
    passes(grid, *FAST, "--exclude_fid", "--data_dir", "data")
    by_name = {row["run"]: row for row in rows()}
    gauss, mol = (by_name[f"hvae_fixed_cifar_{name}"] for name in ("gauss", "mol"))
    latents = read_arrays(Path("runs/b/hvae_fixed_cifar_gauss/latents.npz"))
    assert latents["qz_mu"].shape == (20, 8)
    # with the sigma it was trained with, ll = -1770.85 - 3047.01 MSE, whose MSE is below 1
    assert -1770.85 - 3047.01 < float(gauss["ll"]) < -1770.85
    assert mol["bpd"] != "" and gauss["bpd"] == ""
    assert all(row["mi_q_mc"] and row["mi_q_mc_y"] for row in by_name.values())


KINDS = {  # of runs, and what has no value
    "--qz_family GumbelSoftmax --z_dims 7 --linear_y_with_dims 5": {"mi_q_mc"},
    "--vae_type LVAE --use_conv_z": {"mi_q"},
    "--vae_type BVAE": {"mi_q", "mi_q_mc", "acc_bound", "lr_acc_mean"},
}
COLUMNS = ("mi_q_mc", "mi_q", "mi_q_mc_y", "acc_bound", "lr_acc_mean", "lr_acc_mean_y", "ll_iw", "is_mean")


@pytest.mark.parametrize("flags", KINDS)
def test_every_kind_of_run_goes_through_all_steps(flags, made, passes):
    """Which leave each other's figures alone."""
    shutil.copytree(made / "runs/classifiers", "runs/classifiers")
    passes(train.main, *TINY, *flags.split(), "--run_batch_name", "b")
    is_gumbel, step1 = "Gumbel" in flags, "--with_classifier --n_samples 50 --iw_samples 2"
    for step in (step1, "--get_mi_cal_acc --probe_images 300", "--recons_acc --pca"):
        passes(grid, *FAST, *step.split())
    (row,), (path,) = rows(), runs()
    assert {column for column in COLUMNS if row[column] == ""} == KINDS[flags]
    assert (row["mi_p"] != "") == is_gumbel
    passes(grid, *FAST, "--latents", "test")
    arrays = read_arrays(path / "latents_test.npz")
    assert ("z_std" in arrays) != is_gumbel and not (path / "latents_train.npz").exists()
    assert "z_std" in arrays or set(np.unique(arrays["z_sample"])) == {0, 1}
    before = read_json(path / "metrics.json")
    assert ("note: mi_p" in passes(single, *CPU, "--run_path", path)) == is_gumbel
    passes(grid, *FAST, "--exclude_mi")
    assert read_json(path / "metrics.json") == before


def test_both_protocols_of_the_probes_and_an_early_version(batch, passes):
    for path in runs()[1:]:
        shutil.rmtree(path)
    passes(grid, *RATES)
    passes(grid, *FAST, "--get_mi_cal_acc", "--probe_protocol", "paper")
    (path,), (old,) = runs(), rows()
    assert old["svm_rbf_acc_paper"] and old["mi_lr_lb_y_paper"] and not old["svm_rbf_acc"]
    p, se = (float(old[f"kNN_acc_paper{end}"]) for end in ("", "_se"))
    assert se == approx(math.sqrt(p * (1 - p) / 71))
    assert np.isnan(per_image(path)["svm_rbf_acc_paper"]).sum() == 288
    passes(grid, *PROBES)
    (row,) = rows()
    assert row["svm_rbf_acc_paper"] == old["svm_rbf_acc_paper"] and row["svm_rbf_acc"]
    assert row["probe_images"] == "500"
    metrics = read_json(path / "metrics.json")
    del metrics["probe_images"]  # when the paper's protocol was the only one, and had its names
    (path / "metrics.json").write_text(json.dumps(metrics))
    gather("runs", "b")
    assert rows()[0]["lr_acc_mean"] == rows()[0]["psnr"] == ""
    passes(grid, *RATES)
    assert rows()[0]["lr_acc_mean"] == "" and rows()[0]["psnr"] == old["psnr"]


def test_the_inception_score_is_averaged_over_classifiers(evaluated, passes):
    """Of two, the error is half their difference."""
    good, before = Path("runs/classifiers/Digits"), rows()
    other = Path(shutil.copytree(good, good / "seed_3")) / "classifier.pth"
    state = torch.load(other, weights_only=True)
    torch.save({name: 0.8 * p for name, p in state.items()}, other)
    flags = [*RATES, "--with_classifier", "--n_samples", "200"]
    passes(grid, *flags, "--classifier_path", other)
    scores = [[float(row["is_mean"]) for row in table] for table in (before, rows())]
    assert all(row["n_classifiers"] == "1" and not row["is_mean_se"] for row in before + rows())
    passes(grid, *flags)
    for row, a, b in zip(map(numbers, rows()), *scores, strict=True):
        assert row["is_mean"] == approx((a + b) / 2) and row["n_classifiers"] == 2
        assert row["is_mean_se"] == approx(abs(a - b) / 2) and a != b


def test_results_of_an_earlier_classifier_do_not_stand_beside_those_of_a_new_one(evaluated, passes):
    path = Path("runs/classifiers/Digits/classifier.pth")
    state = torch.load(path, weights_only=True)
    torch.save({name: 0.8 * p for name, p in state.items()}, path)
    before = {row["run"]: row for row in rows()}
    assert "note: results of is by an earlier classifier are left out" in passes(grid, *RATES[:4], "--recons_acc")
    for row in rows():
        assert row["recons_pred_entropy"] != before[row["run"]]["recons_pred_entropy"]
        assert row["is_mean"] == row["fid_classifier"] == "" != before[row["run"]]["is_mean"]
        assert row["psnr"] == before[row["run"]]["psnr"] and row["mi_z_low"] == before[row["run"]]["mi_z_low"]
    passes(grid, *RATES, "--with_classifier", "--n_samples", "200")
    assert all(row["is_mean"] and row["recons_acc"] for row in rows())


def test_per_image_terms_of_damaged_and_foreign_files_are_left_out(evaluated):
    path = runs()[0]
    whole = set(per_image(path))
    (path / "per_image_foreign.npz").write_bytes(b"?")
    assert set(per_image(path)) == whole and per_image(Path("nowhere")) == {}
    shutil.copy(path / "latents.npz", path / "per_image.npz")
    assert whole - set(per_image(path)) == {"ll", "kl_y", "kl_z", "mse"}
    (path / "metrics.json").write_text('{"files": 3}')
    assert per_image(path) == {}


def test_step_2_of_several_runs(batch, script, passes):
    """A shell's star also finds the folder of figures; one run's failure does not stop the others."""
    passes(grid, *RATES)
    first, *others = runs()
    Path("runs/b/figures").mkdir()
    (first / "vae.pth").unlink()
    status, out, err = script(single, *CPU, "--run_path", *runs())
    assert status == 1 and err.count("\n") == 1 and f"failed: {first}: unfinished" in err
    assert {row["run"]: bool(row["mi_q_mc"]) for row in rows()} == {p.name: p != first for p in [first, *others]}
    assert all(path.name in out for path in others)


def test_units_of_rates_that_are_known():
    """Every unit of y follows z, so Burda's count is all; three of them add shift^2 / 2 > 0.01 nats."""
    shifts = torch.tensor([0.0, 0.1, 0.2, -0.2, 1.0])
    x = torch.linspace(-2, 2, 300)[:, None]
    model = SimpleNamespace(
        q_z=lambda x: Gaussian(torch.cat([x, 0 * x], 1), torch.tensor([0.1, 0.99]).expand(len(x), 2)),
        p_y=lambda z: Gaussian(z[:, :1].expand(-1, 5), torch.ones(len(z), 5)),
        q_y=lambda z, x: Gaussian(z[:, :1] + shifts, torch.ones(len(z), 5)),
        noise=lambda n, g: Noise(torch.randn(n, 2, generator=g), torch.randn(n, 5, generator=g)),
    )
    test = Resident(torch.zeros(300, 1, 1, 1), torch.zeros(300), torch.device("cpu"))
    test.batches = lambda size: ((part, None) for part in x.split(size))
    run = SimpleNamespace(model=model, test=test, generator=lambda *_: torch.Generator())
    assert units(run) == {"active_z_rate": 1, "active_y_rate": 3}
    assert active_units(model.q_y(model.q_z(x).mean, x).mean.numpy()) == 5


def test_the_latents_of_both_splits(batch, passes):
    flags, path = [*FAST, "--latents", "train", "test"], runs()[0]
    assert "steps: latents_train, latents_test" in passes(grid, *flags)
    model, file = load_model(Run.open(path), torch.device("cpu")), path / "latents_train.npz"
    written = digest_of(file)
    for name in ("train", "test"):
        split, arrays = getattr(data_of(path), name), read_arrays(path / f"latents_{name}.npz")
        a = {key: torch.from_numpy(array) for key, array in arrays.items()}
        values = {f"{v}_{k}" for v in "zy" for k in ("mean", "std", "sample")}
        assert set(a) == {"index", "label"} | values
        assert a["index"].tolist() == list(range(len(split)))
        assert torch.equal(a["label"], split.labels)
        x = split.images / 255
        with torch.no_grad():
            q_z = model.q_z(x)
            q_y, joint = model.q_y(q_z.mean, x), model.q_y(a["z_sample"], x)
        for v, q in (("z", q_z), ("y", q_y)):
            assert_close((a[f"{v}_mean"], a[f"{v}_std"]), tuple(q), rtol=1e-4, atol=1e-5)
        samples = (a["z_sample"], q_z), (a["y_sample"], joint)
        noise = [((s - q.mean) / q.std).flatten(1).double() for s, q in samples]
        for values in noise:
            tolerance = 5 / values.numel() ** 0.5
            assert abs(values.mean()) < tolerance and abs(values.std() - 1) < tolerance
        z, y = ((values - values.mean(0)) / values.std(0) for values in noise)
        assert (z.T @ y / len(x)).abs().max() < 6 / len(x) ** 0.5  # drawn apart
    changed = file.stat().st_mtime_ns
    passes(grid, *flags)
    assert file.stat().st_mtime_ns == changed
    file.write_bytes(b"cut")
    passes(grid, *flags)
    assert digest_of(file) == written


def test_latents_that_do_not_fit_and_other_splits_are_refused(batch, script, refused, monkeypatch):
    for flags in (["--latents"], ["--latents", "val"]):
        assert refused(grid, *FAST, *flags).startswith("error: --latents: ")
    monkeypatch.setattr("utils.evaluation.steps.memory", lambda: 1000)
    status, _, err = script(grid, *FAST, "--latents", "test")
    assert status == 1 and "--latents test: needs 604,800 bytes of memory, this machine has 1,000" in err
