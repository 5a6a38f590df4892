"""Trains hierarchical VAEs with separate weights on their two rates, R(z) and R(y|z).

    python train.py                                       one model of the bundled digits
    python train.py --beta_y 0.1 1 10 --beta_z 0.1 1 10   a 3 x 3 grid, one run folder per cell

Repeating a command resumes unfinished runs and skips finished ones.
"""

import sys
from itertools import chain
from pathlib import Path

from utils.cli import Parser, add_config_flags, grid_configs, next_command, whole_or_auto
from utils.distributed import is_first, join, leave, share, wait_for_all
from utils.errors import UserError, command_line, run_script
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    add_config_flags(parser)
    group = parser.add_argument_group("grid and files")
    for name, text in (
        ("cells_at_once", "grid cells trained together as one stacked model (auto: 1 on a CPU; on a GPU 1 or 8, "
         "whichever is faster in twenty steps)"),
        ("save_every", "epochs between checkpoints (auto: as often as 5 %% of the training time allows)"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=whole_or_auto, default="auto", help=f"{text} (default: auto)")
    compile = (
        "auto: capture the training step as a CUDA graph on a GPU; on: run it through torch.compile as well; off: "
    )
    compile += "run it eagerly (default: auto)"
    group.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=compile)
    init_from = (
        "start from the weights of that run; a run of the same settings and fewer epochs is continued instead, as "
    )
    init_from += "if it had never ended; of a batch, each cell continues its own"
    group.add_argument("--init_from", metavar="RUN", help=init_from)
    group.add_argument("--like", metavar="RUN", help="print the command that makes that run again, and stop")
    for name, text in (
        ("data_parallel", "under torchrun: split every batch over the processes, instead of distributing the cells"),
        ("overwrite", "retrain all cells from scratch, even finished ones"),
        ("force", "unfold a multi-rate model even if z or y has collapsed"),
        ("dry_run", "print settings, shapes and where each run stands, without training"),
    ):
        group.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse(argv)
    alone = {"like", "runs_dir", "data_dir", "device", "threads"}
    defaults = vars(parser.parse_args([]))
    others = [n for n, v in vars(args).items() if n not in alone and v != defaults[n]]
    if args.like is not None and others:
        raise UserError(f"--like: goes without --{others[0]}; change the command that it prints")
    return args


def print_command(path: Path, data_dir: str) -> int:
    """Prints the command that makes the run in a folder again."""
    from utils.provenance import command_of
    from utils.runs import Run

    above = path.parent.parent if len(path.parts) > 2 else path.resolve().parent.parent
    print(next_command(*command_of(Run.open(path)), runs_dir=str(above), data_dir=data_dir))
    return 0


def unfold_all(plan: dict, mine: list, data, setup, args) -> tuple[list, int]:
    """Unfolds this process's models into the cells of the plan, or refines its share of all of them.

    Returns the runs of the cells, and the exit status.
    """
    from utils.training.multi_rate import cells_of, unfold
    from utils.training.schedule import report, train_all, unfinished

    if args.refine_epochs:
        wait_for_all()
        mine = [*plan]
    runs, problems, starts = [], [], {}
    for model in (run for run in mine if run.status == "finished"):
        cells = cells_of(model, plan[model], data, args.runs_dir, setup.device, args.force)
        runs += cells
        starts |= {run.path: model for run in cells}
        if setup.writes and not args.refine_epochs:
            problems += unfold(model, cells, data, setup.device, args.overwrite)
    mine, single = runs, len(runs) == 1
    if args.refine_epochs:
        mine = runs if args.data_parallel else share(runs, "cells")
        problems = train_all(unfinished(mine, args.overwrite), data, setup, starts)
    return runs, report(problems, mine, single, args.overwrite)


def main(argv=None) -> int:
    """Trains the cells that the flags describe; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    from datasets.loading import load_data
    from utils.runs import Run
    from utils.training.console import describe, show_status, summarise
    from utils.training.multi_rate import near, sources
    from utils.training.saving import Interrupted
    from utils.training.schedule import check_batches, check_setup, report, train_all, unfinished
    from utils.training.start import note_shorter, with_start
    from utils.training.training import Setup

    if args.like is not None:
        return print_command(Path(args.like), args.data_dir)
    cells = with_start(grid_configs(args), args.init_from)
    plan = sources([*cells], args.runs_dir) if args.multi_rate else {Run.of(c, args.runs_dir): [c] for c in cells}
    starts = {Run.of(c, args.runs_dir).path: source for c, source in cells.items() if source is not None}
    config, single = next(iter(plan)).config, len(cells) == 1
    setup = Setup(device, **{name: getattr(args, name) for name in Setup._fields[1:]})
    check_setup(setup, config, len(cells) if args.refine_epochs else len(plan))
    describe([run.config for run in plan], device, [*chain(*plan.values())])
    note_shorter(plan, starts)
    if args.dry_run:
        refined = [Run.of(c, args.runs_dir) for c in cells if c.refine_epochs]
        return show_status(share([*plan, *refined]), args.overwrite, starts)
    data = load_data(config, args.data_dir, device, args.download)
    plan = {run.of_data(data, starts.get(run.path)): cells for run, cells in plan.items()}
    runs = [*plan] if args.multi_rate else near([*plan], data, device)
    mine = runs if args.data_parallel else share(runs)
    todo = unfinished(mine, args.overwrite)
    if args.data_parallel:
        check_batches(data, config.batch_size)
        join(device)
    try:
        status = report(train_all(todo, data, setup, starts), mine, single, args.overwrite)
        if args.multi_rate:
            runs, of_cells = unfold_all(plan, mine, data, setup, args)
            status = max(status, of_cells)
    except Interrupted as e:
        if setup.writes:
            print(f"\nsaved at epoch {e.epoch}; rerun to continue: {command_line('--overwrite')}", file=sys.stderr)
        return 128 + e.signal
    leave()
    if is_first() and runs:
        summarise(runs, args.rate_unit, args.runs_dir, args.data_dir, data.labelled)
    return status


if __name__ == "__main__":
    run_script(main)
