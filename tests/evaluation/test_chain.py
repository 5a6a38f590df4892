"""The four steps on a small real batch: what the metrics are, that nothing is computed twice; latents on demand."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import eval_beta_grid
import eval_beta_single
import train
from datasets.batches import Resident
from datasets.loading import load_data
from models.hvae import Noise
from models.latents import Gaussian
from tests.conftest import TINY
from tests.datasets.files import write_cifar10, write_svhn
from tests.evaluation.conftest import FAST, PROBES, RATES, STEP1, four_steps, rows, runs
from tests.models.test_models import REFERENCE
from tests.scripts import done, refusal
from utils.evaluation.batch import gather
from utils.evaluation.rates import active_units, units
from utils.evaluation.results import per_image
from utils.files import digest_of, read_arrays, read_json
from utils.runs import Run, load_model

CPU = torch.device("cpu")
EMPTY = """
data_digest beta_max_y beta_max_z target_rate_y target_rate_z init_from source bpd bpd_se ll_iw ll_iw_se iw_samples
fid fid_se fid_floor fid_features fid_samples kid kid_se mi_q mi_p is_mean_se run_name image_size image_channels
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
    return {k: float(v) for k, v in row.items() if v.lstrip("-")[:1].isdigit()}


def test_the_relations_between_the_figures_of_the_four_steps(evaluated):
    table = rows()
    assert len(table) == 4
    for row in table:
        paper = {column for column in row if "_paper" in column}
        assert {k for k, v in row.items() if v == ""} == {*EMPTY.split()} | paper
        v = numbers(row)
        rates = v["beta_y"] * v["kl_y"] + v["beta_z"] * v["kl_z"]
        assert v["loss"] == pytest.approx(rates - v["ll"], rel=1e-6)
        assert v["D"] == -v["ll"] and v["probe_images"] == 500
        for mi in ("mi_q_mc", "mi_q_mc_y"):
            assert -3 * v[mi + "_se"] - 1e-9 <= v[mi] <= H + 3 * v[mi + "_se"] + 0.01
        assert v["mi_q_mc"] <= v["kl_z"] + 4 * v["mi_q_mc_se"] + 0.1
        for k, rate in (("z", v["kl_z"]), ("y", v["kl_z"] + v["kl_y"])):
            low, se, high = (v[f"mi_{k}_{end}"] for end in ("low", "low_se", "high"))
            assert 0 <= low <= high + 3 * se and high <= min(H, rate) + 1e-9
        for name in ACCURACIES:  # samples keep to the bound
            assert v[f"{name}_sample"] <= v["acc_bound"] + 3 * v[f"{name}_sample_se"]
        assert v["is_mean"] == pytest.approx(v["is_div"] * v["is_sharp"], rel=0.05)
        for name, (least, most) in RANGES.items():
            assert least <= v[name] <= most, name
        assert (v["active_y_rate"] > 0) == (v["kl_y"] > 0.1)
        assert row["fid_classifier_features"].startswith("Digits classifier")
    cell = {(float(r["beta_y"]), float(r["beta_z"])): numbers(r) for r in table}
    assert cell[0.1, 0.1]["kl_y"] > cell[5.0, 0.1]["kl_y"]  # each beta moves its own rate
    assert cell[0.1, 0.1]["kl_z"] > cell[0.1, 5.0]["kl_z"]


def test_figures_and_their_errors_are_those_of_the_terms_of_each_image(evaluated):
    data = load_data(Run.open(runs()[0]).config, "data", CPU)
    pixels = next(data.test.batches(360))[0].flatten(1).double().numpy()
    floor = (scipy.special.entr(pixels) + scipy.special.entr(1 - pixels)).sum(1)
    tails = ("", "_y", "_sample", "_sample_y")
    names = {name + tail for name in (*ACCURACIES, "lr_nll") for tail in tails}
    names |= {"ll", "kl_y", "kl_z", "mse", "recons_acc", "mi_z_low", "mi_y_low"}
    for row in rows():
        path, v = Path("runs/b", row["run"]), numbers(row)
        terms = per_image(path)
        assert set(terms) == names
        assert {(t.shape, t.dtype) for t in terms.values()} == {((360,), np.dtype("float32"))}
        terms = {name: values.astype(float) for name, values in terms.items()}
        mse = terms.pop("mse")
        for name, values in terms.items():
            mean = max(0, values.mean()) if "low" in name else values.mean()
            assert v[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
            assert v[f"{name}_se"] == pytest.approx(scipy.stats.sem(values), rel=1e-5, abs=1e-9)
        assert v["psnr"] == pytest.approx(-10 * math.log10(mse.mean()), abs=1e-4)
        halves = [-10 * math.log10(mse[i::2].mean()) for i in (0, 1)]
        assert abs(halves[0] - halves[1]) < 8 * v["psnr_se"]
        losses = v["beta_y"] * terms["kl_y"] + v["beta_z"] * terms["kl_z"] - terms["ll"]
        assert v["loss_se"] == pytest.approx(scipy.stats.sem(losses), rel=1e-4)
        assert v["D_floor"] == pytest.approx(253.2, abs=0.05)
        assert v["D_above_floor"] == v["D"] - v["D_floor"] > 0
        above = scipy.stats.sem(-terms["ll"] - floor)
        assert v["D_above_floor_se"] == pytest.approx(above, rel=1e-4)
        latents, pca = (read_arrays(path / f"{name}.npz") for name in ("latents", "pca"))
        assert latents["qz_mu"].shape == (360, 6)
        assert latents["qy_std"].shape == (360, 4, 4, 4)
        assert {a.dtype for k, a in latents.items() if k[0] == "q"} == {np.dtype("float32")}
        assert pca["projections"].shape == (360, 3)


def test_nothing_is_done_twice_and_all_of_it_at_once_is_the_same(evaluated, script, monkeypatch):
    files = [p for p in Path("runs/b").rglob("*") if p.suffix in (".json", ".csv", ".npz")]
    before = {p: p.read_bytes() for p in files}
    with monkeypatch.context() as m:
        m.setattr("utils.evaluation.run.EvaluatedRun.record", None)
        assert all(script(*step)[0] == 0 for step in four_steps())
    assert {p: p.read_bytes() for p in files} == before
    for path in files:
        if path.name not in ("config.json", "training.json"):
            path.unlink()
    flags = [*PROBES, "--n_samples", "200", "--all", "--pca"]
    done(script, eval_beta_grid.main, *flags)
    table = Path("runs/b/eval_results.csv")
    assert table.read_bytes() == before[table]


def test_a_changed_setting_makes_only_its_step_stale(evaluated, script):
    before, of_y = [row["psnr"] for row in rows()], [row["mi_q_mc_y"] for row in rows()]
    done(script, eval_beta_single.main, "--run_path", *runs(), "--device", "cpu", "--y_samples", "1")
    assert all(row["mi_q_mc_y"] != value for row, value in zip(rows(), of_y, strict=True))
    script(eval_beta_grid.main, *STEP1[:-1], "100", "--iw_samples", "3")
    assert [row["n_samples"] for row in rows()] == ["100"] * 4 and [row["psnr"] for row in rows()] == before
    for v in map(numbers, rows()):  # the bound is at least the ELBO's, which one sample of it estimates
        assert v["ll_iw"] >= v["ll"] - v["kl_y"] - v["kl_z"] - 0.5
        assert v["ll_iw_se"] == pytest.approx(v["ll_se"], rel=0.5)  # both mostly of the images


def test_each_step_tells_when_the_one_before_is_missing(batch, script):
    err = refusal(script, eval_beta_single.main, "--run_path", runs()[0], "--device", "cpu")
    assert "run eval_beta_grid.py --exclude_mi first" in err
    flags = ["--get_mi_cal_acc", "--probe_protocol", "paper"]
    status, _, err = script(eval_beta_grid.main, *FAST, *flags)
    assert status == 1 and err.count("run eval_beta_grid.py --exclude_mi first") == 4
    shutil.rmtree("runs/classifiers")
    assert "train_classifier.py" in refusal(script, eval_beta_grid.main, *STEP1)


def test_runs_of_the_papers_code_evaluate_unchanged(script):
    write_cifar10(Path("data"))
    write_svhn(Path("data"))
    shutil.copytree(REFERENCE, "runs/b")
    Path("runs/b/README.md").unlink()
    done(script, eval_beta_grid.main, *FAST, "--exclude_fid", "--data_dir", "data")
    by_name = {row["run"]: row for row in rows()}
    gauss = by_name["hvae_fixed_cifar_gauss"]
    latents = read_arrays(Path("runs/b/hvae_fixed_cifar_gauss/latents.npz"))
    assert latents["qz_mu"].shape == (20, 8)
    # with the sigma it was trained with, ll = -1770.85 - 3047.01 MSE, whose MSE is below 1
    assert -1770.85 - 3047.01 < float(gauss["ll"]) < -1770.85
    assert by_name["hvae_fixed_cifar_mol"]["bpd"] != "" and gauss["bpd"] == ""
    assert all(row["mi_q_mc"] != "" and row["mi_q_mc_y"] != "" for row in rows())


@pytest.mark.parametrize(
    "flags, empty",
    [
        (["--qz_family", "GumbelSoftmax", "--z_dims", "7", "--linear_y_with_dims", "5"], {"mi_q_mc"}),
        (["--vae_type", "LVAE", "--use_conv_z"], {"mi_q"}),
        (["--vae_type", "BVAE"], {"mi_q", "mi_q_mc", "acc_bound", "lr_acc_mean"}),
    ],
)
def test_every_kind_of_run_goes_through_all_steps_which_leave_each_others_figures_alone(flags, empty, made, script):
    shutil.copytree(made / "runs/classifiers", "runs/classifiers")
    done(script, train.main, *TINY, *flags, "--run_batch_name", "b")
    step1 = ["--with_classifier", "--n_samples", "50", "--iw_samples", "2"]
    for step in (step1, ["--get_mi_cal_acc", "--probe_images", "300"], ["--recons_acc", "--pca"]):
        done(script, eval_beta_grid.main, *FAST, *step)
    (row,), (path,) = rows(), runs()
    for column in ("mi_q_mc", "mi_q", "mi_q_mc_y", "acc_bound", "lr_acc_mean", "lr_acc_mean_y", "ll_iw", "is_mean"):
        assert (row[column] == "") == (column in empty), column
    assert (row["mi_p"] != "") == ("GumbelSoftmax" in flags)
    done(script, eval_beta_grid.main, *FAST, "--latents", "test")
    with np.load(path / "latents_test.npz") as arrays:
        assert ("z_std" in arrays) != ("GumbelSoftmax" in flags) and not (path / "latents_train.npz").exists()
        assert "z_std" in arrays or set(np.unique(arrays["z_sample"])) == {0, 1}
    before = read_json(path / "metrics.json")
    out = done(script, eval_beta_single.main, "--run_path", path, "--device", "cpu")
    assert ("note: mi_p" in out) == ("GumbelSoftmax" in flags)
    done(script, eval_beta_grid.main, *FAST, "--exclude_mi")
    assert read_json(path / "metrics.json") == before


def test_both_protocols_of_the_probes_and_results_of_an_early_version(batch, script):
    for path in runs()[1:]:
        shutil.rmtree(path)
    script(eval_beta_grid.main, *RATES)
    paper = [*FAST, "--get_mi_cal_acc", "--probe_protocol", "paper"]
    done(script, eval_beta_grid.main, *paper)
    (path,), (old,) = runs(), rows()
    assert old["svm_rbf_acc_paper"] and old["mi_lr_lb_y_paper"] and not old["svm_rbf_acc"]
    p, se = (float(old[f"kNN_acc_paper{end}"]) for end in ("", "_se"))
    assert se == pytest.approx(math.sqrt(p * (1 - p) / 71))
    assert np.isnan(per_image(path)["svm_rbf_acc_paper"]).sum() == 288
    done(script, eval_beta_grid.main, *PROBES)
    (row,) = rows()
    assert row["svm_rbf_acc_paper"] == old["svm_rbf_acc_paper"] and row["svm_rbf_acc"]
    assert row["probe_images"] == "500"
    metrics = read_json(path / "metrics.json")
    del metrics["probe_images"]  # when the paper's protocol was the only one, and had its names
    (path / "metrics.json").write_text(json.dumps(metrics))
    gather("runs", "b")
    assert rows()[0]["lr_acc_mean"] == rows()[0]["psnr"] == ""
    done(script, eval_beta_grid.main, *RATES)
    assert rows()[0]["lr_acc_mean"] == "" and rows()[0]["psnr"] == old["psnr"]


def test_the_inception_score_is_averaged_over_classifiers(evaluated, script):
    """Two: its error is half their difference. A further classifier makes only the steps that use it stale."""
    good = Path("runs/classifiers/Digits")
    other = Path(shutil.copytree(good, good / "seed_3"))
    state = torch.load(good / "classifier.pth", weights_only=True)
    torch.save({name: 0.8 * p for name, p in state.items()}, other / "classifier.pth")
    before = rows()
    flags = [*RATES, "--with_classifier", "--n_samples", "200"]
    done(script, eval_beta_grid.main, *flags, "--classifier_path", other / "classifier.pth")
    scores = [[float(row["is_mean"]) for row in table] for table in (before, rows())]
    assert all(row["n_classifiers"] == "1" and row["is_mean_se"] == "" for row in before + rows())
    done(script, eval_beta_grid.main, *flags)
    for row, a, b in zip(rows(), *scores, strict=True):
        assert float(row["is_mean"]) == pytest.approx((a + b) / 2) and row["n_classifiers"] == "2"
        assert float(row["is_mean_se"]) == pytest.approx(abs(a - b) / 2) and a != b


def test_per_image_terms_of_damaged_foreign_and_outdated_files_are_left_out(evaluated):
    path = runs()[0]
    whole = set(per_image(path))
    (path / "per_image_foreign.npz").write_bytes(b"?")
    assert set(per_image(path)) == whole and per_image(Path("nowhere")) == {}
    (path / "per_image.npz").write_bytes((path / "latents.npz").read_bytes())
    assert whole - set(per_image(path)) == {"ll", "kl_y", "kl_z", "mse"}
    (path / "metrics.json").write_text('{"files": 3}')
    assert per_image(path) == {}


def test_step_2_of_several_runs(batch, script):
    """A shell's star also finds the folder of figures; a run that cannot be evaluated does not stop the others."""
    done(script, eval_beta_grid.main, *RATES)
    first, *others = runs()
    Path("runs/b/figures").mkdir()
    (first / "vae.pth").unlink()
    status, out, err = script(eval_beta_single.main, "--run_path", *runs(), "--device", "cpu")
    assert status == 1 and err.count("\n") == 1 and f"failed: {first}: unfinished" in err
    assert [bool(row["mi_q_mc"]) for row in sorted(rows(), key=lambda row: row["run"])] == [False, True, True, True]
    assert all(path.name in out for path in others)


def test_units_of_rates_that_are_known():
    """Every unit of y follows z, so Burda's count is all; three of them add more than 0.01 nats: shift^2 / 2 > 0.01."""
    shifts = torch.tensor([0.0, 0.1, 0.2, -0.2, 1.0])
    x = torch.linspace(-2, 2, 300)[:, None]
    model = SimpleNamespace(
        q_z=lambda x: Gaussian(torch.cat([x, 0 * x], 1), torch.tensor([0.1, 0.99]).expand(len(x), 2)),
        p_y=lambda z: Gaussian(z[:, :1].expand(-1, 5), torch.ones(len(z), 5)),
        q_y=lambda z, x: Gaussian(z[:, :1] + shifts, torch.ones(len(z), 5)),
        noise=lambda n, g: Noise(torch.randn(n, 2, generator=g), torch.randn(n, 5, generator=g)),
    )
    test = Resident(torch.zeros(300, 1, 1, 1, dtype=torch.uint8), torch.zeros(300), CPU)
    test.batches = lambda size: ((part, None) for part in x.split(size))
    run = SimpleNamespace(model=model, test=test, generator=lambda *_: torch.Generator())
    assert units(run) == {"active_z_rate": 1, "active_y_rate": 3}
    assert active_units(model.q_y(model.q_z(x).mean, x).mean.numpy()) == 5


def test_the_latents_of_both_splits(batch, script):
    flags = [*FAST, "--latents", "train", "test"]
    assert "steps: latents_train, latents_test" in done(script, eval_beta_grid.main, *flags)
    run = Run.open(runs()[0])
    model, file = load_model(run, CPU), run.path / "latents_train.npz"
    data, written = load_data(run.config, "data", CPU), digest_of(file)
    for name in ("train", "test"):
        split, arrays = getattr(data, name), read_arrays(run.path / f"latents_{name}.npz")
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
            for ours, expected in ((a[f"{v}_mean"], q.mean), (a[f"{v}_std"], q.std)):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        samples = (a["z_sample"], q_z), (a["y_sample"], joint)
        noise = [((s - q.mean) / q.std).flatten(1).double() for s, q in samples]
        for values in noise:
            tolerance = 5 / values.numel() ** 0.5
            assert abs(values.mean()) < tolerance and abs(values.std() - 1) < tolerance
        z, y = ((values - values.mean(0)) / values.std(0) for values in noise)
        assert (z.T @ y / len(x)).abs().max() < 6 / len(x) ** 0.5  # drawn apart
    changed = file.stat().st_mtime_ns
    done(script, eval_beta_grid.main, *flags)
    assert file.stat().st_mtime_ns == changed
    file.write_bytes(b"cut")
    done(script, eval_beta_grid.main, *flags)
    assert digest_of(file) == written


def test_latents_that_do_not_fit_and_other_splits_are_refused(batch, script, monkeypatch):
    for flags in (["--latents"], ["--latents", "val"]):
        assert refusal(script, eval_beta_grid.main, *FAST, *flags).startswith("error: --latents: ")
    monkeypatch.setattr("utils.evaluation.latents.memory", lambda: 1000)
    status, _, err = script(eval_beta_grid.main, *FAST, "--latents", "test")
    assert status == 1 and "--latents test: needs 604,800 bytes of memory, this machine has 1,000" in err
