"""The columns of eval_results.csv: label, unit, which way is better, and what is linear in mixtures."""

import math
from typing import NamedTuple

import numpy as np

from utils.errors import UserError, nearest
from utils.evaluation.probes import PROBES, TAILS, accuracy_of

DECIBEL = -10 / math.log(10)


class Metric(NamedTuple):
    """Label and unit of a column, and whether higher (+1) or lower (-1) values are better (0: neither).

    `mixes`: whether a mixture of two models, each used for a share of the images, has the mean of their values. PSNR
    has not; it is the squared error that has.
    """

    label: str
    unit: str = ""
    better: int = 1
    mixes: bool = False


METRICS = {
    "ll": Metric("log-likelihood", "nats", mixes=True),
    "loss": Metric("loss at the cell's own betas", "nats", 0, mixes=True),
    "psnr": Metric("PSNR", "dB", mixes=True),
    "D": Metric("distortion D", "nats", -1, mixes=True),
    "nelbo": Metric("loss at betas 1, D + R", "nats", -1, mixes=True),
    "ll_iw": Metric("importance-weighted ll", "nats", mixes=True),
    "bpd": Metric("bits per dimension", "bits", -1, mixes=True),
    "is_mean": Metric("inception score"),
    "is_div": Metric("diversity of samples"),
    "is_sharp": Metric("sharpness of samples"),
    "fid": Metric("FID", better=-1),
    "fid_classifier": Metric("Frechet distance (classifier)", better=-1),
    "kid": Metric("KID", better=-1),
    "kid_classifier": Metric("KID (classifier)", better=-1),
    "fid_floor": Metric("FID of training images", better=0),
    "fid_classifier_floor": Metric("Frechet distance (classifier) of training images", better=0),
    "recons_acc": Metric("accuracy on reconstructions", mixes=True),
    "mi_q_mc": Metric("I(z; label)", "nats"),
    "mi_q": Metric("I(z; label)", "nats"),
    "mi_p": Metric("I(z; generated label)", "nats"),
    "mi_q_mc_y": Metric("I(y; label)", "nats"),
    "mi_q_mc_se": Metric("standard error of I(z; label)", "nats", 0),
    "mi_q_mc_y_se": Metric("standard error of I(y; label)", "nats", 0),
    "mi_q_mc_null": Metric("I(z; shuffled label)", "nats", 0),
    "mi_q_mc_y_null": Metric("I(y; shuffled label)", "nats", 0),
    "recons_pred_entropy": Metric("entropy of the prediction", "nats", 0, mixes=True),
    "mi_z_low": Metric("I(z; label), at least", "nats", mixes=True),
    "mi_z_high": Metric("I(z; label), at most", "nats"),
    "mi_y_low": Metric("I(y; label), at least", "nats", mixes=True),
    "mi_y_high": Metric("I(y; label), at most", "nats"),
    "D_above_floor": Metric("D above its least", "nats", -1, mixes=True),
    "D_floor": Metric("least possible D", "nats", 0),
    "mi_q_mc_saturated": Metric("whether the estimate of I(z; label) is saturated", better=0),
    "mi_q_mc_y_saturated": Metric("whether the estimate of I(y; label) is saturated", better=0),
    "mi_lr_lb": Metric("H(label) - log loss on means of z", "nats", 0),
    "acc_bound": Metric("bound on accuracy from z"),
    "lr_acc_mean": Metric("logistic regression on z", mixes=True),
    "svm_rbf_acc": Metric("SVM (rbf) on z", mixes=True),
    "svm_linear_acc": Metric("SVM (linear) on z", mixes=True),
    "kNN_acc": Metric("5-NN on z", mixes=True),
    "lr_ece": Metric("calibration error on z", better=-1),
    "lr_nll": Metric("log loss on z", "nats", -1, mixes=True),
    "lr_ece_null": Metric("calibration error on z if it were 0", better=0),
    "clsfr_acc": Metric("classifier's accuracy on test images", better=0),
    "clsfr_ece": Metric("classifier's calibration error", better=-1),
    "clsfr_ece_null": Metric("classifier's calibration error if it were 0", better=0),
    "is_std": Metric("inception score, spread over splits", better=0),
    "n_classifiers": Metric("classifiers behind the inception score", better=0),
    "n_samples": Metric("samples behind the inception score", better=0),
    "probe_images": Metric("training images of the probes", better=0),
    "active_z": Metric("active units of z", better=0),
    "active_y": Metric("active units of y", better=0),
    "active_z_rate": Metric("units of z with a rate", better=0),
    "active_y_rate": Metric("units of y with a rate", better=0),
    "kl_z": Metric("R(z)", "nats", 0),
    "kl_y": Metric("R(y|z)", "nats", 0),
    "rate": Metric("R(z) + R(y|z)", "nats", 0),
}
ACCURACIES = {key: tuple(accuracy_of(name) + tail for name in PROBES) for key, tail in TAILS.items()}  # of latents
BRACKETS = {"mi_z_low": "mi_z_high", "mi_y_low": "mi_y_high"}  # lower and upper ends of what is only known between


def metric(name: str) -> Metric:
    """The Metric of a column; those of variants (`train_`, `_se`, `_y`, `_sample`, `_paper` and so on) derive."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("train_"):
        known = metric(name.removeprefix("train_"))
        return known._replace(label=f"{known.label}, training images")
    if name.endswith("_se"):
        known = metric(name.removesuffix("_se"))
        return Metric(f"standard error of {known.label}", known.unit, 0)
    base = plain(name)
    if base not in METRICS:
        return Metric(name.replace("_", " "), better=0)
    known, ending = METRICS[base], name[len(base) :]
    label = known.label.replace("on z", "on samples of z") if "_sample" in ending else known.label
    if "_y" in ending:
        label = label.replace(" z", " y").replace("(z", "(y")
    label += ", paper's protocol" * ("_paper" in ending) + ", standardised" * ("_standardized" in ending)
    return known._replace(label=label)


def is_squared(name: str) -> bool:
    """Whether a metric's mean term is a squared error, as that of PSNR."""
    return metric(name).unit == "dB"


def score_of(name: str, mean):
    """The mean term of a metric, signed so that more is better; linear in mixtures, as PSNR is not."""
    return -mean if is_squared(name) else metric(name).better * mean


def value_of(name: str, means: np.ndarray) -> np.ndarray:
    """A metric from the means of its terms."""
    return DECIBEL * np.log(means.clip(1e-30)) if is_squared(name) else means


def mean_of(name: str, value: np.ndarray) -> np.ndarray:
    """The mean term behind a metric's value."""
    return np.exp(value / DECIBEL) if is_squared(name) else value


def plain(name: str) -> str:
    """A column's name without what says of which latent and how."""
    for ending in ("_standardized", "_paper", "_y", "_sample"):
        name = name.removesuffix(ending)
    return name


FOUR = [  # one metric for each of reconstruction, generation, representation by z and by y: the first that is there
    ("psnr", "recons_acc", "nelbo"),
    ("is_mean", "fid", "fid_classifier"),
    ("svm_rbf_acc", "lr_acc_mean", "mi_z_low"),
    ("svm_rbf_acc_y", "lr_acc_mean_y", "mi_y_low"),
]
INFORMATION = [  # on the label, against R(z)
    ("mi_z_low", "mi_q_mc", "mi_q"),
    ("mi_y_low", "mi_q_mc_y"),
    ("svm_rbf_acc_sample", "lr_acc_mean_sample"),
    ("svm_rbf_acc", "lr_acc_mean"),
]


def first_of(names: list[str], choices: list[tuple[str, ...]]) -> list[str]:
    """Of each choice, the first metric that is among the names."""
    found = [next((name for name in choice if name in names), None) for choice in choices]
    return [name for name in found if name is not None]


def wanted(names: list[str], asked: list[str] | None) -> list[str]:
    """Of a batch's metrics those to draw: asked for, all that have a better way, or one for each task.

    Raises UserError for one that the batch has not.
    """
    if asked == ["all"]:
        return [name for name in names if name in METRICS and metric(name).better]
    for name in asked or []:
        if name not in names:
            raise UserError(f"--metrics: no run has {name!r}{nearest(name, names)}")
    return list(dict.fromkeys(asked)) if asked else first_of(names, FOUR)
