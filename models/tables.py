"""The names of models, families of z and likelihoods, and the classes that they mean."""

from collections.abc import Iterator, Mapping
from importlib import import_module

COLLAPSED = 0.5  # nats; a latent of a smaller rate carries hardly anything


class Table(Mapping):
    """Classes by name; a class is imported when it is looked up, so that a --help need not import torch."""

    def __init__(self, **places: str):
        self.places = places

    def __getitem__(self, name: str) -> type:
        module, _, of_class = self.places[name].partition(".")
        return getattr(import_module(f"models.{module}"), of_class)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


MODELS = Table(HVAE="hvae.HVAE", LVAE="lvae.LVAE", BVAE="bvae.BVAE")
LATENTS = Table(DiagonalGaussian="latents.Gaussian", GumbelSoftmax="latents.RelaxedOneHot")
LIKELIHOODS = Table(
    Bernoulli="likelihoods.Bernoulli",
    ContinuousBernoulli="likelihoods.ContinuousBernoulli",
    GaussianFixedSigma="likelihoods.GaussianFixedSigma",
    GaussianLearnedSigma="likelihoods.GaussianLearnedSigma",
    MoL="likelihoods.MoL",
)
