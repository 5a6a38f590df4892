"""The function that builds the models, for training and evaluation alike."""

import torch
from torch import nn

from .conditioned import Conditioned
from .tables import MODELS


def build_model(config) -> nn.Module:
    """Builds the model of a Config, with initial weights drawn from torch's global generator."""
    model = MODELS[config.vae_type](config)
    if config.is_conditioned:
        betas = [[config.beta_y, config.beta_z], [config.beta_max_y, config.beta_max_z]]
        return Conditioned(model, torch.tensor(betas).log10(), config.image_shape, config.sharing)
    return model
