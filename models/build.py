"""The table of models, and the function that builds them for training and evaluation alike."""

from torch import nn

from .bvae import BVAE
from .hvae import HVAE
from .lvae import LVAE

MODELS = {c.__name__: c for c in (HVAE, LVAE, BVAE)}


def build_model(config) -> nn.Module:
    """Builds the model of a Config, with initial weights drawn from torch's global generator."""
    return MODELS[config.vae_type](config)
