"""Measures of images, samples and predictions against closed forms and independent libraries."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.distributions import MultivariateNormal

from models.hvae import HVAE
from models.latents import Gaussian
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import (
    active_units,
    frechet_distance,
    importance_weighted_ll,
    inception_score,
    kernel_distance,
)
from utils.evaluation.probes import (
    KERNELS,
    PROBES,
    ROWS,
    accuracy_of,
    calibration_error,
    calibration_null,
    choose_c,
    entropy,
    fit_probe,
    probe,
    split,
    svm_labels,
    untrained,
)
from utils.seeds import generator


def test_psnr_equals_scikit_images():
    """skimage.metrics.peak_signal_noise_ratio (scikit-image 0.26) of these arrays is 20.58897870264339 dB."""
    rng = np.random.default_rng(0)
    images = rng.random((3, 1, 4, 4))
    others = np.clip(images + rng.normal(size=images.shape) * 0.1, 0, 1)

    class Model:
        def reconstruct(self, x):
            return torch.from_numpy(others)

    assert HVAE.psnr(Model(), [(torch.from_numpy(images), None)]) == pytest.approx(20.58897870264339, abs=1e-12)


def test_psnr_is_of_all_pixels_together():
    x = torch.rand(10, 1, 4, 4)
    noisy = (x + 0.1 * torch.randn(10, 1, 4, 4) * torch.arange(10)[:, None, None, None]).clamp(0, 1)
    lookup = {float(a.sum()): b for a, b in zip(x, noisy, strict=True)}
    model = SimpleNamespace(reconstruct=lambda batch: torch.stack([lookup[float(a.sum())] for a in batch]))
    batches = [(x[:7], None), (x[7:], None)]
    expected = 10 * math.log10(1 / ((x - noisy) ** 2).double().mean())
    assert HVAE.psnr(model, batches) == pytest.approx(expected, rel=1e-6)


def test_active_units():
    means = np.zeros((100, 2, 2), dtype=np.float32)
    means[:, 0, 0] = np.linspace(-1, 1, 100)
    means[:, 0, 1] = np.linspace(-0.1, 0.1, 100)  # variance 0.0034
    means[:, 1, 1] = 1000 + np.linspace(-1, 1, 100)
    assert active_units(means) == 2
    assert active_units(np.zeros((5, 0))) == 0


def linear_gaussian():
    """z ~ N(0, I), y|z ~ N(A z, s^2 I), x|y ~ N(B y, t^2 I), with Gaussian but inexact q: log p(x) is known."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, generator=g).double(), torch.randn(4, 3, generator=g).double()
    s, t = 0.7, 0.5
    cov_y = a @ a.T + s**2 * torch.eye(3)
    cov_x = b @ cov_y @ b.T + t**2 * torch.eye(4)
    to_z = (b @ a).T @ torch.linalg.inv(cov_x)  # E[z|x]
    std_z = 1.1 * (torch.eye(2) - to_z @ b @ a).diagonal().sqrt()
    cov_y_zx = torch.linalg.inv(b.T @ b / t**2 + torch.eye(3) / s**2)
    std_y = 1.1 * cov_y_zx.diagonal().sqrt()

    class Model:
        family = Gaussian

        def noise(self, n, g):
            return SimpleNamespace(z=Gaussian.noise((n, 2), g).double(), y=Gaussian.noise((n, 3), g).double())

        def q_z(self, x):
            return Gaussian(x @ to_z.T, std_z.expand(len(x), 2))

        def q_y(self, z, x):
            return Gaussian((x @ b / t**2 + z @ a.T / s**2) @ cov_y_zx, std_y.expand(len(x), 3))

        def p_y(self, z):
            return Gaussian(z @ a.T, torch.full((len(z), 3), s).double())

        def p_x(self, y):
            return Gaussian(y @ b.T, torch.full((len(y), 4), t).double())

    p_x = MultivariateNormal(torch.zeros(4).double(), cov_x)
    x = p_x.sample((200,))
    return Model(), x, p_x.log_prob(x).mean().item()


def test_importance_weighted_ll_rises_to_the_closed_form():
    torch.manual_seed(0)
    model, x, exact = linear_gaussian()
    estimates = [importance_weighted_ll(model, x, k, generator("cpu", 1)).mean().item() for k in (1, 5, 50, 2000)]
    assert all(a < b + 0.02 for a, b in zip(estimates, estimates[1:], strict=False))
    assert estimates[0] < exact - 0.1 and abs(estimates[-1] - exact) < 0.02
    assert all(e < exact + 0.05 for e in estimates)


def random_log_p(n=1003, k=10, sharp=3.0):
    return torch.log_softmax(sharp * torch.randn(n, k, generator=torch.Generator().manual_seed(0)).double(), 1)


def test_inception_score_equals_a_loop_with_scipy():
    log_p = random_log_p()
    scores, log_parts = [], []
    for part in np.array_split(log_p.exp().numpy(), 5):
        marginal = part.mean(0)
        scores.append(math.exp(np.mean([scipy.stats.entropy(p, marginal) for p in part])))
        log_parts.append(scipy.stats.entropy(marginal) - np.mean([scipy.stats.entropy(p) for p in part]))
    ours = inception_score(log_p)
    assert ours["is_mean"] == pytest.approx(np.mean(scores), rel=1e-10)
    assert ours["is_std"] == pytest.approx(np.std(scores), rel=1e-8)
    np.testing.assert_allclose(np.log(scores), log_parts, atol=1e-9)
    one = inception_score(log_p, splits=1)
    assert math.log(one["is_mean"]) == pytest.approx(math.log(one["is_div"]) + math.log(one["is_sharp"]), abs=1e-6)
    assert 1 <= ours["is_mean"] <= 10


def test_inception_score_extremes():
    confident = torch.full((1000, 10), -1e4).double()
    confident[torch.arange(1000), torch.arange(1000) % 10] = 0
    assert inception_score(confident)["is_mean"] == pytest.approx(10)
    constant = torch.log_softmax(torch.arange(10.0), 0).expand(1000, 10)
    assert inception_score(constant)["is_mean"] == pytest.approx(1)


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
    few = rng.normal(size=(4, 6))  # a singular covariance
    assert math.isfinite(frechet_distance(few, b))


def slow_kernel(x, y):
    return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3


def slow_within(t):
    return np.mean([slow_kernel(x, y) for i, x in enumerate(t) for j, y in enumerate(t) if i != j])


def slow_kernel_distance(a, b):
    """The definition, pair by pair."""
    return slow_within(a) + slow_within(b) - 2 * np.mean([slow_kernel(x, y) for x in a for y in b])


def test_kernel_distance_equals_a_slow_loop_and_has_no_bias():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(20, 4)) + 0.3
    assert kernel_distance(a, b)[0] == pytest.approx(slow_kernel_distance(a, b))
    many = np.tile(a, (70, 1))
    of_all = (many @ many.T / 4 + 1) ** 3
    within = (of_all.sum() - np.trace(of_all)) / (2100 * 2099)
    apart = slow_kernel_distance(a, b) - slow_within(a)  # the same of 70 copies
    assert kernel_distance(many, b)[0] == pytest.approx(within + apart)
    same = [kernel_distance(rng.normal(size=(40, 4)), rng.normal(size=(50, 4)))[0] for _ in range(100)]
    assert abs(np.mean(same)) < 3 * scipy.stats.sem(same)
    other = [kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(90, 4)) + 1) for _ in range(100)]
    distances, ses = np.array(other).T
    assert np.sqrt((ses**2).mean()) == pytest.approx(distances.std(), rel=0.2)


def slow_calibration_error(p, labels, bins=15):
    total = 0.0
    for low in range(bins):
        inside = [
            i
            for i in range(len(p))
            if low / bins <= p[i].max() < (low + 1) / bins or (p[i].max() == 1 and low == bins - 1)
        ]
        if inside:
            gap = np.mean([p[i].argmax() == labels[i] for i in inside]) - np.mean([p[i].max() for i in inside])
            total += len(inside) / len(p) * abs(gap)
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
    figures = {}
    train, test = split(len(labels))
    assert len(train) == 800 and set(train) | set(test) == set(range(1000))
    np.savez("latents.npz", qz_mu=latents, labels=labels)
    for name in PROBES:
        found, of_image = probe(name, (Path("latents.npz"), "qz_mu"), "_paper", paper=True)
        figures |= {key.replace("_paper", ""): value for key, value in found.items()}
        correct = of_image[f"{accuracy_of(name)}_paper"]
        assert np.isnan(correct[train]).all() and set(correct[test]) <= {0, 1}
        assert correct[test].mean(dtype=float) == pytest.approx(found[f"{accuracy_of(name)}_paper"])
    model = LogisticRegression(max_iter=1000).fit(latents[train], labels[train])
    assert figures["lr_acc_mean"] == model.score(latents[test], labels[test])
    p = model.predict_proba(latents[test]).astype(np.float64)
    assert figures["lr_nll"] == pytest.approx(log_loss(labels[test], p))
    assert figures["lr_ece"] == pytest.approx(slow_calibration_error(p, labels[test]), abs=1e-9)
    assert figures["mi_lr_lb"] == pytest.approx(math.log(4) - figures["lr_nll"])
    losses = -np.log(p[np.arange(len(test)), labels[test]])
    assert figures["lr_nll_se"] == pytest.approx(scipy.stats.sem(losses), rel=1e-6)
    correct = model.predict(latents[test]) == labels[test]
    assert figures["lr_acc_mean_se"] == pytest.approx(scipy.stats.sem(correct))
    means = torch.tensor(centres[labels])[:, None]
    mi = gaussian_mi(torch.tensor(latents), means, torch.ones_like(means), torch.tensor(labels))
    assert figures["mi_lr_lb"] <= mi.mi + 3 * mi.se + 0.05
    if gap > 10:
        assert min(figures[accuracy_of(name)] for name in PROBES) > 0.99


def test_a_class_that_the_training_part_lacks_is_an_error_not_a_crash():
    latents, labels, _ = blobs(1.0, n=50, k=2)
    train, test = split(50)
    labels = labels.copy()
    labels[test[0]] = 2
    figures, _ = fit_probe("lr", (latents[train], labels[train]), (latents[test], labels[test]), "", False)
    assert figures["lr_nll"] == math.inf and figures["lr_acc_mean"] < 1


@pytest.mark.parametrize("name", PROBES)
def test_probes_see_no_test_image_and_no_scale(name):
    """Logistic regression on raw latents 10,000 times smaller is at chance; standardised it is what it was."""
    latents, labels, _ = blobs(5.0)
    arrays = {"z": latents[:300], "labels": labels[:300], "z_train": latents[300:], "labels_train": labels[300:]}
    np.savez("a.npz", **arrays)
    np.savez("b.npz", **arrays | {"z": latents[:300] * 1e-4, "z_train": latents[300:] * 1e-4})
    (figures, of_image), (scaled, _) = (probe(name, (Path(f"{f}.npz"), "z"), "_sample", paper=False) for f in "ab")
    column = f"{accuracy_of(name)}_sample"
    assert scaled == pytest.approx(figures, abs=0.02) and figures[column] > 0.9
    assert set(of_image) == {column} | ({"lr_nll_sample", "mi_z_low"} if name == "lr" else set())
    for term, values in of_image.items():
        assert figures[term] == pytest.approx(values.mean(dtype=float))
    arrays["labels"] = np.roll(arrays["labels"], 1)  # neither the fit nor its choices depend on the labels of the test
    np.savez("c.npz", **arrays)
    assert probe(name, (Path("c.npz"), "z"), "_sample", paper=False)[0][column] < 0.1
    if name == "lr":
        raw, _ = fit_probe(name, (latents[300:] * 1e-4, labels[300:]), (latents[:300] * 1e-4, labels[:300]), "", False)
        assert raw["lr_nll"] > 1.3 > 0.5 > figures["lr_nll_sample"]
        assert figures["mi_z_low"] == pytest.approx(entropy(labels[:300]) - figures["lr_nll_sample"])


def test_probes_that_learn_on_training_images_find_what_80_percent_of_the_test_images_do_not_show():
    """Ten classes in 64 dimensions, 90 test images: a kernel SVM on 72 of them hardly learns, on 900 others it does."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 990)
    latents = 0.4 * rng.normal(size=(10, 64))[labels] + rng.normal(size=(990, 64))
    arrays = {"qz_mu": latents[:90], "labels": labels[:90], "qz_mu_train": latents[90:], "labels_train": labels[90:]}
    np.savez("l.npz", **arrays)
    source = Path("l.npz"), "qz_mu"
    ours, papers = (probe("svm_rbf", source, "", paper=paper)[0]["svm_rbf_acc"] for paper in (False, True))
    assert papers < 0.35 < 0.8 < ours


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gap", [0.1, 0.4, 5.0])
def test_support_vector_machines_are_scikit_learns(name, gap):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, 9, 2300)
    latents = (rng.normal(scale=gap, size=(9, 64))[labels] + rng.normal(size=(2300, 64))).astype(np.float32)
    train, test = (latents[:800] * 50, labels[:800]), latents[800:] * 50
    theirs = untrained(name, True).fit(*train).predict(test)
    ours, labels = svm_labels(name, train, test), labels[800:]
    assert len(test) > ROWS and np.mean(ours == theirs) > (0.999 if name == "svm_rbf" else 0.9)
    more = (ours == labels).astype(float) - (theirs == labels)
    assert abs(more.mean()) <= 3 * scipy.stats.sem(more)
    column = accuracy_of(name)
    assert np.array_equal(fit_probe(name, train, (test, labels), "", True)[1][column], ours == labels)
    few = train[0][:, :63], train[1]  # it takes over from 64 dimensions on
    theirs = untrained(name, True).fit(*few).predict(test[:, :63])
    assert np.array_equal(fit_probe(name, few, (test[:, :63], labels), "", True)[1][column], theirs == labels)


def test_a_probe_of_many_dimensions_is_not_too_sure_to_certify_information():
    """300 dimensions, 500 training images: with C = 1, H(label) - log loss would be below 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(1500) % 4
    latents = rng.normal(size=(1500, 300))
    latents[:, :4] += 1.5 * np.eye(4)[labels]
    train, test = (latents[:500], labels[:500]), (latents[500:], labels[500:])
    assert choose_c(*train) == 0.01
    careless = untrained("lr", True).fit(*train).predict_proba(test[0])
    chosen, _ = fit_probe("lr", train, test, "", standardize=True)
    assert chosen["lr_nll"] < math.log(4) - 0.1 and log_loss(test[1], careless) > math.log(4) + 0.2
    assert choose_c(np.eye(4), np.arange(4)) == choose_c(np.zeros((0, 3)), np.zeros(0, int)) == 1


def test_the_calibration_error_of_a_perfect_probe_is_what_it_is_expected_to_be():
    """Labels drawn from the probabilities themselves; 72 images, then 10,000."""
    rng = np.random.default_rng(1)
    for n in (72, 10_000):
        p = random_log_p(n, 10).exp().numpy()
        drawn = [(p.cumsum(1) > rng.random((n, 1))).argmax(1) for _ in range(100)]
        errors = [calibration_error(p, labels) for labels in drawn]
        assert abs(np.mean(errors) - calibration_null(p)) < 4 * np.std(errors) / 10
        assert calibration_error(p, np.roll(drawn[0], 1)) > np.mean(errors) + 5 * np.std(errors)


@pytest.mark.parametrize("name", PROBES)
def test_probes_that_cannot_be_trained_give_no_figures(name):
    rng = np.random.default_rng(0)
    latents, one = rng.normal(size=(20, 3)), np.zeros(20, int)
    assert fit_probe(name, (latents, one), (latents, one), "", standardize=False)[0] == {}  # one class
    assert fit_probe(name, (latents[:0], one[:0]), (latents, one), "", standardize=True)[0] == {}
    assert fit_probe(name, (latents, np.arange(20) % 2), (latents[:0], one[:0]), "", standardize=True)[0] == {}
    constant = np.zeros((40, 3)), rng.integers(0, 2, 40)
    assert fit_probe(name, constant, constant, "", standardize=True)[0][accuracy_of(name)] <= 1


def test_the_frechet_distance_of_a_single_image_is_not_a_number():
    assert math.isnan(frechet_distance(np.ones((1, 4)), np.random.default_rng(0).normal(size=(10, 4))))
