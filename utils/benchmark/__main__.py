"""Benchmarks of training and evaluation, on random images of a data set's shape.

    python -m utils.benchmark plane       what a map of the rate plane costs, from training to the report
    python -m utils.benchmark step        a training step beside one like the paper's: eager, captured, stacked
    python -m utils.benchmark evaluate    where the evaluation of a cell spends its time
    python -m utils.benchmark gpu         whether a GPU does what it should, and how fast; at most eight minutes
    python -m utils.benchmark validation  a file of training images, one in ten as test images, to choose settings by

Times are medians over n repetitions, with quartiles. Compare only times of the same run.
"""

from functools import partial

from datasets.table import DATASETS
from utils.cli import Parser, default_data_dir, whole
from utils.config import Config
from utils.errors import run_script
from utils.machine import prepare

NUMBERS = {
    "conv_channels": (32, "channels of the conv layers"),
    "z_dims": (32, "dimensions of z"),
    "batch_size": (256, "images per batch"),
    "images": (50_000, "training images of plane and step"),
    "test_images": (10_000, "test images, samples and probe images"),
    "some_images": (2560, "of which the evaluation is repeated, as --error may choose"),
}


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__, files=False)
    parser.prog = "python -m utils.benchmark"
    flag = parser.add_argument
    flag("what", choices=("plane", "step", "evaluate", "gpu", "validation"), help="what to measure or write")
    flag("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    for name, (default, text) in NUMBERS.items():
        flag(f"--{name}", type=whole, default=default, help=f"{text} (default: {default})")
    flag("--cells", type=whole, nargs="+", help="stacked cells (default: step 1 8, gpu 1 8 32)")
    flag("--data_dir", default=default_data_dir(), help="validation: folder of the data sets")
    flag("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as for train.py (default: fp32)")
    flag("--compile", action="store_true", help="step: also time the compiled step")
    flag("--n", type=partial(whole, least=2), default=20, help="repetitions (default: 20)")
    return parser.parse(argv)


def main(argv=None) -> int:
    """Runs one benchmark; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    import torch

    from utils.benchmark import evaluation, gpu, plane, step, validation
    from utils.training.schedule import use_precision

    names = "dataset", "conv_channels", "z_dims", "batch_size", "precision"
    config = Config(**{name: getattr(args, name) for name in names})
    torch.backends.cudnn.benchmark = True
    use_precision(args.precision)
    if args.what == "validation":
        validation.validation(config, args.data_dir)
        return 0
    print(step.machine(device))
    if args.what == "plane":
        plane.plane(config, args.images, args.test_images, args.some_images, args.n, device)
    elif args.what == "step":
        step.step(config, args.images, args.cells or [1, 8], args.compile, args.n, device)
    elif args.what == "gpu":
        gpu.gpu(config, args.cells or [1, 8, 32], args.n, device)
    else:
        evaluation.evaluate(config, args.test_images, args.some_images, args.n, device)
    return 0


if __name__ == "__main__":
    run_script(main)
