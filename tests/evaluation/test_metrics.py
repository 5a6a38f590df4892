"""Measures of images, samples and predictions against closed forms and independent libraries, and their page."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from models.hvae import HVAE, Noise
from models.latents import Gaussian
from tests.conftest import ROOT
from utils.config import fields_of
from utils.evaluation import probes
from utils.evaluation.batch import COLUMNS
from utils.evaluation.generation import frechet_distance, inception_score, kernel_distance
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import METRICS, metric
from utils.evaluation.probes import PROBES, calibration_error, entropy, fit_probe, fit_stored
from utils.evaluation.rates import importance_weighted_ll
from utils.seeds import generator

PAGE = (ROOT / "docs/metrics.md").read_text()
ROWS = re.findall(r"^\| (`[a-zA-Z]\w*`(?:, `\w+`)*) \| (\w*) ?\| (.*) \| (.*)\|$", PAGE, re.MULTILINE)
ENTRIES = {name: unit for names, unit, *_ in ROWS for name in re.findall(r"\w+", names)}
DERIVED = {"nelbo", "rate", "lr_acc_std", "mi_lr_lb"}  # by plot_eval.py, or of the paper's protocol alone
ENDINGS = ("_se", "_paper", "_y", "_sample")


def test_psnr_is_of_all_pixels_together_and_scikit_images():
    """skimage.metrics.peak_signal_noise_ratio (scikit-image 0.26) of these arrays is 20.58897870264339 dB."""
    rng = np.random.default_rng(0)
    images = rng.random((3, 1, 4, 4))
    others = np.clip(images + rng.normal(size=images.shape) * 0.1, 0, 1)
    parts = iter([torch.from_numpy(others[:2]), torch.from_numpy(others[2:])])
    model = SimpleNamespace(reconstruct=lambda x: next(parts))
    batches = [(torch.from_numpy(part), None) for part in (images[:2], images[2:])]
    assert HVAE.psnr(model, batches) == pytest.approx(20.58897870264339, abs=1e-12)


def linear_gaussian():
    """z ~ N(0, 1), y|z ~ N(z, 1/2), x|y ~ N(y, 1/4), with q of too large variances: log p(x) is known."""

    def normal(mean, variance):
        return Gaussian(mean, torch.full_like(mean, variance**0.5))

    model = SimpleNamespace(
        family=Gaussian,
        noise=lambda n, g: Noise(*(Gaussian.noise((n, 1), g).double() for _ in "zy")),
        q_z=lambda x: normal(x / 1.75, 2 * 0.75 / 1.75),
        q_y=lambda z, x: normal((4 * x + 2 * z) / 6, 2 / 6),
        p_y=lambda z: normal(z, 0.5),
        p_x=lambda y: normal(y, 0.25),
    )
    p_x = torch.distributions.Normal(0.0, 1.75**0.5)
    x = p_x.sample((200, 1)).double()
    return model, x, p_x.log_prob(x).mean().item()


def test_importance_weighted_ll_rises_to_the_closed_form():
    torch.manual_seed(0)
    model, x, exact = linear_gaussian()
    log_p = (importance_weighted_ll(model, x, k, generator("cpu", 1)) for k in (1, 5, 50, 2000))
    estimates = [values.mean().item() for values in log_p]
    assert all(a < b + 0.02 for a, b in zip(estimates, estimates[1:], strict=False))
    assert estimates[0] < exact - 0.1 and abs(estimates[-1] - exact) < 0.02


def random_log_p(n=1003, k=10, sharp=3.0):
    return torch.log_softmax(sharp * torch.randn(n, k, generator=torch.Generator().manual_seed(0)).double(), 1)


def test_inception_score_equals_a_loop_with_scipy():
    log_p, entropy = random_log_p(), scipy.stats.entropy
    parts = np.array_split(log_p.exp().numpy(), 5)
    scores = [math.exp(np.mean([entropy(p, part.mean(0)) for p in part])) for part in parts]
    ours, one = inception_score(log_p), inception_score(log_p, splits=1)
    assert ours["is_mean"] == pytest.approx(np.mean(scores), rel=1e-10)
    assert ours["is_std"] == pytest.approx(np.std(scores), rel=1e-8)
    assert one["is_mean"] == pytest.approx(one["is_div"] * one["is_sharp"])
    assert one["is_div"] == pytest.approx(math.exp(entropy(log_p.exp().mean(0))))
    confident = torch.log(torch.eye(10).repeat(100, 1)).clamp(min=-1e4)
    constant = torch.log_softmax(torch.arange(10.0), 0).expand(1000, 10)
    for log_p, score in ((confident, 10), (constant, 1)):
        assert inception_score(log_p)["is_mean"] == pytest.approx(score)


def test_frechet_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    one = frechet_distance(a[:, :1], 3 * a[:, :1])
    assert one == pytest.approx((2 * a[:, 0].mean()) ** 2 + (2 * a[:, 0].std(ddof=1)) ** 2, rel=1e-8)
    assert math.isfinite(frechet_distance(a[:4], b))  # a singular covariance
    assert math.isnan(frechet_distance(a[:1], b))


def kernel(x, y):
    """Of each row of x and each of y."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def slow_kernel_distance(a, b):
    """The definition, with each pair of two different rows of one set."""
    within = [kernel(t, t)[~np.eye(len(t), dtype=bool)].mean() for t in (a, b)]
    return sum(within) - 2 * kernel(a, b).mean()


def test_kernel_distance_equals_its_definition_and_has_no_bias():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(20, 4)) + 0.3
    for many in (a, np.tile(a, (70, 1))):  # also in blocks
        assert kernel_distance(many, b)[0] == pytest.approx(slow_kernel_distance(many, b))
    same = [kernel_distance(rng.normal(size=(40, 4)), rng.normal(size=(50, 4)))[0] for _ in range(100)]
    assert abs(np.mean(same)) < 3 * scipy.stats.sem(same)
    other = [kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(90, 4)) + 1) for _ in range(100)]
    distances, ses = np.array(other).T
    assert np.sqrt((ses**2).mean()) == pytest.approx(distances.std(), rel=0.2)


def slow_calibration_error(p, labels, bins=15):
    top, right = p.max(1), p.argmax(1) == labels
    total = 0.0
    for i in range(bins):
        inside = (i / bins <= top) & ((top < (i + 1) / bins) | (i == bins - 1))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    return total


def test_calibration_error():
    p = random_log_p(300, 4).exp().numpy()
    labels = np.random.default_rng(0).integers(0, 4, 300)
    assert calibration_error(p, labels) == pytest.approx(slow_calibration_error(p, labels), abs=1e-12)
    sure = np.eye(4)[labels]
    assert calibration_error(sure, labels) == 0
    assert calibration_error(sure, (labels + 1) % 4) == 1


def blobs(gap, n=1000, k=4, d=3):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % k
    centres = gap * rng.normal(size=(k, d))
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels, centres


@pytest.mark.parametrize("gap", [0.7, 20.0])
def test_probes_and_the_information_they_certify(gap):
    latents, labels, centres = blobs(gap)
    train, test = probes.split(len(labels))
    assert len(train) == 800 and set(train) | set(test) == set(range(1000))
    np.savez("latents.npz", qz_mu=latents, labels=labels)
    figures = {}
    for name, column in PROBES.items():
        fit, terms = fit_stored(name, Path("latents.npz"), "qz_mu", "_paper")
        figures |= {key.removesuffix("_paper"): value for key, value in fit.items()}
        correct = terms[f"{column}_paper"]
        assert np.isnan(correct[train]).all() and set(correct[test]) <= {0, 1}
        assert correct[test].mean(dtype=float) == pytest.approx(figures[column])
    model = LogisticRegression(max_iter=1000).fit(latents[train], labels[train])
    p = model.predict_proba(latents[test]).astype(np.float64)
    correct = model.predict(latents[test]) == labels[test]
    losses = -np.log(p[np.arange(len(test)), labels[test]])
    assert figures["lr_acc_mean"] == correct.mean()
    assert figures["lr_acc_mean_paper_se"] == pytest.approx(scipy.stats.sem(correct))
    assert figures["lr_nll"] == pytest.approx(losses.mean())
    assert figures["lr_nll_paper_se"] == pytest.approx(scipy.stats.sem(losses), rel=1e-6)
    assert figures["lr_ece"] == pytest.approx(slow_calibration_error(p, labels[test]), abs=1e-9)
    assert figures["mi_lr_lb"] == pytest.approx(math.log(4) - figures["lr_nll"])
    means = torch.tensor(centres[labels])[:, None]
    mi = gaussian_mi(torch.tensor(latents), means, torch.ones_like(means), torch.tensor(labels))
    assert figures["mi_lr_lb"] <= mi.mi + 3 * mi.se + 0.05
    assert gap < 10 or min(figures[column] for column in PROBES.values()) > 0.99


@pytest.mark.parametrize("name", PROBES)
def test_probes_see_no_test_image_and_no_scale(name):
    """Logistic regression on raw latents 10,000 times smaller is at chance; standardised it is what it was."""
    latents, labels, _ = blobs(5.0)

    def fit(scale, test_labels):
        z, z_train = scale * latents[:300], scale * latents[300:]
        arrays = {"z": z, "labels": test_labels, "z_train": z_train, "labels_train": labels[300:]}
        np.savez("latents.npz", **arrays)
        return fit_stored(name, Path("latents.npz"), "z", "_sample")

    (figures, terms), (scaled, _) = (fit(scale, labels[:300]) for scale in (1, 1e-4))
    column = f"{PROBES[name]}_sample"
    assert scaled == pytest.approx(figures, abs=0.02) and figures[column] > 0.9
    assert set(terms) == {column} | ({"lr_nll_sample", "mi_z_low"} if name == "lr" else set())
    for term, values in terms.items():
        assert figures[term] == pytest.approx(values.mean(dtype=float))
    assert fit(1, np.roll(labels[:300], 1))[0][column] < 0.1  # nothing depends on test labels
    if name == "lr":
        train, test = (latents[300:] * 1e-4, labels[300:]), (latents[:300] * 1e-4, labels[:300])
        raw, _ = fit_probe(name, train, test, "", False)
        assert raw["lr_nll"] > 1.3 > 0.5 > figures["lr_nll_sample"]
        low = entropy(labels[:300]) - figures["lr_nll_sample"]
        assert figures["mi_z_low"] == pytest.approx(low)


@pytest.mark.parametrize("name", probes.KERNELS)
@pytest.mark.parametrize("gap", [0.1, 0.4, 5.0])
def test_support_vector_machines_are_scikit_learns(name, gap):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, 9, 2300)
    latents = (rng.normal(scale=gap, size=(9, 64))[labels] + rng.normal(size=(2300, 64))).astype(np.float32)
    train, test = (latents[:800] * 50, labels[:800]), latents[800:] * 50
    theirs = probes.untrained(name, True).fit(*train).predict(test)
    ours, labels = probes.svm_labels(name, train, test), labels[800:]
    assert len(test) > probes.ROWS and np.mean(ours == theirs) > (0.999 if name == "svm_rbf" else 0.9)
    more = (ours == labels).astype(float) - (theirs == labels)
    assert abs(more.mean()) <= 3 * scipy.stats.sem(more)
    column = PROBES[name]
    assert np.array_equal(fit_probe(name, train, (test, labels), "", True)[1][column], ours == labels)
    few = train[0][:, :63], train[1]  # it takes over from 64 dimensions on
    theirs = probes.untrained(name, True).fit(*few).predict(test[:, :63])
    assert np.array_equal(fit_probe(name, few, (test[:, :63], labels), "", True)[1][column], theirs == labels)


def test_a_probe_of_many_dimensions_is_not_too_sure_to_certify_information():
    """300 dimensions, 500 training images: with C = 1, H(label) - log loss would be below 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(1500) % 4
    latents = rng.normal(size=(1500, 300))
    latents[:, :4] += 1.5 * np.eye(4)[labels]
    train, test = (latents[:500], labels[:500]), (latents[500:], labels[500:])
    assert probes.choose_c(*train) == 0.01
    careless = probes.untrained("lr", True).fit(*train).predict_proba(test[0])
    chosen, _ = fit_probe("lr", train, test, "", standardize=True)
    assert chosen["lr_nll"] < math.log(4) - 0.1 and log_loss(test[1], careless) > math.log(4) + 0.2
    assert probes.choose_c(np.eye(4), np.arange(4)) == probes.choose_c(np.zeros((0, 3)), np.zeros(0, int)) == 1


def test_the_calibration_error_of_a_perfect_probe_is_what_it_is_expected_to_be():
    """Labels drawn from the probabilities themselves; 72 images, then 10,000."""
    rng = np.random.default_rng(1)
    for n in (72, 10_000):
        p = random_log_p(n, 10).exp().numpy()
        drawn = [(p.cumsum(1) > rng.random((n, 1))).argmax(1) for _ in range(100)]
        errors = [calibration_error(p, labels) for labels in drawn]
        assert abs(np.mean(errors) - probes.calibration_null(p)) < 4 * np.std(errors) / 10
        assert calibration_error(p, np.roll(drawn[0], 1)) > np.mean(errors) + 5 * np.std(errors)


@pytest.mark.parametrize("name", PROBES)
def test_probes_that_cannot_be_trained_give_no_figures_and_unknown_classes_an_error(name):
    rng = np.random.default_rng(0)
    latents, one, two = rng.normal(size=(20, 3)), np.zeros(20, int), np.arange(20) % 2
    for train, test in (((latents, one), (latents, one)), ((latents, two), (latents[:0], two[:0]))):
        assert fit_probe(name, train, test, "", standardize=True)[0] == {}
    assert fit_probe(name, (latents[:0], two[:0]), (latents, two), "", standardize=True)[0] == {}
    constant = np.zeros((40, 3)), rng.integers(0, 2, 40)
    assert fit_probe(name, constant, constant, "", standardize=True)[0][PROBES[name]] <= 1
    figures, _ = fit_probe(name, (latents, two), (latents, two + (np.arange(20) == 7)), "", False)
    assert figures[PROBES[name]] < 1 and figures.get("lr_nll", math.inf) == math.inf


def entry_of(column: str) -> str | None:
    """The entry that a column belongs to: its own, or that of the name without an ending."""
    if column in ENTRIES:
        return column
    shorter = next((column.removesuffix(end) for end in ENDINGS if column.endswith(end)), None)
    return shorter and entry_of(shorter)


def test_the_page_explains_every_column_in_the_words_of_its_declaration():
    columns = [c for c in COLUMNS if c not in (*fields_of(), "run", "status") and "train_" not in c]
    assert len(columns) == len(set(columns)) and {m.name for m in METRICS.values()} - {*columns} == DERIVED
    assert set(ENTRIES) == {entry_of(column) for column in columns}
    for column in columns:
        assert ENTRIES[entry_of(column)] == metric(column).unit, column
    for names, _, definition, error in ROWS:
        names = re.findall(r"\w+", names)
        assert definition.replace("\\|", "|").startswith(metric(names[0]).label), names
        assert "`_se`" not in error or all(f"{name}_se" in columns for name in names), names


def test_metrics_of_derived_columns():
    labels = {
        "svm_rbf_acc_y_paper": "SVM (rbf) on y, paper's protocol",
        "lr_nll_sample_y_se": "standard error of log loss on samples of y",
        "mi_q_mc_y_null": "I(y; shuffled label)",
        "train_ll": "log-likelihood, training images",
        "new_column": "new column",
    }
    assert {name: metric(name).label for name in labels} == labels
    assert (metric("lr_nll_sample_y_se").unit, metric("lr_nll_sample_y_se").better) == ("nats", 0)
    assert metric("svm_rbf_acc_y_paper").mixes and metric("lr_nll_sample").better == -1
