"""Cells from one conditioned model: an ordinary run folder for each pair of betas."""

import dataclasses
import math
import time
from pathlib import Path

import torch

from datasets.loading import Data
from models.build import build_model
from models.conditioned import Conditioned
from models.stack import TERMS, Stack
from utils.config import FLAGS, Config
from utils.distributed import progress
from utils.errors import UserError
from utils.files import digest_of
from utils.runs import Run, load_model, runs_in
from utils.seeds import generator
from utils.training.pictures import N, pictures, write_pictures
from utils.training.targets import reach

TRAIN_IMAGES = 2000  # on which a cell's figures of the training images are taken, at most


def sources(cells: list[Config], runs_dir: str) -> dict[Run, list[Config]]:
    """The conditioned models that the cells are unfolded from, one for each seed, each with its cells.

    One of the batch whose range holds the cells is taken, else one of just their range. Raises UserError if the batch
    has such cells but their model is gone.
    """
    result = {}
    for seed in dict.fromkeys(c.seed for c in cells):
        mine = [c for c in cells if c.seed == seed]
        result[_existing(mine, runs_dir) or Run.of(_conditioned(mine), runs_dir)] = mine
    return result


def _conditioned(cells: list[Config]) -> Config:
    """Of a model for the range of the cells' betas."""
    ends = {}
    for name in ("beta_y", "beta_z"):
        values = [getattr(c, name) for c in cells]
        ends |= {name: min(values), f"beta_max_{name[-1]}": max(values)}
    return dataclasses.replace(cells[0], **ends)


def _existing(cells: list[Config], runs_dir: str) -> Run | None:
    """The conditioned model of the batch, trained or in training, of the smallest range that holds the cells."""
    alike = {n: getattr(cells[0], n) for n in ("beta_y", "beta_z", "run_batch_name")}  # whatever it says of these
    alike |= {name: None for name in vars(cells[0]) if name not in FLAGS}
    plain = dataclasses.replace(cells[0], **dict.fromkeys(("target_rate_y", "target_rate_z")))
    batch, found, orphans = Path(runs_dir, cells[0].run_batch_name), [], False
    for run in runs_in(batch)[0]:
        moved = {"dataset": cells[0].dataset} if run.config.data_name == cells[0].data_name else {}
        if dataclasses.replace(run.config, **alike, **moved) == plain:
            orphans |= run.config.source is not None
            if run.config.is_conditioned and all(_holds(run.config, c) for c in cells):
                found.append(run)
    if orphans and not found:
        raise UserError(
            f"--multi_rate: {batch} holds cells of a model that is not there any more, or whose range does not hold "
            "these betas; choose another --run_batch_name to train one"
        )
    return min(found, key=lambda run: run.config.beta_max_y * run.config.beta_max_z, default=None)


def _holds(source: Config, cell: Config) -> bool:
    return source.beta_y <= cell.beta_y <= source.beta_max_y and source.beta_z <= cell.beta_z <= source.beta_max_z


def unfold(source: Run, cells: list[Config], data: Data, args) -> tuple[list[Run], list[tuple[Run, UserError]]]:
    """Writes an ordinary run folder for each cell of a finished conditioned model; returns them, and what is wrong.

    Raises UserError for a model whose z has collapsed, unless --force is given.
    """
    if source.result.get("collapsed") and not args.force:
        raise UserError(
            f"{source.path}: its z has collapsed, so its cells would not be models of a hierarchy; train another one "
            "(--seed, --warmup_epochs), or unfold it all the same by --force"
        )
    model, runs, problems = load_model(source, args.device), [], []
    asked = [c for c in cells if c.has_target]
    if asked:
        cells = [c for c in cells if not c.has_target] + reach(model, asked, data)
    origin = digest_of(source.path / "vae.pth")
    for cell in progress(cells, unit="cell", desc="unfolding"):
        run = Run.of(dataclasses.replace(cell, source=origin, data_digest=source.config.data_digest), args.runs_dir)
        runs.append(run)
        try:
            run.check(args.overwrite)
            run.create()
            with run.locked():
                if args.overwrite:
                    run.restart()
                if run.status != "finished":
                    run.finish(*folded(model, run, data, args.device))
        except UserError as e:
            problems.append((run, e))
    return runs, problems


def unfold_all(plan: dict[Run, list[Config]], data: Data, args) -> tuple[list[Run], list[tuple[Run, str]]]:
    """`unfold` for several conditioned models: all their cells, and what is wrong."""
    done = [unfold(source, cells, data, args) for source, cells in plan.items()]
    return [run for runs, _ in done for run in runs], [problem for _, problems in done for problem in problems]


def folded(model: Conditioned, run: Run, data: Data, device: torch.device) -> tuple[dict, dict]:
    """The ordinary model's weights at a cell's betas, and what training.json says of it; draws its pictures."""
    start, config = time.monotonic(), run.config
    with torch.no_grad():
        at = torch.tensor([config.beta_y, config.beta_z], device=device).log10()
        weights = {name: p.detach().cpu().clone() for name, p in model.at(at).items()}
    plain = build_model(config)
    plain.load_state_dict(weights)
    stack = Stack(plain.to(device).eval(), 1)
    betas = [torch.tensor([b], device=device) for b in (config.beta_y, config.beta_z)]
    figures = {}
    for name, split in (("train", data.train.first(TRAIN_IMAGES)), ("test", data.test)):
        values = stack.evaluate(split, config.batch_size, generator(device, config.seed, "test"), *betas)[0].tolist()
        figures[name] = dict(zip(TERMS, values, strict=True))
    quality = plain.psnr(data.test.batches(config.batch_size))
    figures["test"]["psnr"] = quality if math.isfinite(quality) else None
    write_pictures(run.path, pictures(plain, next(iter(data.test.batches(N)))[0], config.seed))
    settings = {"epoch": config.num_epochs, "seconds": round(time.monotonic() - start, 2), "device": str(device)}
    parameters = sum(p.numel() for p in plain.parameters())
    return weights, {"status": "finished", **settings, "torch": torch.__version__, "parameters": parameters, **figures}
