"""The steps of the evaluation: each computes metrics of a run on the test images."""

import math
from functools import partial

import numpy as np
import torch

from models.latents import Gaussian
from models.stack import TERMS
from utils.evaluation.generation import fid, fid_classifier, inception_features, sample_quality
from utils.evaluation.information import (
    MutualInformation,
    accuracy_bound,
    channel_mi,
    discrete_mi,
    gaussian_mi,
    upper_end,
)
from utils.evaluation.latents import active_by_rate, export
from utils.evaluation.metrics import active_units, importance_weighted_ll
from utils.evaluation.probes import (
    PROBES,
    TAILS_PAPER,
    accuracy_of,
    calibration_error,
    calibration_null,
    standard_error,
)
from utils.evaluation.subject import BATCH, Bench, Step, Subject
from utils.files import npz


@torch.no_grad()
def rates(s: Subject) -> dict[str, float]:
    """Loss and its terms (nats), bits per dimension, active units, PSNR (dB); latents.npz and per_image.npz."""
    model, g = s.model, s.generator("rates")
    latents = {name: [] for name in ("qz_mu", "qz_std", "qy_mu", "qy_std", "labels")}
    of_image = {}
    for x, label in s.test.batches(BATCH):
        terms = model(x, model.noise(len(x), g))
        q_z = model.q_z(x)
        q_y = model.q_y(q_z.mode, x)
        error = ((model.mean_x(q_y.mode) - x) ** 2).double().mean((1, 2, 3))
        floor = model.likelihood.floor(x)
        found = {"loss": terms.loss(s.config.beta_y, s.config.beta_z), **terms._asdict(), "mse": error, "floor": floor}
        for name, value in found.items():
            if value is not None:
                of_image.setdefault(name, []).append(value.double().cpu())
        z_std = q_z.std if isinstance(q_z, Gaussian) else torch.zeros_like(q_z.mean)
        for name, value in zip(latents, (q_z.mean, z_std, q_y.mean, q_y.std, label), strict=True):
            latents[name].append(value.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in latents.items()}
    values = {name: torch.cat(parts).numpy() for name, parts in of_image.items()}
    means = {name: float(value.mean()) for name, value in values.items()}
    ses = {f"{name}_se": standard_error(value) for name, value in values.items()}
    result = {**means, **ses, "D": -means["ll"], "D_se": ses["ll_se"]}
    if "floor" in means:
        result |= {"D_floor": means["floor"], "D_above_floor": result["D"] - means["floor"]}
        result["D_above_floor_se"] = standard_error(values["ll"] + values["floor"])
    if model.likelihood.is_mass:
        bits = (values["kl_y"] + values["kl_z"] - values["ll"]) / (math.log(2) * math.prod(s.config.image_shape))
        result |= {"bpd": float(bits.mean()), "bpd_se": standard_error(bits)}
    result["active_z"], result["active_y"] = active_units(arrays["qz_mu"]), active_units(arrays["qy_mu"])
    result["psnr"] = -10 * math.log10(means["mse"]) if means["mse"] > 0 else math.inf
    result["psnr_se"] = 10 / math.log(10) * ses["mse_se"] / means["mse"] if means["mse"] > 0 else math.nan
    kept = {name: values[name].astype(np.float32) for name in ("ll", "kl_y", "kl_z", "mse")}
    return result | {"latents.npz": npz(arrays), "per_image.npz": npz(kept)}


def importance_weighted(s: Subject) -> dict[str, float]:
    """The importance-weighted log-likelihood in nats, averaged over the test images."""
    g, k = s.generator("iw"), s.bench.iw_samples
    found = [importance_weighted_ll(s.model, x, k, g).double().cpu() for x, _ in s.test.batches(BATCH)]
    ll = torch.cat(found).numpy()
    return {"ll_iw": float(ll.mean()), "ll_iw_se": standard_error(ll), "iw_samples": k}


def mi_z(s: Subject) -> dict[str, float]:
    """Mutual information between z and the label, nats."""
    labels = s.latents["labels"]
    if s.model.z_shape == (0,):
        s.bench.note(f"{s.config.vae_type} has no z: metrics of z are left empty")
        return {}
    rate = s.metrics["kl_z"], s.metrics.get("kl_z_se", 0.0)
    if s.model.family is not Gaussian:
        q = s.latents["qz_mu"]
        high, se = upper_end(labels, rate, (channel_mi(q, labels), 0.0))
        ends = {"mi_z_high": high, "mi_z_high_se": se, "acc_bound": accuracy_bound(high, labels)}
        return {"mi_q": discrete_mi(q.argmax(1), labels), **ends}
    means, stds = (torch.from_numpy(s.latents[k]).to(s.bench.device).flatten(1) for k in ("qz_mu", "qz_std"))
    z = means + stds * torch.randn(means.shape, generator=s.generator("mi_z"), device=means.device)
    mi = gaussian_mi(z, means[:, None], stds[:, None], torch.from_numpy(labels).to(s.bench.device))
    found = _estimate(mi, rate, labels, "mi_q_mc", "mi_z_high")
    return {**found, "acc_bound": accuracy_bound(found["mi_z_high"], labels)}


def _estimate(mi: MutualInformation, rate: tuple[float, float], labels: np.ndarray, name: str, end: str) -> dict:
    high, se = upper_end(labels, rate, (mi.upper, mi.upper_se))
    saturated = int(mi.is_saturated(rate[0], len(labels)))
    estimate = {name: mi.mi, f"{name}_se": mi.se, f"{name}_null": mi.null, f"{name}_saturated": saturated}
    return {**estimate, end: high, f"{end}_se": se}


@torch.no_grad()
def mi_p(s: Subject) -> dict[str, float]:
    """Mutual information in nats between a categorical z and the classifier's label of 1000 samples per category."""
    if s.model.family is Gaussian:
        return {}
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    categories, g, predicted = s.config.z_dims, s.generator("mi_p"), []
    z = torch.eye(categories, device=s.bench.device).repeat_interleave(1000, 0)
    for part in z.split(BATCH):
        predicted.append(found[0](s.model.sample(z=part, generator=g)).argmax(1).cpu())
    return {"mi_p": discrete_mi(z.argmax(1).cpu().numpy(), torch.cat(predicted).numpy())}


@torch.no_grad()
def mi_y(s: Subject) -> dict[str, float]:
    """Mutual information between y and the label, nats; q(y|x) = E_q(z|x) q(y|z,x) is averaged over samples of z."""
    g, means, stds, labels, samples = s.generator("mi_y"), [], [], [], []
    for x, label in s.test.batches(BATCH):
        q_z = s.model.q_z(x)
        mixture = [s.model.q_y(q_z.sample(s.model.noise(len(x), g).z), x) for _ in range(s.bench.y_samples)]
        samples.append(mixture[0].sample(s.model.noise(len(x), g).y).flatten(1))
        means.append(torch.stack([q.mean.flatten(1) for q in mixture], 1))
        stds.append(torch.stack([q.std.flatten(1) for q in mixture], 1))
        labels.append(label)
    mi = gaussian_mi(*(torch.cat(parts) for parts in (samples, means, stds, labels)))
    known = s.metrics  # I(y; label) <= I(z, y; x) <= R(z) + R(y|z)
    rate = known["kl_z"] + known["kl_y"], math.hypot(known.get("kl_z_se", 0.0), known.get("kl_y_se", 0.0))
    found = _estimate(mi, rate, torch.cat(labels).cpu().numpy(), "mi_q_mc_y", "mi_y_high")
    return {**found, "y_samples": s.bench.y_samples}


@torch.no_grad()
def reconstructions(s: Subject) -> dict[str, float]:
    """The classifier's accuracy on reconstructions and on test images, predictive entropy (nats) and calibration."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    net, log_p, labels = found[0], [], []
    for x, label in s.test.batches(BATCH):
        log_p.append(torch.log_softmax(net(s.model.reconstruct(x)).double(), 1))
        labels.append(label)
    features = s.bench.test_features(s.config, net.features)
    on_images = torch.softmax(net.head(features.to(s.bench.device)).double(), 1).cpu().numpy()
    log_p, labels = torch.cat(log_p), torch.cat(labels).cpu().numpy()
    correct, without = log_p.argmax(1).cpu().numpy() == labels, on_images.argmax(1) == labels
    entropies = torch.special.entr(log_p.exp()).sum(1).cpu().numpy()
    return {
        "recons_acc": float(correct.mean()),
        "recons_acc_se": standard_error(correct),
        "recons_pred_entropy": float(entropies.mean()),
        "recons_pred_entropy_se": standard_error(entropies),
        "clsfr_acc": float(without.mean()),
        "clsfr_acc_se": standard_error(without),
        "clsfr_ece": calibration_error(on_images, labels),
        "clsfr_ece_null": calibration_null(on_images),
        "per_image_recons.npz": npz({"recons_acc": correct.astype(np.float32)}),
    }


def pca(s: Subject) -> dict[str, float]:
    """The first three principal components of the posterior means of y, in pca.npz."""
    from sklearn.decomposition import PCA

    y = s.latents["qy_mu"].reshape(len(s.latents["labels"]), -1)
    fitted = PCA(min(3, *y.shape), random_state=0).fit(y)
    arrays = {
        "projections": fitted.transform(y).astype(np.float32),
        "components": fitted.components_.astype(np.float32),
        "explained_variance_ratio": fitted.explained_variance_ratio_,
        "labels": s.latents["labels"],
    }
    return {"pca_explained": float(fitted.explained_variance_ratio_.sum()), "pca.npz": npz(arrays)}


def _probe_columns(*tails: str) -> tuple[str, ...]:
    scores = (*map(accuracy_of, PROBES), "lr_nll")
    names = [(f"{name}{tail}", f"{name}{tail}_se") for tail in tails for name in scores]
    names += [(f"lr_ece{tail}", f"lr_ece_null{tail}") for tail in tails]
    return tuple(name for pair in names for name in pair)


def _distance_columns(name: str, kernel: str) -> tuple[str, ...]:
    ends = ("", "_se", "_floor", "_features", "_samples")
    return (*(name + end for end in ends), kernel, f"{kernel}_se")


_RATES = tuple(name for term in (*TERMS, "D") for name in (term, f"{term}_se"))
_RATES += ("D_floor", "D_above_floor", "D_above_floor_se", "bpd", "bpd_se", "active_z", "active_y", "psnr", "psnr_se")
_CLASSIFIER = ("clsfr_acc", "clsfr_acc_se", "clsfr_ece", "clsfr_ece_null")
_MC = ("mi_q_mc", "mi_q_mc_se", "mi_q_mc_null")
_MC_Y = ("mi_q_mc_y", "mi_q_mc_y_se", "mi_q_mc_y_null")
_PAPER = tuple(TAILS_PAPER.values())
_LOW = ("mi_z_low", "mi_z_low_se", "mi_y_low", "mi_y_low_se")
STEPS = {
    step.name: step
    for step in (
        Step("rates", _RATES, rates, files=("latents.npz", "per_image.npz"), version=2),
        Step("units", ("active_z_rate", "active_y_rate"), active_by_rate),
        Step("iw", ("ll_iw", "ll_iw_se", "iw_samples"), importance_weighted, ("iw_samples",)),
        Step(
            "is",
            ("is_mean", "is_mean_se", "is_std", "is_div", "is_sharp", "n_classifiers", "n_samples"),
            sample_quality,
            ("n_samples",),
            True,
            version=2,
        ),
        Step("fid", _distance_columns("fid", "kid"), fid, ("n_samples",), version=2),
        Step(
            "fid_classifier",
            _distance_columns("fid_classifier", "kid_classifier"),
            fid_classifier,
            ("n_samples",),
            True,
            version=2,
        ),
        Step(
            "mi_z",
            (*_MC, "mi_q_mc_saturated", "mi_q", "mi_z_high", "mi_z_high_se", "acc_bound"),
            mi_z,
            metrics=("kl_z", "kl_z_se"),
            labels=True,
            version=2,
        ),
        Step("mi_p", ("mi_p",), mi_p, (), True),
        Step(
            "mi_y",
            (*_MC_Y, "mi_q_mc_y_saturated", "y_samples", "mi_y_high", "mi_y_high_se"),
            mi_y,
            ("y_samples",),
            metrics=("kl_z", "kl_z_se", "kl_y", "kl_y_se"),
            labels=True,
            version=2,
        ),
        Step(
            "probes",
            (*_LOW, *_probe_columns("", "_y", "_sample", "_sample_y"), "probe_images"),
            None,
            ("probe_images",),
            files=("per_image_probes.npz",),
            labels=True,
            version=3,
        ),
        Step(
            "probes_paper",
            (*_probe_columns(*_PAPER), *(f"{name}{tail}" for tail in _PAPER for name in ("lr_acc_std", "mi_lr_lb"))),
            None,
            files=("per_image_probes_paper.npz",),
            labels=True,
        ),
        Step(
            "recons",
            ("recons_acc", "recons_acc_se", "recons_pred_entropy", "recons_pred_entropy_se", *_CLASSIFIER),
            reconstructions,
            (),
            True,
            files=("per_image_recons.npz",),
            version=2,
        ),
        Step("pca", ("pca_explained",), pca, files=("pca.npz",)),
        *(Step(f"latents_{s}", (), partial(export, split=s), files=(f"latents_{s}.npz",)) for s in ("train", "test")),
    )
}
MI_STEPS = ["mi_z", "mi_y", "mi_p"]


def choose(name: str, bench: Bench) -> str | None:
    """The step to run for a name, None to skip it: "frechet" is fid, or fid_classifier without Inception weights."""
    if name == "frechet":
        return "fid" if inception_features(bench) else "fid_classifier" if bench.with_classifier else None
    if name == "mi_p" and not bench.with_classifier:
        return None
    return name
