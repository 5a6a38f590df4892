"""Probes: simple classifiers that predict the label from a latent. Worker processes import this, so it avoids torch."""

import math
import signal
import warnings
from functools import partial
from pathlib import Path

import numpy as np

PROBES = ("lr", "svm_rbf", "svm_linear", "kNN")


def untrained(name: str):
    """The unfitted scikit-learn model of a probe."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    return {
        "lr": partial(LogisticRegression, solver="lbfgs", max_iter=1000),
        "svm_rbf": partial(SVC, kernel="rbf"),
        "svm_linear": partial(SVC, kernel="linear"),
        "kNN": partial(KNeighborsClassifier, n_neighbors=5),
    }[name]()


def split(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the fixed 80 % for training and 20 % for testing (the paper's permutation, seed 42)."""
    order = np.random.RandomState(42).permutation(n)  # noqa: NPY002  (the paper's split needs this generator)
    return order[: int(0.8 * n)], order[int(0.8 * n) :]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top prediction, with equal-width bins; probabilities (N, K), labels (N,)."""
    probabilities = probabilities.astype(np.float64)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def fit_probe(name: str, latents: np.ndarray, labels: np.ndarray, suffix: str, standardize: bool) -> dict[str, float]:
    """Fits a probe to latents (N, d) and labels (N,). Returns its accuracy on the held-out 20 %.

    For logistic regression, also its log loss in nats and its calibration error. `lr_acc_std` is 0, because lbfgs is
    deterministic. `mi_lr_lb` = H(label) - log loss is a lower bound on I(latent; label) (Barber & Agakov 2003).
    Empty where there are too few images or classes to train it on.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = split(len(labels))
    model = untrained(name)
    if len(np.unique(labels[train])) < 2 or len(test) == 0 or name == "kNN" and len(train) < model.n_neighbors:
        return {}
    model = make_pipeline(StandardScaler(), model) if standardize else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(latents[train], labels[train])
    if name != "lr":
        return {f"{name}_acc{suffix}": float(model.score(latents[test], labels[test]))}
    probabilities = model.predict_proba(latents[test])
    classes = list(model.classes_)
    known = np.isin(labels[test], classes)
    columns = np.searchsorted(classes, labels[test])
    nll = math.inf
    if known.all():
        nll = float(log_loss(columns, probabilities, labels=range(len(classes))))
    columns[~known] = -1
    p = np.bincount(labels) / len(labels)
    h = -sum(v * math.log(v) for v in p if v > 0)
    return {
        f"lr_acc_mean{suffix}": float((probabilities.argmax(1) == columns).mean()),
        f"lr_acc_std{suffix}": 0.0,
        f"lr_ece{suffix}": calibration_error(probabilities, columns),
        f"lr_nll{suffix}": nll,
        f"mi_lr_lb{suffix}": h - nll,
    }


def probe(index: int, name: str, source: tuple[Path, str], suffix: str, standardize: bool) -> tuple[int, dict | str]:
    """`fit_probe` in a worker process; `source` is an NPZ file and a key.

    Returns the index with the metrics, or with an error message.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    path, key = source
    try:
        with np.load(path, allow_pickle=False) as arrays:
            latents, labels = arrays[key], arrays["labels"]
        return index, fit_probe(name, latents.reshape(len(labels), -1), labels, suffix, standardize)
    except Exception as e:  # a failure must not stop the other runs
        return index, f"{path}: {name}{suffix} failed: {' '.join(str(e).split())}"
