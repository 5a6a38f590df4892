"""Images of a known Gaussian distribution, and what the best of all models reaches on them.

    x = 1/2 + sum_i s_i b_i,    s_i ~ N(0, v_i) independent,    v_i = 2.5 / 2^i,    i < K

The b_i are orthonormal patterns, products of cosines. Bytes add a rounding error, spread evenly over the 784 dimensions
with a variance of 1 / (12 255^2) in each; no pixel is outside [0, 1]. So the covariance of x has the eigenvalues
lambda_i = v_i + 1 / (12 255^2), where v_i = 0 for i >= K.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

SIZE, N_TRAIN, N_TEST, SEED = 28, 20_000, 5_000, 0
PIXELS, LARGEST, ROUNDING = SIZE**2, 2.5, 1 / (12 * 255**2)
NEGLIGIBLE = 0.1  # nats; at a sigma of 0.2, the rounding takes 0.013
# Coefficients and patterns are rounded to these. Their products and sums are then exact in any order, and the last
# digit of another machine's cosine or logarithm changes no byte: none of them is that near to where rounding turns.
STEP_S, STEP_B = 2.0**-16, 2.0**-24


class Gaussian:
    """The distribution of K patterns."""

    def __init__(self, k: int = 8):
        self.v = LARGEST / 2.0 ** np.arange(k)

    @cached_property
    def exact_patterns(self) -> ndarray:
        """Those of the lowest frequencies, (K, 784), before they are rounded."""
        k, at = len(self.v), (np.arange(SIZE) + 0.5) / SIZE
        cosines = np.array([math.sqrt((2 if f else 1) / SIZE) * np.cos(np.pi * f * at) for f in range(k)])
        frequencies = sorted(np.ndindex(k, k), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))[:k]
        return np.array([np.outer(cosines[row], cosines[column]).ravel() for row, column in frequencies])

    @cached_property
    def patterns(self) -> ndarray:
        """The b_i, (K, 784)."""
        return np.rint(self.exact_patterns / STEP_B) * STEP_B

    def exact_coefficients(self) -> ndarray:
        """Those of all images, (25,000, K), before they are rounded: Box and Muller's of bits that numpy guarantees."""
        n = N_TRAIN + N_TEST
        bits = np.random.PCG64(SEED).random_raw(2 * n * len(self.v)).reshape(2, n, -1)
        u, angle = ((bits >> 11) + 0.5) / 2**53
        return np.sqrt(-2 * np.log(u) * self.v) * np.cos(2 * np.pi * angle)

    def read(self, root: Path) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray]]:
        """Images (N, 1, 28, 28), bytes, and labels (N,) of both splits: the quadrant of (s_0, s_1). Reads no file."""
        s = np.rint(self.exact_coefficients() / STEP_S) * STEP_S
        parts = [np.rint(255 * (0.5 + part @ self.patterns)).astype(np.uint8) for part in np.array_split(s, 25)]
        images, labels = np.concatenate(parts).reshape(-1, 1, SIZE, SIZE), 2 * (s[:, 0] > 0) + (s[:, 1] > 0)
        return (images[:N_TRAIN], labels[:N_TRAIN]), (images[N_TRAIN:], labels[N_TRAIN:])

    def optimum(self, beta: float, sigma: float) -> "Optimum | None":
        """The best of all models whose smaller beta is `beta`; None where rounding is worth coding, or knowing."""
        of_rounding = PIXELS * ROUNDING / (2 * sigma**2)  # nats of D that a decoder which rounds as well would not have
        return Optimum(self, beta, sigma) if beta * sigma**2 > ROUNDING and of_rounding < NEGLIGIBLE else None


class Optimum(NamedTuple):
    """The best of all models with p(x|y) = N(x; ., sigma^2) and a smaller beta of `beta`, for any size of the other.

    For any encoders, decoder and prior

        D + beta_y R(y|z) + beta_z R(z)  >=  D + beta (R(y|z) + R(z))  >=  D + beta I(x; y, z)

    as R(z) >= I(x; z) and R(y|z) >= I(x; y|z). The least of the last is a point of the Gaussian's rate-distortion
    function (reverse water-filling; Cover & Thomas, 10.3): dimension i is coded with a squared error of
    d_i = min(lambda_i, beta sigma^2). Linear encoders and a linear decoder come as near as one likes, with all of the
    rate in the layer of the smaller beta, if it has K dimensions. This takes rounding for Gaussian noise; a decoder
    that rounds as well could gain less than NEGLIGIBLE.
    """

    source: Gaussian
    beta: float
    sigma: float

    @property
    def n(self) -> ndarray:
        """How many dimensions there are of each lambda: (K + 1,), the last is of all but the patterns'."""
        return np.array([1] * len(self.source.v) + [PIXELS - len(self.source.v)])

    @property
    def variances(self) -> ndarray:
        """The lambda_i, (K + 1,)."""
        return np.append(self.source.v, 0) + ROUNDING

    @property
    def errors(self) -> ndarray:
        """The d_i, (K + 1,)."""
        return np.minimum(self.variances, self.beta * self.sigma**2)

    @property
    def rate(self) -> float:
        """R(z) + R(y|z), nats: to code a variance of lambda_i with an error of d_i takes ln(lambda_i / d_i) / 2."""
        return float((self.n * np.log(self.variances / self.errors)).sum() / 2)

    @property
    def D(self) -> float:  # noqa: N802  (its name everywhere)
        """D, nats: of -log N(x; ., sigma^2) the constant and the squared error, sum_i d_i, over 2 sigma^2."""
        return PIXELS / 2 * math.log(2 * math.pi * self.sigma**2) + (self.n * self.errors).sum() / (2 * self.sigma**2)

    @property
    def loss(self) -> float:
        """The least loss in expectation, nats."""
        return self.D + self.beta * self.rate

    def loss_of(self, x: ndarray) -> ndarray:
        """The least loss, nats, on each of the images (B, 1, 28, 28) in [0, 1]: (B,).

        That is -beta ln E exp(log p(x|v) / beta) over the optimum's reconstructions v, of variances lambda_i - d_i,
        since min_q E_q[-log p(x|v)] + beta KL[q(v)||p(v)] is attained at q ~ p(v) p(x|v)^(1 / beta). It differs from
        `loss` by the image's squared coefficients in place of their means, the lambda_i, and so is `loss` on average.
        """
        x = x.reshape(len(x), PIXELS).astype(np.float64) - 0.5
        squares = (x @ self.source.patterns.T) ** 2
        rest = (x**2).sum(1, keepdims=True) - squares.sum(1, keepdims=True)
        more = np.append(squares, rest, 1) - self.n * self.variances
        return self.loss + more @ (self.errors / self.variances) / (2 * self.sigma**2)

    @property
    def psnr(self) -> float:
        """PSNR, dB, from posterior modes: these give (1 - d_i / lambda_i) s_i, with an error of d_i^2 / lambda_i."""
        return -10 * math.log10((self.n * self.errors**2 / self.variances).sum() / PIXELS)

    @property
    def correlations(self) -> ndarray:
        """Those of s_0 and s_1 with the latent that codes them, sqrt(1 - d_i / lambda_i)."""
        return np.sqrt(1 - self.errors / self.variances)[:2]

    @property
    def information(self) -> float:
        """I(z, y; label), nats: of each sign ln 2 - E h(Phi(k t)), t ~ N(0, 1), k = rho / sqrt(1 - rho^2).

        Given a latent t of variance 1, the sign of a coefficient of correlation rho is + with probability Phi(k t);
        h is the entropy of such a choice.
        """
        from scipy.special import entr, ndtr

        total, grid = 0.0, np.linspace(-9, 9, 2001)
        for rho in self.correlations[self.correlations > 0]:
            k = rho / math.sqrt(1 - rho**2)
            t = grid * min(1, 1 / k)  # beyond which the density of t, or h, is nothing
            p, density = ndtr(k * t), np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
            total += math.log(2) - (density * (entr(p) + entr(1 - p))).sum() * (t[1] - t[0])
        return float(total)

    @property
    def accuracy(self) -> float:
        """The best accuracy of a label predicted from samples of (z, y): both signs are, each from a latent of its own.

        Two normal variables of correlation rho have one sign with probability 1/2 + arcsin(rho) / pi.
        """
        return float(np.prod(0.5 + np.arcsin(self.correlations) / math.pi))

    @property
    def metrics(self) -> dict[str, float]:
        """By their names in eval_results.csv; y has all that (z, y) know, since the images depend on nothing else."""
        terms = {"rate": self.rate, "D": self.D, "ll": -self.D, "loss": self.loss, "nelbo": self.D + self.rate}
        of_label = {"mi_y_low": self.information, "lr_acc_mean_sample_y": self.accuracy}
        return {**terms, "psnr": self.psnr, "above_bound": 0.0, **of_label}
