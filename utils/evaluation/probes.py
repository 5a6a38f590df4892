"""Probes: simple classifiers that predict the label from a latent. Worker processes import this, so it avoids torch."""

import math
import signal
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

PROBES = ("lr", "svm_rbf", "svm_linear", "kNN")
NEIGHBOURS = 5
OF_PAPER = ("lr_acc_mean", "lr_acc_std", "svm_rbf_acc", "svm_linear_acc", "kNN_acc", "lr_ece", "lr_nll", "mi_lr_lb")
KERNELS = {"svm_rbf": "rbf", "svm_linear": "linear"}
TOLERANCES = {"svm_rbf": 1e-3, "svm_linear": 0.1}  # of their solver; docs/performance.md says what the latter costs
MANY = 64  # dimensions from which on kernels are sooner made as products of matrices
MOST_BYTES, ROWS = 2**31, 1000  # of a kernel matrix; of it that are made at once for test latents
SAMPLES = ("z", "y")  # keys of the latents that are samples; qz_mu, qy_mu are means
TAILS = {"qz_mu": "", "qy_mu": "_y", "z": "_sample", "y": "_sample_y"}  # of the columns, by the key of the latents
TAILS_PAPER = {"qz_mu": "_paper", "qy_mu": "_y_paper"}


def accuracy_of(name: str) -> str:
    """The column of a probe's accuracy; the paper's code averaged logistic regression over seeds."""
    return "lr_acc_mean" if name == "lr" else f"{name}_acc"


def untrained(name: str, standardize: bool, c: float = 1.0):
    """The unfitted scikit-learn model of a probe; `c` is the inverse of logistic regression's L2 weight."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = {
        "lr": partial(LogisticRegression, solver="lbfgs", max_iter=1000, C=c),
        **{svm: partial(SVC, kernel=kernel) for svm, kernel in KERNELS.items()},
        "kNN": partial(KNeighborsClassifier, n_neighbors=NEIGHBOURS),
    }[name]()
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
    return float(values.std(ddof=1, dtype=np.float64) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _calibration_gap(confidence: ndarray, correct: ndarray, bins: int = 15) -> float:
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def calibration_error(probabilities: ndarray, labels: ndarray) -> float:
    """Expected calibration error of the top prediction, 15 equal-width bins; probabilities (N, K), labels (N,)."""
    probabilities = probabilities.astype(np.float64)
    return _calibration_gap(probabilities.max(1), probabilities.argmax(1) == labels)


def calibration_null(probabilities: ndarray, draws: int = 200) -> float:
    """What `calibration_error` would be on average if the probabilities (N, K) were right.

    It is above 0, since the N images fill each bin by chance: the mean over labels drawn from the probabilities.
    """
    confidence, rng = probabilities.astype(np.float64).max(1), np.random.default_rng(0)
    drawn = [rng.random(len(confidence)) < confidence for _ in range(draws)]
    return float(np.mean([_calibration_gap(confidence, correct) for correct in drawn]))


def choose_c(latents: ndarray, labels: ndarray) -> float:
    """The C of logistic regression among 1, 0.1, 0.01 of the least log loss on a fifth of latents (N, d) held out.

    Without it, many dimensions and few images make the probe too sure of itself to certify information. 1 where a class
    is in the fifth only.
    """
    from sklearn.metrics import log_loss

    train, held = split(len(labels))
    if len(held) == 0 or len(np.unique(labels[train])) < 2 or not np.isin(labels[held], labels[train]).all():
        return 1.0

    def loss(c: float) -> float:
        model = untrained("lr", True, c).fit(latents[train], labels[train])
        return log_loss(labels[held], model.predict_proba(latents[held]), labels=np.unique(labels[train]))

    return min((1.0, 0.1, 0.01), key=loss)


Split = tuple[ndarray, ndarray]  # latents (N, d), labels (N,)


def svm_labels(name: str, train: Split, latents: ndarray) -> ndarray:
    """What `untrained(name, True)` would label latents (M, d), sooner: its kernels are products of whole matrices.

    That of svm_linear stops sooner, too: its accuracy is the same within its error.
    """
    from sklearn.metrics.pairwise import pairwise_kernels
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    scaler = StandardScaler().fit(train[0])
    known = scaler.transform(train[0]).astype(np.float64)
    gamma = 1 / (known.shape[1] * known.var()) if known.any() else 1.0  # as SVC's gamma="scale"
    kernel = partial(pairwise_kernels, metric=KERNELS[name], filter_params=True, gamma=gamma)
    model = SVC(kernel="precomputed", tol=TOLERANCES[name]).fit(kernel(known), train[1])
    parts = (scaler.transform(latents[i : i + ROWS]).astype(np.float64) for i in range(0, len(latents), ROWS))
    return np.concatenate([model.predict(kernel(part, known)) for part in parts])


def fit_probe(
    name: str, train: Split, test: Split, tail: str, standardize: bool
) -> tuple[dict[str, float], dict[str, ndarray]]:
    """Fits a probe on some latents and tests it on others; `tail` ends the names of the results.

    Returns its accuracy and, of logistic regression, log loss in nats and calibration error, each with its standard
    error or what it would be by chance; and the terms (N,) of which accuracy and log loss are the means. Both are empty
    where there are too few images or classes to train on.
    """
    from sklearn.exceptions import ConvergenceWarning

    latents, labels = train
    if len(np.unique(labels)) < 2 or len(test[1]) == 0 or name == "kNN" and len(labels) < NEIGHBOURS:
        return {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        column = accuracy_of(name) + tail
        if name in KERNELS and standardize and latents.shape[1] >= MANY and 8 * len(labels) ** 2 <= MOST_BYTES:
            predicted = svm_labels(name, train, test[0])
        else:
            c = choose_c(latents, labels) if name == "lr" and standardize else 1.0
            model = untrained(name, standardize, c).fit(latents, labels)
            predicted = model.predict(test[0])
    if name != "lr":
        correct = predicted == test[1]
        return {column: float(correct.mean()), f"{column}_se": standard_error(correct)}, {column: correct}
    probabilities, classes = model.predict_proba(test[0]), model.classes_
    columns = np.searchsorted(classes, test[1])
    known = np.isin(test[1], classes)
    losses = np.full(len(columns), math.inf)
    of_label = probabilities[known, columns[known]]
    losses[known] = -np.log(np.maximum(of_label, np.finfo(of_label.dtype).eps))  # as scikit-learn's log_loss
    columns[~known] = -1
    correct = probabilities.argmax(1) == columns
    return {
        column: float(correct.mean()),
        f"{column}_se": standard_error(correct),
        f"lr_ece{tail}": calibration_error(probabilities, columns),
        f"lr_ece_null{tail}": calibration_null(probabilities),
        f"lr_nll{tail}": float(losses.mean()),
        f"lr_nll{tail}_se": standard_error(losses) if known.all() else math.inf,
    }, {column: correct, f"lr_nll{tail}": losses}


def probe(name: str, source: tuple[Path, str], tail: str, paper: bool) -> tuple:
    """`fit_probe` in a worker process, by the paper's protocol or this project's.

    `source` is an NPZ file and the key of the latents to test on. The paper's splits them; otherwise the probe is
    trained on the file's `<key>_train`, standardised. Returns the metrics, and the terms (N,) of each image by column,
    NaN where it was not tested; or an error message and nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    path, key = source
    try:
        with np.load(path, allow_pickle=False) as arrays:
            latents, labels = arrays[key], arrays["labels"]
            latents, tested = latents.reshape(len(labels), -1), np.arange(len(labels))
            if paper:
                known, tested = split(len(labels))
                train = latents[known], labels[known]
            else:
                train = arrays[f"{key}_train"].reshape(len(arrays["labels_train"]), -1), arrays["labels_train"]
        results, terms = fit_probe(name, train, (latents[tested], labels[tested]), tail, standardize=not paper)
        if name == "lr" and results:
            # of means, H(label) - log loss bounds nothing about a sample's information; kept as the paper's protocol
            low, lows = (entropy(labels) - of[f"lr_nll{tail}"] for of in (results, terms))
            results |= {f"lr_acc_std{tail}": 0.0, f"mi_lr_lb{tail}": low} if paper else {}  # lbfgs is deterministic
            if key in SAMPLES:
                results |= {f"mi_{key}_low": max(0.0, low), f"mi_{key}_low_se": results[f"lr_nll{tail}_se"]}
                terms[f"mi_{key}_low"] = lows
        of_image = {column: np.full(len(labels), math.nan, dtype=np.float32) for column in terms}
        for column, values in terms.items():
            of_image[column][tested] = values
        return results, of_image
    except Exception as e:  # a failure must not stop the other runs
        return f"{path}: {name}{tail} failed: {' '.join(str(e).split())}", {}
