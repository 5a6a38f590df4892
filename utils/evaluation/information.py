"""Mutual information between latents and labels, and the bound on accuracy that it implies; all in nats."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from utils.evaluation.probes import entropy

ROWS, COLUMNS = 500, 2000  # block sizes, which limit the memory whatever the number of images
FAR = -1e300  # the log of a density that does not count; unlike -inf, it can be subtracted from itself


class MutualInformation(NamedTuple):
    """An estimate, its Monte-Carlo standard error, the same for shuffled labels; an upper bound, its standard error."""

    mi: float
    se: float
    null: float
    upper: float
    upper_se: float

    def is_saturated(self, rate: float, n: int) -> bool:
        """Whether the estimate from n images measures how narrow the posteriors are, rather than information.

        So it is where shuffled labels give as much as its own do, to 3 standard errors, or where the rate in nats
        comes within 2 of ln n, the most that n images can tell apart.
        """
        return self.mi > 3 * self.se and self.mi - self.null <= 3 * self.se or rate > math.log(n) - 2


def gaussian_mi(samples: Tensor, means: Tensor, stds: Tensor, labels: Tensor, seed: int = 0) -> MutualInformation:
    """Monte-Carlo estimate of I_q(latent; label): the mean over images i of log q(s_i | label_i) - log q(s_i).

    `samples` (N, d) has one sample of each image's posterior. `means` and `stds` (N, S, d) are the posteriors, each
    a mixture of S Gaussians; `labels` is (N,). q(s | l) is the average posterior of class l, q(s) that of all images.
    Both include the image's own posterior, so narrow posteriors give H(label) for any labels: compare with `null`.
    Of `upper`, q(s) leaves the own posterior out: by Jensen's inequality, the expectation of the class's term is then
    too large and that of the total too small, if anything, and their difference bounds the information from above
    (leave-one-out bound; Poole 2019, eq. 14). Infinite for a single image.
    """
    n = len(labels)
    shuffled = labels[torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(labels.device)]
    log_all, log_class, log_null, log_others = log_mixtures(samples, means, stds, (labels, shuffled)).unbind(1)
    counts = torch.bincount(labels).double()
    log_class = log_class - counts[labels].log()
    values = log_class - (log_all - math.log(n))
    null = (log_null - counts[shuffled].log()) - (log_all - math.log(n))
    upper = log_class - (log_others - math.log(max(1, n - 1)))
    ses = [v.std().item() / n**0.5 for v in (values, upper)]
    return MutualInformation(values.mean().item(), ses[0], null.mean().item(), upper.mean().item(), ses[1])


def upper_end(labels: np.ndarray, *bounds: tuple[float, float]) -> tuple[float, float]:
    """The smallest of upper bounds on the information on labels (N,), given with standard errors, and of H(label)."""
    bounds = [(max(0.0, value), se) for value, se in bounds if math.isfinite(value)]
    return min([*bounds, (entropy(labels), 0.0)])


def log_mixtures(samples: Tensor, means: Tensor, stds: Tensor, labellings: tuple[Tensor, ...]) -> Tensor:
    """Log of the sum of posterior densities at each sample: over all images, its class in each labelling, the others.

    samples (N, d), means and stds (N, S, d), labellings (N,) each -> (N, 2 + number of labellings), float64; the last
    column leaves the image's own posterior out.
    log N(s; m, v) = -1/2 [s^2 . 1/v - 2 s . m/v + sum(m^2/v + log v + log 2 pi)] is one matrix product, which
    needs centred float64: in float32, the error is 10 nats at a std of 1e-3.
    """
    n, mixture, d = means.shape
    own = log_own_density(samples, means, stds)
    centre = means.double().mean((0, 1))
    rows = samples.double() - centre
    rows = torch.cat([rows**2, rows], 1)
    classes = int(max(labels.max() for labels in labellings)) + 1
    others = rows.new_full((n, 1 + len(labellings)), -math.inf)
    width = max(1, COLUMNS // mixture)
    for j in range(0, n, width):
        block = slice(j, j + width)
        mean, precision = means[block].double().flatten(0, 1) - centre, stds[block].double().flatten(0, 1) ** -2
        columns = torch.cat([-0.5 * precision, mean * precision], 1).T
        constant = -0.5 * ((mean**2 * precision).sum(1) - precision.log().sum(1) + d * math.log(2 * math.pi))
        members = torch.cat([one_hot(labels[block], classes).double() for labels in labellings], 1)

        def log_p(index, columns=columns, constant=constant, first=j):
            log_p = torch.addmm(constant, rows[index], columns)
            log_p = log_p if mixture == 1 else log_p.unflatten(1, (-1, mixture)).logsumexp(2) - math.log(mixture)
            return log_p.masked_fill_(index[:, None] == first + torch.arange(log_p.shape[1], device=own.device), FAR)

        for part in torch.arange(n, device=own.device).split(ROWS):
            p = log_p(part)
            largest = p.amax(1, keepdim=True)
            p = p.sub_(largest).clamp_min_(-690).exp_()  # exp of less is subnormal and slow
            by_class = (p @ members).unflatten(1, (-1, classes))
            sums = [by_class[:, 0].sum(1)]
            sums += [by_class[:, k].gather(1, labels[part, None])[:, 0] for k, labels in enumerate(labellings)]
            log_sums = torch.stack(sums, 1).log() + largest
            # the clamp spoils class sums far below the block's largest density; if that is far above `own`, recompute
            far = largest[:, 0] > own[part] + 400
            for k, labels in enumerate(labellings, start=1):
                lost = (far & (sums[k] < 1e-200)).nonzero().squeeze(1)
                other = labels[part][lost, None] != labels[block][None, :]
                log_sums[lost, k] = log_p(part[lost]).masked_fill(other, -math.inf).logsumexp(1)
            others[part] = torch.logaddexp(others[part], log_sums)
    return torch.cat([torch.logaddexp(others, own[:, None]), others[:, :1]], 1)


def log_own_density(samples: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """Log-density of each sample under its own image's posterior, as in `log_mixtures`; (N,), float64."""
    means, stds = means.double(), stds.double()
    log_p = -0.5 * ((samples[:, None] - means) / stds) ** 2 - stds.log() - 0.5 * math.log(2 * math.pi)
    return log_p.sum(2).logsumexp(1) - math.log(means.shape[1])


def discrete_entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution proportional to the counts (K,)."""
    p = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(p * np.log(p)).sum()))


def discrete_mi(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two discrete variables from their joint counts; a, b (N,) are integers >= 0."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    return _mi(joint)


def channel_mi(q: np.ndarray, labels: np.ndarray) -> float:
    """Mutual information of labels (N,) and a category drawn from its probabilities (N, C) for each image.

    At most too large in expectation, as it is convex in the classes' average probabilities.
    """
    joint = np.zeros((labels.max() + 1, q.shape[1]))
    np.add.at(joint, labels, q.astype(np.float64))
    return _mi(joint)


def _mi(joint: np.ndarray) -> float:
    separate = discrete_entropy(joint.sum(1)) + discrete_entropy(joint.sum(0))
    return max(0.0, separate - discrete_entropy(joint.ravel()))


def accuracy_bound(mi: float, labels: np.ndarray) -> float:
    """The largest accuracy that a classifier can reach with `mi` nats of information on the label (Meyen 2016).

    The root a in [1/K, 1] of H(label) - H_2(a) - (1 - a) ln(K - 1) = mi; 1 when mi reaches H(label).
    """
    from scipy.optimize import brentq

    k, missing = len(np.unique(labels)), entropy(labels) - max(mi, 0.0)
    if missing <= 0 or k < 2:
        return 1.0

    def excess(a):
        h2 = -sum(p * math.log(p) for p in (a, 1 - a) if p > 0)
        return h2 + (1 - a) * math.log(k - 1) - missing

    if excess(1 / k) <= 0:  # for balanced labels and no information, 0 up to rounding
        return 1 / k
    return float(brentq(excess, 1 / k, 1.0, xtol=1e-12))
