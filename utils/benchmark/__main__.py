"""Benchmarks of training and evaluation, on random images of a data set's shape.

    python -m utils.benchmark plane       what a map of the rate plane costs, from training to the report
    python -m utils.benchmark step        a training step beside one like the paper's: eager, captured, stacked
    python -m utils.benchmark evaluate    where the evaluation of a cell spends its time

Times are medians over n repetitions, with quartiles. Compare only times of the same run.
"""

import importlib
from functools import partial

from datasets.table import DATASETS
from utils.cli import Parser, whole
from utils.errors import run_script
from utils.machine import prepare

BENCHMARKS = {"plane": "plane", "step": "step", "evaluate": "evaluation"}  # name: module


def main(argv=None) -> int:
    """Runs one benchmark; returns the exit status."""
    parser = Parser(__doc__, files=False)
    parser.prog = "python -m utils.benchmark"
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    parser.add_argument("--conv_channels", type=whole, default=32, help="channels of the conv layers (default: 32)")
    parser.add_argument("--z_dims", type=whole, default=32, help="dimensions of z (default: 32)")
    parser.add_argument("--batch_size", type=whole, default=256, help="images per batch (default: 256)")
    parser.add_argument(
        "--images", type=whole, default=50_000, help="training images of plane and step (default: 50000)"
    )
    parser.add_argument("--test_images", type=whole, default=10_000, help="test images, and samples (default: 10000)")
    parser.add_argument("--cells", type=whole, nargs="+", default=[1, 8], help="step: stacked cells (default: 1 8)")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as for train.py (default: fp32)"
    )
    parser.add_argument("--compile", action="store_true", help="step: also time the compiled step")
    parser.add_argument("--n", type=partial(whole, least=2), default=20, help="repetitions (default: 20)")
    args = parser.parse(argv)
    args.device = prepare(args.device, args.threads)
    import torch

    from utils.benchmark.measuring import machine
    from utils.training.schedule import use_precision

    torch.backends.cudnn.benchmark = True
    use_precision(args.precision)
    print(machine(args.device))
    getattr(importlib.import_module(f"utils.benchmark.{BENCHMARKS[args.what]}"), args.what)(args)
    return 0


if __name__ == "__main__":
    run_script(main)
