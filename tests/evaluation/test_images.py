"""As many images as an error asks for: what is estimated from less, who decides how many, and that it is kept."""

import json
import math
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

from eval_beta_grid import main as grid
from tests.evaluation.conftest import FAST, PROBES, rows, runs
from utils.evaluation import batch as batch_module
from utils.evaluation import images
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import per_image
from utils.evaluation.run import EvaluatedRun
from utils.evaluation.steps import STEPS
from utils.locks import locked

ALL = [*FAST, "--all"]


def test_doubling_the_images_tells_the_error_that_is_left():
    """Of means with noise and a bias of 1 / N; what is the same in all cells does not count."""
    rng, noise, bias, spread, n = np.random.default_rng(0), 3.0, 40.0, 0.5, 800
    told, left = [], []
    for _ in range(300):
        truth, of_bias = spread * rng.normal(size=5), bias * rng.normal(size=5)
        terms = truth[:, None] + rng.normal(size=(1, n)) * 50 + noise * rng.normal(size=(5, n))
        before, after = (terms[:, :m].mean(1) + of_bias / m for m in (n // 2, n))
        cells = [[{"recons_acc": v, "recons_acc_se": 0.0} for v in values] for values in (before, after)]
        told.append(images.error_left(*cells, [STEPS["recons"]], 0.1, 1) * 0.1 * after.std(ddof=1))
        left.append(((after - truth) - (after - truth).mean()).std(ddof=1))
    told, left = (math.sqrt(np.mean(np.square(errors))) for errors in (told, left))
    assert told == approx(left, rel=0.1) == approx(math.hypot(noise / n**0.5, bias / n), rel=0.1)
    assert images.error_left(*cells, [STEPS["recons"]], 1.0, 0) == approx(told / spread, rel=3)
    for cell in cells[1]:
        cell["recons_acc_se"] = 10.0  # with all images
    assert images.error_left(*cells, [STEPS["recons"]], 0.1, 1) < 0.1


def test_information_of_some_images_is_the_same_on_average():
    """Each is of the posteriors of all images: the means over parts are exactly the whole."""
    g = torch.Generator().manual_seed(0)
    means, stds = torch.randn(600, 2, 3, generator=g).double(), torch.full((600, 2, 3), 0.4).double()
    samples, labels = means[:, 0] + 0.4 * torch.randn(600, 3, generator=g).double(), torch.arange(600) % 4
    whole = gaussian_mi(samples, means, stds, labels)
    parts = [gaussian_mi(samples, means, stds, labels, part) for part in torch.randperm(600, generator=g).split(150)]
    for name in ("mi", "null", "bias", "upper"):
        assert np.mean([getattr(part, name) for part in parts]) == approx(getattr(whole, name), abs=1e-9)
    for name in ("image_low", "image_high"):
        assert np.mean([getattr(part, name)[0] for part in parts]) == approx(getattr(whole, name)[0], abs=1e-9)
    assert all(part.se == approx(2 * whole.se, rel=0.2) for part in parts)


@pytest.fixture
def few_images(monkeypatch):
    """Four cells decide, from 45 images on, of which the first choice is twice."""
    monkeypatch.setattr(images, "CELLS", 4)
    monkeypatch.setattr(images, "LEAST", dict.fromkeys(images.SIZES, 45))


def test_a_batch_uses_as_many_images_as_its_error_asks_for(batch, few_images, passes, monkeypatch):
    real, computed = EvaluatedRun.record, Counter()

    def record(self, step, results):
        computed[self.path, step.name, self.evaluation.probe_images if step.name == "probes" else 0] += 1
        real(self, step, results)

    with monkeypatch.context() as m:
        m.setattr(EvaluatedRun, "record", record)
        out = passes(grid, *ALL, "--error", "0.5", "--n_samples", "200")
    sizes = {n for _, step, n in computed if step == "probes"}
    assert all(n == 1 for (_, step, _), n in computed.items() if step in ("rates", "is", "probes")) and len(sizes) > 1
    chosen = json.loads(Path("runs/b/images.json").read_text())
    assert "n_samples" not in chosen and chosen["error"] == 0.5
    n, of_probes = chosen["test_images"], chosen["probe_images"]
    assert 90 <= n < 360 and 90 <= of_probes < 1437, chosen
    assert f"--error 0.5: {of_probes:,} probe images, {n} test images" in out
    some = {row["run"]: row for row in rows()}
    for path in runs():
        row, terms = some[path.name], per_image(path)["recons_acc"]
        assert row["probe_images"] == str(of_probes) and row["n_samples"] == "200"
        assert np.isfinite(terms).sum() == n and np.nanmean(terms) == approx(float(row["recons_acc"]))
        assert np.isfinite(per_image(path)["ll"]).all() and np.isfinite(per_image(path)["kNN_acc"]).all()
    passes(grid, *ALL, "--error", "0.5", "--n_samples", "200", "--force")
    assert json.loads(Path("runs/b/images.json").read_text()) == chosen
    with monkeypatch.context() as m:
        m.setattr(EvaluatedRun, "record", None)  # nothing is done twice, but told again
        assert f"--error 0.5: {of_probes:,} probe images" in passes(grid, *ALL, "--error", "0.5", "--n_samples", "200")
    assert {row[f"{name}_images"] for row in rows() for name in ("mi_y", "recons")} == {str(n)}
    passes(grid, *ALL, "--error", "0", "--n_samples", "200")
    for row in rows():
        for name in ("recons_acc", "recons_pred_entropy", "mi_q_mc_y", "mi_yx_high"):
            before, se = (float(some[row["run"]][name + end]) for end in ("", "_se"))
            assert abs(before - float(row[name])) < 4 * se + 1e-6
            assert float(row[f"{name}_se"]) <= se * 1.1 + 1e-6
        assert row["mi_y_images"] == row["recons_images"] == ""  # all
    with monkeypatch.context() as m:
        m.setattr(EvaluatedRun, "record", None)  # all images are as many as any error asks for
        assert "as some cells" not in passes(grid, *ALL, "--error", "0.5", "--n_samples", "200")


def test_few_cells_use_all_images_and_so_does_a_batch_that_did(batch, few_images, passes):
    others = runs()[1:]
    for path in others:
        shutil.move(path, path.name)
    flags = [*ALL, "--n_samples", "200", "--probe_images", "500"]
    assert "--error" not in passes(grid, *flags) and not Path("runs/b/images.json").exists()
    for path in others:
        shutil.move(path.name, path)
    assert "note: all test images are used, as some cells have them; --force" in passes(grid, *flags)
    for path in runs():
        (path / "per_image_recons.npz").unlink()
    Path("runs/b/images.json").write_text('{"error": 0.1, "test_images": 0}')  # as it might have chosen
    out = passes(grid, *flags)
    assert "--error 0.1: all test images" in out and "as some cells" not in out
    assert all(np.isfinite(per_image(path)["recons_acc"]).all() for path in runs())


def test_processes_that_share_the_cells_write_what_one_writes(made, batch, script):
    """It takes long since two processes start. What fails there fails alone, and is told here."""
    shutil.copytree(runs()[0], "runs/b/broken")
    (Path("runs/b/broken") / "vae.pth").write_bytes(b"")
    status, out, err = script(grid, *PROBES, "--n_samples", "200", "--all", "--pca", "--cpu_n", "2")
    assert status == 1 and err.startswith("failed: runs/b/broken") and err.count("\n") == 1
    ours = [row for row in rows() if row["run"] != "broken"]
    shutil.copy(made / "evaluated/b/eval_results.csv", "runs/b")
    assert ours == rows()


def test_an_evaluation_that_is_stopped_while_it_tries_numbers_goes_on(batch, few_images, passes, monkeypatch):
    """What was measured by fewer images is kept, until the numbers are chosen; nothing is told before."""
    flags, real, computed = [*ALL, "--error", "0.5", "--n_samples", "200"], EvaluatedRun.compute, []

    def compute(self, steps):
        real(self, steps)
        computed.append(self.evaluation.probe_images)
        if len(computed) in (4 + 4, 4 + 4 + 3):  # the rates of four cells, and the first number; a part of the next
            monkeypatch.setattr(batch_module, "monotonic", lambda: math.inf)

    monkeypatch.setattr(EvaluatedRun, "compute", compute)
    for _ in range(2):
        out = passes(grid, *flags, "--max_hours", "1")
        assert "; --error 0.5" in out and "--error 0.5:" not in out
        assert "0 of 4 runs evaluated" in out and re.search("probes +4 of 4", out)
        monkeypatch.setattr(batch_module, "monotonic", time.monotonic)
    assert "--error 0.5: " in passes(grid, *flags) and "tried" not in Path("runs/b/images.json").read_text()
    assert computed.count(45) <= 8 and len(runs()) == 4


def test_a_process_waits_for_another_ones_choice_and_uses_it(batch, few_images, passes, monkeypatch):
    chosen = {"error": 0.5, "probe_images": 90, "test_images": 0}  # 0: all
    Path("runs/b/.images").mkdir()

    def choose(held):
        with locked(Path("runs/b/.images")):
            held.set()
            time.sleep(3)
            assert not list(Path("runs/b").glob("*/per_image_probes.npz"))
            Path("runs/b/images.json").write_text(json.dumps(chosen))

    with ThreadPoolExecutor() as pool:
        other = pool.submit(choose, held := threading.Event())
        held.wait()
        monkeypatch.setattr(images, "_smallest", None)
        out = passes(grid, *ALL, "--error", "0.5", "--n_samples", "200")
    assert other.result() is None and "--error 0.5: 90 probe images, all test images" in out
    assert {row["probe_images"] for row in rows()} == {"90"}
    assert all(np.isfinite(per_image(path)["recons_acc"]).all() for path in runs())


@pytest.mark.parametrize("text", ["", '{"error": 0.5, "n_samples": -5}', '{"error": 0.5, "test_images": "x"}'])
def test_a_damaged_choice_is_refused(text, batch, few_images, refused):
    Path("runs/b/images.json").write_text(text)
    assert "images.json: damaged; remove it" in refused(grid, *ALL, "--error", "0.5", "--n_samples", "200")


def test_odd_errors(refused):
    for value in ("-1", "nan", "x"):
        assert refused(grid, *FAST, "--error", value).startswith("error: --error: ")
