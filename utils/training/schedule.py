"""The schedule: which cells train together, in which order, and from which position in the data."""

import collections
import contextlib
import gc
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from models.checks import check_networks
from utils.config import Config
from utils.distributed import from_first, is_first, place
from utils.errors import UserError, is_out_of_memory, one_line
from utils.files import load_tensors
from utils.locks import Held, note_held
from utils.runs import Run
from utils.training.console import GridBar, standing
from utils.training.saving import Interrupted, Signals
from utils.training.start import begin
from utils.training.training import Setup, Training

STACKED = 8  # the cells that `fastest` stacks; by a model of a GPU's speed, more gain nothing (untested)
Cell = tuple[Run, dict | None]  # a run, and its checkpoint if it has one
Problem = tuple[Run, UserError]  # a run, and why it is not trained
NO_MEMORY = "--batch_size: out of GPU memory; try a smaller batch size or a smaller --cells_at_once"


def train_all(runs: list[Run], data, setup: Setup, starts: Mapping[Path, Run]) -> list[Problem]:
    """Trains the runs, new ones in `starts` (by path) from the weights of others; returns those that cannot be opened.

    Raises Interrupted after a signal.
    """
    problems, size = [], setup.size
    torch.backends.cudnn.benchmark = True
    trained = {run.path: 0.0 if setup.overwrite else standing(run, starts.get(run.path))[1] for run in runs}
    with Signals() as signals, contextlib.closing(GridBar(runs, trained)) as bar:
        while runs:
            of_seed = [run for run in runs if run.config.seed == runs[0].config.seed]
            use_precision(runs[0].config.precision)
            most = max(collections.Counter(run.config.seed for run in runs).values())
            size = size or (fastest(runs[0].config, most, setup.device) if most > 1 else 1)
            together = of_seed[: math.ceil(len(of_seed) / math.ceil(len(of_seed) / size))]  # of equal sizes if possible
            runs = [run for run in runs if run not in together]
            with contextlib.ExitStack() as locks:
                cells, wrong = open_cells(together, setup, locks, starts)
                problems += wrong
                bar.skip([run for run in together if run not in dict(cells)])
                size = min(size, train_cells(cells, data, setup, signals, bar))
            if signals.received and (runs or together[0].config.is_conditioned):  # whose cells are still to be unfolded
                raise Interrupted(signals.received, together[0].config.last_epoch)
    return problems


def train_cells(cells: list[Cell], data, setup: Setup, signals: Signals, bar: GridBar) -> float:
    """Trains cells, those at one position in the data together, in halves if the GPU's memory is too small.

    Returns how many fit, inf if no number is known not to. Raises UserError if a single one does not.
    """
    most, usual = math.inf, torch.get_num_threads()
    for p in sorted({position(state) for _, state in cells}):
        together = [(run, state) for run, state in cells if position(state) == p]
        runs, states = (list(of_cells) for of_cells in zip(*together, strict=True))
        try:
            set_threads(setup.threads, states[0])
            training = Training(runs, states, setup)
            if p > (training.config.first_epoch, 0):
                print(f"resuming at epoch {training.epoch} of {training.config.last_epoch}", flush=True)
            training.train(data, signals, bar)
            continue
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            why = one_line(e)
        finally:
            torch.set_num_threads(usual)  # for the cells that follow
        training = None
        free(setup.device)  # out here, where the exception holds nothing any more
        if len(together) == 1 or setup.data_parallel:
            raise UserError(f"{NO_MEMORY} ({why})")
        print(f"{len(together)} cells at once do not fit into the GPU's memory; halving", flush=True)
        most = math.ceil(len(together) / 2)
        for half in (runs[:most], runs[most:]):
            unfinished = [(run, run.load_state()[0]) for run in half if run.status == "unfinished"]
            most = min(most, train_cells(unfinished, data, setup, signals, bar))
    return most


def set_threads(threads: int | None, state: dict | None) -> None:
    """Computes with the threads of --threads, else with those of a checkpoint, for bitwise equal results."""
    before = (state or {}).get("threads")
    if threads and before and before != threads:
        print(f"--threads {threads}: the checkpoint was saved with {before}; last digits may differ", flush=True)
    elif before:
        torch.set_num_threads(before)


def use_precision(precision: str) -> None:
    """Allows TF32 products on a GPU for every precision but fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def fastest(config: Config, most: int, device: torch.device) -> int:
    """How many of `most` cells to train at once: 1 or STACKED, whichever takes less time a cell in twenty steps."""
    x, seconds = torch.rand(config.batch_size, *config.image_shape, device=device), {}
    for m in sorted({1, min(STACKED, most)}):
        try:
            seconds[m] = _seconds_of_a_step(config, m, x) / m
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        free(device)  # before the next one allocates its own memory
    best = min(seconds, key=seconds.get, default=1)
    each = ", ".join(f"{1e3 * s:.3g} ms a cell with {m} at once" for m, s in seconds.items())
    print(f"cells at once: {best} (a step takes {each})", flush=True)
    return best


def _seconds_of_a_step(config: Config, m: int, x: torch.Tensor) -> float:
    training = Training([Run(Path(), config)] * m, [None] * m, Setup(x.device))
    training.begin_epoch(22)
    for i in range(22):
        if i == 2:
            start = clock(x.device)
        training.step(x, len(x))
    return (clock(x.device) - start) / 20


def clock(device: torch.device) -> float:
    """A time in seconds, read once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free(device: torch.device) -> None:
    """Frees the memory of discarded trainings; a compiled one is part of a reference cycle, hence gc."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of torch before 2.13, after a capture that failed; of a lost GPU
            torch.cuda.empty_cache()


def check_setup(setup: Setup, config: Config, n_runs: int) -> None:
    """Raises UserError for flags that are incompatible with the device or with the launcher, and for own networks."""
    if config.precision == "bf16" and setup.device.type == "cpu" and (setup.cells_at_once or 1) > 1:
        raise UserError(f"--cells_at_once: with bf16 a CPU trains one cell at a time, got {setup.cells_at_once}")
    on_gpu = setup.device.type == "cuda"
    if config.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--precision: this GPU has no bf16; try tf32 or fp32")
    if setup.data_parallel and not dist.is_torchelastic_launched():
        raise UserError(
            "--data_parallel: needs several processes; start them with torchrun --nproc_per_node N train.py"
        )
    if config.networks:
        check_networks(config, stacked=n_runs > 1 and setup.size != 1)


def check_batches(data, batch_size: int) -> None:
    """Raises UserError if a batch has fewer images than there are data-parallel processes."""
    smallest = min(min(n, n % batch_size or batch_size) for n in (len(data.train), len(data.test)))
    if smallest < place()[1]:
        raise UserError(f"--batch_size: leaves a last batch of {smallest} images for {place()[1]} processes")


def unfinished(runs: list[Run], overwrite: bool) -> list[Run]:
    """The runs that are still to be trained; prints a line for each other. Raises UserError for what cannot be."""
    for run in runs:
        run.check(overwrite)
    todo = [r for r in runs if overwrite or r.status not in ("finished", "failed")]
    for run in runs:
        if run not in todo:
            load_tensors(run.path / "vae.pth")  # raises UserError if damaged
            print(f"already complete: {run.path}" if run.status == "finished" else f"failed before: {run.path}")
    return todo


def open_cells(
    runs: list[Run], setup: Setup, locks: contextlib.ExitStack, starts: Mapping[Path, Run]
) -> tuple[list[Cell], list[Problem]]:
    """Locks the runs that are still to be trained, until `locks` is closed; returns these, and what is wrong.

    A new run in `starts` begins with the weights of another one.
    """
    cells, problems = [], []
    for run in runs if setup.writes else ():
        try:
            state = open_cell(run, setup.overwrite, locks, starts.get(run.path))
            if state is not False:
                cells.append((run, state))
        except OSError as e:
            if not run.path.is_dir():  # then none of the others can be made either
                raise
            problems.append((run, UserError(f"{run.path}: {e.strerror or e}")))
        except UserError as e:
            problems.append((run, e))
    cells = align(cells)
    if setup.data_parallel:  # all open the same runs
        paths = from_first([run.path for run, _ in cells])
        if not is_first():
            cells = [(run, run.load_state()[0]) for run in runs if run.path in paths]
    return cells, problems


def open_cell(run: Run, overwrite: bool, locks: contextlib.ExitStack, start: Run | None) -> dict | bool | None:
    """Locks a run; its checkpoint, None if it is new, False if another process has trained it in the meantime."""
    run.create()
    locks.enter_context(run.locked())
    if overwrite:
        run.restart()
    if run.status in ("finished", "failed"):
        return False
    state, damaged = run.load_state()
    for line in damaged:
        print(f"{line}; falling back to the previous checkpoint", file=sys.stderr)
    if state is None and start is not None:
        begin(run, start)
        state, _ = run.load_state()
    return state


def position(state: dict | None) -> tuple[int, int]:
    """A checkpoint's position in the data, (epoch, step); (0, 0) without one."""
    return (state["epoch"], state["step"]) if state else (0, 0)


def align(cells: list[Cell]) -> list[Cell]:
    """Brings cells to a common position in the data where possible, so that they train together again.

    A process killed while saving leaves some cells one checkpoint ahead; these return to the previous one.
    """
    last = min((position(state) for _, state in cells), default=(0, 0))

    def back(run: Run, state: dict | None) -> dict | None:
        if position(state) == last:
            return state
        if last == (0, 0):  # killed during the first save; cells past the first epoch keep their progress
            return None if position(state) <= (1, 0) else state
        return run.step_back(last) or state

    return [(run, back(run, state)) for run, state in cells]


def report(problems: list[Problem], runs: list[Run], single: bool, overwrite: bool) -> int:
    """Prints the problems of this process and those of its `runs` that failed; returns the exit status."""
    # another process may have finished it since, unless it was finished before, and was to be trained again
    errors = [e for run, e in problems if overwrite or run.status != "finished"]
    if not single:  # of which the user should notice that nothing was done
        for e in errors:
            if isinstance(e, Held):
                note_held(e)
        errors = [e for e in errors if not isinstance(e, Held)]
    lines = [str(e) for e in errors]
    lines += [
        f"{r.path}: failed, the loss is not finite; --overwrite retrains it" for r in runs if r.status == "failed"
    ]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0
