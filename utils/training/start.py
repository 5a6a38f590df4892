"""Where a training starts that does not start anew: at a finished run's weights, or where a shorter one ended."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from utils.config import Config
from utils.distributed import is_first
from utils.errors import UserError
from utils.files import digest_of
from utils.runs import Run, load_model, runs_in
from utils.training.optimizers import MOMENTS


def shorter(cells: list[Config], runs: list[Run]) -> dict[Config, Run]:
    """For each cell the longest of the finished runs that it continues, where there is one."""
    result, finished = {}, [run for run in runs if run.status == "finished"]
    for cell in cells:
        continued = [run for run in finished if cell.continues(run.config)]
        if continued:
            result[cell] = max(continued, key=lambda run: run.config.num_epochs)
    return result


def with_start(cells: list[Config], path: str | None) -> dict[Config, Run | None]:
    """The cells, each with the finished run whose weights it starts from, or that it continues; None without a path.

    A cell that continues a run is what it would be without a break; any other keeps the digest of what it starts from.
    Raises UserError if there is no such run, or if it is of another architecture, unfinished or damaged.
    """
    if path is None:
        return dict.fromkeys(cells)
    if cells[0].multi_rate:
        raise UserError("--init_from: a multi-rate model is trained from the beginning; start from one of its cells")
    folder = Path(path)
    is_run = (folder / "config.json").is_file()
    runs = [Run.open(folder)] if is_run else runs_in(folder)[0]
    if not runs:
        raise UserError(f"--init_from: {folder} is neither a run nor a batch of runs")
    continued, result = shorter(cells, [r for r in runs if (r.path / "adam.pth").exists()]), {}
    for cell in cells:
        source = continued.get(cell) or (runs[0] if is_run else None)
        if source is None:
            raise UserError(
                f"--init_from: {folder} has no finished run of fewer epochs for beta_y {cell.beta_y:g}, beta_z "
                f"{cell.beta_z:g} with these settings; name a single run to start from its weights"
            )
        _check(cell, source)
        if cell not in continued:
            cell = dataclasses.replace(cell, init_from=digest_of(source.path / "vae.pth"))
        result[cell] = source
    return result


def note_shorter(runs: Iterable[Run], starts: Mapping[Path, Run]) -> None:
    """Says so if new runs could continue others in their batch, and are not asked to."""
    new = {run.config: run.path for run in runs if run.path not in starts and run.status == "new"}
    sources = [*shorter([*new], runs_in(next(iter(new.values())).parent)[0]).values()] if new else []
    if len(sources) == 1:
        path, which = sources[0].path, f"{sources[0].path} is this run"
    elif sources:
        path = sources[0].path.parent
        which = f"{path} has {len(sources)} of these cells"
    if sources and is_first():
        print(f"note: {which} with fewer epochs; --init_from {path} continues instead of starting anew", flush=True)


def _check(cell: Config, source: Run) -> None:
    theirs, where = source.config, f"--init_from: {source.path}"
    different = [n for n in (*cell.differs_in(theirs, "model"), "image_shape", "is_conditioned") if n != "sigma"]
    for name in different:
        if getattr(theirs, name) != getattr(cell, name):
            both = f"{name} {getattr(theirs, name)}, not {getattr(cell, name)}"
            raise UserError(f"{where} is of another architecture: {both}")
    if source.status != "finished":
        raise UserError(f"{where} is {source.status}; the command that trains it continues it")
    if theirs.num_epochs >= cell.num_epochs and cell.begins_as(theirs):
        more = f"--num_epochs must be larger to continue it, got {cell.num_epochs}"
        raise UserError(f"{where} has {theirs.num_epochs} epochs; {more}")
    load_model(source, torch.device("cpu"))


def begin(run: Run, source: Run) -> None:
    """Writes the first checkpoint of a run that starts from another one, or of a cell of a multi-rate model."""
    model, config = load_model(source, torch.device("cpu")), run.config
    weights = dict(model.named_parameters())
    if config.source:
        weights = model.weights_at(torch.tensor([config.beta_y, config.beta_z]).log10())
    if config.source or config.init_from:
        moments = {k: {name: torch.zeros_like(p) for name, p in weights.items()} for k in MOMENTS}
        state = {**moments, "adam_steps": 0, "epoch": config.first_epoch, "step": 0, "seconds": 0.0}
        state |= {"sessions": source.result.get("sessions", [])} if config.source else {}
    else:
        if source.config.data_digest not in (None, run.config.data_digest):
            raise UserError(f"--init_from: {source.path} was trained on other images than {run.config.dataset} has")
        state = source.read_state(source.path / "adam.pth")
    run.save_state({**state, "weights": {name: p.detach().clone() for name, p in weights.items()}})
