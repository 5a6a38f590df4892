"""The steps of the evaluation, and parts of it compared with plain implementations of their definitions."""

import argparse
import copy
import io
import math
import resource
import statistics
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.distributions import Normal

from datasets.batches import Resident
from datasets.loading import Data
from models.build import build_model
from models.classifiers import NETWORKS, build_classifier, evaluator
from utils.benchmark.measuring import measure, report
from utils.config import Config
from utils.evaluation.fits import probe_latents
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import inception_score
from utils.evaluation.probes import KERNELS, PROBES, TAILS, fit_probe, split
from utils.evaluation.steps import STEPS
from utils.evaluation.subject import BATCH, Bench, Subject
from utils.seeds import generator

GRID, CORES = 441, 16
FEW = (200, 1000)  # images through the classifier that are timed on a CPU, which takes minutes for 10,000
OF_CLASSIFIER = ("is", "fid_classifier", "recons")


def mi(args: argparse.Namespace) -> None:
    """The mutual information of z, compared with a loop over images, which is timed on some of them only."""
    n, d, few = args.images or 10_000, args.z_dims, 100
    g = generator(args.device, 0)
    means = torch.rand(n, d, generator=g, device=args.device) * 6 - 3
    stds = torch.full_like(means, 0.1)
    labels = torch.randint(0, 10, (n,), generator=g, device=args.device)
    samples = means + stds * torch.randn(means.shape, generator=g, device=args.device)
    name = f"plain loop (of {few} images, x {n / few:g})"
    candidates = {
        name: partial(plain_mi, samples, means, stds, labels, few),
        "gaussian_mi": lambda: gaussian_mi(samples, means[:, None], stds[:, None], labels),
    }
    print(f"mutual information for {n:,} images and a {d}-dimensional z, with standard error and shuffled labels:")
    report(measure(candidates, args.n, args.device, warmup=1), {name: few / n, "gaussian_mi": 1}, baseline=name)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def plain_mi(samples: Tensor, means: Tensor, stds: Tensor, labels: Tensor, few: int) -> Tensor:
    """The mutual information of the first few of N images by a loop over them, like the paper's code."""
    values = []
    for i in range(few):
        log_p = Normal(means, stds).log_prob(samples[i]).double().sum(1)
        own = log_p[labels == labels[i]]
        values.append((own.logsumexp(0) - math.log(len(own))) - (log_p.logsumexp(0) - math.log(len(labels))))
    return torch.stack(values).mean()


def probes(args: argparse.Namespace) -> None:
    """The probes, compared with the paper's logistic regression: saga, 100 iterations, five seeds."""
    n, d = args.images or 2_000, args.z_dims
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n)
    latents = (rng.normal(size=(10, d))[labels] + rng.normal(size=(n, d))).astype(np.float32)
    train_part, test_part = split(n)
    train, test = ((latents[part], labels[part]) for part in (train_part, test_part))
    candidates = {"saga, 5 seeds": partial(saga, train, test)} | {
        name: lambda name=name: fit_probe(name, train, test, "", False) for name in PROBES
    }
    print(f"probes on {n:,} latents of {d} dimensions:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = measure(candidates, args.n, args.device, warmup=1)
    report(seconds, dict.fromkeys(candidates, 1), baseline="saga, 5 seeds")


def saga(train: tuple, test: tuple) -> None:
    """The paper's logistic regression: 100 iterations of saga, five times."""
    for seed in range(5):
        LogisticRegression(solver="saga", max_iter=100, random_state=seed).fit(*train).score(*test)


def inception(args: argparse.Namespace) -> None:
    """The inception score, compared with a loop over images with scipy's entropy."""
    n = args.images or 10_000
    log_p = torch.log_softmax(3 * torch.randn(n, 10, generator=generator(args.device, 0), device=args.device), 1)
    p = log_p.exp().cpu().numpy()

    def plain():
        scores = []
        for part in np.array_split(p, 5):
            marginal = part.mean(0)
            scores.append(math.exp(np.mean([scipy.stats.entropy(row, marginal) for row in part])))
        return scores

    print(f"inception score of {n:,} samples:")
    candidates = {"plain loop": plain, "inception_score": lambda: inception_score(log_p)}
    report(measure(candidates, args.n, args.device, warmup=1), dict.fromkeys(candidates, 1), baseline="plain loop")


@torch.no_grad()
def classifiers(args: argparse.Namespace) -> None:
    """The classifiers' networks on a batch of images, plain and as the evaluation uses them."""
    shape, n = (3, 32, 32), args.images or BATCH
    x = torch.rand(n, *shape, device=args.device)
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        plain = build(shape, 10).to(args.device).eval()
        ours = evaluator(copy.deepcopy(plain), args.device)
        print(f"{name}, {n} images of {shape}:")
        candidates = {"plain": partial(plain, x), "as evaluated": partial(ours, x)}
        report(measure(candidates, args.n, args.device, warmup=1), dict.fromkeys(candidates, n), baseline="plain")


class Made(Subject):
    """A run of random weights, and images of noisy patterns, one a class; its results are kept here, not in files."""

    metrics: dict = {}  # of the steps so far; other steps read them

    def __init__(self, config: Config, n: int, device: torch.device, classes: int = 10):
        self.config, self.bench, self.metrics = config, Bench(device, "", "", n_samples=n), {}
        self.classes = classes
        rng = np.random.default_rng(0)
        patterns = rng.normal(scale=40, size=(classes, *config.image_shape))

        def images():
            labels = rng.integers(0, classes, n)
            x = (128 + patterns[labels] + rng.normal(scale=40, size=(n, *config.image_shape))).clip(0, 255)
            return Resident(torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(labels), device)

        torch.manual_seed(0)
        self.model = build_model(config).to(device).eval()
        self.bench._data[config.dataset, config.image_shape] = Data(images(), images(), classes)
        net = evaluator(build_classifier(config, classes), device)
        self.bench._classifiers[config.data_name] = [(net, "random")]

    def compute(self, name: str) -> None:
        """Computes a step, as the evaluation does."""
        self.metrics |= STEPS[name].compute(self)
        if name == "rates":
            self.latents = dict(np.load(io.BytesIO(self.metrics["latents.npz"])))

    def anew(self, *names: str) -> None:
        """Computes steps as of a run that follows others, with what all of them share."""
        self.__dict__.pop("sample_features", None)
        for name in names:
            self.compute(name)

    def seconds(self, names: Sequence[str], n: int) -> list[float]:
        """Seconds of n repetitions of steps; on a CPU, those of the classifier are extrapolated from few images."""
        images, device = self.bench.n_samples, self.bench.device
        if not set(names) & set(OF_CLASSIFIER) or device.type != "cpu" or images <= FEW[-1]:
            return measure({"": partial(self.anew, *names)}, n, device, warmup=1)[""]
        few, more = (Made(self.config, k, device, self.classes).seconds(names, n) for k in FEW)
        return [a + (b - a) / (FEW[1] - FEW[0]) * (images - FEW[0]) for a, b in zip(few, more, strict=True)]

    def fit(self, name: str, key: str) -> None:
        """Fits a probe, as the evaluation does."""
        parts = [(self.probes[key + end], self.probes["labels" + end]) for end in ("_train", "")]
        fit_probe(name, *((latents.reshape(len(y), -1), y) for latents, y in parts), "", True)

    def prepare(self) -> None:
        """Computes the latents that probes are fitted to."""
        self.probes = probe_latents(self)

    def plain_probes(self) -> None:
        """Fits probes like the paper's code: raw means of 80 % of the test images, saga, scikit-learn's own kernels."""
        for key in ("qz_mu", "qy_mu"):
            latents, labels = self.latents[key].reshape(len(self.latents["labels"]), -1), self.latents["labels"]
            train, test = ((latents[part], labels[part]) for part in split(len(labels)))
            saga(train, test)
            for name in (*KERNELS, "kNN"):
                fit_probe(name, train, test, "", False)


def evaluate(args: argparse.Namespace) -> None:
    """Every step of the evaluation of one run, and the time that a grid takes."""
    config = Config(dataset=args.dataset, conv_channels=args.conv_channels, z_dims=args.z_dims)
    n = args.images or 10_000
    made = Made(config, n, args.device)
    fits = {f"{name}, {key}": partial(made.fit, name, key) for key in TAILS for name in PROBES}
    print(f"evaluation of a run of {args.dataset}, {n:,} test images, as many for training and as many samples:")
    if n > FEW[-1] and args.device.type == "cpu":
        print(f"those that pass the classifier ({', '.join(OF_CLASSIFIER)}) extrapolated from {FEW[0]} and {FEW[1]}")
    names = (("rates",), ("is", "fid_classifier"), ("mi_z",), ("mi_y",), ("recons",))
    steps = {", ".join(some): made.seconds(some, args.n) for some in names}
    steps |= measure({"latents of the probes": made.prepare}, args.n, args.device, warmup=0)
    fits = measure(fits, args.n, args.device, warmup=0)
    seconds = steps | fits
    print(f"{'':24s} {'median':>9} {'quartiles':>20} {'n':>4}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:24s} {middle:7.2f} s {low:8.2f} .. {high:8.2f} {len(values):4d}")
    of_steps, of_fits = (GRID / 3600 * sum(statistics.median(seconds[name]) for name in part) for part in (steps, fits))
    print(
        f"{GRID} runs take {of_steps:.2f} hours for the steps, and {of_fits / CORES:.2f} for the probes "
        f"on {CORES} cores"
    )
