"""The metrics: a line for each, from which columns, labels, units and docs/metrics.md follow; a run's files of them.

A new metric is a line here, among those of its step, and the code of the step that computes it.
"""

import contextlib
import math
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from numpy import ndarray

from utils.errors import UserError
from utils.files import digest_of, read_arrays, read_json


class Metric(NamedTuple):
    """A metric: the steps that compute it, its label and unit, and how to read it.

    `better`: the sign of what is better (0: neither). `mixes`: whether a mixture of models has the mean of values;
    PSNR has not.
    """

    name: str
    steps: str  # separated by a space; none if plot_eval.py computes it
    label: str
    unit: str = ""
    better: int = 0
    mixes: bool = False
    endings: tuple[str, ...] = ()  # of further columns


SE = ("_se",)
DISTANCE = ("_se", "_floor", "_features", "_samples")
ESTIMATE = ("_se", "_null", "_saturated")
BOTH = "probes probes_paper"
TAILS = {"qz_mu": "", "qy_mu": "_y", "z": "_sample", "y": "_sample_y"}  # of columns, by the key of the latents
TAILS_PAPER = {"qz_mu": "_paper", "qy_mu": "_y_paper"}
_ROWS = [
    ("loss", "rates", "loss at the cell's own betas", "nats", 0, True, SE),
    ("above_bound", "rates", "loss above its bound", "nats", -1, False, SE),
    ("ll", "rates", "log-likelihood", "nats", 1, True, SE),
    ("kl_y", "rates", "R(y|z)", "nats", 0, False, SE),
    ("kl_z", "rates", "R(z)", "nats", 0, False, SE),
    ("D", "rates", "distortion D", "nats", -1, True, SE),
    ("D_floor", "rates", "least possible D", "nats"),
    ("D_above_floor", "rates", "D above its least", "nats", -1, True, SE),
    ("bpd", "rates", "bits per dimension", "bits", -1, True, SE),
    ("active_z", "rates", "active units of z"),
    ("active_y", "rates", "active units of y"),
    ("psnr", "rates", "PSNR", "dB", 1, True, SE),
    ("active_z_rate", "units", "units of z with a rate"),
    ("active_y_rate", "units", "units of y with a rate"),
    ("ll_iw", "iw", "importance-weighted ll", "nats", 1, True, SE),
    ("iw_samples", "iw", "samples behind the importance-weighted ll"),
    ("is_mean", "is", "inception score", "", 1, False, SE),
    ("is_std", "is", "inception score, spread over splits"),
    ("is_div", "is", "diversity of samples", "", 1),
    ("is_sharp", "is", "sharpness of samples", "", 1),
    ("n_classifiers", "is", "classifiers behind the inception score"),
    ("n_samples", "is", "samples behind the inception score"),
    ("fid", "fid", "FID", "", -1, False, DISTANCE),
    ("kid", "fid", "KID", "", -1, False, SE),
    ("fid_classifier", "fid_classifier", "Frechet distance (classifier)", "", -1, False, DISTANCE),
    ("kid_classifier", "fid_classifier", "KID (classifier)", "", -1, False, SE),
    ("mi_q_mc", "mi_z", "I(z; label)", "nats", 1, False, ESTIMATE),
    ("mi_q", "mi_z", "I(z; label)", "nats", 1),
    ("mi_z_high", "mi_z", "I(z; label), at most", "nats", 1, False, SE),
    ("mi_zx_low", "mi_z", "I(z; x), at least", "nats", 0, False, SE),
    ("mi_zx_high", "mi_z", "I(z; x), at most", "nats", 0, False, SE),
    ("mi_yx_low", "mi_y", "I(y; x), at least", "nats", 0, False, SE),
    ("mi_yx_high", "mi_y", "I(y; x), at most", "nats", 0, False, SE),
    ("acc_bound", "mi_z", "bound on accuracy from z", "", 1),
    ("mi_p", "mi_p", "I(z; generated label)", "nats", 1),
    ("mi_q_mc_y", "mi_y", "I(y; label)", "nats", 1, False, ESTIMATE),
    ("y_samples", "mi_y", "samples of z behind I(y; label)"),
    ("mi_y_images", "mi_y", "test images behind I(y; label), if not all"),
    ("mi_y_high", "mi_y", "I(y; label), at most", "nats", 1, False, SE),
    ("mi_z_low", "probes", "I(z; label), at least", "nats", 1, True, SE),
    ("mi_y_low", "probes", "I(y; label), at least", "nats", 1, True, SE),
    ("lr_acc_mean", BOTH, "accuracy of logistic regression on z", "", 1, True, SE),
    ("svm_rbf_acc", BOTH, "accuracy of SVM (rbf) on z", "", 1, True, SE),
    ("svm_linear_acc", BOTH, "accuracy of SVM (linear) on z", "", 1, True, SE),
    ("kNN_acc", BOTH, "accuracy of 5-NN on z", "", 1, True, SE),
    ("lr_nll", BOTH, "log loss on z", "nats", -1, True, SE),
    ("lr_ece", BOTH, "calibration error on z", "", -1),
    ("lr_ece_null", BOTH, "calibration error on z if it were 0"),
    ("lr_acc_std", "probes_paper", "spread of logistic regression on z over seeds"),
    ("mi_lr_lb", "probes_paper", "H(label) - log loss on means of z", "nats"),
    ("probe_images", "probes", "training images of the probes"),
    ("recons_acc", "recons", "accuracy on reconstructions", "", 1, True, SE),
    ("recons_images", "recons", "test images of the accuracy on reconstructions, if not all"),
    ("recons_pred_entropy", "recons", "entropy of the prediction", "nats", 0, True, SE),
    ("clsfr_acc", "recons", "classifier's accuracy on test images", "", 0, False, SE),
    ("clsfr_ece", "recons", "classifier's calibration error", "", -1),
    ("clsfr_ece_null", "recons", "classifier's calibration error if it were 0"),
    ("pca_explained", "pca", "variance of y in three principal components"),
    ("nelbo", "", "loss at betas 1, D + R", "nats", -1, True),
    ("rate", "", "R(z) + R(y|z)", "nats"),
]
_TABLE = [Metric(*row) for row in _ROWS]
METRICS = {m.name: m for m in _TABLE}
DERIVED = {  # the labels of derived columns, by their endings
    "_se": "standard error of {}".format,
    "_null": lambda label: label.replace("label", "shuffled label"),
    "_saturated": "whether the estimate of {} is saturated".format,
    "_floor": "{} of training images".format,
    "_features": "network behind {}".format,
    "_samples": "samples behind {}".format,
}


def columns_of(step: str) -> list[str]:
    """The columns that a step fills, in the order of eval_results.csv."""
    columns, tails = [], TAILS_PAPER if step == "probes_paper" else TAILS
    for (steps, _), group in groupby(_TABLE, lambda m: (m.steps, m.endings)):
        if step in steps.split():
            names = [(m.name, end) for m in group for end in ("", *m.endings)]
            of_latents = tails.values() if "probes_paper" in steps else [""]
            columns += [name + tail + end for tail in of_latents for name, end in names]
    return columns


STEP_OF = {c: step for m in _TABLE for step in m.steps.split() for c in columns_of(step)}


def conditions_of(step: str) -> list[str]:
    """The columns of a step that say what it was computed with: values with others cannot be compared."""
    others = "n_classifiers", "probe_images"
    return [c for c in columns_of(step) if c in others or c.endswith(("_features", "_samples"))]


def metric(column: str) -> Metric:
    """The Metric of a column; that of a derived column follows from its base's."""
    if column in METRICS:
        return METRICS[column]
    if column.startswith("train_"):
        base = metric(column.removeprefix("train_"))
        return base._replace(label=f"{base.label}, training images")
    for ending, label in DERIVED.items():
        if column.endswith(ending):
            base = metric(column.removesuffix(ending))
            unit = "" if ending == "_saturated" else base.unit
            return Metric(column, base.steps, label(base.label), unit)
    if (base := METRICS.get(plain(column))) is None:
        return Metric(column, "", column.replace("_", " "))
    label = base.label
    if "_sample" in column:
        label = label.replace("on z", "on samples of z")
    if column.removesuffix("_paper").endswith("_y"):
        label = label.replace(" z", " y").replace("(z", "(y")
    if column.endswith("_paper"):
        label += ", paper's protocol"
    return base._replace(label=label)


def plain(column: str) -> str:
    """The column of the same metric of the mean of z, by this project's protocol."""
    return column.removesuffix("_paper").removesuffix("_y").removesuffix("_sample")


def read_metrics(folder: Path) -> dict:
    """metrics.json; empty if there is none, or an early version's. Raises UserError if damaged."""
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    for name, value in metrics.items():
        right = isinstance(value, dict if name in ("steps", "files", "classifiers") else int | float | str)
        if not right or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: damaged ({name} cannot be {value!r:.40}); remove it and evaluate the run again")
    new = {"lr_acc_mean": "probe_images", "acc_bound": "mi_z_high"}  # of names with another meaning before
    return {} if any(name in metrics and other not in metrics for name, other in new.items()) else metrics


def per_image(folder: Path) -> dict[str, ndarray]:
    """What each image adds to the mean of a column, float32 (N,), NaN where not tested, from intact files."""
    terms = {}
    with contextlib.suppress(UserError):
        for name, digest in read_metrics(folder).get("files", {}).items():
            if name.startswith("per_image") and digest == digest_of(folder / name):
                terms |= read_arrays(folder / name)
    return terms
