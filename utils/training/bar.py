"""One progress bar for all cells that a process trains, and a line for each that is done."""

import math
import sys

from tqdm import tqdm

from utils.distributed import duration, progress
from utils.names import what_differs
from utils.runs import Run
from utils.training.chunk import Chunk

FORMAT = "{percentage:3.0f}%|{bar:16}| {desc} · {left}"


class GridBar:
    """The bar of several runs; it counts steps of single cells, those of earlier trainings as well."""

    def __init__(self, runs: list[Run]):
        self.names = dict(zip([run.path for run in runs], what_differs([run.config for run in runs]), strict=True))
        self.cells, self.done, self.steps, self.bar = len(runs), 0, 0, None

    def begin(self, chunk: Chunk, steps: int) -> None:
        """A chunk begins or goes on, with so many steps an epoch."""
        self.steps = steps * chunk.config.num_epochs
        if self.bar is None:
            each = {} if sys.stderr and sys.stderr.isatty() else {"miniters": steps}  # in a file, a line an epoch
            self.bar = progress(total=self.cells * self.steps, dynamic_ncols=True, bar_format=FORMAT, **each)
        self._jump(self.done * self.steps + len(chunk.runs) * (chunk.epoch * steps + chunk.step))
        self.show(chunk, math.nan)

    def _jump(self, n: int) -> None:
        """Counts up or down to n, without taking that for speed."""
        if not self.bar.disable:
            more = n - self.bar.n
            self.bar.n, self.bar.initial, self.bar.last_print_n = (
                n,
                self.bar.initial + more,
                self.bar.last_print_n + more,
            )

    def show(self, chunk: Chunk, loss: float) -> None:
        """Says which cells are trained, the epochs that are done, and the loss, if it is known."""
        first, last = self.done + 1, self.done + len(chunk.runs)
        which = f"cell {first}/{self.cells}, {self.names[chunk.runs[0].path]} · " if first == last else None
        which = which or f"cells {first} to {last} of {self.cells} · "
        text = which * (self.cells > 1) + f"epoch {chunk.epoch}/{chunk.config.num_epochs}"
        self.bar.set_description_str(text + (f" · loss {loss:.4g}" if math.isfinite(loss) else ""), refresh=False)

    def end(self, chunk: Chunk) -> None:
        """A chunk is done: of several cells, a line for each."""
        self.done += len(chunk.runs)
        self._jump(self.done * self.steps)
        for run in chunk.written.values() if self.cells > 1 else ():
            t, seconds = run.result["test"], run.result["seconds"]
            rates = f"loss {t['loss']:.4g}, R(y|z) {t['kl_y']:.3g}, R(z) {t['kl_z']:.3g} nats"
            tqdm.write(f"finished: {self.names[run.path]} · {rates} · {duration(seconds)}")
            sys.stdout.flush()

    def skip(self, cells: int) -> None:
        """So many cells are not trained here after all."""
        self.cells -= cells
        if self.bar is not None:
            self.bar.total = self.cells * self.steps

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
