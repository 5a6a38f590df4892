"""How fast it is, measured here and now.

    python -m utils.benchmark grid        the paper's grid of 441 models, beside a loop like the paper's code
    python -m utils.benchmark step        one step: numbers of cells, ways of convolving, compiled or not
    python -m utils.benchmark layers      each convolution and its gradients, by every way of convolving
    python -m utils.benchmark streams     single models side by side on a GPU's streams, instead of stacked
    python -m utils.benchmark loader      decoding ImageNet's images, beside the step that they feed
    python -m utils.benchmark threads     a step by one thread and by several, on an idle and on a loaded machine
    python -m utils.benchmark precision RUNS   what a precision changes, beside what a seed changes
    python -m utils.benchmark mi|probes|inception   parts of the evaluation

Every figure is a median over repetitions, with the spread between the quartiles and n. Compare figures of one run only;
ratios are taken between measurements that alternate.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

import argparse

import torch

from datasets.table import DATASETS
from models.stack import ROUTES
from utils.benchmark import evaluation, training
from utils.benchmark.measuring import machine
from utils.benchmark.threads import threads
from utils.cli import Parser, whole
from utils.engine import check_route, use_precision
from utils.errors import UserError, run_script

BENCHMARKS = {
    f.__name__: f
    for f in (
        *(training.grid, training.step, training.layers, training.streams, training.loader, training.precision),
        *(evaluation.mi, evaluation.probes, evaluation.inception),
        threads,
    )
}


def at_least_two(text: str) -> int:
    """A number of repetitions that has quartiles."""
    if whole(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return int(text)


def main(argv=None) -> int:
    parser = Parser(__doc__, files=False)
    parser.prog = "python -m utils.benchmark"
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("runs", nargs="?", help="for `precision`: a batch's folder, e.g. runs/precision")
    parser.add_argument("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    parser.add_argument("--conv_channels", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--z_dims", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--batch_size", type=whole, default=256, help="(default: 256)")
    parser.add_argument("--images", type=whole, help="images (default: grid 50000, mi, inception 10000, others 2000)")
    parser.add_argument("--cells", type=whole, nargs="+", help="numbers of stacked cells (default: 1 4; on a GPU more)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--convolutions", choices=ROUTES, nargs="+", help="ways of convolving (default: all there are)")
    parser.add_argument("--compile", action="store_true", help="step, streams: compiled (grid: always, on a GPU)")
    parser.add_argument("--epochs", type=whole, help="grid: whole epochs to train (default: 20 on a GPU, else 1)")
    parser.add_argument("--n", type=at_least_two, default=20, help="repetitions (default: 20)")
    args = parser.parse(argv)
    if args.runs and args.what != "precision":
        raise UserError(f"{args.runs}: a folder of runs is for `precision`")
    for route in args.convolutions or ():
        check_route(route, args.device)
    args.convolutions = args.convolutions or [r for r in ROUTES if r != "kernels" or args.device.type == "cuda"]
    torch.backends.cudnn.benchmark = True
    use_precision(args.precision)
    print(machine(args.device))
    BENCHMARKS[args.what](args)
    return 0


if __name__ == "__main__":
    run_script(main)
