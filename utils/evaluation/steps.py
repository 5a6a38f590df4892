"""The steps of the evaluation: each computes metrics of a run on the test images."""

import functools
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.latents import Gaussian
from models.stack import TERMS, Stack
from utils.evaluation.information import accuracy_bound, discrete_mi, gaussian_mi
from utils.evaluation.latents import active_by_rate, export
from utils.evaluation.metrics import active_units, frechet_distance, importance_weighted_ll, inception_score
from utils.evaluation.probes import calibration_error
from utils.evaluation.subject import BATCH, Bench, Step, Subject
from utils.files import npz

INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "6726825d")  # torch-fidelity's file, prefix of its sha256


@torch.no_grad()
def rates(s: Subject) -> dict[str, float]:
    """Loss and its terms (nats), bits per dimension, active units, PSNR (dB); and latents.npz."""
    model, betas = s.model, [torch.tensor([b], device=s.bench.device) for b in (s.config.beta_y, s.config.beta_z)]
    means = Stack(model, 1).evaluate(s.test, BATCH, s.generator("rates"), *betas)[0].tolist()
    terms = dict(zip(TERMS, means, strict=True))
    latents = {name: [] for name in ("qz_mu", "qz_std", "qy_mu", "qy_std", "labels")}
    for x, label in s.test.batches(BATCH):
        q_z = model.q_z(x)
        q_y = model.q_y(q_z.mode, x)
        z_std = q_z.std if isinstance(q_z, Gaussian) else torch.zeros_like(q_z.mean)
        for name, value in zip(latents, (q_z.mean, z_std, q_y.mean, q_y.std, label), strict=True):
            latents[name].append(value.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in latents.items()}
    result = {**terms, "D": -terms["ll"], "latents.npz": npz(arrays)}
    if model.likelihood.is_mass:
        result["bpd"] = (-terms["ll"] + terms["kl_y"] + terms["kl_z"]) / (math.log(2) * math.prod(s.config.image_shape))
    result["active_z"], result["active_y"] = active_units(arrays["qz_mu"]), active_units(arrays["qy_mu"])
    result["psnr"] = model.psnr(s.test.batches(BATCH))
    return result


def importance_weighted(s: Subject) -> dict[str, float]:
    """The importance-weighted log-likelihood in nats, averaged over the test images."""
    g, total = s.generator("iw"), 0.0
    for x, _ in s.test.batches(BATCH):
        total += importance_weighted_ll(s.model, x, s.bench.iw_samples, g).sum().item()
    return {"ll_iw": total / len(s.test), "iw_samples": s.bench.iw_samples}


def sample_quality(s: Subject) -> dict[str, float]:
    """The inception score of samples, from the data set's classifier."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    log_p = s.samples("samples", lambda x: torch.log_softmax(found[0](x).double(), 1))
    return {**inception_score(log_p), "n_samples": s.bench.n_samples}


def fid(s: Subject) -> dict[str, float | str]:
    """Frechet distance between samples and test images in Inception-v3 features."""
    features = inception_features(s.bench)
    return {} if features is None else _frechet(s, features, "fid", "inception-v3-compat")


def fid_classifier(s: Subject) -> dict[str, float | str]:
    """Frechet distance between samples and test images in the features of the data set's classifier."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    return _frechet(s, found[0].features, "fid_classifier", f"{s.config.data_name} classifier {found[1]}")


@torch.no_grad()
def _frechet(s: Subject, features: Callable[[Tensor], Tensor], name: str, source: str) -> dict[str, float | str]:
    real = torch.cat([features(x) for x, _ in s.test.batches(BATCH)])
    fake = s.samples("samples", features)
    distance = frechet_distance(real.cpu().numpy(), fake.cpu().numpy())
    return {name: distance, f"{name}_features": source, f"{name}_samples": len(fake)}


@functools.cache
def inception_features(bench: Bench) -> Callable[[Tensor], Tensor] | None:
    """A function from images (B, C, H, W) in [0, 1] to Inception-v3 features (B, 2048).

    None, with a note, if torch-fidelity or its weights are not installed.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION[0]
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION[1]):
            raise OSError("not the published file")
    except (ImportError, OSError):
        bench.note(
            f"no fid: it needs the Inception weights at {path}; to fetch them: pip install torch-fidelity, then "
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as F; '
            "F('inception-v3-compat', ['2048'])\"; with --with_classifier, fid_classifier is computed instead"
        )
        return None
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(bench.device).eval()

    def features(x):
        return net((x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0]

    return features


def mi_z(s: Subject) -> dict[str, float]:
    """Mutual information between z and the label, nats."""
    labels = s.latents["labels"]
    if s.model.z_shape == (0,):
        s.bench.note(f"{s.config.vae_type} has no z: metrics of z are left empty")
        return {}
    if s.model.family is not Gaussian:
        return {"mi_q": discrete_mi(s.latents["qz_mu"].argmax(1), labels)}
    means, stds = (torch.from_numpy(s.latents[k]).to(s.bench.device).flatten(1) for k in ("qz_mu", "qz_std"))
    z = means + stds * torch.randn(means.shape, generator=s.generator("mi_z"), device=means.device)
    mi = gaussian_mi(z, means[:, None], stds[:, None], torch.from_numpy(labels).to(s.bench.device))
    return {"mi_q_mc": mi.mi, "mi_q_mc_se": mi.se, "mi_q_mc_null": mi.null}


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
    return {"mi_q_mc_y": mi.mi, "mi_q_mc_y_se": mi.se, "mi_q_mc_y_null": mi.null, "y_samples": s.bench.y_samples}


@torch.no_grad()
def reconstructions(s: Subject) -> dict[str, float]:
    """The classifier's accuracy on reconstructions and on test images, predictive entropy (nats) and calibration."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    log_p, on_images, labels = [], [], []
    for x, label in s.test.batches(BATCH):
        log_p.append(torch.log_softmax(found[0](s.model.reconstruct(x)).double(), 1))
        on_images.append(torch.softmax(found[0](x).double(), 1).cpu())
        labels.append(label)
    log_p, labels, on_images = torch.cat(log_p), torch.cat(labels), torch.cat(on_images).numpy()
    return {
        "recons_acc": (log_p.argmax(1) == labels).double().mean().item(),
        "recons_pred_entropy": -(log_p.exp() * log_p).sum(1).mean().item(),
        "clsfr_acc": float((on_images.argmax(1) == labels.cpu().numpy()).mean()),
        "clsfr_ece": calibration_error(on_images, labels.cpu().numpy()),
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


def bound(s: Subject) -> dict[str, float]:
    """The bound on accuracy implied by the mutual information of z; empty, with a note, before step 2."""
    known = s.metrics
    mi = known.get("mi_q_mc", known.get("mi_q"))
    if mi is None and s.latents["qz_mu"].size:
        s.bench.note("no acc_bound: it needs the mutual information; run eval_beta_single.py (step 2) first")
    return {} if mi is None else {"acc_bound": accuracy_bound(mi, s.latents["labels"])}


def _probe_columns(*suffixes: str) -> tuple[str, ...]:
    names = ("lr_acc_mean", "lr_acc_std", "svm_rbf_acc", "svm_linear_acc", "kNN_acc", "lr_ece", "lr_nll", "mi_lr_lb")
    return tuple(name + suffix for suffix in suffixes for name in names)


STEPS = {
    step.name: step
    for step in (
        Step("rates", (*TERMS, "D", "bpd", "active_z", "active_y", "psnr"), rates, file="latents.npz"),
        Step("units", ("active_z_rate", "active_y_rate"), active_by_rate),
        Step("iw", ("ll_iw", "iw_samples"), importance_weighted, ("iw_samples",)),
        Step("is", ("is_mean", "is_std", "is_div", "is_sharp", "n_samples"), sample_quality, ("n_samples",), True),
        Step("fid", ("fid", "fid_features", "fid_samples"), fid, ("n_samples",)),
        Step(
            "fid_classifier",
            ("fid_classifier", "fid_classifier_features", "fid_classifier_samples"),
            fid_classifier,
            ("n_samples",),
            True,
        ),
        Step("mi_z", ("mi_q_mc", "mi_q_mc_se", "mi_q_mc_null", "mi_q"), mi_z, labels=True),
        Step("mi_p", ("mi_p",), mi_p, (), True),
        Step("mi_y", ("mi_q_mc_y", "mi_q_mc_y_se", "mi_q_mc_y_null", "y_samples"), mi_y, ("y_samples",), labels=True),
        Step("probes", ("acc_bound", *_probe_columns("", "_y")), None, metrics=("mi_q_mc", "mi_q"), labels=True),
        Step("probes_standardized", _probe_columns("_standardized", "_y_standardized"), None, labels=True),
        Step("recons", ("recons_acc", "recons_pred_entropy", "clsfr_acc", "clsfr_ece"), reconstructions, (), True),
        Step("pca", ("pca_explained",), pca, file="pca.npz"),
        *(Step(f"latents_{s}", (), partial(export, split=s), file=f"latents_{s}.npz") for s in ("train", "test")),
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
