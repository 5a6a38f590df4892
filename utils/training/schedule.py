"""The schedule: which cells train together, in which order, and from which position in the data."""

import contextlib
import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from utils import threads
from utils.config import Config
from utils.distributed import from_first, is_first, place
from utils.errors import UserError, is_out_of_memory
from utils.files import load_tensors
from utils.locks import Held, left_to, remove_abandoned
from utils.runs import Run
from utils.training.bar import GridBar
from utils.training.chunk import Chunk
from utils.training.engine import Engine, fastest, free, use_precision
from utils.training.loop import Interrupted, Signals, train
from utils.training.start import begin


def check_flags(args, config: Config) -> None:
    """Raises UserError for flags that are incompatible with each other or with the device."""
    if config.precision == "bf16" and args.device.type == "cpu" and (args.cells_at_once or 1) > 1:
        raise UserError(f"--cells_at_once: with bf16 a CPU trains one cell at a time, got {args.cells_at_once}")


def unfinished(runs: list[Run], overwrite: bool) -> list[Run]:
    """The runs that are still to be trained; prints a line for each of the others.

    Raises UserError if a folder cannot be written or holds another configuration, or if weights are damaged.
    """
    for batch in {run.path.parent for run in runs}:
        remove_abandoned(batch)
    for run in runs:
        run.check(overwrite)
    todo = [r for r in runs if overwrite or r.status not in ("finished", "failed")]
    for run in runs:
        if run not in todo:
            load_tensors(run.path / "vae.pth")  # raises UserError if damaged
            print(f"already complete: {run.path}" if run.status == "finished" else f"failed before: {run.path}")
    return todo


def open_cells(
    runs: list[Run], args, held: contextlib.ExitStack, starts: Mapping[Path, Run]
) -> tuple[list[tuple[Run, dict | None]], list[tuple[Run, UserError]]]:
    """Locks the runs that are still to be trained, until `held` is closed.

    A new run in `starts` begins with the weights of another one. Returns each run with its checkpoint (None for a new
    run), and each run that cannot be opened with the reason.
    """
    ready, problems = [], []
    if is_first() or not args.data_parallel:
        for run in runs:
            try:
                run.create()
                held.enter_context(run.locked())
                if args.overwrite:
                    run.restart()
                if run.status in ("finished", "failed"):  # another process has trained it in the meantime
                    continue
                state, damaged = run.load_state()
                if state is None and run.path in starts:
                    begin(run, starts[run.path])
                    state, _ = run.load_state()
            except OSError as e:
                if not run.path.is_dir():  # then none of the others can be made either
                    raise
                problems.append((run, UserError(f"{run.path}: {e.strerror or e}")))
                continue
            except UserError as e:
                problems.append((run, e))
                continue
            for line in damaged:
                print(f"{line}; falling back to the previous checkpoint", file=sys.stderr)
            ready.append((run, state))
        ready = align(ready)
    if args.data_parallel:  # only the first process locks; all open the same runs
        paths = from_first([run.path for run, _ in ready])
        if not is_first():
            ready = [(run, run.load_state()[0]) for run in runs if run.path in paths]
    return ready, problems


def position(state: dict | None) -> tuple[int, int]:
    """A checkpoint's position in the data, (epoch, step); (0, 0) without one."""
    return (state["epoch"], state["step"]) if state else (0, 0)


def align(cells: list[tuple[Run, dict | None]]) -> list[tuple[Run, dict | None]]:
    """Brings cells to a common position in the data where possible, so that they train together again.

    A process killed while saving leaves some cells one checkpoint ahead; these return to the previous one.
    """
    last = min((position(state) for _, state in cells), default=(0, 0))

    def back(run, state):
        if position(state) == last:
            return state
        if last == (0, 0):  # killed during the first save; cells past the first epoch keep their progress
            return None if position(state) <= (1, 0) else state
        return run.step_back(last) or state

    return [(run, back(run, state)) for run, state in cells]


class Trainer:
    """Trains cells that are at the same position in the data; reuses the compiled engine for later chunks."""

    def __init__(self, data, args, signals: Signals, config: Config, bar: GridBar | None = None):
        self.data, self.args, self.signals, self.engine, self.bar = data, args, signals, None, bar
        torch.backends.cudnn.benchmark = True
        use_precision(config.precision)
        on_gpu, shared = args.device.type == "cuda", args.data_parallel
        self.compile, self.capture = args.compile == "on", on_gpu and args.compile != "off"
        self.size = args.cells_at_once or (1 if shared or not on_gpu else None)

    def size_for(self, config: Config, most: int) -> int:
        """How many of `most` cells to train at once, such that chunks are of equal size where possible."""
        if self.size is None:
            self.size = fastest(config, most, self.args.device)
        return math.ceil(most / math.ceil(most / self.size))

    def train(self, cells: list[tuple[Run, dict | None]]) -> None:
        """Trains the cells, those at one position together; in halves if they do not fit into the GPU's memory."""
        for p in sorted({position(state) for _, state in cells}):
            together = [(run, state) for run, state in cells if position(state) == p]
            if not self._train(together):
                self._train_halves([run for run, _ in together])

    def _train_halves(self, runs: list[Run]) -> None:
        self.engine = None
        free(self.args.device)
        if len(runs) == 1 or self.args.data_parallel:
            raise UserError("--batch_size: out of GPU memory; try a smaller batch size or a smaller --cells_at_once")
        print(f"{len(runs)} cells at once do not fit into the GPU's memory; halving", flush=True)
        self.size = math.ceil(len(runs) / 2)
        for half in (runs[: self.size], runs[self.size :]):
            self.train([(run, run.load_state()[0]) for run in half if run.status == "unfinished"])

    def _set_threads(self, before: list[int]) -> None:
        """Uses the number of threads of the checkpoints, for bitwise equal results; else as many as cores are free."""
        asked = self.args.threads
        if asked and before and before[0] != asked:
            print(f"--threads {asked}: the checkpoint was saved with {before[0]}; last digits may differ", flush=True)
        torch.set_num_threads(asked or (before[0] if before else threads.choose()))

    def _train(self, cells: list[tuple[Run, dict | None]]) -> bool:
        """Trains cells at one position; returns False if they do not fit into the memory."""
        config = cells[0][0].config
        self._set_threads([state["threads"] for _, state in cells if state and "threads" in state])
        try:
            if self.engine is None or not self.engine.fits(config, len(cells)):
                self.engine = None
                free(self.args.device)
                how = {"compile": self.compile, "capture": self.capture}
                self.engine = Engine(config, len(cells), self.args.device, data_parallel=self.args.data_parallel, **how)
            chunk = Chunk([run for run, _ in cells], [state for _, state in cells], self.engine)
            if chunk.epoch or chunk.step:
                print(f"resuming at epoch {chunk.epoch} of {chunk.config.num_epochs}", flush=True)
            train(chunk, self.data, self.signals, self.args.save_every, self.bar)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            return False
        return True


def check_data_parallel(n_train: int, n_test: int, batch_size: int) -> None:
    """Raises UserError without torchrun, or if a batch has fewer images than there are processes."""
    world = place()[1]
    if not dist.is_torchelastic_launched():
        raise UserError(
            "--data_parallel: needs several processes; start them with torchrun --nproc_per_node N train.py"
        )
    for n in (n_train, n_test):
        smallest = min(n, n % batch_size or batch_size)
        if smallest < world:
            raise UserError(f"--batch_size: leaves a last batch of {smallest} images for {world} processes")


def train_all(runs: list[Run], data, args, starts: Mapping[Path, Run]) -> list[tuple[Run, UserError]]:
    """Trains the runs chunk by chunk, new ones in `starts` (by path) from the weights of others.

    Returns each run that could not be opened with the reason.
    """
    problems = []
    threading.excepthook = lambda _: None  # of the event writers' threads, whose errors the log reports
    with Signals() as signals, contextlib.closing(GridBar(runs)) as bar:
        trainer = Trainer(data, args, signals, runs[0].config, bar) if runs else None
        while runs:
            together = [run for run in runs if run.config.seed == runs[0].config.seed]
            together = together[: trainer.size_for(together[0].config, len(together))]
            runs = [run for run in runs if run not in together]
            with contextlib.ExitStack() as held:
                cells, wrong = open_cells(together, args, held, starts)
                problems += wrong
                bar.skip(len(together) - len(cells))
                trainer.train(cells)
            if signals.received and (runs or args.multi_rate):  # whose cells are still to be unfolded
                raise Interrupted(signals.received, together[0].config.num_epochs)
    return problems


def report(problems: list[tuple[Run, UserError]], runs: list[Run], single: bool, overwrite: bool) -> int:
    """Prints the problems of this process and those of its `runs` that failed; returns the exit status.

    A `single` run, of no grid, that is held leaves nothing to do, which its user should notice.
    """
    # another process may have finished it since, unless it was finished before, and was to be trained again
    problems = [e for run, e in problems if overwrite or run.status != "finished"]
    held = [e for e in problems if isinstance(e, Held)]
    if not single:
        for e in held:
            left_to(e)
        problems = [e for e in problems if e not in held]
    lines, failed = [str(e) for e in problems], [r for r in runs if r.status == "failed"]
    lines += [f"{r.path}: failed, the loss is not finite; --overwrite retrains it" for r in failed]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0
