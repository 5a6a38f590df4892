"""Parts of the evaluation, compared with plain implementations of their definitions."""

import argparse
import math
import resource
import warnings

import numpy as np
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from torch.distributions import Normal

from utils.benchmark.measuring import measure, report
from utils.evaluation.information import gaussian_mi
from utils.evaluation.metrics import inception_score
from utils.evaluation.probes import PROBES, fit_probe, split
from utils.seeds import generator


def mi(args: argparse.Namespace) -> None:
    """The mutual information of z, compared with a loop over images, which is timed on some of them only."""
    n, d, few = args.images or 10_000, args.z_dims, 100
    g = generator(args.device, 0)
    means = torch.rand(n, d, generator=g, device=args.device) * 6 - 3
    stds = torch.full_like(means, 0.1)
    labels = torch.randint(0, 10, (n,), generator=g, device=args.device)
    samples = means + stds * torch.randn(means.shape, generator=g, device=args.device)

    def plain():
        values = []
        for i in range(few):
            log_p = Normal(means, stds).log_prob(samples[i]).double().sum(1)
            own = log_p[labels == labels[i]]
            values.append((own.logsumexp(0) - math.log(len(own))) - (log_p.logsumexp(0) - math.log(n)))
        return torch.stack(values).mean()

    name = f"plain loop (of {few} images, x {n / few:g})"
    candidates = {name: plain, "gaussian_mi": lambda: gaussian_mi(samples, means[:, None], stds[:, None], labels)}
    print(f"mutual information for {n:,} images and a {d}-dimensional z, with standard error and shuffled labels:")
    report(measure(candidates, args.n, args.device, warmup=1), {name: few / n, "gaussian_mi": 1}, baseline=name)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def probes(args: argparse.Namespace) -> None:
    """The probes, compared with the paper's logistic regression: saga, 100 iterations, five seeds."""
    n, d = args.images or 2_000, args.z_dims
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n)
    latents = (rng.normal(size=(10, d))[labels] + rng.normal(size=(n, d))).astype(np.float32)
    train_part, test_part = split(n)

    def plain():
        for seed in range(5):
            model = LogisticRegression(solver="saga", max_iter=100, random_state=seed)
            model.fit(latents[train_part], labels[train_part]).score(latents[test_part], labels[test_part])

    candidates = {"saga, 5 seeds": plain} | {
        name: lambda name=name: fit_probe(name, latents, labels, "", False) for name in PROBES
    }
    print(f"probes on {n:,} latents of {d} dimensions:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = measure(candidates, args.n, args.device, warmup=1)
    report(seconds, dict.fromkeys(candidates, 1), baseline="saga, 5 seeds")


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
