"""The benchmarks run, and say what they measured."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from datasets.loading import load_data
from tests import pretended
from utils.benchmark import __main__ as benchmark
from utils.benchmark import gpu, plane
from utils.config import Config
from utils.training import capture

SMALL = ["--dataset", "MNIST", "--conv_channels", "2", "--z_dims", "2", "--batch_size", "8", "--n", "2"]
SMALL += ["--images", "40", "--test_images", "60", "--some_images", "20", "--device", "cpu"]


@pytest.mark.parametrize(
    "what, lines",
    [
        ("step", ["like the paper's code", "1 cell, eager", "2 cells, eager", "1.00 x"]),
        (
            "evaluate",
            ["unfolding", "step 1, samples", "step 2, ", "step 3, svm_linear on qy_mu", "step 4", "all"],
        ),
    ],
)
def test_benchmarks_run(what, lines, script):
    status, out, err = script(benchmark.main, what, *SMALL, "--cells", "1", "2")
    assert status == 0, err
    assert "threads, torch" in out.splitlines()[0] and all(line in out for line in lines), out


def test_the_hours_of_a_map_follow_from_its_steps(script, monkeypatch):
    """A step of 36 ms: 500 epochs x 5 steps take 90 s; unfolding 3.6 s, 441 times, 26 minutes."""
    monkeypatch.setattr(plane, "measure", lambda candidates, n, device: {k: [0.036] * 2 for k in candidates})
    of_cell = {"unfolding": [3.6] * 2, "step 1": [3.0, 5.0], "step 4": [3.2] * 2}
    sizes = {60: of_cell, 20: {"unfolding": [3.6] * 2, "step 1": [0.0, 1.0]}}
    monkeypatch.setattr(plane, "seconds_of_cells", lambda *_: sizes)
    monkeypatch.setattr(plane, "seconds_of_report", lambda cells: float(cells))
    status, out, err = script(benchmark.main, "plane", *SMALL)
    assert status == 0, err
    hours = {line[:40].strip(): line[40:].split() for line in out.splitlines()[-10:-1]}
    assert hours == {
        "like the paper's code": ["1.23", "11.03"],
        "separate trainings by Adam": ["1.23", "11.03"],
        "separate trainings by Muon": ["1.23", "11.03"],
        "one multi-rate training": ["0.03", "0.03"],
        "unfolding": ["0.05", "0.44"],
        "--refine_epochs 50 of all of them": ["0.12", "1.10"],
        "all four steps, 60 images": ["0.10", "0.88"],
        "all four steps, 20 images": ["0.01", "0.06"],
        "report": ["0.01", "0.12"],
    }


@pytest.mark.slow
def test_the_report_of_made_results_is_drawn():
    assert plane.seconds_of_report(4) > 0  # raises if plot_eval.py fails


def test_a_report_needs_a_gpu(script):
    status, out, err = script(benchmark.main, "gpu", *SMALL)
    assert status == 2 and err == "error: gpu: this machine has no GPU that PyTorch can use\n"


@pytest.mark.slow
def test_a_report_of_a_gpu_goes_on_where_a_part_fails(script, monkeypatch):
    def parts(*_):
        yield "too large", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory\nand more"))
        yield "the last", lambda: "done"

    monkeypatch.setattr(gpu, "commands", parts)
    monkeypatch.setattr(capture, "failed", False)
    with pretended.one(monkeypatch):
        status, out, err = script(benchmark.main, "gpu", *SMALL[:-1], "cuda", "--cells", "1", "2")
    rows = json.loads(Path("gpu_report.json").read_text())
    assert status == 0 and list(rows.values())[-2:] == ["FAILED: OutOfMemoryError: CUDA out of memory", "done"], err
    assert len(rows) == 1 + 6 + 12 + 2 + 2 + 2 and str(rows).count("FAILED") == 1, rows
    assert out.splitlines()[-len(rows) - 1 :] == [
        f"| | {rows.pop('machine')} |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    assert all(float(rows[f"{name}, as on the CPU"].split()[3]) < 1e-4 for name in ("HVAE", "Muon", "multi-rate"))


def test_a_tenth_of_the_training_images_of_each_label_is_for_validation(script):
    status, out, err = script(benchmark.main, "validation", "--dataset", "Digits", "--device", "cpu")
    assert status == 0 and "Digits_validation.npz: 1,294 images" in out, err
    config = Config(dataset="Digits_validation.npz")
    whole, parts = (load_data(c, "", torch.device("cpu")) for c in (Config(), config))
    counts = parts.test.labels.bincount()
    assert len(parts.test) == 143 and (counts - whole.train.labels.bincount() / 10).abs().max() < 1
    rows = [torch.cat([s.images.flatten(1), s.labels[:, None]], 1).tolist() for s in (parts.train, parts.test)]
    assert sorted(rows[0] + rows[1]) == sorted(
        torch.cat([whole.train.images.flatten(1), whole.train.labels[:, None]], 1).tolist()
    )


def test_what_makes_no_sense_is_refused(script):
    for argv, flag in ((["step", "--n", "1"], "--n"), (["grid"], "what")):
        status, _, err = script(benchmark.main, *argv, "--device", "cpu")
        assert status == 2 and err.startswith(f"error: {flag}") and err.count("\n") == 1
