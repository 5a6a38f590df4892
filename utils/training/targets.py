"""Betas for asked rates: root finding on a trained conditioned model."""

import dataclasses
import functools
import math

import numpy as np
import torch

from datasets.loading import Data
from models.conditioned import Conditioned
from models.stack import TERMS, Stack
from utils.config import Config
from utils.errors import UserError
from utils.runs import Run, load_model, runs_in
from utils.seeds import generator
from utils.training.start import settings

IMAGES = 1024  # of the training set, on which rates are matched
COARSE = 4  # points along each axis of the table that the search starts from
STEP = 0.02  # of the finite differences, in log10 of a beta
CLOSE = 0.005  # relative difference of rates that counts as met
FREE = ("beta_y", "beta_z", "beta_max_y", "beta_max_z", "target_rate_y", "target_rate_z", "multi_rate", "seed")
FREE += ("num_epochs", "warmup_epochs", "lr_schedule", "optimizer", "init_from", "learning_rate", "batch_size")
LEAST = 1e-4  # nats; smaller rates are not told apart


class Search:
    """The rates of a conditioned model over its range of betas, and the betas of given rates."""

    def __init__(self, model: Conditioned, data: Data, batch_size: int):
        self.model, self.stack = model, Stack(model.model, 1)
        self.split, self.batch_size = data.train.first(IMAGES), batch_size
        self.low, self.high = model.log_range.cpu().numpy()

    def rates(self, log_betas: np.ndarray) -> np.ndarray:
        """R(y|z), R(z) in nats at log10 betas (2,), means over training images with fixed noise."""
        return self._rates(*log_betas.tolist())

    @functools.cache  # noqa: B019  (the table that every search starts from is the same)
    @torch.no_grad()
    def _rates(self, *log_betas: float) -> np.ndarray:
        device = self.model.gates.weight.device
        weights = self.model.at(torch.tensor(log_betas, dtype=torch.float32, device=device))
        for name, p in weights.items():
            self.stack.parameters[name].data = p.detach()[None]
        one = torch.ones(1, device=device)
        means = self.stack.evaluate(self.split, self.batch_size, generator(device, 0, "targets"), one, one)[0].tolist()
        return np.array(means[TERMS.index("kl_y") : TERMS.index("kl_z") + 1])

    def find(self, asked: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Log10 betas (2,) at which the rates are those asked, (R(y|z), R(z)) in nats, and the rates reached there.

        Where a rate is NaN, its layer's beta stays at `start`. Least squares of log rates within the range, from the
        best point of a coarse table. The last value says whether all asked rates are met to CLOSE.
        """
        from scipy.optimize import least_squares

        free = np.isfinite(asked)
        goal = np.log(np.maximum(asked[free], LEAST))

        def full(u):
            log_betas = start.copy()
            log_betas[free] = u
            return log_betas

        def residual(u):
            return np.log(np.maximum(self.rates(full(u))[free], LEAST)) - goal

        def jacobian(u):
            columns = []
            for i in range(len(u)):
                e = np.eye(len(u))[i] * STEP
                ahead, behind = np.minimum(u + e, self.high[free]), np.maximum(u - e, self.low[free])
                columns.append((residual(ahead) - residual(behind)) / (ahead - behind)[i])
            return np.stack(columns, 1)

        axes = [np.linspace(lo, hi, COARSE) for lo, hi in zip(self.low[free], self.high[free], strict=True)]
        coarse = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        best = min(coarse, key=lambda u: np.abs(residual(u)).sum())
        bounds = self.low[free], self.high[free]
        found = least_squares(residual, best, jacobian, bounds, xtol=1e-4, ftol=1e-9, max_nfev=10)
        met = np.abs(found.fun).max() <= CLOSE
        return full(found.x), self.rates(full(found.x)), bool(met)


def near(runs: list[Run], data: Data, device: torch.device) -> list[Run]:
    """The runs; new ones that ask for rates with the betas that a multi-rate model of their batch has for them.

    Such a start is nearer to the rates than the flags' betas, for any settings of that model's training.
    """
    new = [run for run in runs if run.config.has_target and run.status == "new"]
    found = {}
    for source in runs_in(new[0].path.parent)[0] if new else ():
        if source.config.is_conditioned and source.status == "finished" and not source.result.get("collapsed"):
            alike = [run for run in new if settings(run.config, *FREE) == settings(source.config, *FREE)]
            alike = [run for run in alike if run.path not in found]
            search = Search(load_model(source, device), data, source.config.batch_size) if alike else None
            for run in alike:
                log_betas, *_ = search.find(*_asked(run.config))
                betas = {f"beta_{n}": float(f"{10**u:.6g}") for n, u in zip("yz", log_betas, strict=True)}
                found[run.path] = dataclasses.replace(run, config=dataclasses.replace(run.config, **betas))
                print(f"{run.path}: starts at the betas of {source.path.name}", flush=True)
    return [found.get(run.path, run) for run in runs]


def _asked(cell: Config) -> tuple[np.ndarray, np.ndarray]:
    """The rates asked for, NaN where there is none, and the log10 of the betas."""
    asked = [math.nan if t is None else t for t in (cell.target_rate_y, cell.target_rate_z)]
    return np.array(asked), np.log10([cell.beta_y, cell.beta_z])


def reach(model: Conditioned, cells: list[Config], data: Data) -> list[Config]:
    """The cells with the betas at which the model's rates are their targets.

    Raises UserError naming all that cannot be reached within the model's range, and what is nearest.
    """
    search, result, unreachable = Search(model, data, cells[0].batch_size), [], []
    for cell in cells:
        asked, start = _asked(cell)
        log_betas, rates, met = search.find(asked, start)
        beta_y, beta_z = (float(f"{10**u:.6g}") for u in log_betas)
        result.append(dataclasses.replace(cell, beta_y=beta_y, beta_z=beta_z))
        if not met:
            names = ("R(y|z)", "R(z)")
            wish = ", ".join(f"{n} {a:g}" for n, a in zip(names, asked, strict=True) if math.isfinite(a))
            nearest = ", ".join(f"{n} {r:.4g}" for n, r in zip(names, rates, strict=True))
            unreachable.append(f"{wish} (nearest: {nearest} at beta_y {beta_y:.4g}, beta_z {beta_z:.4g})")
    if unreachable:
        raise UserError(
            f"--target_rate_z, --target_rate_y: not within the range of betas that was trained, nats: "
            f"{'; '.join(unreachable)}"
        )
    return result
