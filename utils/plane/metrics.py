"""The metrics of a plane: their order, and what is linear in mixtures."""

import math

import numpy as np

from utils.errors import UserError, nearest
from utils.evaluation.metrics import METRICS as DECLARED
from utils.evaluation.metrics import TAILS, metric
from utils.evaluation.probes import PROBES

DECIBEL = -10 / math.log(10)
FIRST = """
ll loss above_bound psnr D nelbo ll_iw bpd is_mean is_div is_sharp fid fid_classifier kid kid_classifier
recons_acc mi_q_mc mi_q mi_p mi_q_mc_y mi_z_low mi_z_high mi_y_low mi_y_high D_above_floor
acc_bound lr_acc_mean svm_rbf_acc svm_linear_acc kNN_acc lr_ece lr_nll
"""
METRICS = {name: DECLARED[name] for name in [*FIRST.split(), *DECLARED]}  # in figures' order
ACCURACIES = {key: tuple(column + tail for column in PROBES.values()) for key, tail in TAILS.items()}
BRACKETS = {f"mi_{of}_low": f"mi_{of}_high" for of in ("z", "y", "zx", "yx")}  # ends of what is known between
FOUR = [  # for reconstruction, generation, representation by z and by y the first that is there
    ("psnr", "recons_acc", "nelbo"),
    ("is_mean", "fid", "fid_classifier"),
    ("svm_rbf_acc", "lr_acc_mean", "mi_z_low"),
    ("svm_rbf_acc_y", "lr_acc_mean_y", "mi_y_low"),
]
DRAWN = [*FOUR, ("above_bound",)]
# what the report's page offers first as a colour, beside rates and betas
COLOURS = [(n,) for n in ("above_bound", "psnr", "D", "nelbo", "is_mean")]
COLOURS += [("fid", "fid_classifier"), *FOUR[2:], ("mi_z_low",), ("mi_y_low",)]
INFORMATION = [  # on the label, and the image, against R(z)
    ("mi_z_low", "mi_q_mc", "mi_q"),
    ("mi_y_low", "mi_q_mc_y"),
    ("svm_rbf_acc_sample", "lr_acc_mean_sample"),
    ("svm_rbf_acc", "lr_acc_mean"),
    ("mi_zx_low",),
]


def score_of(name: str, mean):
    """A metric's mean term, more is better; linear in mixtures: of PSNR the squared error is."""
    return -mean if metric(name).unit == "dB" else metric(name).better * mean


def value_of(name: str, means: np.ndarray) -> np.ndarray:
    """A metric from the means of its terms."""
    return DECIBEL * np.log(means.clip(1e-30)) if metric(name).unit == "dB" else means


def mean_term(name: str, value: np.ndarray) -> np.ndarray:
    """The mean term behind a metric's value."""
    return np.exp(value / DECIBEL) if metric(name).unit == "dB" else value


def first_of(names: list[str], choices: list[tuple[str, ...]]) -> list[str]:
    """Of each choice, the first metric that is among the names."""
    there = ([name for name in choice if name in names] for choice in choices)
    return [choice[0] for choice in there if choice]


def wanted(names: list[str], requested: list[str] | None) -> list[str]:
    """A batch's metrics to draw: those requested, all that have a better way, or one for each task and the excess.

    Raises UserError for one that the batch has not.
    """
    if requested == ["all"]:
        return [name for name in names if name in METRICS and metric(name).better]
    for name in requested or []:
        if name not in names:
            raise UserError(f"--metrics: no run has {name!r}{nearest(name, names)}")
    return list(dict.fromkeys(requested)) if requested else first_of(names, DRAWN)
