"""The benchmarks run, and say what they measured."""

import pytest

from utils import benchmark

SMALL = ["--dataset", "MNIST", "--conv_channels", "2", "--z_dims", "2", "--batch_size", "8", "--n", "2"]


@pytest.mark.parametrize(
    "what, images, lines",
    [
        ("train", 40, ["plain", "1 cell ", "2 cells stacked", "per model and epoch of 40 images (5 steps)"]),
        ("grid", 40, ["like the paper's code", "2 cells stacked", "the grid in", "GB/s"]),
        ("mi", 200, ["plain loop", "gaussian_mi", "peak memory"]),
        ("probes", 100, ["saga, 5 seeds", "svm_linear"]),
        ("inception", 100, ["plain loop", "inception_score"]),
    ],
)
def test_benchmarks_run(what, images, lines, script):
    flags = ["--images", images, "--cells", "1", "2", "--device", "cpu"]
    status, out, err = script(benchmark.main, what, *SMALL, *flags)
    assert status == 0, err
    assert "threads, torch" in out.splitlines()[0] and all(line in out for line in lines), out


def test_the_paper_grids_hours_follow_from_its_steps(script, monkeypatch):
    """A step of 36 ms: 441 models x 500 epochs x 5 steps of it take 11.0 hours."""
    monkeypatch.setattr(
        benchmark, "measure", lambda candidates, n, device, warmup=3: {k: [0.036] * 2 for k in candidates}
    )
    out = script(benchmark.main, "grid", *SMALL, "--images", "40", "--cells", "1", "--device", "cpu")[1]
    assert "20000.0 models x epochs an hour, the grid in      11.0 hours" in out
