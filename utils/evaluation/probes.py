"""Probes: simple classifiers that predict the label from a latent. Worker processes import this, so it avoids torch."""

import math
import signal
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

PROBES = {  # the columns of their accuracies; the paper's code averaged logistic regression over seeds
    "lr": "lr_acc_mean",
    "svm_rbf": "svm_rbf_acc",
    "svm_linear": "svm_linear_acc",
    "kNN": "kNN_acc",
}
NEIGHBOURS = 5
KERNELS = {"svm_rbf": "rbf", "svm_linear": "linear"}
TOLERANCES = {"svm_rbf": 1e-3, "svm_linear": 0.1}  # of their solver; docs/performance.md says what the latter costs
MANY = 64  # dimensions from which on kernels are sooner made as products of matrices
MOST_BYTES, ROWS = 2**31, 1000  # of a kernel matrix; of it that are made at once for test latents
Split = tuple[ndarray, ndarray]  # latents (N, d), labels (N,)
Scores = tuple[dict[str, float], dict[str, ndarray]]  # metrics by column; terms (N,) of which some are the means


def untrained(name: str, standardize: bool, c: float = 1.0):
    """The unfitted scikit-learn model of a probe; `c` is the inverse of logistic regression's L2 weight."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = {
        "lr": LogisticRegression(solver="lbfgs", max_iter=1000, C=c),
        "kNN": KNeighborsClassifier(n_neighbors=NEIGHBOURS),
        **{svm: SVC(kernel=kernel) for svm, kernel in KERNELS.items()},
    }[name]
    return make_pipeline(StandardScaler(), model) if standardize else model


def split(n: int) -> tuple[ndarray, ndarray]:
    """Indices of the paper's 80 % for training and 20 % for testing: a fixed permutation, seed 42."""
    order = np.random.RandomState(42).permutation(n)  # noqa: NPY002  (the paper's split needs this generator)
    return order[: int(0.8 * n)], order[int(0.8 * n) :]


def entropy(labels: ndarray) -> float:
    """Entropy H(label) in nats of the empirical distribution of the labels (N,)."""
    p = np.bincount(labels) / len(labels)
    return -sum(v * math.log(v) for v in p if v > 0)


def standard_error(values: ndarray) -> float:
    """The standard error of the mean of independent values (N,); NaN for a single one."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1, dtype=np.float64) / math.sqrt(len(values)))


def mean_and_error(terms: dict[str, ndarray]) -> dict[str, float]:
    """The means of values (N,) by name, and their standard errors by `<name>_se`."""
    errors = {f"{name}_se": standard_error(values) for name, values in terms.items()}
    return {name: float(values.mean()) for name, values in terms.items()} | errors


def _calibration_gap(confidence: ndarray, correct: ndarray, bins: int = 15) -> float:
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def calibration_error(probabilities: ndarray, labels: ndarray) -> float:
    """Expected calibration error of the top prediction, 15 equal-width bins; probabilities (N, K), labels (N,)."""
    return _calibration_gap(probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels)


def calibration_null(probabilities: ndarray, draws: int = 200) -> float:
    """What `calibration_error` is on average, above 0, of labels drawn from the probabilities (N, K) themselves."""
    confidence, rng = probabilities.max(1).astype(np.float64), np.random.default_rng(0)
    drawn = [rng.random(len(confidence)) < confidence for _ in range(draws)]
    return float(np.mean([_calibration_gap(confidence, correct) for correct in drawn]))


def choose_c(latents: ndarray, labels: ndarray) -> float:
    """The C of logistic regression among 1, 0.1, 0.01 of the least log loss on a fifth of latents (N, d) held out.

    With a larger one, many dimensions and few images make the probe too sure of itself to certify information.
    """
    from sklearn.metrics import log_loss

    train, held = split(len(labels))
    if len(held) == 0 or len(np.unique(labels[train])) < 2 or not np.isin(labels[held], labels[train]).all():
        return 1.0

    def loss(c: float) -> float:
        model = untrained("lr", True, c).fit(latents[train], labels[train])
        return log_loss(labels[held], model.predict_proba(latents[held]), labels=np.unique(labels[train]))

    return min((1.0, 0.1, 0.01), key=loss)


def svm_labels(name: str, train: Split, latents: ndarray) -> ndarray:
    """What `untrained(name, True)` would label latents (M, d), sooner: by kernels that are products of matrices."""
    from sklearn.metrics.pairwise import pairwise_kernels
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    scaler = StandardScaler().fit(train[0])
    scaled = scaler.transform(train[0]).astype(np.float64)
    gamma = 1 / (scaled.shape[1] * scaled.var()) if scaled.any() else 1.0  # as SVC's gamma="scale"
    kernel = partial(pairwise_kernels, metric=KERNELS[name], filter_params=True, gamma=gamma)
    model = SVC(kernel="precomputed", tol=TOLERANCES[name]).fit(kernel(scaled), train[1])
    parts = (scaler.transform(latents[i : i + ROWS]).astype(np.float64) for i in range(0, len(latents), ROWS))
    return np.concatenate([model.predict(kernel(part, scaled)) for part in parts])


def fit_probe(name: str, train: Split, test: Split, tail: str, standardize: bool) -> Scores:
    """Fits a probe on some latents and tests it on others; `tail` ends the names of the results.

    Empty where there are too few images or classes to train on; an infinite log loss if a class was not trained on.
    """
    from sklearn.exceptions import ConvergenceWarning

    (latents, labels), (tested, right), column = train, test, PROBES[name] + tail
    if len(np.unique(labels)) < 2 or len(right) == 0 or name == "kNN" and len(labels) < NEIGHBOURS:
        return {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if name in KERNELS and standardize and latents.shape[1] >= MANY and 8 * len(labels) ** 2 <= MOST_BYTES:
            predicted = svm_labels(name, train, tested)
        else:
            c = choose_c(latents, labels) if name == "lr" and standardize else 1.0
            model = untrained(name, standardize, c).fit(latents, labels)
            predicted = model.predict(tested)
    if name != "lr":
        terms = {column: predicted == right}
        return mean_and_error(terms), terms
    probabilities, classes = model.predict_proba(tested), model.classes_
    trained = np.isin(right, classes)  # on that class; else the loss is infinite
    columns = np.where(trained, np.searchsorted(classes, right), -1)
    losses = np.full(len(columns), math.inf)
    of_label = probabilities[trained, columns[trained]]
    losses[trained] = -np.log(np.maximum(of_label, np.finfo(of_label.dtype).eps))  # as scikit-learn's log_loss
    terms = {column: probabilities.argmax(1) == columns, f"lr_nll{tail}": losses}
    return {
        **mean_and_error(terms),
        f"lr_ece{tail}": calibration_error(probabilities, columns),
        f"lr_ece_null{tail}": calibration_null(probabilities),
    }, terms


def fit_stored(name: str, file: Path, key: str, tail: str) -> Scores:
    """`fit_probe` in a worker process, by the paper's protocol or this project's.

    `key` names the latents in an NPZ file to test on. The paper's protocol splits them; otherwise the probe is trained
    on the file's `<key>_train`, standardised. The terms are those of all images, NaN of those that were not tested.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    paper = tail.endswith("_paper")
    with np.load(file, allow_pickle=False) as arrays:
        latents, labels = arrays[key], arrays["labels"]
        latents, tested = latents.reshape(len(labels), -1), np.arange(len(labels))
        if paper:
            trained, tested = split(len(labels))
            train = latents[trained], labels[trained]
        else:
            train = arrays[f"{key}_train"].reshape(len(arrays["labels_train"]), -1), arrays["labels_train"]
    scores, terms = fit_probe(name, train, (latents[tested], labels[tested]), tail, standardize=not paper)
    if name == "lr" and scores:
        low, lows = (entropy(labels) - of[f"lr_nll{tail}"] for of in (scores, terms))
        scores["probe_images"] = len(train[1])
        if paper:  # of means, it bounds nothing about a sample's information; logistic regression knows no seed
            scores |= {f"lr_acc_std{tail}": 0.0, f"mi_lr_lb{tail}": low}
        elif "_sample" in tail:
            scores |= {f"mi_{key}_low": max(0.0, low), f"mi_{key}_low_se": scores[f"lr_nll{tail}_se"]}
            terms[f"mi_{key}_low"] = lows
    of_images = {column: np.full(len(labels), math.nan, dtype=np.float32) for column in terms}
    for column, values in terms.items():
        of_images[column][tested] = values
    return scores, of_images
