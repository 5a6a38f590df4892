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


def kernel_distance(a: np.ndarray, b: np.ndarray, most: int = 10_000) -> tuple[float, float]:
    """Kernel distance (KID; Binkowski 2018) of features (N, F) and (M, F), of at most `most` each; its standard error.

    The squared maximum mean discrepancy with the kernel (x . y / F + 1)^3, without bias: 0 on average for features of
    one distribution. The standard error is to first order, from the terms of the images.
    """
    a, b = (t[:most].astype(np.float64) for t in (a, b))
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan

    def sums(u, v):  # of the kernel, for each of u over v, for each of v over u
        rows, columns = [], 0
        for part in np.array_split(u, 1 + len(u) // 1000):
            k = part @ v.T / v.shape[1] + 1
            k *= k * k  # a power is several times slower
            rows.append(k.sum(1))
            columns += k.sum(0)
        return np.concatenate(rows), columns

    def among(u):  # the mean of the kernel over the others, for each of u
        return (sums(u, u)[0] - ((u**2).mean(1) + 1) ** 3) / (len(u) - 1)

    of_a, of_b = sums(a, b)
    of_a, of_b = among(a) - of_a / len(b), among(b) - of_b / len(a)
    variance = 4 * (of_a.var(ddof=1) / len(a) + of_b.var(ddof=1) / len(b))
    return float(of_a.mean() + of_b.mean()), math.sqrt(variance)


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
