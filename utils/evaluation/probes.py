"""Probes: simple classifiers that predict the label from a latent."""

import math
import warnings
from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy import ndarray

PROBES = {  # the columns of their accuracies; the paper's code averaged logistic regression over seeds
    "lr": "lr_acc_mean",
    "svm_rbf": "svm_rbf_acc",
    "svm_linear": "svm_linear_acc",
    "kNN": "kNN_acc",
}
NEIGHBOURS, FOLDS, ENOUGH = 5, 5, 2000
CLEAR = 4  # standard errors by which nothing differs by chance
CS = (0.01, 0.1, 1.0)  # of logistic regression: the inverses of its L2 weight
KERNELS = {"svm_rbf": "rbf", "svm_linear": "linear"}
TOLERANCES = {"svm_rbf": 1e-3, "svm_linear": 0.1}  # 0.1 takes half the time; accuracies change by less than errors
MANY = 64  # dimensions from which on kernels are sooner made as products of matrices
MOST_BYTES, ROWS = 2**31, 1000  # of a kernel matrix; of it that are made at once for test latents
Split = tuple[ndarray, ndarray]  # latents (N, d), labels (N,)
Scores = tuple[dict[str, float], dict[str, ndarray]]  # metrics by column; terms (N,) whose means some are


def untrained(name: str, standardize: bool, c: float = 1.0):
    """The unfitted scikit-learn model of a probe; `c` is the inverse of logistic regression's L2 weight."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if name == "lr":
        model = LogisticRegression(solver="lbfgs", max_iter=1000, C=c)
    elif name == "kNN":
        model = KNeighborsClassifier(n_neighbors=NEIGHBOURS)
    else:
        model = SVC(kernel=KERNELS[name])
    return make_pipeline(StandardScaler(), model) if standardize else model


def split(n: int) -> tuple[ndarray, ndarray]:
    """Indices of the paper's 80 % for training and 20 % for testing: a fixed permutation, seed 42."""
    order = np.random.RandomState(42).permutation(n)  # noqa: NPY002  (the paper's split needs this generator)
    return order[: int(0.8 * n)], order[int(0.8 * n) :]


def entropy(labels: ndarray) -> float:
    """Entropy H(label) in nats of the empirical distribution of the labels (N,)."""
    p = np.bincount(labels) / len(labels)
    return -sum(v * math.log(v) for v in p if v > 0)


def surprisals(labels: ndarray) -> ndarray:
    """-log p(label) in nats of each of the labels (N,), by their frequencies; the mean is their `entropy`."""
    return np.log(len(labels) / np.bincount(labels)[labels])


def label_entropy(labels: ndarray) -> tuple[float, float]:
    """H(label) in nats of what labels (N,) are drawn from, at most that of even classes, and its standard error.

    Their `entropy` is on average (K - 1) / 2N less (Miller 1955).
    """
    counts = np.bincount(labels)
    correction = (np.count_nonzero(counts) - 1) / (2 * len(labels))
    value = min(entropy(labels) + correction, math.log(len(counts)))
    return value, upper_error(surprisals(labels), labels)


def standard_error(values: ndarray) -> float:
    """The standard error of the mean of independent values (N,); NaN for a single one."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1, dtype=np.float64) / math.sqrt(len(values)))


def upper_error(values: ndarray, labels: ndarray) -> float:
    """The standard error of the mean of an upper bound's terms (N,), also where a class has few labels (N,).

    It is not below that with two more terms of each class, at its mean (as Agresti & Coull 1998): a single image of a
    class does not tell how rare it is.
    """
    counts = np.bincount(labels)
    means = np.bincount(labels, values)[counts > 0] / counts[counts > 0]
    return max(standard_error(terms) for terms in (values, np.concatenate([values, means, means])))


def mean_and_error(terms: dict[str, ndarray]) -> dict[str, float]:
    """The means of values (N,) by name, and their standard errors by `<name>_se`."""
    errors = {f"{name}_se": standard_error(values) for name, values in terms.items()}
    return {name: float(values.mean()) for name, values in terms.items()} | errors


def _calibration_gap(confidence: ndarray, correct: ndarray, bins: int = 15) -> float:
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def calibration_error(probabilities: ndarray, labels: ndarray) -> float:
    """Expected calibration error of the top prediction, 15 bins; probabilities (N, K), labels (N,)."""
    confidence = probabilities.max(1).astype(np.float64)
    return _calibration_gap(confidence, probabilities.argmax(1) == labels)


def calibration_null(probabilities: ndarray, draws: int = 200) -> float:
    """The mean `calibration_error`, above 0, of labels drawn from the probabilities (N, K) themselves."""
    confidence, rng = probabilities.max(1).astype(np.float64), np.random.default_rng(0)
    drawn = [rng.random(len(confidence)) < confidence for _ in range(draws)]
    return float(np.mean([_calibration_gap(confidence, correct) for correct in drawn]))


def choose_c(latents: ndarray, labels: ndarray) -> float:
    """The C of logistic regression by cross-validation on latents (N, d): 1 is often too sure.

    It is the smallest whose mean log loss is above the least by at most one standard error of the difference, so that
    rounding does not decide between those that are as good. Of five folds so many are held out that ENOUGH images are,
    or until the others cannot change it.
    """
    several = np.bincount(labels)[labels] > 1  # a single image of a class cannot be held out
    if len(np.unique(labels[several])) < 2:
        return 1.0
    fold = np.empty(len(labels), int)
    fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % FOLDS  # every fifth image of each class
    folds = np.unique(fold)[: math.ceil(FOLDS * ENOUGH / len(labels))]

    of_c = dict.fromkeys(CS, np.zeros(0))
    for k in folds:
        held, share = fold == k, (k + 1) / len(folds)
        tested = held & several
        for c, losses in of_c.items():
            model = untrained("lr", True, c).fit(latents[~held], labels[~held])
            of_c[c] = np.append(losses, predictions(model, latents[tested], labels[tested])[2])
        best = min(of_c, key=lambda c: of_c[c].mean())
        more = {c: losses - of_c[best] for c, losses in of_c.items()}
        # in standard errors of these folds: what the others may change is sqrt(1 - share), the error of all sqrt(share)
        clear = {c: CLEAR * (1 - share) ** 0.5 + math.copysign(share**0.5, best - c) for c in of_c}
        of_c = {c: of_c[c] for c in of_c if c == best or not more[c].mean() > clear[c] * standard_error(more[c])}
        if len(of_c) == 1:
            break
    return min(of_c)


def predictions(model, latents: ndarray, labels: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Probabilities (N, K) by a fitted model, the labels' columns in them (-1: unknown), log losses in nats (N,)."""
    probabilities, classes = model.predict_proba(latents), model.classes_
    columns = np.where(np.isin(labels, classes), np.searchsorted(classes, labels), -1)
    of_label = probabilities[np.arange(len(columns)), columns]
    losses = -np.log(np.maximum(of_label, np.finfo(of_label.dtype).eps))  # as scikit-learn's log_loss
    return probabilities, columns, np.where(columns < 0, math.inf, losses.astype(np.float64))


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
    """Fits a probe and tests it on other latents, for columns that end in `tail`; empty if it cannot be trained."""
    from sklearn.exceptions import ConvergenceWarning

    (latents, labels), (tested, right), column = train, test, PROBES[name] + tail
    if len(np.unique(labels)) < 2 or len(right) == 0 or name == "kNN" and len(labels) < NEIGHBOURS:
        return {}, {}
    is_large = latents.shape[1] >= MANY and 8 * len(labels) ** 2 <= MOST_BYTES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if name in KERNELS and standardize and is_large:
            terms = {column: svm_labels(name, train, tested) == right}
            return mean_and_error(terms), terms
        c = 1.0
        if name == "lr" and standardize:
            latents, tested = latents.astype(np.float64), tested.astype(np.float64)  # where rounding decides less
            c = choose_c(latents, labels)
        model = untrained(name, standardize, c).fit(latents, labels)
    if name != "lr":
        terms = {column: model.predict(tested) == right}
        return mean_and_error(terms), terms
    probabilities, columns, losses = predictions(model, tested, right)
    terms = {column: probabilities.argmax(1) == columns, f"lr_nll{tail}": losses}
    calibration = calibration_error(probabilities, columns), calibration_null(probabilities)
    calibration = dict(zip((f"lr_ece{tail}", f"lr_ece_null{tail}"), calibration, strict=True))
    return mean_and_error(terms) | calibration, terms


def fit_latent(name: str, arrays: Mapping[str, ndarray], key: str, tail: str) -> Scores:
    """`fit_probe` of the latents of that key among arrays; terms are of all images."""
    paper = tail.endswith("_paper")
    parts = ("", "") if paper else ("_train", "")
    train, test = ((arrays[key + part], arrays["labels" + part]) for part in parts)
    train, test = ((latents.reshape(len(latents), -1), labels) for latents, labels in (train, test))
    tested = np.arange(len(test[1]))
    if paper:
        trained, tested = split(len(tested))
        train = [values[trained] for values in train]
    scores, terms = fit_probe(name, train, [v[tested] for v in test], tail, standardize=not paper)
    if name == "lr" and scores:
        scores["probe_images"] = len(train[1])
        if paper:  # of means, it bounds nothing about a sample; logistic regression knows no seed
            scores |= {f"lr_acc_std{tail}": 0.0, f"mi_lr_lb{tail}": entropy(test[1]) - scores[f"lr_nll{tail}"]}
        elif "_sample" in tail:
            low = f"mi_{key}_low"
            terms[low] = surprisals(test[1]) - terms[f"lr_nll{tail}"]
            value = entropy(test[1]) - scores[f"lr_nll{tail}"]
            scores |= {low: max(0.0, value), f"{low}_se": standard_error(terms[low])}
    of_images = {column: np.full(len(test[1]), math.nan, dtype=np.float32) for column in terms}
    for column, values in terms.items():
        of_images[column][tested] = values
    return scores, of_images
