"""Measures of images, samples and predictions against closed forms and other libraries; their page."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import entropy, sem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from models.hvae import HVAE, Noise
from models.latents import Gaussian
from tests.conftest import ROOT
from utils.config import fields_of
from utils.evaluation import probes, steps
from utils.evaluation.batch import COLUMNS
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import METRICS, metric
from utils.evaluation.probes import PROBES, calibration_error, fit_latent, fit_probe
from utils.seeds import generator

PAGE = (ROOT / "docs/metrics.md").read_text()
ROW = r"^\| (`[a-zA-Z]\w*`(?:, `\w+`)*) \| (\w*) ?\| (.*) \| (.*)\|$"
ROWS = re.findall(ROW, PAGE, re.MULTILINE)
ENTRIES = {name: unit for names, unit, *_ in ROWS for name in re.findall(r"\w+", names)}
DERIVED = {"nelbo", "rate", "lr_acc_std", "mi_lr_lb"}  # by plot_eval.py or the paper's protocol
ENDINGS = ("_se", "_paper", "_y", "_sample")
approx = pytest.approx


def test_psnr_is_of_all_pixels_together_and_scikit_images():
    """Of skimage.metrics.peak_signal_noise_ratio, scikit-image 0.26."""
    rng = np.random.default_rng(0)
    x = rng.random((3, 1, 4, 4))
    others = np.clip(x + rng.normal(size=x.shape) * 0.1, 0, 1)
    parts = iter(torch.from_numpy(others).split(2))
    model = SimpleNamespace(reconstruct=lambda x: next(parts))
    batches = [(part, None) for part in torch.from_numpy(x).split(2)]
    assert HVAE.psnr(model, batches) == approx(20.58897870264339, abs=1e-12)


def linear_gaussian():
    """z ~ N(0, 1), y|z ~ N(z, 1/2), x|y ~ N(y, 1/4), q of too large variances: log p(x) is known."""

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
    ks, ll = (1, 5, 50, 2000), steps.importance_weighted_ll
    first, *others = (ll(model, x, k, generator("cpu", 1)).mean().item() for k in ks)
    for a, b in zip([first, *others], others, strict=False):
        assert a < b + 0.02
    assert first < exact - 0.1 and abs(others[-1] - exact) < 0.02


def random_log_p(n=1003, k=10):
    g = torch.Generator().manual_seed(0)
    return torch.log_softmax(3 * torch.randn(n, k, generator=g).double(), 1)


def test_inception_score_equals_a_loop_with_scipy():
    score, log_p = steps.inception_score, random_log_p()
    parts = np.array_split(log_p.exp().numpy(), 5)
    scores = [math.exp(np.mean([entropy(p, part.mean(0)) for p in part])) for part in parts]
    ours, one = score(log_p), score(log_p, splits=1)
    assert ours["is_mean"] == approx(np.mean(scores), rel=1e-10)
    assert ours["is_std"] == approx(np.std(scores), rel=1e-8)
    assert one["is_mean"] == approx(one["is_div"] * one["is_sharp"])
    assert one["is_div"] == approx(math.exp(entropy(log_p.exp().mean(0))))
    confident = torch.log(torch.eye(10).repeat(100, 1)).clamp(min=-1e4)
    constant = torch.log_softmax(torch.arange(10.0), 0).expand(1000, 10)
    assert score(confident)["is_mean"] == approx(10)
    assert score(constant)["is_mean"] == approx(1)


def test_frechet_distance():
    rng, distance = np.random.default_rng(0), steps.frechet_distance
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert distance(a, b) == approx(expected, rel=1e-8)
    assert distance(a, a) == approx(0, abs=1e-9)
    one = a[:, :1]
    expected = 4 * (one.mean() ** 2 + one.var(ddof=1))
    assert distance(one, 3 * one) == approx(expected, rel=1e-8)
    assert math.isfinite(distance(a[:4], b))  # a singular covariance
    assert math.isnan(distance(a[:1], b))


def slow_kernel_distance(a, b):
    """The definition, with each pair of two different rows of one set."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [kernel(t, t)[~np.eye(len(t), dtype=bool)].mean() for t in (a, b)]
    return sum(within) - 2 * kernel(a, b).mean()


def test_kernel_distance_equals_its_definition_and_has_no_bias():
    normal, distance = np.random.default_rng(0).normal, steps.kernel_distance
    a, b = normal(size=(30, 4)), normal(size=(20, 4)) + 0.3
    for many in (a, np.tile(a, (70, 1))):  # also in blocks
        assert distance(many, b)[0] == approx(slow_kernel_distance(many, b))
    same = [distance(normal(size=(40, 4)), normal(size=(50, 4)))[0] for _ in range(100)]
    assert abs(np.mean(same)) < 3 * sem(same)
    other = [distance(normal(size=(60, 4)), normal(size=(90, 4)) + 1) for _ in range(100)]
    distances, ses = np.array(other).T
    assert np.sqrt((ses**2).mean()) == approx(distances.std(), rel=0.2)


def slow_calibration_error(p, labels, bins=15):
    top, right, total = p.max(1), p.argmax(1) == labels, 0.0
    for i in range(bins):
        inside = (i / bins <= top) & ((top < (i + 1) / bins) | (i == bins - 1))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    return total


def test_calibration_error():
    p, labels = random_log_p(300, 4).exp().numpy(), np.random.default_rng(0).integers(0, 4, 300)
    assert calibration_error(p, labels) == approx(slow_calibration_error(p, labels), abs=1e-12)
    sure = np.eye(4)[labels]
    assert calibration_error(sure, labels) == 0
    assert calibration_error(sure, (labels + 1) % 4) == 1


def test_the_calibration_error_of_a_perfect_probe_is_its_null():
    """Labels drawn from the probabilities themselves; 72 images, then 10,000."""
    rng = np.random.default_rng(1)
    for n in (72, 10_000):
        p = random_log_p(n, 10).exp().numpy()
        drawn = [(p.cumsum(1) > rng.random((n, 1))).argmax(1) for _ in range(100)]
        errors = [calibration_error(p, labels) for labels in drawn]
        assert abs(np.mean(errors) - probes.calibration_null(p)) < 4 * np.std(errors) / 10
        wrong = calibration_error(p, np.roll(drawn[0], 1))
        assert wrong > np.mean(errors) + 5 * np.std(errors)


def blobs(gap, n=1000, k=4, d=3):
    rng, labels = np.random.default_rng(0), np.arange(n) % k
    centres = gap * rng.normal(size=(k, d))
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels, centres


@pytest.mark.parametrize("gap", [0.7, 20.0])
def test_probes_and_the_information_they_certify(gap):
    latents, labels, centres = blobs(gap)
    train, test = probes.split(len(labels))
    assert len(train) == 800 and set(train) | set(test) == set(range(1000))
    v, arrays = {}, {"qz_mu": latents, "labels": labels}
    for name, column in PROBES.items():
        fit, terms = fit_latent(name, arrays, "qz_mu", "_paper")
        v |= {key.removesuffix("_paper"): value for key, value in fit.items()}
        correct = terms[f"{column}_paper"]
        assert np.isnan(correct[train]).all() and set(correct[test]) <= {0, 1}
        assert correct[test].mean(dtype=float) == approx(v[column])
    model = LogisticRegression(max_iter=1000).fit(latents[train], labels[train])
    p = model.predict_proba(latents[test]).astype(np.float64)
    correct = model.predict(latents[test]) == labels[test]
    losses = -np.log(p[np.arange(len(test)), labels[test]])
    assert v["lr_acc_mean"] == correct.mean()
    assert v["lr_acc_mean_paper_se"] == approx(sem(correct))
    assert v["lr_nll"] == approx(losses.mean())
    assert v["lr_nll_paper_se"] == approx(sem(losses), rel=1e-6)
    assert v["lr_ece"] == approx(slow_calibration_error(p, labels[test]), abs=1e-9)
    assert v["mi_lr_lb"] == approx(math.log(4) - v["lr_nll"])
    means = torch.tensor(centres[labels])[:, None]
    mi = gaussian_mi(torch.tensor(latents), means, torch.ones_like(means), torch.tensor(labels))
    assert v["mi_lr_lb"] <= mi.mi + 3 * mi.se + 0.05
    assert gap < 10 or min(v[column] for column in PROBES.values()) > 0.99


@pytest.mark.parametrize("name", PROBES)
def test_probes_see_no_test_image_and_no_scale(name):
    """Logistic regression on raw latents 10,000 times smaller is at chance."""
    latents, labels, _ = blobs(5.0)

    def fit(scale, tested):
        z, train = scale * latents[:300], scale * latents[300:]
        arrays = {"z": z, "labels": tested, "z_train": train, "labels_train": labels[300:]}
        return fit_latent(name, arrays, "z", "_sample")

    (v, terms), (scaled, _) = (fit(scale, labels[:300]) for scale in (1, 1e-4))
    column = f"{PROBES[name]}_sample"
    assert scaled == approx(v, abs=0.02) and v[column] > 0.9
    assert set(terms) == {column} | ({"lr_nll_sample", "mi_z_low"} if name == "lr" else set())
    for term, values in terms.items():
        assert v[term] == approx(values.mean(dtype=float))
    assert fit(1, np.roll(labels[:300], 1))[0][column] < 0.1  # nothing depends on test labels
    if name == "lr":
        train, test = ((latents[part] * 1e-4, labels[part]) for part in (slice(300, None), slice(300)))
        raw, _ = fit_probe(name, train, test, "", False)
        assert raw["lr_nll"] > 1.3 > 0.5 > v["lr_nll_sample"]
        assert v["mi_z_low"] == approx(probes.entropy(labels[:300]) - v["lr_nll_sample"])


@pytest.mark.parametrize("name", probes.KERNELS)
@pytest.mark.parametrize("gap", [0.1, 0.4, 5.0])
def test_support_vector_machines_are_scikit_learns(name, gap):
    rng = np.random.default_rng(0)
    labels, centres = rng.integers(3, 9, 2300), rng.normal(scale=gap, size=(9, 64))
    latents = 50 * (centres[labels] + rng.normal(size=(2300, 64))).astype(np.float32)
    train, test, labels = (latents[:800], labels[:800]), latents[800:], labels[800:]
    theirs = probes.untrained(name, True).fit(*train).predict(test)
    ours = probes.svm_labels(name, train, test)
    assert len(test) > probes.ROWS and np.mean(ours == theirs) > (0.999 if name == "svm_rbf" else 0.9)
    more = (ours == labels).astype(float) - (theirs == labels)
    assert abs(more.mean()) <= 3 * sem(more)
    few = train[0][:, :63], train[1]  # it takes over from 64 dimensions on
    theirs = probes.untrained(name, True).fit(*few).predict(test[:, :63])
    for data, x, expected in ((train, test, ours), (few, test[:, :63], theirs)):
        _, terms = fit_probe(name, data, (x, labels), "", True)
        assert np.array_equal(terms[PROBES[name]], expected == labels)


def test_a_probe_of_many_dimensions_is_not_too_sure():
    """300 dimensions, 500 training images: with C = 1, H(label) - log loss would be below 0."""
    rng, labels = np.random.default_rng(0), np.arange(1500) % 4
    latents = rng.normal(size=(1500, 300))
    latents[:, :4] += 1.5 * np.eye(4)[labels]
    train, test = (latents[:500], labels[:500]), (latents[500:], labels[500:])
    assert probes.choose_c(*train) == 0.01
    careless = probes.untrained("lr", True).fit(*train).predict_proba(test[0])
    chosen, _ = fit_probe("lr", train, test, "", standardize=True)
    assert chosen["lr_nll"] < math.log(4) - 0.1 and log_loss(test[1], careless) > math.log(4) + 0.2
    for data in ((np.eye(4), np.arange(4)), (np.zeros((0, 3)), np.zeros(0, int))):
        assert probes.choose_c(*data) == 1


def test_rounding_does_not_choose_between_two_that_are_as_good():
    """Here a held-out fifth finds C of 1 or 0.1 better, as rounding falls; latents that are all alike, none."""
    rng, labels = np.random.default_rng(0), np.arange(600) % 4
    latents = 2 * np.eye(12)[labels] + 1.4393 * rng.normal(size=(600, 12))
    noise = [1 + 1e-6 * np.random.default_rng(seed).normal(size=latents.shape) for seed in range(5)]
    assert {probes.choose_c((latents * of_seed).astype(np.float32), labels) for of_seed in noise} == {0.1}
    assert probes.choose_c(np.zeros((600, 12)), labels) == 0.01


@pytest.mark.parametrize("name", PROBES)
def test_probes_that_cannot_be_trained_and_unknown_classes(name):
    rng = np.random.default_rng(0)
    z, one, two = rng.normal(size=(20, 3)), np.zeros(20, int), np.arange(20) % 2
    nothing = z[:0], two[:0]
    for train, test in (((z, one), (z, one)), ((z, two), nothing), (nothing, (z, two))):
        assert fit_probe(name, train, test, "", standardize=True)[0] == {}
    constant = np.zeros((40, 3)), rng.integers(0, 2, 40)
    assert fit_probe(name, constant, constant, "", standardize=True)[0][PROBES[name]] <= 1
    v, _ = fit_probe(name, (z, two), (z, two + (np.arange(20) == 7)), "", False)
    assert v[PROBES[name]] < 1 and v.get("lr_nll", math.inf) == math.inf


def entry_of(column: str) -> str | None:
    """The entry that a column belongs to: its own, or that of the name without an ending."""
    if column in ENTRIES:
        return column
    shorter = next((column.removesuffix(end) for end in ENDINGS if column.endswith(end)), None)
    return shorter and entry_of(shorter)


def test_the_page_explains_every_column_as_declared():
    others = {*fields_of(), "run", "status", "commit", "date"}
    columns = [c for c in COLUMNS if c not in others and "train_" not in c]
    assert len(columns) == len(set(columns))
    assert {m.name for m in METRICS.values()} - {*columns} == DERIVED
    assert set(ENTRIES) == {entry_of(column) for column in columns}
    for column in columns:
        assert ENTRIES[entry_of(column)] == metric(column).unit, column
    for names, _, definition, error in ROWS:
        names = re.findall(r"\w+", names)
        assert definition.replace("\\|", "|").startswith(metric(names[0]).label), names
        assert "`_se`" not in error or all(f"{name}_se" in columns for name in names), names


def test_metrics_of_derived_columns():
    labels = {
        "svm_rbf_acc_y_paper": "accuracy of SVM (rbf) on y, paper's protocol",
        "lr_nll_sample_y_se": "standard error of log loss on samples of y",
        "mi_q_mc_y_null": "I(y; shuffled label)",
        "train_ll": "log-likelihood, training images",
        "new_column": "new column",
    }
    assert {name: metric(name).label for name in labels} == labels
    error = metric("lr_nll_sample_y_se")
    assert (error.unit, error.better) == ("nats", 0)
    assert metric("svm_rbf_acc_y_paper").mixes and metric("lr_nll_sample").better == -1
