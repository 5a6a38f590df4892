"""Trains hierarchical VAEs with separate weights on their two rates, R(z) and R(y|z).

    python train.py                                       one model of the bundled digits
    python train.py --beta_y 0.1 1 10 --beta_z 0.1 1 10   a 3 x 3 grid, one run folder per cell

Repeating a command resumes unfinished runs and skips finished ones.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

import math
import shlex
import sys

import torch

from datasets.loading import load_data
from models.build import build_model
from models.stack import BACKENDS
from utils.cli import Parser, add_config_flags, grid_configs, next_command, whole_or_auto
from utils.config import FLAGS, Config
from utils.distributed import is_first, join, share, wait_for_all
from utils.errors import command_line, run_script
from utils.runs import Run
from utils.training.loop import Interrupted
from utils.training.schedule import check_data_parallel, check_flags, report, train_all, unfinished
from utils.training.unfold import sources, unfold_all


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    add_config_flags(parser, grid=("beta_y", "beta_z", "seed"))
    group = parser.add_argument_group("grid and files")
    group.add_argument(
        "--cells_at_once",
        type=whole_or_auto,
        default="auto",
        help="grid cells trained together as one stacked model (default: auto: 1 on a CPU; on a GPU measured for long "
        "trainings, else 32)",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="on: run the training step through torch.compile; auto: only for long trainings on a GPU; off: run it "
        "eagerly, without a CUDA graph (default: auto)",
    )
    group.add_argument(
        "--convolutions",
        choices=("auto", *BACKENDS),
        default="auto",
        help="convolution backend; kernels: this project's Triton kernels, GPU only (default: auto: measured for long "
        "trainings on a GPU, else plain, or channels_last for 256 pixels)",
    )
    group.add_argument(
        "--save_every",
        type=whole_or_auto,
        default="auto",
        help="epochs between checkpoints (default: auto: as often as 5 %% of the training time allows)",
    )
    group.add_argument(
        "--data_parallel",
        action="store_true",
        help="under torchrun: split every batch over the processes, instead of distributing the cells",
    )
    group.add_argument("--overwrite", action="store_true", help="retrain all cells from scratch, even finished ones")
    group.add_argument("--force", action="store_true", help="unfold a multi-rate model even if its z has collapsed")
    group.add_argument("--dry_run", action="store_true", help="print settings, shapes and run folders without training")
    return parser.parse(argv)


def describe(configs: list[Config], device: torch.device) -> None:
    """Prints the settings of all cells, the tensor shapes and the number of parameters."""
    for name in FLAGS:
        values = list(dict.fromkeys(getattr(c, name) for c in configs))
        print(f"  {name:20s}", *values)
    model = build_model(configs[0])
    print(f"  {'device':20s} {device}")
    print(f"  {'shapes':20s} x {configs[0].image_shape}, y {model.y_shape}, z {model.z_shape}")
    print(f"  {'parameters':20s} {sum(p.numel() for p in model.parameters()):,}")
    print(f"  {'cells':20s} {len(configs)}", flush=True)


def summarise(runs: list[Run], args) -> None:
    """Prints the test results of all runs, and the commands that inspect and evaluate them."""
    print(f"\n{'beta_y':>10} {'beta_z':>10} {'loss':>10} {'ll':>10} {'kl_y':>8} {'kl_z':>8} {'psnr':>6} {'seconds':>8}")
    for run in (Run.open(run.path) if run.status != "new" else run for run in runs):  # with the betas that were found
        result, status = run.result, run.status
        line = f"{run.config.beta_y:10.5g} {run.config.beta_z:10.5g} "
        if status == "finished" and result:
            t = result["test"]
            line += f"{t['loss']:10.2f} {t['ll']:10.2f} {t['kl_y']:8.3f} {t['kl_z']:8.3f} {t['psnr'] or math.inf:6.2f} "
            line += f"{result['seconds']:8.1f}"
        elif status == "failed":
            terms = ", ".join(f"{k} {v}" for k, v in result["terms"].items())
            line += f"failed at epoch {result['epoch']}, step {result['step']}: {terms}"
        else:
            line += status
        print(line)
    print("(test images; nats per image, psnr in dB)")
    if len(runs) == 1:
        print(f"\nThe run is in {runs[0].path}")
    else:
        print(f"\nThe runs are in {runs[0].path.parent}")
    print(f"To inspect: tensorboard --logdir {shlex.quote(args.runs_dir)}")
    print(f"To evaluate: {next_command(args, 'eval_beta_grid.py', '--run_batch_name', runs[0].config.run_batch_name)}")


def main(argv=None) -> int:
    """Trains the cells that the flags describe; returns the exit status."""
    args = parse_args(argv)
    cells = grid_configs(args)
    plan = sources(cells, args.runs_dir) if args.multi_rate else {Run.of(c, args.runs_dir): [c] for c in cells}
    config = next(iter(plan)).config
    check_flags(args, config)
    if is_first():
        describe([run.config for run in plan], args.device)
    if args.dry_run:
        for run in plan:
            print(run.path)
        return 0
    data = load_data(config, args.data_dir, args.device, args.download)
    plan = {run.of_data(data.digest): cells for run, cells in plan.items()}
    runs = [*plan]
    mine = runs if args.data_parallel else share(runs)
    todo = unfinished(mine, args.overwrite)
    if args.data_parallel:
        check_data_parallel(len(data.train), len(data.test), config.batch_size)
        join(args.device)
    try:
        problems = train_all(todo, data, args)
    except Interrupted as e:
        if is_first() or not args.data_parallel:
            print(f"\nsaved at epoch {e.epoch}; rerun to continue: {command_line()}", file=sys.stderr)
        return 128 + e.signal
    status = report(problems, mine)
    if args.multi_rate:
        runs, problems = unfold_all({run: plan[run] for run in mine if run.status == "finished"}, data, args)
        status = max(status, report(problems, runs))
    wait_for_all()
    if is_first() and runs:
        summarise(runs, args)
    return status


if __name__ == "__main__":
    run_script(main)
