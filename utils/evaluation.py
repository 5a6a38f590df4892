"""The steps of the evaluation: what each measures of a run, what it needs, and where it is kept.

A step's figures go into the run's metrics.json together with a fingerprint of the weights and settings that
they were computed from, so that the same command again computes only what is missing or stale.
"""

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

import datasets
from models.classifiers import CLASSIFIERS
from models.latents import Gaussian
from models.stack import TERMS, Stack
from train_classifier import load_classifier
from utils.config import Config
from utils.errors import UserError
from utils.information import accuracy_bound, discrete_mi, gaussian_mi
from utils.metrics import (
    active_units,
    frechet_distance,
    importance_weighted_ll,
    inception_score,
    psnr,
)
from utils.probes import calibration_error
from utils.runs import Run, load_model, read_json, write_atomic, write_json
from utils.seeds import generator

BATCH = 256  # images at a time; fixed, since the noise is drawn batch by batch
INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "6726825d")  # torch-fidelity's file, start of its sha256


@dataclass(eq=False)
class Bench:
    """What all runs of an evaluation share: settings, data, classifiers; and notes, each said once."""

    device: torch.device
    data_dir: str
    runs_dir: str
    download: bool = False
    classifier_path: str | None = None
    with_classifier: bool = False
    n_samples: int = 10_000
    iw_samples: int = 0
    y_samples: int = 4
    notes: set[str] = field(default_factory=set)
    _data: dict = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}", flush=True)

    def data(self, config: Config) -> datasets.Data:
        key = (config.dataset, config.image_shape)
        if key not in self._data:
            self._data[key] = datasets.load(config, self.data_dir, self.device, self.download)
        return self._data[key]

    @functools.cache  # noqa: B019  (one bench lives as long as the script)
    def classifier(self, dataset: str) -> tuple[nn.Module, str]:
        """The classifier of a data set and its digest. Raises UserError if there is none."""
        default = Path(self.runs_dir) / "classifiers" / dataset
        return load_classifier(Path(self.classifier_path) if self.classifier_path else default, self.device)

    def classifier_of(self, config: Config) -> tuple[nn.Module, str] | None:
        """The classifier if the data set has one and it is wanted; else None, with a note."""
        if config.dataset not in CLASSIFIERS:
            self.note(f"{config.data_name} has no classifier: no inception score, recons_acc and the like")
            return None
        return self.classifier(config.dataset)


class Subject:
    """A run under evaluation; the model and its latents are loaded when first needed."""

    def __init__(self, run: Run, bench: Bench):
        self.run, self.config, self.bench = run, run.config, bench

    @functools.cached_property
    def weights_digest(self) -> str:
        return hashlib.sha256((self.run.path / "vae.pth").read_bytes()).hexdigest()[:16]

    @functools.cached_property
    def model(self) -> nn.Module:
        return load_model(self.run, self.bench.device)

    @property
    def test(self):
        return self.bench.data(self.config).test

    def generator(self, *key) -> torch.Generator:
        return generator(self.bench.device, 0, *key)

    @functools.cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """latents.npz. Raises UserError if step 1 has not written it for these weights, or it is damaged."""
        path = self.run.path / "latents.npz"
        if fingerprint(self, STEPS["rates"]) != metrics_of(self.run).get("steps", {}).get("rates"):
            raise UserError(f"{path}: missing or stale; run eval_beta_grid.py --exclude_mi first")
        return read_arrays(path)

    @torch.no_grad()
    def samples(self, name: str, consume: Callable[[Tensor], Tensor]) -> Tensor:
        """What `consume` gives for each batch of n_samples ancestral samples, together."""
        g, n = self.generator(name), self.bench.n_samples
        sizes = [min(BATCH, n - i) for i in range(0, n, BATCH)]
        return torch.cat([consume(self.model.sample(size, generator=g)) for size in sizes])


@torch.no_grad()
def rates(s: Subject) -> dict[str, float]:
    """Loss and its terms, active units, PSNR; writes latents.npz."""
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
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(s.run.path / "latents.npz", buffer.getvalue())
    result = {**terms, "D": -terms["ll"]}
    if model.likelihood.is_mass:
        result["bpd"] = (-terms["ll"] + terms["kl_y"] + terms["kl_z"]) / (math.log(2) * math.prod(s.config.image_shape))
    result["active_z"], result["active_y"] = active_units(arrays["qz_mu"]), active_units(arrays["qy_mu"])
    result["psnr"] = psnr(model, s.test.batches(BATCH))
    return result


def importance_weighted(s: Subject) -> dict[str, float]:
    """The importance-weighted log-likelihood, mean over the test images."""
    g, total = s.generator("iw"), 0.0
    for x, _ in s.test.batches(BATCH):
        total += importance_weighted_ll(s.model, x, s.bench.iw_samples, g).sum().item()
    return {"ll_iw": total / len(s.test), "iw_samples": s.bench.iw_samples}


def sample_quality(s: Subject) -> dict[str, float]:
    """The inception score of samples under the data set's classifier."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    log_p = s.samples("samples", lambda x: torch.log_softmax(found[0](x).double(), 1))
    return {**inception_score(log_p), "n_samples": s.bench.n_samples}


def frechet(s: Subject) -> dict[str, float | str]:
    """Frechet distance of samples and test images: in Inception's features, else in the classifier's."""
    features = inception_features(s.bench)
    name, source = "fid", "inception-v3-compat"
    if features is None:
        found = s.bench.classifier_of(s.config) if s.bench.with_classifier else None
        if found is None:
            return {}
        features, name, source = found[0].features, "fid_classifier", f"{s.config.dataset} classifier {found[1]}"
    with torch.no_grad():
        real = torch.cat([features(x) for x, _ in s.test.batches(BATCH)])
        fake = s.samples("samples", features)
    return {name: frechet_distance(real.cpu().numpy(), fake.cpu().numpy()), "fid_features": source}


def inception_features(bench: Bench) -> Callable[[Tensor], Tensor] | None:
    """Images in [0, 1] to Inception-v3's 2048 features, if torch-fidelity and its weights are on this machine."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION[0]
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION[1]):
            raise OSError("not the published file")
    except (ImportError, OSError):
        bench.note(
            f"no fid: it needs Inception's weights at {path} (pip install torch-fidelity, and once with a network: "
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as F; '
            "F('inception-v3-compat', ['2048'])\"); with a classifier, fid_classifier is its stand-in"
        )
        return None
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(bench.device).eval()

    def features(x):
        return net((x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0]

    return features


def mi_z(s: Subject) -> dict[str, float]:
    """Mutual information of z and the label."""
    labels = s.latents["labels"]
    if s.model.z_shape == (0,):
        s.bench.note(f"{s.config.vae_type} has no z: no figures of z")
        return {}
    if s.model.family is not Gaussian:
        result = {"mi_q": discrete_mi(s.latents["qz_mu"].argmax(1), labels)}
        found = s.bench.classifier_of(s.config) if s.bench.with_classifier else None
        return result if found is None else {**result, "mi_p": generated_mi(s, found[0])}
    means, stds = (torch.from_numpy(s.latents[k]).to(s.bench.device).flatten(1) for k in ("qz_mu", "qz_std"))
    z = means + stds * torch.randn(means.shape, generator=s.generator("mi_z"), device=means.device)
    mi = gaussian_mi(z, means[:, None], stds[:, None], torch.from_numpy(labels).to(s.bench.device))
    return {"mi_q_mc": mi.mi, "mi_q_mc_se": mi.se, "mi_q_mc_null": mi.null}


@torch.no_grad()
def generated_mi(s: Subject, classifier: nn.Module) -> float:
    """Mutual information of a categorical z and the classifier's label of what it generates, 1000 samples each."""
    categories, g, predicted = s.config.z_dims, s.generator("mi_p"), []
    z = torch.eye(categories, device=s.bench.device).repeat_interleave(1000, 0)
    for part in z.split(BATCH):
        predicted.append(classifier(s.model.sample(z=part, generator=g)).argmax(1).cpu())
    return discrete_mi(z.argmax(1).cpu().numpy(), torch.cat(predicted).numpy())


@torch.no_grad()
def mi_y(s: Subject) -> dict[str, float]:
    """Mutual information of y and the label, q(y|x) = E_q(z|x) q(y|z,x) averaged over samples of z."""
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
    """The classifier on reconstructions and on the test images themselves."""
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
    """Three principal components of the means of y: writes pca.npz."""
    y = s.latents["qy_mu"].reshape(len(s.latents["labels"]), -1)
    fitted = PCA(min(3, *y.shape), random_state=0).fit(y)
    arrays = {
        "projections": fitted.transform(y).astype(np.float32),
        "components": fitted.components_.astype(np.float32),
        "explained_variance_ratio": fitted.explained_variance_ratio_,
        "labels": s.latents["labels"],
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(s.run.path / "pca.npz", buffer.getvalue())
    return {"pca_explained": float(fitted.explained_variance_ratio_.sum())}


def bound(metrics: dict, labels: np.ndarray) -> dict[str, float]:
    """The accuracy bound that the mutual information of z implies."""
    mi = metrics.get("mi_q_mc", metrics.get("mi_q"))
    return {} if mi is None else {"acc_bound": accuracy_bound(mi, labels)}


class Step(NamedTuple):
    """A part of the evaluation: its figures' names, how they are computed, and the settings they depend on."""

    name: str
    columns: tuple[str, ...]
    compute: Callable[[Subject], dict] | None
    settings: tuple[str, ...] = ()
    classifier: bool = False  # whether it depends on the data set's classifier


def _probe_columns(*suffixes: str) -> tuple[str, ...]:
    names = ("lr_acc_mean", "lr_acc_std", "svm_rbf_acc", "svm_linear_acc", "kNN_acc", "lr_ece", "lr_nll", "mi_lr_lb")
    return tuple(name + suffix for suffix in suffixes for name in names)


STEPS = {
    step.name: step
    for step in (
        Step("rates", (*TERMS, "D", "bpd", "active_z", "active_y", "psnr"), rates),
        Step("iw", ("ll_iw", "iw_samples"), importance_weighted, ("iw_samples",)),
        Step("is", ("is_mean", "is_std", "is_div", "is_sharp", "n_samples"), sample_quality, ("n_samples",), True),
        Step("fid", ("fid", "fid_classifier", "fid_features"), frechet, ("n_samples", "with_classifier"), True),
        Step("mi_z", ("mi_q_mc", "mi_q_mc_se", "mi_q_mc_null", "mi_q", "mi_p"), mi_z, ("with_classifier",), True),
        Step("mi_y", ("mi_q_mc_y", "mi_q_mc_y_se", "mi_q_mc_y_null", "y_samples"), mi_y, ("y_samples",)),
        Step("probes", ("acc_bound", *_probe_columns("", "_y")), None),
        Step("probes_standardized", _probe_columns("_standardized", "_y_standardized"), None),
        Step("recons", ("recons_acc", "recons_pred_entropy", "clsfr_acc", "clsfr_ece"), reconstructions, (), True),
        Step("pca", ("pca_explained",), pca),
    )
}


def fingerprint(s: Subject, step: Step) -> str:
    """Of all that the step's figures depend on: weights, settings, classifier."""
    parts = {name: getattr(s.bench, name) for name in step.settings}
    wanted = step.classifier and (s.bench.with_classifier or "with_classifier" not in step.settings)
    if wanted and s.config.dataset in CLASSIFIERS:
        parts["classifier"] = s.bench.classifier(s.config.dataset)[1]
    if step.name.startswith("probes"):
        known = metrics_of(s.run)
        parts["mi"] = [known.get("mi_q_mc"), known.get("mi_q")]
    text = json.dumps([s.weights_digest, s.run.config.to_json(), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_done(s: Subject, step: Step) -> bool:
    """Whether metrics.json has the step's figures, of these weights and settings."""
    return metrics_of(s.run).get("steps", {}).get(step.name) == fingerprint(s, step)


def record(s: Subject, step: Step, figures: dict) -> None:
    """Merges a step's figures into metrics.json; figures that are not finite are left out, with a note."""
    for name in [k for k, v in figures.items() if isinstance(v, float) and not math.isfinite(v)]:
        s.bench.note(f"{s.run.path.name}: {name} is {figures[name]}, left empty")
        figures = {k: v for k, v in figures.items() if k != name}
    figures = {name: figures[name] for name in step.columns if name in figures}  # workers end in any order
    with s.run.locked():
        known = metrics_of(s.run)
        kept = {k: v for k, v in known.items() if k not in step.columns}
        steps = {**known.get("steps", {}), step.name: fingerprint(s, step)}
        write_json(s.run.path / "metrics.json", {**kept, **figures, "steps": steps})


def metrics_of(run: Run) -> dict:
    """What metrics.json holds; empty while there is none. Raises UserError if it is damaged."""
    path = run.path / "metrics.json"
    return read_json(path) if path.exists() else {}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """An NPZ's arrays. Raises UserError naming the file if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as e:  # numpy and zipfile raise anything on damaged files
        raise UserError(f"{path}: missing or damaged ({e})") from e
