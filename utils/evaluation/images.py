"""How many images the steps of a batch use: as many as the error asks for that differences between cells may have."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.evaluation.metrics import columns_of, metric, read_metrics
from utils.evaluation.run import EvaluatedRun, Evaluation
from utils.evaluation.steps import Step
from utils.files import read_json, write_json
from utils.locks import locked
from utils.runs import Run

SIZES = {"n_samples": "samples", "probe_images": "probe images", "test_images": "test images"}  # of an Evaluation
# that are tried first, then doubled until the error is reached; of fewer, learning curves do not tell how they go on
LEAST = {"n_samples": 640, "probe_images": 1280, "test_images": 640}
CELLS = 5  # that tell it: corners and centre of the plane
FILE = "images.json"  # in which a batch keeps what was chosen
Compute = Callable[[list[EvaluatedRun], list[Step]], bool]  # evaluates cells; whether there was time


def choose(
    folder: Path,
    runs: list[Run],
    steps: list[Step],
    evaluation: Evaluation,
    error: float,
    names: list[str],
    compute: Compute,
) -> None:
    """Sets the named SIZES of an Evaluation to the least by which a batch's cells differ with such errors; says so.

    The error is relative to the spread of each metric over the cells. All images are used where there are few cells, or
    some were evaluated with all (a note says so). A batch keeps what was chosen for an error.
    """
    file, cells, told, full, alone = folder / FILE, [], [], [], contextlib.nullcontext()
    for run in runs:
        with contextlib.suppress(UserError):
            read_metrics(run.path)  # which may be damaged
            cells.append(EvaluatedRun(run, evaluation))
    using = {name: [step for step in steps if name in step.settings] for name in names}
    using = {name: sized for name, sized in using.items() if sized}
    if len(cells) < CELLS or not using:
        return
    if not evaluation.force:  # other processes of the batch wait, and use what the first one chose
        (folder / ".images").mkdir(exist_ok=True)
        alone = locked(folder / ".images", math.inf)
    with alone:
        known = {"error": error} if evaluation.force else _kept(file, error)
        for name, sized in using.items():
            needs = [cell.needs(step) for cell in cells for step in sized]
            if not all(needs) and known.get(name) != 0:
                if any(needs):
                    full.append(SIZES[name])
                continue
            if name not in known:
                known[name] = _smallest(Pilot(file, known, name, cells[:CELLS], sized, compute), error)
            if known[name] is None:
                return
            told.append(f"{known[name]:,} {SIZES[name]}" if known[name] else f"all {SIZES[name]}")
            setattr(evaluation, name, known[name] or getattr(evaluation, name))
        if full:
            evaluation.note(f"all {', '.join(full)} are used, as some cells have them; --force chooses anew")
        if told:
            write_json(file, {k: v for k, v in known.items() if k != "tried"})
            print(f"--error {error:g}: {', '.join(told)}", flush=True)


def _kept(file: Path, error: float) -> dict:
    """What a batch keeps of an error. Raises UserError if it is damaged."""
    try:
        kept = read_json(file) if file.exists() else {}
        is_right = all(type(kept.get(name, 0)) is int and kept.get(name, 0) >= 0 for name in SIZES)
    except UserError:
        is_right = False
    if not is_right:
        raise UserError(f"{file}: damaged; remove it, the numbers of images are then chosen anew")
    return kept if kept.get("error") == error else {"error": error}


class Pilot(NamedTuple):
    """The cells by which one of SIZES is chosen."""

    file: Path
    known: dict  # what it holds: all that was measured, under `tried`, until the numbers are chosen
    size: str
    cells: list[EvaluatedRun]
    sized: list[Step]  # the steps that use so many images
    compute: Compute

    @property
    def most(self) -> int:
        """The number of images without an error to choose by."""
        evaluation = self.cells[0].evaluation
        data = evaluation.data(self.cells[0].config)
        of_probes = min(evaluation.probe_images, len(data.train))
        return {"n_samples": evaluation.n_samples, "probe_images": of_probes, "test_images": len(data.test)}[self.size]

    def measured(self, n: int) -> list[dict[str, float]] | None:
        """The cells' metrics by n images; None if there was no time."""
        of_n = self.known.setdefault("tried", {}).setdefault(self.size, {}).setdefault(str(n), {})
        if any(cell.weights not in of_n for cell in self.cells):
            evaluation = self.cells[0].evaluation
            before = getattr(evaluation, self.size)
            setattr(evaluation, self.size, n)
            try:
                if not self.compute(self.cells, self.sized):
                    return None
                for cell in self.cells:  # none of one that failed, or that another process has by another number
                    lacks = any(cell.needs(step) and not cell.has(step) for step in self.sized)
                    values = {} if lacks else cell.metrics
                    of_n[cell.weights] = {k: v for k, v in values.items() if isinstance(v, int | float)}
            finally:
                setattr(evaluation, self.size, before)
            write_json(self.file, self.known)
        return [of_n[cell.weights] for cell in self.cells]


def _smallest(pilot: Pilot, error: float) -> int | None:
    """The number of images; 0 for all, None if there was no time."""
    n, before, most = LEAST[pilot.size], None, pilot.most
    if 2 * n >= most:  # the least that can be chosen
        return 0
    while n < most:
        if (after := pilot.measured(n)) is None:
            return None
        left = 1 if pilot.size == "probe_images" else math.sqrt(n / most)  # probes are tested on all test images
        error_of_n = error_left(before, after, pilot.sized, error, left) if before else math.inf
        if error_of_n <= 1:
            return n
        n, before = 2 * n, after
    return 0


def error_left(before: list[dict], after: list[dict], steps: list[Step], error: float, left: float) -> float:
    """The error of differences between cells, relative to what is allowed: root mean square over the steps' metrics.

    `before` and `after` are the cells' metrics by half of the images, and by all. What doubling changes is the error
    that is left, of a mean as of a bias of 1 / N; what it changes in all cells alike is no difference between them.
    Allowed is `error` of the spread over the cells, or what is left of standard errors with all images, if more.
    """
    columns = [n for step in steps for n in columns_of(step.name)]
    names = [n for n in columns if metric(n).better and any(f"{n}_se" in cell for cell in after)]
    tables = (before, names), (after, names), (after, [f"{n}_se" for n in names])
    tables = [np.array([[cell.get(n, math.nan) for n in row] for cell in cells]) for cells, row in tables]
    complete = np.isfinite(tables).all((0, 2))  # without cells that failed
    if complete.sum() < 2 or not names:
        return math.inf
    old, new, se = (values[complete] for values in tables)
    change, spread = (new - old).std(0, ddof=1), new.std(0, ddof=1)
    allowed = np.fmax(error * spread, left * se.mean(0))
    ratios = (change / allowed)[allowed > 0]
    return math.sqrt((ratios**2).mean()) if len(ratios) else math.inf
