"""Metrics: active units, importance-weighted likelihood, inception score, Frechet distance."""

import math

import numpy as np
import torch
from torch import Tensor, nn


def active_units(means: np.ndarray) -> int:
    """Latent dimensions whose posterior mean varies over the images by more than 0.01 (Burda 2016); means (N, ...)."""
    flat = means.reshape(len(means), -1)
    return int((flat.var(axis=0, dtype=np.float64) > 0.01).sum()) if flat.size else 0


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


def inception_score(log_p: Tensor, splits: int = 5) -> dict[str, float]:
    """Inception score from a classifier's log-probabilities (N, K) of samples: mean and std over the splits.

    Per split, IS = exp(mean KL[p(l|x) || p(l)]) = diversity x sharpness, where diversity = exp(H[p(l)]) and
    sharpness = exp(-mean H[p(l|x)]); their means over the splits are returned as well.
    """
    log_p = log_p.double()
    scores, diversities, sharpnesses = [], [], []
    for part in log_p.tensor_split(splits):
        p = part.exp()
        marginal = p.mean(0)
        diversity = torch.special.entr(marginal).sum()
        sharpness = torch.special.xlogy(p, p).sum(1).mean()
        diversities.append(diversity.exp().item())
        sharpnesses.append(sharpness.exp().item())
        scores.append((diversity + sharpness).exp().item())
    return {
        "is_mean": float(np.mean(scores)),
        "is_std": float(np.std(scores)),
        "is_div": float(np.mean(diversities)),
        "is_sharp": float(np.mean(sharpnesses)),
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, (N, F) and (M, F) (Heusel 2017).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the matrix root is computed as the sum of the
    square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    """
    from scipy.linalg import eigh, eigvalsh

    if min(len(a), len(b)) < 2:  # no covariance
        return math.nan

    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(t.astype(np.float64), rowvar=False)) for t in (a, b))
    values, vectors = eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
