"""The metrics: a line for each, from which columns, labels, units and the rows of docs/metrics.md follow.

A new metric is a line here, among those of its step, and the code of the step that computes it.
"""

from itertools import groupby
from typing import NamedTuple


class Metric(NamedTuple):
    """A metric: its name, the steps that compute it, its label and unit, and how to read it.

    `better`: whether higher (+1) or lower (-1) values are (0: neither). `mixes`: whether a mixture of two models, each
    used for a share of the images, has the mean of their values. PSNR has not; it is the squared error that has.
    `endings` name further columns.
    """

    name: str
    steps: str  # separated by a space; none if plot_eval.py computes it
    label: str
    unit: str = ""
    better: int = 0
    mixes: bool = False
    endings: tuple[str, ...] = ()


SE = ("_se",)
DISTANCE = ("_se", "_floor", "_features", "_samples")
ESTIMATE = ("_se", "_null", "_saturated")
BOTH = "probes probes_paper"
TAILS = {"qz_mu": "", "qy_mu": "_y", "z": "_sample", "y": "_sample_y"}  # of columns, by the key of the latents
TAILS_PAPER = {"qz_mu": "_paper", "qy_mu": "_y_paper"}
_TABLE = (
    Metric("loss", "rates", "loss at the cell's own betas", "nats", 0, True, SE),
    Metric("ll", "rates", "log-likelihood", "nats", 1, True, SE),
    Metric("kl_y", "rates", "R(y|z)", "nats", endings=SE),
    Metric("kl_z", "rates", "R(z)", "nats", endings=SE),
    Metric("D", "rates", "distortion D", "nats", -1, True, SE),
    Metric("D_floor", "rates", "least possible D", "nats"),
    Metric("D_above_floor", "rates", "D above its least", "nats", -1, True, SE),
    Metric("bpd", "rates", "bits per dimension", "bits", -1, True, SE),
    Metric("active_z", "rates", "active units of z"),
    Metric("active_y", "rates", "active units of y"),
    Metric("psnr", "rates", "PSNR", "dB", 1, True, SE),
    Metric("active_z_rate", "units", "units of z with a rate"),
    Metric("active_y_rate", "units", "units of y with a rate"),
    Metric("ll_iw", "iw", "importance-weighted ll", "nats", 1, True, SE),
    Metric("iw_samples", "iw", "samples behind the importance-weighted ll"),
    Metric("is_mean", "is", "inception score", "", 1, endings=SE),
    Metric("is_std", "is", "inception score, spread over splits"),
    Metric("is_div", "is", "diversity of samples", "", 1),
    Metric("is_sharp", "is", "sharpness of samples", "", 1),
    Metric("n_classifiers", "is", "classifiers behind the inception score"),
    Metric("n_samples", "is", "samples behind the inception score"),
    Metric("fid", "fid", "FID", "", -1, endings=DISTANCE),
    Metric("kid", "fid", "KID", "", -1, endings=SE),
    Metric("fid_classifier", "fid_classifier", "Frechet distance (classifier)", "", -1, endings=DISTANCE),
    Metric("kid_classifier", "fid_classifier", "KID (classifier)", "", -1, endings=SE),
    Metric("mi_q_mc", "mi_z", "I(z; label)", "nats", 1, endings=ESTIMATE),
    Metric("mi_q", "mi_z", "I(z; label)", "nats", 1),
    Metric("mi_z_high", "mi_z", "I(z; label), at most", "nats", 1, endings=SE),
    Metric("acc_bound", "mi_z", "bound on accuracy from z", "", 1),
    Metric("mi_p", "mi_p", "I(z; generated label)", "nats", 1),
    Metric("mi_q_mc_y", "mi_y", "I(y; label)", "nats", 1, endings=ESTIMATE),
    Metric("y_samples", "mi_y", "samples of z behind I(y; label)"),
    Metric("mi_y_high", "mi_y", "I(y; label), at most", "nats", 1, endings=SE),
    Metric("mi_z_low", "probes", "I(z; label), at least", "nats", 1, True, SE),
    Metric("mi_y_low", "probes", "I(y; label), at least", "nats", 1, True, SE),
    Metric("lr_acc_mean", BOTH, "logistic regression on z", "", 1, True, SE),
    Metric("svm_rbf_acc", BOTH, "SVM (rbf) on z", "", 1, True, SE),
    Metric("svm_linear_acc", BOTH, "SVM (linear) on z", "", 1, True, SE),
    Metric("kNN_acc", BOTH, "5-NN on z", "", 1, True, SE),
    Metric("lr_nll", BOTH, "log loss on z", "nats", -1, True, SE),
    Metric("lr_ece", BOTH, "calibration error on z", "", -1),
    Metric("lr_ece_null", BOTH, "calibration error on z if it were 0"),
    Metric("lr_acc_std", "probes_paper", "spread of logistic regression on z over seeds"),
    Metric("mi_lr_lb", "probes_paper", "H(label) - log loss on means of z", "nats"),
    Metric("probe_images", "probes", "training images of the probes"),
    Metric("recons_acc", "recons", "accuracy on reconstructions", "", 1, True, SE),
    Metric("recons_pred_entropy", "recons", "entropy of the prediction", "nats", 0, True, SE),
    Metric("clsfr_acc", "recons", "classifier's accuracy on test images", endings=SE),
    Metric("clsfr_ece", "recons", "classifier's calibration error", "", -1),
    Metric("clsfr_ece_null", "recons", "classifier's calibration error if it were 0"),
    Metric("pca_explained", "pca", "variance of y in three principal components"),
    Metric("nelbo", "", "loss at betas 1, D + R", "nats", -1, True),
    Metric("rate", "", "R(z) + R(y|z)", "nats"),
)
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
    columns = []
    tails = (TAILS_PAPER if step == "probes_paper" else TAILS).values()
    for (steps, _), kind in groupby(_TABLE, lambda m: (m.steps, m.endings)):
        if step in steps.split():
            names = [(m.name, end) for m in kind for end in ("", *m.endings)]
            of_latents = tails if "probes_paper" in steps else [""]
            columns += [name + tail + end for tail in of_latents for name, end in names]
    return columns


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
            return Metric(column, base.steps, label(base.label), "" if ending == "_saturated" else base.unit)
    base = METRICS.get(plain(column))
    if base is None:
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
