"""The steps of the evaluation that other networks judge: samples, by their distances too, and reconstructions."""

import math

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.evaluation import BATCH, Features
from utils.evaluation.probes import calibration_error, calibration_null, mean_and_error, standard_error
from utils.evaluation.run import EvaluatedRun, on_all_images
from utils.files import npz


@torch.no_grad()
def sample_quality(run: EvaluatedRun) -> dict[str, float]:
    """The inception score of samples: the mean over the data set's classifiers, with its standard error."""
    nets = [net for net, _ in run.evaluation.classifiers(run.config)]
    if not nets:
        return {}
    scores = []
    for net, features in zip(nets, run.sample_features.unbind(1), strict=True):
        logits = net.head(features.to(run.evaluation.device))
        scores.append(inception_score(torch.log_softmax(logits.double(), 1)))
    result = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    if len(nets) > 1:
        result["is_mean_se"] = standard_error(np.array([score["is_mean"] for score in scores]))
    return {**result, "n_classifiers": len(nets), "n_samples": run.evaluation.n_samples}


def inception_score(log_p: Tensor, splits: int = 5) -> dict[str, float]:
    """Inception score from a classifier's log-probabilities (N, K) of samples: mean and std over the splits.

    Per split, exp(mean KL[p(l|x) || p(l)]) = exp(H[p(l)]) exp(-mean H[p(l|x)]), the diversity and the sharpness.
    """
    scores = []
    for part in log_p.double().tensor_split(splits):
        p = part.exp()
        diversity = torch.special.entr(p.mean(0)).sum()
        sharpness = torch.special.xlogy(p, p).sum(1).mean()
        scores.append([v.exp().item() for v in (diversity + sharpness, diversity, sharpness)])
    of_splits = list(zip(*scores, strict=True))
    result = {name: float(np.mean(v)) for name, v in zip(("is_mean", "is_div", "is_sharp"), of_splits, strict=True)}
    return {**result, "is_std": float(np.std(of_splits[0]))}


def fid(run: EvaluatedRun) -> dict[str, float | str]:
    """Distances between samples and test images in Inception-v3 features."""
    network = run.evaluation.inception
    return _distances(run, "", "inception-v3-compat", network, run.samples(network))


def fid_classifier(run: EvaluatedRun) -> dict[str, float | str]:
    """Distances between samples and test images in the features of the data set's first classifier."""
    for net, digest in run.evaluation.classifiers(run.config)[:1]:
        source = f"{run.config.data_name} classifier {digest}"
        return _distances(run, "_classifier", source, net.features, run.sample_features[:, 0])
    return {}


@torch.no_grad()
def _distances(run: EvaluatedRun, ending: str, source: str, network: Features, of_samples: Tensor) -> dict:
    evaluation, config, fake = run.evaluation, run.config, of_samples.numpy()
    real = evaluation.features(config, network, "test")

    def floor() -> float:
        return frechet_distance(real, evaluation.features(config, network, "train"))

    halves = [frechet_distance(real[i::2], fake[i::2]) for i in (0, 1)]
    kernel, kernel_se = kernel_distance(real, fake)
    fid, kid = f"fid{ending}", f"kid{ending}"
    return {
        fid: frechet_distance(real, fake),
        f"{fid}_se": abs(halves[0] - halves[1]) / 2,
        f"{fid}_floor": evaluation.once((network, "floor"), config, floor),
        f"{fid}_features": source,
        f"{fid}_samples": len(fake),
        kid: kernel,
        f"{kid}_se": kernel_se,
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, (N, F) and (M, F) (Heusel 2017).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the root has the eigenvalues of that of C_a^(1/2) C_b C_a^(1/2).
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


def kernel_distance(a: np.ndarray, b: np.ndarray, most: int = 10_000) -> tuple[float, float]:
    """Kernel distance (KID; Binkowski 2018) of features (N, F) and (M, F), of at most `most` each; its standard error.

    The squared maximum mean discrepancy with the kernel (x . y / F + 1)^3, without bias; the error is to first order.
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


@torch.no_grad()
def reconstructions(run: EvaluatedRun) -> dict:
    """The first classifier's accuracy on reconstructions and on test images, predictive entropy (nats), calibration."""
    classifiers = run.evaluation.classifiers(run.config)
    if not classifiers:
        return {}
    net, _ = classifiers[0]

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        log_p = torch.log_softmax(net(run.model.reconstruct(x)).double(), 1)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        return {"recons_acc": log_p.argmax(1) == label, "recons_pred_entropy": entropy, "labels": label}

    terms = on_all_images(of_batch(*batch) for batch in run.test.batches(BATCH))
    labels = terms.pop("labels")
    features = torch.from_numpy(run.evaluation.features(run.config, net.features, "test"))
    p = torch.softmax(net.head(features.to(run.evaluation.device)).double(), 1).cpu().numpy()
    terms["clsfr_acc"] = p.argmax(1) == labels
    calibration = {"clsfr_ece": calibration_error(p, labels), "clsfr_ece_null": calibration_null(p)}
    file = npz({"recons_acc": terms["recons_acc"].astype(np.float32)})
    return {**mean_and_error(terms), **calibration, "per_image_recons.npz": file}
