"""Benchmarks of training and evaluation.

    python -m utils.benchmark grid        time for the paper's grid of 441 models, compared with a loop like the paper's
    python -m utils.benchmark plane       the same for a map of the rate plane by one multi-rate training
    python -m utils.benchmark step        one training step: number of cells, convolution backend, eager or compiled
    python -m utils.benchmark profile     where the time of a step goes: its operators, and their share of the peaks
    python -m utils.benchmark layers      each convolution and its gradients with every convolution backend
    python -m utils.benchmark streams     single models on parallel CUDA streams, instead of stacked
    python -m utils.benchmark loader      throughput of ImageNet's data loader, compared with the training step
    python -m utils.benchmark threads     one step with one and several threads, on an idle and on a loaded machine
    python -m utils.benchmark precision RUNS   effect of --precision on the test metrics, compared with the seed's
    python -m utils.benchmark pipeline    a cell from training to figures, and what is like the paper's code
    python -m utils.benchmark growth      how the evaluation grows with images, classes and cells
    python -m utils.benchmark evaluate    every step of the evaluation of one run
    python -m utils.benchmark mi|probes|inception|classifiers   parts of it, compared with plain implementations

Times are medians over n repetitions, with quartiles. Compare only times of the same run.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

import argparse
import importlib

from datasets.table import DATASETS
from models.tables import BACKENDS
from utils.cli import Parser, whole
from utils.errors import UserError, run_script

BENCHMARKS = {  # name: module
    **{name: name for name in ("grid", "plane", "step", "profile", "layers", "loader", "threads", "precision")},
    **{"streams": "step", **dict.fromkeys(("pipeline", "growth"), "pipeline")},
    **dict.fromkeys(("evaluate", "mi", "probes", "inception", "classifiers"), "evaluation"),
}


def at_least_two(text: str) -> int:
    """A flag's number of repetitions, at least 2, as quartiles require."""
    if whole(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return int(text)


def main(argv=None) -> int:
    """Runs one benchmark; returns the exit status."""
    parser = Parser(__doc__, files=False)
    parser.prog = "python -m utils.benchmark"
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("runs", nargs="?", help="for `precision`: folder of a batch, e.g. runs/precision")
    parser.add_argument("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    parser.add_argument("--conv_channels", type=whole, default=32, help="channels of the conv layers (default: 32)")
    parser.add_argument("--z_dims", type=whole, default=32, help="dimensions of z (default: 32)")
    parser.add_argument("--batch_size", type=whole, default=256, help="images per batch (default: 256)")
    parser.add_argument(
        "--images",
        type=whole,
        help="number of images (default: grid, plane 50000, growth 60000, others of the evaluation 10000, classifiers "
        "256, others 2000)",
    )
    parser.add_argument(
        "--cells", type=whole, nargs="+", help="numbers of stacked cells (default: set by the benchmark)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as for train.py (default: fp32)"
    )
    parser.add_argument(
        "--convolutions", choices=BACKENDS, nargs="+", help="convolution backends (default: all available)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="step: also time the compiled step; streams, loader: compile the step (grid: always on a GPU)",
    )
    parser.add_argument("--epochs", type=whole, help="grid: whole epochs to time (default: 20 on a GPU, else 1)")
    parser.add_argument("--n", type=at_least_two, default=20, help="repetitions of each measurement (default: 20)")
    args = parser.parse(argv)
    import torch

    from utils.benchmark.measuring import machine
    from utils.training.engine import check_backend, use_precision

    if args.runs and args.what != "precision":
        raise UserError(f"{args.runs}: only `precision` takes a folder of runs")
    for backend in args.convolutions or ():
        check_backend(backend, args.device)
    args.convolutions = args.convolutions or [b for b in BACKENDS if b != "kernels" or args.device.type == "cuda"]
    torch.backends.cudnn.benchmark = True
    use_precision(args.precision)
    print(machine(args.device))
    getattr(importlib.import_module(f"utils.benchmark.{BENCHMARKS[args.what]}"), args.what)(args)
    return 0


if __name__ == "__main__":
    run_script(main)
