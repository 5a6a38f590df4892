"""The steps of the evaluation that judge test images: their rates, likelihood, PSNR, and the units in use."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from models.latents import Gaussian
from utils.evaluation.evaluation import BATCH
from utils.evaluation.probes import mean_and_error
from utils.evaluation.run import EvaluatedRun, on_all_images
from utils.files import npz

ACTIVE = 0.01  # the variance of a posterior mean, or the rate in nats, from which a unit counts as active


@torch.no_grad()
def rates(run: EvaluatedRun) -> dict:
    """Loss and its terms (nats), bits per dimension, active units, PSNR (dB); latents.npz and per_image.npz."""
    model, betas, g = run.model, (run.config.beta_y, run.config.beta_z), run.generator("rates")

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor | None]:
        terms = model(x, model.noise(len(x), g))
        q_z = model.q_z(x)
        q_y = model.q_y(q_z.mode, x)
        z_std = q_z.std if isinstance(q_z, Gaussian) else torch.zeros_like(q_z.mean)
        latents = {"qz_mu": q_z.mean, "qz_std": z_std, "qy_mu": q_y.mean, "qy_std": q_y.std, "labels": label}
        error = ((model.mean_x(q_y.mode) - x) ** 2).double().mean((1, 2, 3))
        values = {"loss": terms.loss(*betas), **terms._asdict(), "mse": error, "floor": model.likelihood.floor(x)}
        return {**latents, **{name: v.double() for name, v in values.items() if v is not None}}

    arrays = on_all_images(of_batch(*batch) for batch in run.test.batches(BATCH))
    latents = {name: arrays.pop(name) for name in ("qz_mu", "qz_std", "qy_mu", "qy_std", "labels")}
    terms = {**arrays, "D": -arrays["ll"]}
    if "floor" in terms:
        terms["D_above_floor"] = -(terms["ll"] + terms["floor"])
    if model.likelihood.is_mass:
        nats = terms["kl_y"] + terms["kl_z"] - terms["ll"]
        terms["bpd"] = nats / (math.log(2) * math.prod(run.config.image_shape))
    result = mean_and_error(terms)
    if "floor" in terms:
        result |= {"D_floor": result["floor"], "D_above_floor": result["D"] - result["floor"]}
    result |= {f"active_{k}": active_units(latents[f"q{k}_mu"]) for k in "zy"}
    mse, se = result["mse"], result["mse_se"]
    result["psnr"] = -10 * math.log10(mse) if mse > 0 else math.inf
    result["psnr_se"] = 10 / math.log(10) * se / mse if mse > 0 else math.nan
    kept = {name: terms[name].astype(np.float32) for name in ("ll", "kl_y", "kl_z", "mse")}
    return result | {"latents.npz": npz(latents), "per_image.npz": npz(kept)}


def active_units(means: np.ndarray) -> int:
    """Latent dimensions whose posterior mean varies over the images by more than 0.01 (Burda 2016); means (N, ...)."""
    flat = means.reshape(len(means), -1)
    return int((flat.var(axis=0, dtype=np.float64) > ACTIVE).sum()) if flat.size else 0


@torch.no_grad()
def units(run: EvaluatedRun) -> dict[str, int]:
    """Units whose own rate, KL[q(z_i|x) || p(z_i)] or KL[q(y_i|z,x) || p(y_i|z)], exceeds 0.01 nats on average.

    They add up to R(z) and R(y|z). A categorical z is one unit.
    """
    g, of_z, of_y = run.generator("units"), 0.0, 0.0
    for x, _ in run.test.batches(BATCH):
        q_z, noise = run.model.q_z(x), run.model.noise(len(x), g)
        z = q_z.sample(noise.z)
        of_z += q_z.rate_of_units().double().sum(0)
        of_y += run.model.q_y(z, x).kl_of_units(run.model.p_y(z)).double().sum(0)
    counts = {"active_z_rate": of_z, "active_y_rate": of_y}
    return {name: int((total / len(run.test) > ACTIVE).sum()) for name, total in counts.items()}


def importance_weighted(run: EvaluatedRun) -> dict[str, float]:
    """The importance-weighted log-likelihood in nats, averaged over the test images."""
    g, k = run.generator("iw"), run.evaluation.iw_samples
    of_batches = [importance_weighted_ll(run.model, x, k, g).cpu() for x, _ in run.test.batches(BATCH)]
    return {**mean_and_error({"ll_iw": torch.cat(of_batches).numpy()}), "iw_samples": k}


@torch.no_grad()
def importance_weighted_ll(model: nn.Module, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Importance-weighted lower bound on log p(x), nats (B,), from `samples` samples of (z, y) (IWAE, Burda 2016)."""
    q_z, weights = model.q_z(x), []
    for _ in range(samples):
        noise = model.noise(len(x), generator)
        z = q_z.sample(noise.z)
        q_y = model.q_y(z, x)
        y = q_y.sample(noise.y)
        log_p = model.p_x(y).log_prob(x) + model.p_y(z).log_prob(y) + model.family.prior_log_prob(z)
        weights.append((log_p - q_z.log_prob(z) - q_y.log_prob(y)).double())
    return torch.stack(weights).logsumexp(0) - math.log(samples)
