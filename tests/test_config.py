"""Configs, their names and files, and the grid's axis."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from utils.cli import axis
from utils.config import Config
from utils.errors import UserError

PAPER = dict(dataset="CIFAR10", num_epochs=500, conv_channels=32, z_dims=32, sigma=0.71)


def test_run_folder_name_is_the_papers():
    config = Config(**PAPER, px_y_family_ll="GaussianFixedSigma")
    assert config.folder_name == (
        "NoName-Epochs_500-BatchSize_256-c_32-CIFAR10-HVAE-px_y_family_ll_GaussianFixedSigma-"
        "qz_family_DiagonalGaussian-Beta_y_1.0-Beta_z_1.0-ll_sigma_0.71-z_dim_32"
    )


def test_names_tell_all_that_changes_the_model():
    lvae = Config(vae_type="LVAE", dataset="SVHN", use_conv_z=True, no_warmup=True, run_name="mine", seed=3)
    assert lvae.folder_name.startswith("mine-Epochs_200-")
    assert lvae.folder_name.endswith("-Beta_y_1.0-Beta_z_1.0-use_conv_z-no_warmup-seed_3")
    assert Config(linear_y_with_dims=64).folder_name.endswith("-z_dim_8-linear_y_dims_64")
    assert Config(warmup_epochs=7).folder_name.endswith("-z_dim_8-warmup_epochs_7")
    assert "sigma" not in Config(sigma=0.5).folder_name


def test_warmup_defaults():
    assert Config(vae_type="LVAE").warmup_epochs == 12
    assert Config(vae_type="LVAE", no_warmup=True).warmup_epochs == 0
    assert Config().warmup_epochs == 0


def test_axis():
    assert axis("0.3") == [0.3]
    assert axis("0.1:10:21") == [round(10 ** (k / 10), 8) for k in range(-10, 11)]
    assert axis("0.1:10:21")[1] == 0.12589254
    assert axis("1:8:4") == [1, 2, 4, 8]


@pytest.mark.parametrize("config", [Config(), Config(vae_type="LVAE", dataset="SVHN", use_conv_z=True, beta_y=0.1)])
def test_config_round_trips_through_its_file(config):
    Path("config.json").write_text(config.to_json())
    assert Config.from_json(Path("config.json")) == config
    settings = json.loads(Path("config.json").read_text())
    settings["beta_z"] = 7.0
    Path("config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="config.json: damaged or edited"):
        Config.from_json(Path("config.json"))


def test_every_flipped_bit_of_a_config_is_seen_or_harmless():
    original = Config().to_json().encode()
    for position in range(0, len(original), 3):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 7)
        Path("config.json").write_bytes(damaged)
        try:
            assert Config.from_json(Path("config.json")) == Config()
        except UserError as e:
            assert "config.json" in str(e)


def test_equal_settings_make_equal_configs():
    assert replace(Config(), beta_y=2) == Config(beta_y=2.0)
    assert len({Config(), Config(beta_y=1)}) == 1


def test_the_digits_have_defaults_of_their_own():
    """What trains well within a minute; the paper's elsewhere, and whatever is given."""
    digits, paper = Config(), Config(dataset="CIFAR10")
    assert (digits.num_epochs, digits.batch_size, digits.learning_rate, digits.z_dims) == (60, 128, 9e-4, 8)
    assert (paper.num_epochs, paper.batch_size, paper.learning_rate, paper.z_dims) == (200, 256, 3e-4, 10)
    assert Config(num_epochs=7).num_epochs == 7 and Config(num_epochs=7).batch_size == 128
