"""The steps of the evaluation that are about latents: probes of them, their principal components, their export."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.loading import memory
from models.latents import Gaussian
from utils.errors import UserError
from utils.evaluation.evaluation import BATCH
from utils.evaluation.metrics import TAILS, TAILS_PAPER
from utils.evaluation.probes import PROBES, Scores, fit_stored
from utils.evaluation.run import EvaluatedRun, on_all_images
from utils.files import npz


@torch.no_grad()
def probe_latents(run: EvaluatedRun) -> dict[str, np.ndarray]:
    """Means and samples of z and y, and labels, of test images and (`_train`) a fixed choice of training images."""
    data, most = run.evaluation.data(run.config), run.evaluation.probe_images
    model, g = run.model, run.generator("probes")

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        z = q_z.sample(noise.z)
        samples = {"z": z, "y": model.q_y(z, x).sample(noise.y)}
        means = {"qz_mu": q_z.mean, "qy_mu": model.q_y(q_z.mode, x).mean}
        return {**samples, **means, "labels": label}

    test = on_all_images(of_batch(*batch) for batch in data.test.batches(BATCH))
    batches = itertools.islice(data.train.batches(BATCH, (0, 0)), math.ceil(most / BATCH))
    train = on_all_images(of_batch(*batch) for batch in batches)
    return test | {f"{name}_train": values[:most] for name, values in train.items()}


def fits(run: EvaluatedRun, file: Path, paper: bool) -> list[tuple]:
    """The fits of all probes, by the paper's protocol or this project's, to latents that are written to a file."""
    arrays, tails = (run.latents, TAILS_PAPER) if paper else (probe_latents(run), TAILS)
    np.savez(file, **arrays)
    keys = [key for key in tails if arrays[key].size]
    return [(fit_stored, name, file, key, tails[key]) for key in keys for name in PROBES]


def scores(run: EvaluatedRun, *fitted: Scores, file: str) -> dict:
    """All metrics of the fits, and the terms of their images as a file's content; a note if some could not be made."""
    if not all(metrics for metrics, _ in fitted):
        run.evaluation.note(f"{run.path.name}: too few images, or one class only, to train a classifier on")
    terms = {name: values for _, terms in fitted for name, values in terms.items()}
    metrics = {name: value for metrics, _ in fitted for name, value in metrics.items()}
    return {**metrics, file: npz(dict(sorted(terms.items())))}


def pca(run: EvaluatedRun) -> dict:
    """The first three principal components of the posterior means of y, in pca.npz."""
    from sklearn.decomposition import PCA

    labels = run.latents["labels"]
    y = run.latents["qy_mu"].reshape(len(labels), -1)
    fitted = PCA(min(3, *y.shape), random_state=0).fit(y)
    arrays = {
        "projections": fitted.transform(y).astype(np.float32),
        "components": fitted.components_.astype(np.float32),
        "explained_variance_ratio": fitted.explained_variance_ratio_,
        "labels": labels,
    }
    return {"pca_explained": float(fitted.explained_variance_ratio_.sum()), "pca.npz": npz(arrays)}


@torch.no_grad()
def export(run: EvaluatedRun, split: str) -> dict[str, bytes]:
    """The latents of a split's N images, in the data set's order, as latents_<split>.npz.

    `index`, `label` (N,); `z_mean`, `z_std` of q(z|x) (N, *z_shape); `y_mean`, `y_std` of q(y|z,x) at the mode of
    q(z|x) (N, *y_shape); `z_sample`, `y_sample`: one joint sample. A categorical z has probabilities as means, and no
    stds; without labels there is no `label`. Raises UserError if they do not fit into the memory.
    """
    data, model, g = run.evaluation.data(run.config), run.model, run.generator("latents", split)
    images = getattr(data, split)
    needed, free = 24 * len(images) * (np.prod(model.z_shape) + np.prod(model.y_shape)), memory()
    if needed > free:
        raise UserError(f"--latents {split}: needs {int(needed):,} bytes of memory, this machine has {free:,}")

    def of_batch(x: Tensor, label: Tensor) -> dict[str, Tensor | None]:
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        q_y, z = model.q_y(q_z.mode, x), q_z.sample(noise.z)
        return {
            "label": label if data.labelled else None,
            "z_mean": q_z.mean,
            "z_sample": z,
            "y_mean": q_y.mean,
            "y_std": q_y.std,
            "y_sample": model.q_y(z, x).sample(noise.y),
            "z_std": q_z.std if isinstance(q_z, Gaussian) else None,
        }

    arrays = on_all_images(of_batch(*batch) for batch in images.batches(BATCH))
    return {f"latents_{split}.npz": npz({"index": np.arange(len(images)), **arrays})}
