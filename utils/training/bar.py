"""One progress bar for all cells that a process trains, and a line for each that is done."""

import math
import sys

from tqdm import tqdm

from utils.distributed import duration, progress
from utils.names import what_differs
from utils.runs import Run

FORMAT = "{percentage:3.0f}%|{bar:16}| {desc} · {remaining} left"


class GridBar:
    """The bar of several runs; it counts steps of single cells, those of earlier trainings as well."""

    def __init__(self, runs: list[Run]):
        self.names = dict(zip([run.path for run in runs], what_differs([run.config for run in runs]), strict=True))
        self.cells, self.done, self.steps, self.bar = len(runs), 0, 0, None

    def begin(self, training) -> None:
        """A training begins or goes on."""
        self.steps = training.steps * training.config.num_epochs
        if self.bar is None:
            often = {} if sys.stderr and sys.stderr.isatty() else {"miniters": training.steps}  # a line an epoch
            self.bar = progress(total=self.cells * self.steps, dynamic_ncols=True, bar_format=FORMAT, **often)
        steps = training.epoch * training.steps + training.steps_done
        self._jump(self.done * self.steps + len(training.runs) * steps)
        self.show(training, math.nan)

    def update(self, steps: int) -> None:
        """So many steps of single cells have been made."""
        self.bar.update(steps)

    def _jump(self, n: int) -> None:
        """Counts up or down to n, without taking that for speed."""
        if not self.bar.disable:
            self.bar.initial += n - self.bar.n
            self.bar.last_print_n += n - self.bar.n
            self.bar.n = n

    def show(self, training, loss: float) -> None:
        """Says which cells are trained, the epochs that are done, and the loss, if it is finite."""
        first, last = self.done + 1, self.done + len(training.runs)
        text = f"epoch {training.epoch}/{training.config.num_epochs}"
        if first < last:
            text = f"cells {first} to {last} of {self.cells} · {text}"
        elif self.cells > 1:
            text = f"cell {first}/{self.cells}, {self.names[training.runs[0].path]} · {text}"
        if math.isfinite(loss):
            text += f" · loss {loss:.4g}"
        self.bar.set_description_str(text, refresh=False)

    def end(self, training) -> None:
        """A training is done: of several cells, a line for each."""
        self.done += len(training.runs)
        self._jump(self.done * self.steps)
        for run in training.written.values() if self.cells > 1 else ():
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
