"""The steps of the evaluation, which `STEPS` lists; metrics.py says which columns they fill."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from datasets.batches import subset
from datasets.loading import memory
from datasets.table import optimum
from models.latents import Gaussian
from utils.errors import UserError
from utils.evaluation import probes
from utils.evaluation.information import mi_p, mi_y, mi_z
from utils.evaluation.metrics import TAILS, TAILS_PAPER
from utils.evaluation.probes import mean_and_error
from utils.evaluation.run import BATCH, EvaluatedRun, Evaluation, Features, on_all_images, once
from utils.files import npz

ACTIVE = 0.01  # the variance of a posterior mean, or the rate in nats, of an active unit
LATENTS = ("qz_mu", "qz_std", "qy_mu", "qy_std", "labels")


class Step(NamedTuple):
    """A step: how it computes its columns (`columns_of`), and what these depend on.

    `compute` returns metrics by column, and the contents of files by name.
    """

    name: str
    compute: Callable[[EvaluatedRun], dict]
    version: int = 1  # counts the changes of what it computes
    settings: tuple[str, ...] = ()  # fields of Evaluation
    metrics: tuple[str, ...] = ()  # of other steps
    classifier: bool = False  # whether it depends on the data set's classifiers
    labels: bool = False  # whether it needs the images' labels
    files: tuple[str, ...] = ()  # that it writes in addition to the metrics


@torch.no_grad()
def rates(run: EvaluatedRun) -> dict:
    """Loss and its terms (nats), bits per dimension, active units, PSNR (dB); latents.npz and per_image.npz."""
    model, config, g = run.model, run.config, run.generator("rates")
    best = optimum(config)

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor | None]:
        terms, q_z = model(x, model.noise(len(x), g)), model.q_z(x)
        q_y = model.q_y(q_z.mode, x)
        z_std = q_z.std if isinstance(q_z, Gaussian) else torch.zeros_like(q_z.mean)
        latents = zip(LATENTS, (q_z.mean, z_std, q_y.mean, q_y.std, label), strict=True)
        error = ((model.mean_x(q_y.mode) - x) ** 2).double().mean((1, 2, 3))
        values = {"loss": terms.loss(config.beta_y, config.beta_z), **terms._asdict()}
        values |= {"mse": error, "floor": model.likelihood.floor(x)}
        if best is not None:
            values["above_bound"] = values["loss"].cpu() - torch.from_numpy(best.loss_of(x.cpu().numpy()))
        return {**dict(latents), **{k: v.double() for k, v in values.items() if v is not None}}

    terms = on_all_images(of_batch(*batch) for batch in run.test.batches(BATCH))
    latents = {name: terms.pop(name) for name in LATENTS}
    terms["D"] = -terms["ll"]
    if "floor" in terms:
        terms["D_above_floor"] = -(terms["ll"] + terms["floor"])
    if model.likelihood.is_mass:
        nats = terms["kl_y"] + terms["kl_z"] - terms["ll"]
        terms["bpd"] = nats / (math.log(2) * math.prod(config.image_shape))
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
    """Units whose posterior mean (N, ...) varies over the images by more than 0.01 (Burda 2016)."""
    return int((means.reshape(len(means), -1).var(axis=0, dtype=np.float64) > ACTIVE).sum())


@torch.no_grad()
def units(run: EvaluatedRun) -> dict[str, int]:
    """Units whose own rate exceeds 0.01 nats on average; a categorical z is one."""
    model, g, of_z, of_y = run.model, run.generator("units"), 0.0, 0.0
    for x, _ in run.test.batches(BATCH):
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        z = q_z.sample(noise.z)
        of_z += q_z.rate_of_units().double().sum(0)
        of_y += model.q_y(z, x).kl_of_units(model.p_y(z)).double().sum(0)
    totals = {"active_z_rate": of_z, "active_y_rate": of_y}
    return {name: int((total / len(run.test) > ACTIVE).sum()) for name, total in totals.items()}


def importance_weighted(run: EvaluatedRun) -> dict[str, float]:
    """The importance-weighted log-likelihood in nats, averaged over the test images."""
    g, k = run.generator("iw"), run.evaluation.iw_samples
    values = [importance_weighted_ll(run.model, x, k, g).cpu() for x, _ in run.test.batches(BATCH)]
    return {**mean_and_error({"ll_iw": torch.cat(values).numpy()}), "iw_samples": k}


@torch.no_grad()
def importance_weighted_ll(model: nn.Module, x: Tensor, samples: int, g: torch.Generator) -> Tensor:
    """Lower bound on log p(x), nats (B,), from so many samples of (z, y) (IWAE, Burda 2016)."""
    q_z, weights = model.q_z(x), []
    for _ in range(samples):
        noise = model.noise(len(x), g)
        z = q_z.sample(noise.z)
        q_y = model.q_y(z, x)
        y = q_y.sample(noise.y)
        log_p = model.p_x(y).log_prob(x) + model.p_y(z).log_prob(y) + model.family.prior_log_prob(z)
        weights.append((log_p - q_z.log_prob(z) - q_y.log_prob(y)).double())
    return torch.stack(weights).logsumexp(0) - math.log(samples)


@torch.no_grad()
def sample_quality(run: EvaluatedRun) -> dict[str, float]:
    """The inception score of samples: the mean over the data set's classifiers, with its standard error."""
    nets, scores = [net for net, _ in run.evaluation.classifiers(run.config)], []
    if not nets:
        return {}
    for net, features in zip(nets, run.sample_features.unbind(1), strict=True):
        logits = net.head(features.to(run.evaluation.device))
        scores.append(inception_score(torch.log_softmax(logits.double(), 1)))
    result = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    if len(nets) > 1:
        result["is_mean_se"] = probes.standard_error(np.array([score["is_mean"] for score in scores]))
    return {**result, "n_classifiers": len(nets), "n_samples": run.evaluation.n_samples}


def inception_score(log_p: Tensor, splits: int = 5) -> dict[str, float]:
    """Inception score exp(H[p(l)] - mean H[p(l|x)]) from log p (N, K): mean, std over splits, its factors."""
    scores = []
    for part in log_p.double().tensor_split(splits):
        p = part.exp()
        diversity = torch.special.entr(p.mean(0)).sum()
        sharpness = torch.special.xlogy(p, p).sum(1).mean()
        scores.append([v.exp().item() for v in (diversity + sharpness, diversity, sharpness)])
    score, diversity, sharpness = (list(values) for values in zip(*scores, strict=True))
    result = {"is_mean": score, "is_div": diversity, "is_sharp": sharpness}
    return {name: float(np.mean(v)) for name, v in result.items()} | {"is_std": float(np.std(score))}


def fid(run: EvaluatedRun) -> dict[str, float | str]:
    """Distances between samples and test images in Inception-v3 features."""
    network = run.evaluation.inception
    return _distances(run, "", "inception-v3-compat", network, run.samples(network))


def fid_classifier(run: EvaluatedRun) -> dict[str, float | str]:
    """Distances between samples and test images in the features of the first classifier."""
    for net, digest in run.evaluation.classifiers(run.config)[:1]:
        source = f"{run.config.data_name} classifier {digest}"
        return _distances(run, "_classifier", source, net.features, run.sample_features[:, 0])
    return {}


@once
def _floor(evaluation, config, network: Features, n: int) -> float:
    """The distance between test and up to n training images."""
    return frechet_distance(*(evaluation.features(config, network, *some) for some in ((), (n,))))


@once
def _within(evaluation, config, network: Features) -> np.ndarray:
    """`kernel_means` of the test images."""
    return kernel_means(*few(evaluation.features(config, network)))


def _distances(run: EvaluatedRun, ending: str, source: str, network: Features, samples: Tensor) -> dict:
    evaluation, config = run.evaluation, run.config
    real, fake = evaluation.features(config, network), samples.numpy()
    halves = [frechet_distance(real[i::2], fake[i::2]) for i in (0, 1)]
    fid, (kid, kid_se) = f"fid{ending}", kernel_distance(real, fake, within=_within(evaluation, config, network))
    return {
        fid: frechet_distance(real, fake),
        f"{fid}_se": abs(halves[0] - halves[1]) / 2,
        f"{fid}_floor": _floor(evaluation, config, network, evaluation.n_samples),
        f"{fid}_features": source,
        f"{fid}_samples": len(fake),
        **{f"kid{ending}": kid, f"kid{ending}_se": kid_se},
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features (N, F), (M, F) (Heusel 2017); NaN without covariance."""
    from scipy.linalg import eigh, eigvalsh

    if min(len(a), len(b)) < 2:  # no covariance
        return math.nan
    means = [t.mean(0, dtype=np.float64) for t in (a, b)]
    cov_a, cov_b = (np.atleast_2d(np.cov(t.astype(np.float64), rowvar=False)) for t in (a, b))
    values, vectors = eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(eigvalsh(root @ cov_b @ root).clip(0)).sum()
    squares = ((means[0] - means[1]) ** 2).sum()
    return max(0.0, float(squares + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def few(*features: np.ndarray, most: int = 10_000) -> list[np.ndarray]:
    """At most so many rows of each, float64, always the same."""
    return [t[subset(torch.zeros(len(t)), most).numpy()].astype(np.float64) for t in features]


def kernel_sums(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of KID's kernel: for each of u (N, F) over v (M, F), and for each of v over u."""
    rows, columns = [], 0
    for part in np.array_split(u, 1 + len(u) // 1000):
        k = part @ v.T / v.shape[1] + 1
        k *= k * k  # a power is several times slower
        rows.append(k.sum(1))
        columns += k.sum(0)
    return np.concatenate(rows), columns


def kernel_means(u: np.ndarray) -> np.ndarray:
    """The mean of KID's kernel over the others, for each of u (N, F)."""
    return (kernel_sums(u, u)[0] - ((u**2).mean(1) + 1) ** 3) / max(1, len(u) - 1)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, most: int = 10_000, within: np.ndarray | None = None
) -> tuple[float, float]:
    """Unbiased kernel distance (KID; Binkowski 2018) of features (N, F), (M, F); its first-order error.

    Of at most so many of each; `within`, if known, are the `kernel_means` of a.
    """
    a, b = few(a, b, most=most)
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan
    of_a, of_b = kernel_sums(a, b)
    of_a, of_b = (kernel_means(a) if within is None else within) - of_a / len(b), kernel_means(b) - of_b / len(a)
    variance = 4 * (of_a.var(ddof=1) / len(a) + of_b.var(ddof=1) / len(b))
    return float(of_a.mean() + of_b.mean()), math.sqrt(variance)


@torch.no_grad()
def reconstructions(run: EvaluatedRun) -> dict:
    """The first classifier's accuracy on reconstructions and test images, entropy (nats), calibration."""
    evaluation, config = run.evaluation, run.config
    if not (classifiers := evaluation.classifiers(config)):
        return {}
    net, _ = classifiers[0]
    chosen, labels = run.chosen, run.test.labels.cpu().numpy()
    images = run.test if len(chosen) == len(labels) else run.test.subset(len(chosen))

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        log_p = torch.log_softmax(net(run.model.reconstruct(x)).double(), 1)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        return {"recons_acc": log_p.argmax(1) == label, "recons_pred_entropy": entropy}

    terms = on_all_images(of_batch(*batch) for batch in images.batches(BATCH))
    features = torch.from_numpy(evaluation.features(config, net.features))
    p = torch.softmax(net.head(features.to(evaluation.device)).double(), 1).cpu().numpy()
    terms["clsfr_acc"] = p.argmax(1) == labels
    calibration = {"clsfr_ece": probes.calibration_error(p, labels), "clsfr_ece_null": probes.calibration_null(p)}
    of_images = np.full(len(labels), math.nan, np.float32)
    of_images[chosen] = terms["recons_acc"]
    some = {"recons_images": len(chosen)} if len(chosen) < len(labels) else {}
    return {**mean_and_error(terms), **calibration, **some, "per_image_recons.npz": npz({"recons_acc": of_images})}


@torch.no_grad()
def probe_latents(run: EvaluatedRun) -> dict[str, np.ndarray]:
    """Means and samples of z and y, and labels, of test and (`_train`) a choice of training images."""
    data, most = run.evaluation.data(run.config), run.evaluation.probe_images
    model, g = run.model, run.generator("probes")

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        z = q_z.sample(noise.z)
        means = {"qz_mu": q_z.mean, "qy_mu": model.q_y(q_z.mode, x).mean}
        return {"z": z, "y": model.q_y(z, x).sample(noise.y), **means, "labels": label}

    test = on_all_images(of_batch(*batch) for batch in data.test.batches(BATCH))
    batches = itertools.islice(data.train.batches(BATCH, (0, 0)), math.ceil(most / BATCH))
    train = on_all_images(of_batch(*batch) for batch in batches)
    return test | {f"{name}_train": values[:most] for name, values in train.items()}


def fits(run: EvaluatedRun, paper: bool) -> dict[tuple[str, str], Callable[[], probes.Scores]]:
    """The fits of all probes, by one of the protocols; by probe, and key of its latents."""
    arrays, tails = (run.latents, TAILS_PAPER) if paper else (probe_latents(run), TAILS)
    pairs = [(name, key) for key in tails if arrays[key].size for name in probes.PROBES]
    return {(name, key): partial(probes.fit_latent, name, arrays, key, tails[key]) for name, key in pairs}


def scores(run: EvaluatedRun, paper: bool, file: str) -> dict:
    """All metrics of the fits, and the terms of their images in a file; a note if one failed."""
    with threadpool_limits(1):  # with more, the last digits depend on how many there are
        fitted = [fit() for fit in fits(run, paper).values()]
    if not all(metrics for metrics, _ in fitted):
        why = "too few images, or one class only, to train a classifier on"
        run.evaluation.note(f"{run.path.name}: {why}")
    metrics, terms = {}, {}
    for of_fit, of_images in fitted:
        metrics |= of_fit
        terms |= of_images
    return {**metrics, file: npz(dict(sorted(terms.items())))}


def pca(run: EvaluatedRun) -> dict:
    """The first three principal components of the posterior means of y, in pca.npz."""
    from sklearn.decomposition import PCA

    labels, y = run.latents["labels"], run.latents["qy_mu"]
    y = y.reshape(len(y), -1)
    fitted = PCA(min(3, *y.shape), random_state=0).fit(y)
    arrays = {
        "projections": fitted.transform(y).astype(np.float32),
        "components": fitted.components_.astype(np.float32),
        "explained_variance_ratio": fitted.explained_variance_ratio_,
        "labels": labels,
    }
    explained = float(fitted.explained_variance_ratio_.sum())
    return {"pca_explained": explained, "pca.npz": npz(arrays)}


@torch.no_grad()
def export(run: EvaluatedRun, split: str) -> dict[str, bytes]:
    """The latents of a split's N images, in the data set's order, as latents_<split>.npz.

    `y_mean` and `y_std` are at the mode of q(z|x), `z_sample` and `y_sample` one joint sample. A categorical z has
    probabilities as means; a folder of images has `filename` and `classes`. Raises UserError if they do not fit into
    the memory.
    """
    data, model, g = run.evaluation.data(run.config), run.model, run.generator("latents", split)
    images, size = getattr(data, split), math.prod(model.z_shape) + math.prod(model.y_shape)
    needed, free = 24 * len(images) * size, memory()
    if needed > free:
        what = f"needs {needed:,} bytes of memory, this machine has {free:,}"
        raise UserError(f"--latents {split}: {what}")

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor | None]:
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        q_y, z = model.q_y(q_z.mode, x), q_z.sample(noise.z)
        return {
            "label": label if data.labelled else None,
            **{"z_mean": q_z.mean, "z_sample": z, "y_mean": q_y.mean, "y_std": q_y.std},
            "y_sample": model.q_y(z, x).sample(noise.y),
            "z_std": q_z.std if isinstance(q_z, Gaussian) else None,
        }

    arrays = on_all_images(of_batch(*batch) for batch in images.batches(BATCH))
    names = data.folder.names(split) if data.folder else {}
    return {f"latents_{split}.npz": npz({"index": np.arange(len(images)), **names, **arrays})}


def _probes(name: str, version: int, paper: bool, **more) -> Step:
    file = f"per_image_{name}.npz"
    return Step(name, partial(scores, paper=paper, file=file), version, labels=True, files=(file,), **more)


RATES, SAMPLES = ("kl_z", "kl_z_se", "kl_y", "kl_y_se"), {"settings": ("n_samples",)}
_STEPS = (
    Step("rates", rates, 2, files=("latents.npz", "per_image.npz")),
    Step("units", units),
    Step("iw", importance_weighted, settings=("iw_samples",)),
    Step("is", sample_quality, 2, classifier=True, **SAMPLES),
    Step("fid", fid, 2, **SAMPLES),
    Step("fid_classifier", fid_classifier, 2, classifier=True, **SAMPLES),
    Step("mi_z", mi_z, 5, metrics=RATES[:2], labels=True),
    Step("mi_p", mi_p, classifier=True),
    Step("mi_y", mi_y, 5, metrics=RATES, labels=True, settings=("y_samples", "test_images")),
    _probes("probes", 5, paper=False, settings=("probe_images",)),
    _probes("probes_paper", 1, paper=True),
    Step(
        "recons",
        reconstructions,
        2,
        classifier=True,
        labels=True,
        files=("per_image_recons.npz",),
        settings=("test_images",),
    ),
    Step("pca", pca, files=("pca.npz",)),
    Step("latents_train", partial(export, split="train"), 2, files=("latents_train.npz",)),
    Step("latents_test", partial(export, split="test"), 2, files=("latents_test.npz",)),
)
STEPS = {step.name: step for step in _STEPS}


def possible(names: Iterable[str], evaluation: Evaluation) -> list[Step]:
    """Those of the named steps that there is a network for: not both FIDs, mi_p only with a classifier."""
    excluded = set() if evaluation.with_classifier else {"fid_classifier", "mi_p"}
    if "fid" in names:
        excluded.add("fid" if evaluation.inception is None else "fid_classifier")
    return [STEPS[name] for name in names if name not in excluded]
