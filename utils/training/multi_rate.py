"""What is special to multi-rate models: how betas spread in their training, unfolding, and betas for given rates."""

import dataclasses
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.batches import chosen
from datasets.loading import Data
from models.build import build_model
from models.conditioned import Conditioned
from models.stack import TERMS, Stack
from models.tables import COLLAPSED
from utils.config import Config
from utils.distributed import progress
from utils.errors import UserError
from utils.files import digest_of
from utils.provenance import now, provenance
from utils.runs import Run, load_model, runs_in
from utils.seeds import generator
from utils.training.log import N, figures, pictures, write_pictures

IN_USE = 2.0  # nats of R(z), or half of what it can hold: more than noise keeps for a while
SPREAD = 0.15  # of the training, in which betas fill their range
TRAIN_IMAGES = 2000  # on which a cell's figures of the training images are taken, at most
SEARCHED_IMAGES = 1024  # of the training set, on which rates are matched
COARSE = 4  # points along each axis of the table that a search starts from
STEP = 0.02  # of the finite differences, in log10 of a beta
CLOSE = 0.005  # relative difference of rates that counts as met
LEAST = 1e-4  # nats; smaller rates are not told apart
TWICE = 2  # times the rate: what a layer needs at most for what the other one tells of the image
BEHIND, FEW = 1.0, 0.05  # a layer is given up if the loss is so many nats too large, its rate such a share of all
NOTED = (0.25, 0.25 + SPREAD, 1.0)  # the shares of the training after which that is told
REMEDY = "another --seed or more --warmup_epochs may help"


def next_spread(config: Config, epoch: int, spread: float, means: Tensor) -> float:
    """The share of their range that betas fill after so many epochs, the last with means (M, 4).

    It grows once z is in use, which comes within a few epochs at betas where z is worth its rate; large ones would keep
    it from that. From half of the training on it grows all the same. 0 for an ordinary model.
    """
    if not config.is_conditioned:
        return 0.0
    enough = min(IN_USE, config.most_rate_z / 2)
    in_use = config.vae_type == "BVAE" or means[:, TERMS.index("kl_z")].min() >= enough
    if in_use or 2 * epoch >= config.num_epochs:
        return min(1.0, spread + 1 / (SPREAD * config.num_epochs))
    return spread


@torch.no_grad()
def terms_at_points(model: Conditioned, x: Tensor) -> dict[str, dict[str, float]]:
    """Loss, ll, kl_y, kl_z (means over images x, nats) of a conditioned model at its `points`, with fixed noise."""
    noise, result = model.noise(len(x), generator(x.device, 0, "points")), {}
    for name, log_betas in model.points().items():
        terms = model(x, noise._replace(log_betas=log_betas.to(x).expand(len(x), 2)))
        beta_y, beta_z = (10**log_betas).tolist()
        values = (terms.loss(beta_y, beta_z), *terms)
        result[name] = {term: v.mean().item() for term, v in zip(TERMS, values, strict=True)}
    return result


def collapsed(config: Config, points: dict[str, dict[str, float]]) -> list[str]:
    """A phrase for each layer that is given up where it should be in use, by the terms at single betas.

    That is where its beta is smallest, and the code of another point would have a lower loss, even if this layer told
    all that the other one tells in it, at TWICE the rate. So it may be given up where the other one is hardly more
    expensive, and where any rate is too expensive. Without a rate at any point, all layers are collapsed.
    """
    names, largest = {"z": "R(z)", "y": "R(y|z)"}, {"z": config.most_rate_z, "y": math.inf}
    total, result = {n: t["kl_y"] + t["kl_z"] for n, t in points.items()}, []
    is_idle = max(total.values()) < COLLAPSED
    for layer, other in ["zy", "yz"][config.vae_type == "BVAE" :]:
        rate, of_other = f"kl_{layer}", f"kl_{other}"
        betas = {name: float(re.search(f"beta_{layer} ([^,]+)", name)[1]) for name in points}
        low = min(betas.values())
        losses = {n: -t["ll"] + low * (t[rate] + TWICE * t[of_other]) for n, t in points.items()}
        code = min(losses, key=losses.get)
        few = COLLAPSED if is_idle else min(IN_USE, largest[layer] / 2, FEW * total[code])
        behind = {n: t["loss"] - losses[code] for n, t in points.items() if betas[n] == low and t[rate] < few}
        where = max(behind, key=behind.get, default=None)
        if behind and (is_idle or behind[where] > BEHIND):
            result.append(f"{layer} has collapsed, {names[layer]} is {points[where][rate]:.2g} nats at {where}")
    return result


def note_collapse(config: Config, epoch: int, spread: float, points: dict[str, dict[str, float]]) -> None:
    """Says so if a layer has collapsed, early and at the end; not while betas spread, when codes are still to come."""
    if spread in (0, 1) and epoch in [math.ceil(share * config.num_epochs) for share in NOTED]:
        for what in collapsed(config, points):
            print(f"note: after {epoch} of {config.num_epochs} epochs {what}; {REMEDY}", file=sys.stderr)


def sources(cells: list[Config], runs_dir: str) -> dict[Run, list[Config]]:
    """The conditioned models that the cells are unfolded from, one for each seed, each with its cells.

    One of the batch whose range holds the cells is taken, else one of just their range. Raises UserError if the batch
    has such cells but their model is gone.
    """
    result = {}
    for seed in dict.fromkeys(c.seed for c in cells):
        of_seed = [c for c in cells if c.seed == seed]
        result[_existing(of_seed, runs_dir) or Run.of(_conditioned(of_seed), runs_dir)] = of_seed
    return result


def _conditioned(cells: list[Config]) -> Config:
    """Of a model for the range of the cells' betas."""
    ends = {}
    for layer in "yz":
        values = [getattr(c, f"beta_{layer}") for c in cells]
        ends |= {f"beta_{layer}": min(values), f"beta_max_{layer}": max(values)}
    return dataclasses.replace(cells[0], refine_epochs=None, **ends)


def _existing(cells: list[Config], runs_dir: str) -> Run | None:
    """The conditioned model of the batch, trained or in training, of the smallest range that holds the cells."""
    batch, models, orphans = Path(runs_dir, cells[0].run_batch_name), [], False
    for run in runs_in(batch)[0]:
        other = run.config
        different = set(other.differs_in(cells[0], "model", "training", "data", "repeat"))
        if different <= {"data_digest", "source", "refine_epochs", "sharing"} and other.run_name == cells[0].run_name:
            orphans |= other.source is not None
            if other.is_conditioned and all(_holds(other, c) for c in cells):
                models.append(run)
    if orphans and not models:
        raise UserError(
            f"--multi_rate: {batch} holds cells of a model that is not there any more, or whose range does not hold "
            "these betas; choose another --run_batch_name to train one"
        )
    return min(models, key=lambda run: run.config.beta_max_y * run.config.beta_max_z, default=None)


def _holds(model: Config, cell: Config) -> bool:
    return model.beta_y <= cell.beta_y <= model.beta_max_y and model.beta_z <= cell.beta_z <= model.beta_max_z


def cells_of(
    source: Run, cells: list[Config], data: Data, runs_dir: str, device: torch.device, force: bool
) -> list[Run]:
    """The runs of cells of a finished conditioned model, with the betas of rates that are asked for.

    Raises UserError for a model of which a layer has collapsed, unless with `force`.
    """
    what = source.result.get("collapsed")  # of old runs whether z has
    if what and not force:
        why = "; ".join(map(str, what)) if isinstance(what, list) else "z has collapsed"
        raise UserError(f"{source.path}: {why}; {REMEDY}, or --force, which unfolds it all the same")
    asking = [c for c in cells if c.has_target]
    if asking:
        cells = [c for c in cells if not c.has_target] + with_betas(load_model(source, device), asking, data)
    comes_from = {name: getattr(source.config, name) for name in ("data_digest", "sharing")}
    comes_from["source"] = digest_of(source.path / "vae.pth")
    return [Run.of(dataclasses.replace(cell, **comes_from), runs_dir) for cell in cells]


def unfold(
    source: Run, runs: list[Run], data: Data, device: torch.device, overwrite: bool
) -> list[tuple[Run, UserError]]:
    """Writes the folders of the runs of a conditioned model's cells; returns what is wrong."""
    model, of_source, problems = load_model(source, device), source.result, []
    for run in progress(runs, unit="cell", desc="unfolding"):
        try:
            run.check(overwrite)
            run.create()
            with run.locked():
                if overwrite:
                    run.restart()
                if run.status != "finished":
                    weights, result = folded(model, run, data, device)
                    result["sessions"] = of_source.get("sessions", []) + result["sessions"]
                    run.finish(weights, result)
        except UserError as e:
            problems.append((run, e))
    return problems


def folded(model: Conditioned, run: Run, data: Data, device: torch.device) -> tuple[dict, dict]:
    """The ordinary model's weights at a cell's betas, and what training.json says of it; draws its pictures."""
    start, config, session = time.monotonic(), run.config, provenance(device, data)
    with torch.no_grad():
        log_betas = torch.tensor([config.beta_y, config.beta_z], device=device).log10()
        weights = {name: p.detach().cpu().clone() for name, p in model.weights_at(log_betas).items()}
    plain = build_model(config)
    plain.load_state_dict(weights)
    stack = Stack(plain.to(device).eval(), 1)
    betas = [torch.tensor([b], device=device) for b in (config.beta_y, config.beta_z)]
    train, test = (
        stack.evaluate(split, config.batch_size, generator(device, config.seed, "test"), *betas)[0]
        for split in (data.train.subset(TRAIN_IMAGES), data.test)
    )
    values = figures(plain, data, config, train=train, test=test)
    write_pictures(run.path, pictures(plain, chosen(data.test, N)[0], config.seed))
    result = {"status": "finished", "epoch": config.num_epochs, "seconds": round(time.monotonic() - start, 2)}
    result["parameters"] = sum(p.numel() for p in plain.parameters())
    return weights, {**result, "sessions": [{**session, "end": now()}], **values}


class Search:
    """The rates of a conditioned model over its range of betas, and the betas of given rates."""

    def __init__(self, model: Conditioned, data: Data, batch_size: int):
        self.model, self.stack, self.device = model, Stack(model.model, 1), model.gates.weight.device
        self.images, self.batch_size = data.train.subset(SEARCHED_IMAGES), batch_size
        self.low, self.high = model.log_range.cpu().numpy()
        self.table: dict[tuple[float, ...], np.ndarray] = {}  # of the rates so far, by log10 betas

    @torch.no_grad()
    def rates(self, log_betas: np.ndarray) -> np.ndarray:
        """R(y|z), R(z) in nats at log10 betas (2,), means over training images with fixed noise."""
        key = tuple(log_betas.tolist())
        if key not in self.table:
            for name, p in self.model.weights_at(torch.tensor(key, device=self.device)).items():
                self.stack.parameters[name].data = p.detach()[None]
            one, noise = torch.ones(1, device=self.device), generator(self.device, 0, "targets")
            means = self.stack.evaluate(self.images, self.batch_size, noise, one, one)[0].tolist()
            self.table[key] = np.array(means[TERMS.index("kl_y") : TERMS.index("kl_z") + 1])
        return self.table[key]

    def betas(self, cell: Config) -> tuple[Config, np.ndarray, bool]:
        """The cell with the betas at which the rates are its targets, the rates there, and whether they are met.

        A beta whose rate is not asked for, or of which the model has one, stays. Least squares of log rates within the
        range, from the best point of a coarse table; met is what is CLOSE.
        """
        from scipy.optimize import least_squares

        targets = np.array([math.nan if t is None else t for t in (cell.target_rate_y, cell.target_rate_z)])
        start, asked = np.log10([cell.beta_y, cell.beta_z]), np.isfinite(targets)
        free = asked & (self.high > self.low)
        start[asked & ~free] = self.low[asked & ~free]
        goal = np.log(np.maximum(targets[asked], LEAST))

        def place(u):
            log_betas = start.copy()
            log_betas[free] = u
            return log_betas

        def residual(u):
            return np.log(np.maximum(self.rates(place(u))[asked], LEAST)) - goal

        def jacobian(u):
            columns = []
            for i in range(len(u)):
                e = np.eye(len(u))[i] * STEP
                ahead, behind = np.minimum(u + e, self.high[free]), np.maximum(u - e, self.low[free])
                columns.append((residual(ahead) - residual(behind)) / (ahead - behind)[i])
            return np.stack(columns, 1)

        best, bounds = start[free], (self.low[free], self.high[free])
        if free.any():
            axes = [np.linspace(lo, hi, COARSE) for lo, hi in zip(*bounds, strict=True)]
            coarse = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
            best = min(coarse, key=lambda u: np.abs(residual(u)).sum())
            best = least_squares(residual, best, jacobian, bounds, xtol=1e-4, ftol=1e-9, max_nfev=10).x
        log_betas = place(best)
        beta_y, beta_z = (float(f"{10**u:.6g}") for u in log_betas)
        met = bool(np.abs(residual(best)).max() <= CLOSE)
        return dataclasses.replace(cell, beta_y=beta_y, beta_z=beta_z), self.rates(log_betas), met


def near(runs: list[Run], data: Data, device: torch.device) -> list[Run]:
    """The runs; new ones that ask for rates with the betas that a multi-rate model of their batch has for them.

    Such a start is nearer to the rates than the flags' betas, for any settings of that model's training.
    """
    new = {run.path: run for run in runs if run.config.has_target and run.status == "new"}
    batch = next(iter(new)).parent if new else Path()
    result = {run.path: run for run in runs}
    for source in runs_in(batch)[0] if new else ():
        if not source.config.is_conditioned or source.status != "finished" or source.result.get("collapsed"):
            continue
        alike = [run for run in new.values() if not run.config.differs_in(source.config, "model", "data")]
        search = Search(load_model(source, device), data, source.config.batch_size) if alike else None
        for run in alike:
            result[run.path] = dataclasses.replace(run, config=search.betas(run.config)[0])
            del new[run.path]
            print(f"{run.path}: starts at the betas of {source.path.name}", flush=True)
    return [*result.values()]


def with_betas(model: Conditioned, cells: list[Config], data: Data) -> list[Config]:
    """The cells with the betas at which the model's rates are their targets.

    Raises UserError naming all that cannot be reached within the model's range, and what is nearest.
    """
    search, result, unreachable = Search(model, data, cells[0].batch_size), [], []
    for cell in cells:
        reached, rates, met = search.betas(cell)
        result.append(reached)
        if not met:
            names = {"R(y|z)": cell.target_rate_y, "R(z)": cell.target_rate_z}
            wish = ", ".join(f"{name} {target:g}" for name, target in names.items() if target is not None)
            nearest = ", ".join(f"{name} {rate:.4g}" for name, rate in zip(names, rates, strict=True))
            at = f"beta_y {reached.beta_y:.4g}, beta_z {reached.beta_z:.4g}"
            unreachable.append(f"{wish} (nearest: {nearest} at {at})")
    if unreachable:
        raise UserError(
            f"--target_rate_z, --target_rate_y: not within the range of betas that was trained, nats: "
            f"{'; '.join(unreachable)}"
        )
    return result
