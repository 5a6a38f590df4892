"""The table of models, and the only way one is ever made, in training and in evaluation alike."""

from torch import nn

from .bvae import BVAE
from .hvae import HVAE
from .lvae import LVAE

MODELS = {c.__name__: c for c in (HVAE, LVAE, BVAE)}


def build_model(config) -> nn.Module:
    """The model of a Config, with freshly initialised weights (from torch's global generator)."""
    return MODELS[config.vae_type](config)
