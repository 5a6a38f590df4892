"""Trains hierarchical VAEs whose two rates, R(z) and R(y|z), have weights of their own.

    python train.py                                       one model of the bundled digits
    python train.py --beta_y 0.1 1 10 --beta_z 0.1 1 10   a grid of nine, each in its own run folder

The same command again continues whatever is unfinished and skips what is finished.
"""

import utils.threads  # isort: skip  (before torch)

import contextlib
import math
import shlex
import sys
import threading

import torch
import torch.distributed as dist

from datasets.loading import load_data
from models.build import build_model
from models.stack import ROUTES
from utils.cli import Parser, add_config_flags, grid_configs, whole
from utils.config import Config
from utils.distributed import from_first, is_first, join, place, share, wait_for_all
from utils.engine import Engine, check_route, doublings, fastest, free, use_precision
from utils.errors import UserError, command_line, is_out_of_memory, run_script
from utils.files import load_tensors
from utils.locks import Held
from utils.runs import Run
from utils.training import Chunk, Interrupted, Signals, train

LONG = 20_000  # model steps: about as many as cost what measuring and compiling do
AT_ONCE = 32  # cells of shorter trainings on a GPU


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_flags(parser, grid=("beta_y", "beta_z", "seed"))
    group = parser.add_argument_group("grid and files")
    group.add_argument(
        "--cells_at_once",
        type=whole_or_auto,
        default="auto",
        help="grid cells trained together as one stacked model (default: auto: 1 on a CPU, measured on a GPU)",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="the training step through torch.compile, on a GPU as a CUDA graph; off: as it is written "
        "(default: auto: for long trainings on a GPU)",
    )
    group.add_argument(
        "--convolutions",
        choices=("auto", *ROUTES),
        default="auto",
        help="how to convolve; kernels are this project's own, for a GPU (default: auto: measured where long trainings "
        "run on a GPU; else plain, or channels_last for 256 pixels)",
    )
    group.add_argument(
        "--save_every",
        type=whole_or_auto,
        default="auto",
        help="epochs between saves of the resume state (default: auto: as often as takes 5 %% of the time)",
    )
    group.add_argument(
        "--data_parallel",
        action="store_true",
        help="under torchrun: its processes share every batch, instead of the grid's cells",
    )
    group.add_argument("--overwrite", action="store_true", help="train the cells anew, even finished ones")
    group.add_argument("--dry_run", action="store_true", help="print the cells, shapes and parameters, and stop")
    return parser.parse(argv)


def whole_or_auto(text: str) -> int | None:
    """None for auto, or a whole number >= 1."""
    return None if text == "auto" else whole(text)


def describe(configs: list[Config], device: torch.device) -> None:
    """Prints the resolved configuration and the model's size."""
    for name in vars(configs[0]):
        values = list(dict.fromkeys(getattr(c, name) for c in configs))
        print(f"  {name:20s}", *values)
    model = build_model(configs[0])
    print(f"  {'device':20s} {device}")
    print(f"  {'shapes':20s} x {configs[0].image_shape}, y {model.y_shape}, z {model.z_shape}")
    print(f"  {'parameters':20s} {sum(p.numel() for p in model.parameters()):,}")
    print(f"  {'cells':20s} {len(configs)}", flush=True)


def open_cells(
    runs: list[Run], args, held: contextlib.ExitStack
) -> tuple[list[tuple[Run, dict | None]], list[tuple[Run, UserError]]]:
    """Locks the runs that are still to be trained; returns them with their resume states, and why not the others."""
    ready, problems = [], []
    if is_first() or not args.data_parallel:
        for run in runs:
            try:
                run.create()
                held.enter_context(run.locked())
                if args.overwrite:
                    run.restart()
                if run.status in ("finished", "failed"):  # by another process, meanwhile
                    continue
                state, damaged = run.load_state()
            except OSError as e:
                if not run.path.is_dir():  # no folder can be made there, so none of the others either
                    raise
                problems.append((run, UserError(f"{run.path}: {e.strerror or e}")))
                continue
            except UserError as e:
                problems.append((run, e))
                continue
            for line in damaged:
                print(f"{line}; falling back to the state before it", file=sys.stderr)
            ready.append((run, state))
        ready = align(ready)
    if args.data_parallel:  # the others follow the first
        paths = from_first([run.path for run, _ in ready])
        if not is_first():
            ready = [(run, run.load_state()[0]) for run in runs if run.path in paths]
    return ready, problems


def position(state: dict | None) -> tuple[int, int]:
    """Where in the data a cell is: (epoch, step)."""
    return (state["epoch"], state["step"]) if state else (0, 0)


def align(cells: list[tuple[Run, dict | None]]) -> list[tuple[Run, dict | None]]:
    """Brings cells to one position, so that they train together again.

    A process killed while it saved leaves some ahead of the others: they go back to the state before.
    """
    last = min((position(state) for _, state in cells), default=(0, 0))

    def back(run, state):
        if position(state) == last:
            return state
        if last == (0, 0):  # killed in the first save of all; of what is further, nothing is given up
            return None if position(state) <= (1, 0) else state
        return run.step_back(last) or state

    return [(run, back(run, state)) for run, state in cells]


class Trainer:
    """Trains cells together that are at one position in the data; keeps the engine, which is compiled, for the next."""

    def __init__(self, data, args, signals: Signals, n_cells: int, config: Config):
        self.data, self.args, self.signals, self.engine = data, args, signals, None
        on_gpu, shared = args.device.type == "cuda", args.data_parallel
        steps = math.ceil(len(data.train) / config.batch_size) * config.num_epochs * n_cells
        long = on_gpu and steps >= LONG  # so that measuring and compiling pay
        self.compile = long if args.compile == "auto" else args.compile == "on"
        self.capture = on_gpu and args.compile != "off"
        self.size = args.cells_at_once or (1 if shared or not on_gpu else None if long else AT_ONCE)
        usual = "channels_last" if config.image_shape[1] == 256 else "plain"  # 1.6 times as fast at 256 pixels on a CPU
        route = None if long and not shared else usual
        self.route = route if args.convolutions == "auto" else args.convolutions

    def size_for(self, config: Config, most: int) -> int:
        """How many of `most` cells to train at once: chunks of one size, as far as that is possible."""
        if self.size is None or self.route is None:
            sizes = [self.size] if self.size else doublings(most)
            routes = [self.route] if self.route else ROUTES
            self.size, self.route = fastest(config, sizes, self.args.device, routes)
            print(f"{self.size} cells at once, convolutions: {self.route}", flush=True)
        return math.ceil(most / math.ceil(most / self.size))

    def train(self, cells: list[tuple[Run, dict | None]]) -> None:
        """Position by position; in halves when the GPU's memory does not hold them."""
        for p in sorted({position(state) for _, state in cells}):
            together = [(run, state) for run, state in cells if position(state) == p]
            if not self._train(together):
                self._train_halves([run for run, _ in together])

    def _train_halves(self, runs: list[Run]) -> None:
        self.engine = None
        free(self.args.device)
        if len(runs) == 1 or self.args.data_parallel:
            raise UserError("--batch_size: the GPU's memory does not hold the cells; try fewer images, or fewer cells")
        print(f"{len(runs)} cells at once are too many for the GPU's memory; halving", flush=True)
        self.size = math.ceil(len(runs) / 2)
        for half in (runs[: self.size], runs[self.size :]):
            self.train([(run, run.load_state()[0]) for run in half if run.status == "unfinished"])

    def _train(self, cells: list[tuple[Run, dict | None]]) -> bool:
        """Whether the memory held them."""
        config = cells[0][0].config
        self._set_threads([state["threads"] for _, state in cells if state and "threads" in state])
        try:
            if self.engine is None or not self.engine.fits(config, len(cells)):
                self.engine = None
                free(self.args.device)
                how = {"compile": self.compile, "capture": self.capture, "route": self.route}
                self.engine = Engine(config, len(cells), self.args.device, data_parallel=self.args.data_parallel, **how)
            chunk = Chunk([run for run, _ in cells], [state for _, state in cells], self.engine)
            if chunk.epoch or chunk.step:
                print(f"resuming at epoch {chunk.epoch} of {chunk.config.num_epochs}", flush=True)
            train(chunk, self.data, self.signals, self.args.save_every)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            return False
        return True

    def _set_threads(self, before: list[int]) -> None:
        """Those that the cells began with, so that they go on bit for bit; else as many as there is room for now."""
        asked = self.args.threads
        if asked and before and before[0] != asked:
            print(f"--threads {asked}: the state was saved with {before[0]}; last digits may differ", flush=True)
        torch.set_num_threads(asked or (before[0] if before else utils.threads.choose()))


def check_data_parallel(n_train: int, n_test: int, batch_size: int) -> None:
    """Raises UserError where processes cannot share every batch."""
    world = place()[1]
    if not dist.is_torchelastic_launched():
        raise UserError(
            "--data_parallel: needs several processes; start them with torchrun --nproc_per_node N train.py"
        )
    for n in (n_train, n_test):
        smallest = min(n, n % batch_size or batch_size)
        if smallest < world:
            raise UserError(f"--batch_size: leaves a last batch of {smallest} images for {world} processes")


def train_all(runs: list[Run], data, args) -> list[tuple[Run, UserError]]:
    """Trains the runs chunk by chunk; returns those that could not be, and why."""
    problems = []
    with Signals() as signals:
        trainer = Trainer(data, args, signals, len(runs), runs[0].config) if runs else None
        while runs:
            together = [run for run in runs if run.config.seed == runs[0].config.seed]
            together = together[: trainer.size_for(together[0].config, len(together))]
            runs = [run for run in runs if run not in together]
            with contextlib.ExitStack() as held:
                cells, wrong = open_cells(together, args, held)
                problems += wrong
                trainer.train(cells)
            if signals.received and runs:
                raise Interrupted(signals.received, together[0].config.num_epochs)
    return problems


def summarise(runs: list[Run]) -> None:
    """Prints a table of the cells, and what to type next."""
    print(f"\n{'beta_y':>10} {'beta_z':>10} {'loss':>10} {'ll':>10} {'kl_y':>8} {'kl_z':>8} {'psnr':>6} {'seconds':>8}")
    for run in runs:
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


def main(argv=None) -> int:
    args = parse_args(argv)
    configs = grid_configs(args)
    check_route(args.convolutions, args.device)
    if configs[0].precision == "bf16" and args.device.type == "cpu" and (args.cells_at_once or 1) > 1:
        raise UserError(f"--cells_at_once: with bf16 a CPU trains one cell at a time, got {args.cells_at_once}")
    if is_first():
        describe(configs, args.device)
    runs = [Run.of(config, args.runs_dir) for config in configs]
    if args.dry_run:
        for run in runs:
            print(run.path)
        return 0
    data = load_data(configs[0], args.data_dir, args.device, args.download)
    mine = runs if args.data_parallel else share(runs)
    for run in mine:
        run.check(args.overwrite)
    todo = [r for r in mine if args.overwrite or r.status not in ("finished", "failed")]
    for run in mine:
        if run not in todo:
            load_tensors(run.path / "vae.pth")  # whole, or an error
            print(f"already complete: {run.path}" if run.status == "finished" else f"failed before: {run.path}")
    if args.data_parallel:
        check_data_parallel(len(data.train), len(data.test), configs[0].batch_size)
        join(args.device)
    torch.backends.cudnn.benchmark = True
    use_precision(configs[0].precision)
    threading.excepthook = lambda _: None  # of the writers of events, whose errors the training tells
    try:
        problems = train_all(todo, data, args)
    except Interrupted as e:
        if is_first() or not args.data_parallel:
            print(f"\nsaved at epoch {e.epoch}; rerun to continue: {command_line()}", file=sys.stderr)
        return 128 + e.signal
    wait_for_all()
    if is_first():
        summarise(runs)
        print(f"Look at it: tensorboard --logdir {args.runs_dir}")
        print(f"Evaluate it: python eval_beta_grid.py --run_batch_name {shlex.quote(runs[0].config.run_batch_name)}")
    failed = [
        f"{r.path}: failed, its loss is not finite; --overwrite trains it anew" for r in mine if r.status == "failed"
    ]
    problems = [e for run, e in problems if run.status != "finished"]  # or another process finished it
    held = [e for e in problems if isinstance(e, Held)]
    if len(held) < len(mine):  # else there was nothing here for this process to do, which its user should notice
        for e in held:
            print(f"note: {e}; it trains that one", file=sys.stderr)
        problems = [e for e in problems if e not in held]
    problems = [str(e) for e in problems] + failed
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
