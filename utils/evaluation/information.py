"""The steps of the evaluation that estimate the information of latents on labels, and how; all of it in nats."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from models.latents import Gaussian
from utils.evaluation.probes import label_entropy, standard_error, upper_error
from utils.evaluation.run import BATCH, EvaluatedRun

ROWS, COLUMNS = 500, 2000  # block sizes, which limit the memory whatever the number of images
NEGLIGIBLE = 1e-3  # nats of bias that nobody minds
FAR = -1e300  # the log of a density that does not count; unlike -inf, it can be subtracted from itself


def mi_z(run: EvaluatedRun) -> dict[str, float]:
    """Mutual information between z and the label."""
    device, latents, rate = run.evaluation.device, run.latents, _rate(run, "kl_z")
    if run.model.z_shape == (0,):
        run.evaluation.note(f"{run.config.vae_type} has no z: metrics of z are left empty")
        return {}
    labels, q = latents["labels"], latents["qz_mu"]
    if run.model.family is Gaussian:
        means, stds = (torch.from_numpy(latents[f"qz_{k}"]).to(device).flatten(1) for k in ("mu", "std"))
        z = means + stds * torch.randn(means.shape, generator=run.generator("mi_z"), device=device)
        mi = gaussian_mi(z, means[:, None], stds[:, None], torch.from_numpy(labels).to(device))
        results, of_image = _bracket(run, "z", labels, mi), (mi.image_low, mi.image_high)
    else:
        high, se = upper_end(labels, rate, channel_bound(q, labels))
        results = {"mi_q": discrete_mi(q.argmax(1), labels), "mi_z_high": high, "mi_z_high_se": se}
        of_image = channel_bracket(q)
    results |= _of_image("z", rate, *of_image)
    return {**results, "acc_bound": accuracy_bound(results["mi_z_high"], labels)}


@torch.no_grad()
def mi_y(run: EvaluatedRun) -> dict[str, float]:
    """Mutual information between y and the label; q(y|x) = E_q(z|x) q(y|z,x) is averaged over samples of z."""
    model, g, n, batches = run.model, run.generator("mi_y"), run.evaluation.y_samples, []
    for x, label in run.test.batches(BATCH):
        q_z = model.q_z(x)
        mixture = [model.q_y(q_z.sample(model.noise(len(x), g).z), x) for _ in range(n)]
        sample = mixture[0].sample(model.noise(len(x), g).y).flatten(1)
        means = torch.stack([q.mean.flatten(1) for q in mixture], 1)
        stds = torch.stack([q.std.flatten(1) for q in mixture], 1)
        batches.append((sample, means, stds, label))
    *posteriors, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    chosen = run.chosen
    mi = gaussian_mi(*posteriors, labels, chosen.to(labels.device))
    of_image = _of_image("y", _rate(run, "kl_z", "kl_y"), mi.image_low, mi.image_high)
    some = {"mi_y_images": len(chosen)} if len(chosen) < len(labels) else {}
    return {**_bracket(run, "y", labels.cpu().numpy(), mi), **of_image, **some, "y_samples": n}


def _of_image(layer: str, rate: tuple, low: tuple, high: tuple) -> dict[str, float]:
    """The columns of what is known of the information on the image, from two bounds and a rate, each with its error."""
    (low, low_se), (high, high_se), name = low, smallest(rate, high), f"mi_{layer}x"
    ends = {f"{name}_low": max(0.0, low), f"{name}_low_se": low_se}
    return {**ends, f"{name}_high": high, f"{name}_high_se": high_se}


def _rate(run: EvaluatedRun, *names: str) -> tuple[float, float]:
    """The sum of rates, and its standard error."""
    ses = [run.metrics.get(f"{name}_se", 0.0) for name in names]
    return sum(run.metrics[name] for name in names), math.hypot(*ses)


def _bracket(run: EvaluatedRun, layer: str, labels: np.ndarray, mi: "MutualInformation") -> dict:
    """The columns of an estimate; I(y; label) <= I(z, y; x) <= R(z) + R(y|z)."""
    name, rates = ("mi_q_mc", ["kl_z"]) if layer == "z" else ("mi_q_mc_y", ["kl_z", "kl_y"])
    rate = _rate(run, *rates)
    high, se = upper_end(labels, rate, (mi.upper, mi.upper_se))
    return {
        **{name: mi.mi, f"{name}_se": mi.se, f"{name}_null": mi.null},
        f"{name}_saturated": int(mi.is_saturated),
        **{f"mi_{layer}_high": high, f"mi_{layer}_high_se": se},
    }


@torch.no_grad()
def mi_p(run: EvaluatedRun) -> dict[str, float]:
    """Between a categorical z and the first classifier's label of 1000 samples per category."""
    if run.model.family is Gaussian or not (classifiers := run.evaluation.classifiers(run.config)):
        return {}
    net, g, labels = classifiers[0][0], run.generator("mi_p"), []
    z = torch.eye(run.config.z_dims, device=run.evaluation.device).repeat_interleave(1000, 0)
    for part in z.split(BATCH):
        labels.append(net(run.model.sample(z=part, generator=g)).argmax(1).cpu())
    return {"mi_p": discrete_mi(z.argmax(1).cpu().numpy(), torch.cat(labels).numpy())}


class MutualInformation(NamedTuple):
    """An estimate, its standard error, that of shuffled labels, its bias; an upper bound, its error; nats.

    Also a lower and an upper bound of the information on the image, each with its standard error.
    """

    mi: float
    se: float
    null: float
    bias: float
    upper: float
    upper_se: float
    image_low: tuple[float, float]
    image_high: tuple[float, float]

    @property
    def is_saturated(self) -> bool:
        """Whether it measures how narrow posteriors are: its bias is above two standard errors."""
        return self.bias > max(2 * self.se, NEGLIGIBLE)


def gaussian_mi(
    samples: Tensor, means: Tensor, stds: Tensor, labels: Tensor, chosen: Tensor | None = None
) -> MutualInformation:
    """I_q(latent; label): the mean of log q(s_i | label_i) - log q(s_i) over a sample (N, d) of each posterior.

    Or over some `chosen` samples (n,): the same in expectation, with a larger error.
    Posteriors are mixtures of S Gaussians (N, S, d). q(s | l) averages those of class l, q(s) all, with the image's
    own, so narrow ones give H(label) for any labels: compare with `null`. In `upper`, q(s) leaves the own one out: a
    bound in expectation (Poole 2019, eq. 14). Where both leave it out, it is missed about as much as it counts too much
    where both include it: `bias` is half of the difference. The information on the image, the mean of log q(s | x) -
    log q(s), is bounded from below where q(s) includes the own one, at most by ln N, and from above where it does not.
    """
    n, counts = len(labels), torch.bincount(labels).double()
    chosen = torch.arange(n, device=labels.device) if chosen is None else chosen
    shuffled = labels[torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(labels.device)]
    columns = log_mixtures(samples, means, stds, (labels, shuffled), chosen).unbind(1)
    log_all, log_class, log_null, log_others, log_class_others, log_own = columns
    labels, shuffled, of_n = labels[chosen], shuffled[chosen], len(chosen) ** 0.5
    log_class, log_all = log_class - counts[labels].log(), log_all - math.log(n)
    values = log_class - log_all
    null = (log_null - counts[shuffled].log()) - log_all
    log_others = log_others - math.log(max(1, n - 1))
    upper = log_class - log_others
    without = log_class_others - (counts - 1).clamp_min(1)[labels].log() - log_others
    without = (without.exp() * (1 - 1 / n) + 1 / n).log()  # a bound still, of which no image decides
    bias = (values - without).mean().item() / 2
    se, upper_se = values.std().item() / of_n, upper_error(upper.cpu().numpy(), labels.cpu().numpy())
    of_image = [(v.mean().item(), v.std().item() / of_n) for v in (log_own - log_all, log_own - log_others)]
    return MutualInformation(
        values.mean().item(), se, null.mean().item(), bias, upper.mean().item(), upper_se, *of_image
    )


def upper_end(labels: np.ndarray, *bounds: tuple[float, float]) -> tuple[float, float]:
    """The smallest of upper bounds, each with its standard error, and of H(label); labels (N,)."""
    return smallest(*bounds, label_entropy(labels))


def smallest(*bounds: tuple[float, float]) -> tuple[float, float]:
    """The smallest of upper bounds, each with its standard error, of those that are finite; none is below 0."""
    return min((max(0.0, value), se) for value, se in bounds if math.isfinite(value))


def log_mixtures(
    samples: Tensor, means: Tensor, stds: Tensor, labellings: tuple[Tensor, ...], chosen: Tensor
) -> Tensor:
    """Log sums of posterior densities (N, S, d) at chosen ones of samples (N, d): of all, by class in each labelling.

    Three more are of all, and by class in the first labelling, without the image's own posterior, and of that. The
    log-densities are one matrix product, which needs centred float64: float32 errs by 10 nats at a std of 1e-3.
    """
    n, mixture, d = means.shape
    own = -0.5 * ((samples.double()[:, None] - means.double()) / stds.double()) ** 2
    own = own - stds.double().log() - 0.5 * math.log(2 * math.pi)
    own = own.sum(2).logsumexp(1) - math.log(mixture)  # of each sample under its own posterior
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

        for part in chosen.split(ROWS):
            p = log_p(part)
            largest = p.amax(1, keepdim=True)
            p = p.sub_(largest).clamp_min_(-690).exp_()  # exp of less is subnormal and slow
            by_class = (p @ members).unflatten(1, (-1, classes))
            sums = [by_class[:, 0].sum(1)]
            sums += [by_class[:, k].gather(1, labels[part, None])[:, 0] for k, labels in enumerate(labellings)]
            log_sums = torch.stack(sums, 1).log() + largest
            # the clamp spoils sums far below the largest density; where that is far above `own`, recompute
            far = largest[:, 0] > own[part] + 400
            for k, labels in enumerate(labellings, start=1):
                lost = (far & (sums[k] < 1e-200)).nonzero().squeeze(1)
                other = labels[part][lost, None] != labels[block][None, :]
                log_sums[lost, k] = log_p(part[lost]).masked_fill(other, -math.inf).logsumexp(1)
            others[part] = torch.logaddexp(others[part], log_sums)
    return torch.cat([torch.logaddexp(others, own[:, None]), others[:, :2], own[:, None]], 1)[chosen]


def discrete_mi(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two discrete variables (N,), integers >= 0, from their joint counts."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)

    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / counts.sum()
        return max(0.0, float(-(p * np.log(p)).sum()))

    return max(0.0, entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.ravel()))


def channel_bound(q: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Upper bound on the information of labels (N,) and categories of probabilities (N, C); its standard error.

    Like `upper` of `gaussian_mi`: the average of a class includes the image's own probabilities, that of all does not.
    """
    from scipy.special import xlogy

    q, members = q.astype(np.float64), np.eye(labels.max() + 1)[labels]
    of_class = (members.T @ q / members.sum(0).clip(1)[:, None])[labels]
    others = (q.sum(0) - q).clip(0) / max(1, len(q) - 1)
    terms = (xlogy(q, of_class) - xlogy(q, others)).sum(1)
    return float(terms.mean()), upper_error(terms, labels)


def channel_bracket(q: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bounds of the information of images and categories of probabilities (N, C), each with its standard error.

    Like `image_low` and `image_high` of `gaussian_mi`.
    """
    from scipy.special import rel_entr

    q = q.astype(np.float64)
    averages = q.mean(0), (q.sum(0) - q).clip(0) / max(1, len(q) - 1)
    terms = [rel_entr(q, average).sum(1) for average in averages]
    return tuple((float(values.mean()), standard_error(values)) for values in terms)


def accuracy_bound(mi: float, labels: np.ndarray) -> float:
    """The largest accuracy with `mi` nats on the label: H(label) - H_2(a) - (1 - a) ln(K - 1) = mi (Meyen 2016)."""
    from scipy.optimize import brentq

    k, missing = len(np.unique(labels)), label_entropy(labels)[0] - max(mi, 0.0)
    if missing <= 0 or k < 2:
        return 1.0

    def excess(a):
        h2 = -sum(p * math.log(p) for p in (a, 1 - a) if p > 0)
        return h2 + (1 - a) * math.log(k - 1) - missing

    if excess(1 / k) <= 0:  # for balanced labels and no information, 0 up to rounding
        return 1 / k
    return float(brentq(excess, 1 / k, 1.0, xtol=1e-12))
