"""The losses of the first steps of every kind of model are those of golden_losses.json, digit by digit.

What changes them on purpose writes the file anew, and says in its commit why: python -m tests.training.test_golden
"""

import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.batches import Resident
from tests.conftest import training_of
from utils.config import Config
from utils.training import multi_rate

FILE = Path(__file__).with_name("golden_losses.json")
STEPS, EPOCHS = 5, 20
KINDS = {
    "HVAE": {},
    "LVAE": {"vae_type": "LVAE"},
    "BVAE": {"vae_type": "BVAE"},
    "conv_z": {"use_conv_z": True},
    "Gumbel": {"qz_family": "GumbelSoftmax"},
    "mixture": {"dataset": "SVHN", "px_y_family_ll": "MoL"},
    "learned_sigma": {"px_y_family_ll": "GaussianLearnedSigma"},
    "conditioned": {"multi_rate": True, "beta_y": 0.1, "beta_max_y": 10.0, "beta_z": 0.1, "beta_max_z": 10.0},
}


def machine() -> dict[str, str]:
    """What last digits depend on: versions, and what the processor can do."""
    cpus = Path("/proc/cpuinfo")
    flags = re.findall(r"flags\s*: (.+)", cpus.read_text()) if cpus.exists() else [platform.machine()]
    versions = {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
    return {**versions, "processor": flags[0]}


def is_machine_of_the_file() -> bool:
    """Whether last digits are to be those that were stored."""
    return json.loads(FILE.read_text())["machine"] == machine()


def losses(kind: str, optimizer: str) -> list[float]:
    """The losses of 100 steps on two random patterns of 4 x 4 squares under noise, nats per image."""
    settings = {"conv_channels": 2, "z_dims": 3, "num_epochs": EPOCHS, "batch_size": 4, "learning_rate": 3e-3}
    config = Config(optimizer=optimizer, **settings, **KINDS[kind])
    training, result, (channels, size, _) = training_of(config), [], config.image_shape
    generator = torch.manual_seed(0)
    patterns = 130 * torch.randint(2, (2, channels, 4, 4), generator=generator).byte()
    images = patterns.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3).repeat(2 * STEPS, 1, 1, 1)
    images += torch.randint(126, images.shape, generator=generator).byte()
    train = Resident(images, torch.zeros(4 * STEPS), training.device)
    for epoch in range(EPOCHS):
        training.epoch, training.steps_done = epoch, 0
        training.begin_epoch(STEPS)
        for x, _ in train.batches(4, (config.seed, epoch)):
            result.append(training.step(x, 4)[0, 0].item() / 4)
        means = training.history.sum(0) / (4 * STEPS)
        training._set_spread(multi_rate.next_spread(config, epoch + 1, training.spread, means))
    return result


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_file(kind, optimizer):
    expected = json.loads(FILE.read_text())["losses"][f"{kind} {optimizer}"]
    assert losses(kind, optimizer) == (expected if is_machine_of_the_file() else pytest.approx(expected, rel=1e-5))
    assert len(expected) == 100


if __name__ == "__main__":
    torch.set_num_threads(1)
    of_all = {f"{kind} {optimizer}": losses(kind, optimizer) for kind in KINDS for optimizer in ("adam", "muon")}
    FILE.write_text(json.dumps({"machine": machine(), "losses": of_all}, indent=0) + "\n")
