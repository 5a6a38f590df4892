"""Which cells train together, when, and from which position in the data."""

import contextlib
import math
import sys
import threading

import torch
import torch.distributed as dist

from models.stack import ROUTES
from utils.config import Config
from utils.distributed import from_first, is_first, place
from utils.errors import UserError, is_out_of_memory
from utils.files import load_tensors
from utils.runs import Run
from utils.training.chunk import Chunk
from utils.training.engine import Engine, check_route, doublings, fastest, free, use_precision
from utils.training.loop import Interrupted, Signals, report_thread, train

LONG = 20_000  # model steps: about as many as cost what measuring and compiling do
AT_ONCE = 32  # cells of shorter trainings on a GPU


def check_flags(args, config: Config) -> None:
    """Raises UserError for flags that cannot be had together, or on that device."""
    check_route(args.convolutions, args.device)
    if config.precision == "bf16" and args.device.type == "cpu" and (args.cells_at_once or 1) > 1:
        raise UserError(f"--cells_at_once: with bf16 a CPU trains one cell at a time, got {args.cells_at_once}")


def unfinished(runs: list[Run], overwrite: bool) -> list[Run]:
    """The runs that are still to be trained; a line for each of the others.

    Raises UserError for a folder that cannot be written or holds something else, and for damaged weights.
    """
    for run in runs:
        run.check(overwrite)
    todo = [r for r in runs if overwrite or r.status not in ("finished", "failed")]
    for run in runs:
        if run not in todo:
            load_tensors(run.path / "vae.pth")  # whole, or an error
            print(f"already complete: {run.path}" if run.status == "finished" else f"failed before: {run.path}")
    return todo


def open_cells(
    runs: list[Run], args, held: contextlib.ExitStack
) -> tuple[list[tuple[Run, dict | None]], list[tuple[Run, str]]]:
    """Locks the runs that are still to be trained; returns them with their resume states, and what is wrong."""
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
            except UserError as e:
                problems.append((run, str(e)))
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
        torch.backends.cudnn.benchmark = True
        use_precision(config.precision)
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


def train_all(runs: list[Run], data, args) -> list[tuple[Run, str]]:
    """Trains the runs chunk by chunk; returns what went wrong."""
    problems = []
    threading.excepthook = report_thread
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
