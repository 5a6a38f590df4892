"""The columns of eval_results.csv: label, unit, and which way is better."""

from typing import NamedTuple


class Metric(NamedTuple):
    """Label and unit of a column, and whether higher (+1) or lower (-1) values are better (0: neither)."""

    label: str
    unit: str = ""
    better: int = 1


METRICS = {
    "ll": Metric("log-likelihood", "nats"),
    "loss": Metric("loss at the cell's own betas", "nats", 0),
    "psnr": Metric("PSNR", "dB"),
    "D": Metric("distortion D", "nats", -1),
    "nelbo": Metric("loss at betas 1, D + R", "nats", -1),
    "ll_iw": Metric("importance-weighted ll", "nats"),
    "bpd": Metric("bits per dimension", "bits", -1),
    "is_mean": Metric("inception score"),
    "is_div": Metric("diversity of samples"),
    "is_sharp": Metric("sharpness of samples"),
    "fid": Metric("FID", better=-1),
    "fid_classifier": Metric("Frechet distance (classifier)", better=-1),
    "recons_acc": Metric("accuracy on reconstructions"),
    "mi_q_mc": Metric("I(z; label)", "nats"),
    "mi_q": Metric("I(z; label)", "nats"),
    "mi_p": Metric("I(z; generated label)", "nats"),
    "mi_q_mc_y": Metric("I(y; label)", "nats"),
    "mi_q_mc_se": Metric("standard error of I(z; label)", "nats", 0),
    "mi_q_mc_y_se": Metric("standard error of I(y; label)", "nats", 0),
    "mi_q_mc_null": Metric("I(z; shuffled label)", "nats", 0),
    "mi_q_mc_y_null": Metric("I(y; shuffled label)", "nats", 0),
    "recons_pred_entropy": Metric("entropy of the prediction", "nats", 0),
    "mi_lr_lb": Metric("lower bound on I(z; label)", "nats"),
    "acc_bound": Metric("bound on accuracy from z"),
    "lr_acc_mean": Metric("logistic regression on z"),
    "svm_rbf_acc": Metric("SVM (rbf) on z"),
    "svm_linear_acc": Metric("SVM (linear) on z"),
    "kNN_acc": Metric("5-NN on z"),
    "lr_ece": Metric("calibration error on z", better=-1),
    "lr_nll": Metric("log loss on z", "nats", -1),
    "clsfr_ece": Metric("classifier's calibration error", better=-1),
    "active_z": Metric("active units of z", better=0),
    "active_y": Metric("active units of y", better=0),
    "kl_z": Metric("R(z)", "nats", 0),
    "kl_y": Metric("R(y|z)", "nats", 0),
    "rate": Metric("R = R(z) + R(y|z)", "nats", 0),
}
PROBES = ("lr_acc_mean", "svm_rbf_acc", "svm_linear_acc", "kNN_acc")


def metric(name: str) -> Metric:
    """The Metric of a column; variants (`train_`, `_y`, `_standardized`) derive theirs from the metric's own."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("train_"):
        label, unit, better = metric(name.removeprefix("train_"))
        return Metric(f"{label}, training images", unit, better)
    plain = name.removesuffix("_standardized")
    base = plain.removesuffix("_y")
    if base not in METRICS:
        return Metric(name.replace("_", " "), better=0)
    label, unit, better = METRICS[base]
    if base != plain:
        label = label.replace(" z", " y").replace("(z", "(y")
    return Metric(label + ", standardised" * (plain != name), unit, better)
