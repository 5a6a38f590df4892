"""Where a training starts that does not start anew: at a finished run's weights, or where a shorter one ended."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from utils.config import Config
from utils.errors import UserError
from utils.files import digest_of
from utils.runs import Run, load_model, runs_in
from utils.training.engine import MOMENTS

ARCHITECTURE = ("vae_type", "image_shape", "px_y_family_ll", "qz_family", "use_conv_z", "z_dims", "linear_y_with_dims")
ARCHITECTURE += ("conv_channels", "is_conditioned")
NAMES = ("run_name", "run_batch_name", "dataset", "data_digest", "no_warmup")  # no_warmup follows from warmup_epochs


def settings(config: Config, *but: str) -> tuple:
    """What determines a training, without the settings named; the data set by its name, since folders move."""
    return (config.data_name, *(v for k, v in vars(config).items() if k not in (*NAMES, *but)))


def shorter(cells: list[Config], runs: list[Run]) -> dict[Config, Run]:
    """For each cell the longest of the runs that differs from it only in having fewer epochs, where there is one."""
    found = {}
    for run in runs:
        if run.config.is_extendable and run.status == "finished":
            known = found.setdefault(settings(run.config, "num_epochs"), [])
            known.append(run)
    result = {}
    for cell in cells:
        fewer = [r for r in found.get(settings(cell, "num_epochs"), ()) if r.config.num_epochs < cell.num_epochs]
        if fewer:
            result[cell] = max(fewer, key=lambda r: r.config.num_epochs)
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
    one = (folder / "config.json").is_file()
    runs = [Run.open(folder)] if one else runs_in(folder)[0]
    if not runs:
        raise UserError(f"--init_from: {folder} is neither a run nor a batch of runs")
    continued, result = shorter(cells, [r for r in runs if (r.path / "adam.pth").exists()]), {}
    for cell in cells:
        source = continued.get(cell) or (runs[0] if one else None)
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
    if new and (found := shorter([*new], runs_in(next(iter(new.values())).parent)[0])):
        first = next(iter(found.values())).path
        which = f"{first} is this run" if len(found) == 1 else f"{first.parent} has {len(found)} of these cells"
        path = first if len(found) == 1 else first.parent
        print(f"note: {which} with fewer epochs; --init_from {path} continues instead of starting anew", flush=True)


def _check(cell: Config, source: Run) -> None:
    for name in ARCHITECTURE:
        theirs, ours = getattr(source.config, name), getattr(cell, name)
        if theirs != ours:
            raise UserError(f"--init_from: {source.path} is of another architecture: {name} {theirs}, not {ours}")
    if source.status != "finished":
        raise UserError(f"--init_from: {source.path} is {source.status}; the command that trains it continues it")
    same = settings(cell, "num_epochs") == settings(source.config, "num_epochs") and source.config.is_extendable
    if same and source.config.num_epochs >= cell.num_epochs:
        raise UserError(
            f"--init_from: {source.path} has {source.config.num_epochs} epochs; --num_epochs must be larger to "
            f"continue it, got {cell.num_epochs}"
        )
    load_model(source, torch.device("cpu"))


def begin(run: Run, source: Run) -> None:
    """Writes the first checkpoint of a run that starts from another one."""
    weights = dict(load_model(source, torch.device("cpu")).named_parameters())
    if run.config.init_from is None:
        theirs, ours = source.config.data_digest, run.config.data_digest
        if theirs != ours:
            raise UserError(f"--init_from: {source.path} was trained on other images than {run.config.dataset} has")
        state = source.final_state()
    else:
        moments = {k: {name: torch.zeros_like(p) for name, p in weights.items()} for k in MOMENTS}
        state = {**moments, "adam_steps": 0, "epoch": 0, "step": 0, "seconds": 0.0}
    run.save_state({**state, "weights": {name: p.detach().clone() for name, p in weights.items()}})
