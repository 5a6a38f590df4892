"""Flags and Configs: what is refused is told in the words of the flag, what is told can be pasted; names, files."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import train
from tests.conftest import TINY
from tests.scripts import done
from utils.cli import axis
from utils.config import Config
from utils.distributed import Lines, progress
from utils.errors import UserError

REFUSED = r"""
--beta_y -1                                     got -1.0
--beta_y 1 -.5E+2                               got -50.0
--beta_y a                                      got 'a'
--beta_y 0:1:3                                  got '0:1:3'
--beta_y 1:2:1000000                            got '1:2:1000000'
--beta_y 0.1 --beta_y 1                         given twice
--seed=1 --z_dims 2 --seed 3                    given twice
--beta_z nan                                    got nan
--vae_type BVAE --beta_z 1 2                    BVAE
--z_dims 0                                      got 0
--conv_channels 1000000                         at most 4096, got 1000000
--batch_size 999999999999999999999999999999     at most
--linear_y_with_dims 0                          got 0
--use_conv_z --linear_y_with_dims 8             vector z
--vae_type HVEA                                 unknown 'HVEA'; did you mean HVAE? (valid: HVAE, LVAE, BVAE)
--dataset ImageNet --vae_type LVAE              128 pixels
--dataset Cifar10                               unknown 'Cifar10'; did you mean CIFAR10?
--dataset SVHN --px_y_family_ll Bernoulli       Bernoulli
--use_conv_z --qz_family GumbelSoftmax          GumbelSoftmax
--beta-y 1                                      did you mean --beta_y?
--use_conv_z --standardize                      unknown argument
--use_conv_z True                               too many values, got 'True'
--warmup_epochs 1 --no_warmup                   --warmup_epochs
--warmup_epochs 3                               --num_epochs (2), got 3
--run_name XXX                                  too long
--run_name UNDECODABLE                          folder name
--run_batch_name a/b                            folder name
--run_batch_name ''                             folder name
--device cuda:99                                cuda:99
--image_size 28                                 folder of images
--dataset . --image_size 65                     28, 32, 64, 128, 256
--save_every x                                  got 'x'
"""


def test_flags_that_are_refused_are_named_in_one_line_and_leave_no_folder(script):
    """In each line, the last flag is the one to blame, and what follows is said of it."""
    for line in REFUSED.strip().splitlines():
        given, said = re.split(r"\s{2,}", line, maxsplit=1)
        flags = [f.replace("XXX", "x" * 300).replace("UNDECODABLE", "\udcff") for f in shlex.split(given)]
        status, _, err = script(train.main, *TINY, *flags)
        blamed = [flag for flag in flags if flag.startswith("--")][-1].partition("=")[0]
        assert status == 2 and err.count("\n") == 1 and not Path("runs").exists(), line
        assert err.startswith(f"error: {blamed}: ") and said in err, (line, err)


def test_a_flag_given_twice_where_one_value_counts_is_the_last(script):
    """As shells' aliases and scripts rely on."""
    assert "num_epochs           3" in script(train.main, "--num_epochs", "2", "--num_epochs", "3", "--dry_run")[1]


def test_the_next_command_can_be_pasted(script):
    flags = ["--runs_dir", "my runs", "--run_batch_name", "it's"]
    out = done(script, train.main, *TINY, *flags)
    (command,) = re.findall("To evaluate: python (.*)", out)
    both = "train_classifier.py --dataset Digits --runs_dir 'my runs' && python eval_beta_grid.py"
    assert shlex.split(command) == [*shlex.split(both), "--run_batch_name", "it's", "--all", "--runs_dir", "my runs"]
    (board,) = re.findall("To inspect: tensorboard --logdir (.*)", out)
    assert shlex.split(board) == ["my runs/it's"]


def test_progress_in_a_file_is_a_line_at_most_every_half_minute():
    assert type(progress([])) is Lines
    file = io.StringIO()
    with Lines(range(8), file=file, disable=False) as bar:
        for _ in bar:
            pass
    first, last = file.getvalue().strip().splitlines()
    assert first.startswith("0%|") and last.startswith("100%|####") and "\r" not in file.getvalue()


PAPER = dict(dataset="CIFAR10", num_epochs=500, conv_channels=32, z_dims=32, sigma=0.71)


def test_folder_names_are_the_papers_and_tell_all_that_changes_the_model():
    assert Config(**PAPER, px_y_family_ll="GaussianFixedSigma").folder_name == (
        "NoName-Epochs_500-BatchSize_256-c_32-CIFAR10-HVAE-px_y_family_ll_GaussianFixedSigma-"
        "qz_family_DiagonalGaussian-Beta_y_1.0-Beta_z_1.0-ll_sigma_0.71-z_dim_32"
    )
    lvae = Config(vae_type="LVAE", dataset="SVHN", use_conv_z=True, no_warmup=True, run_name="mine", seed=3)
    assert lvae.folder_name.startswith("mine-Epochs_200-")
    assert lvae.folder_name.endswith("-Beta_y_1.0-Beta_z_1.0-use_conv_z-no_warmup-seed_3")
    assert Config(linear_y_with_dims=64).folder_name.endswith("-z_dim_8-linear_y_dims_64")
    assert Config(warmup_epochs=7).folder_name.endswith("-z_dim_8-warmup_epochs_7")
    assert "sigma" not in Config(sigma=0.5).folder_name


def test_defaults_are_the_papers_and_those_of_the_digits_what_trains_within_a_minute():
    digits, paper = Config(), Config(dataset="CIFAR10")
    assert (digits.num_epochs, digits.batch_size, digits.learning_rate, digits.z_dims) == (60, 128, 9e-4, 8)
    assert (paper.num_epochs, paper.batch_size, paper.learning_rate, paper.z_dims) == (200, 256, 3e-4, 10)
    assert Config(num_epochs=7).num_epochs == 7 and Config(num_epochs=7).batch_size == 128
    assert Config(vae_type="LVAE").warmup_epochs == 12 and Config().warmup_epochs == 0
    assert Config(vae_type="LVAE", no_warmup=True).warmup_epochs == 0
    assert replace(Config(), beta_y=2) == Config(beta_y=2.0) and len({Config(), Config(beta_y=1)}) == 1


def test_axis():
    assert axis("0.3") == [0.3]
    assert axis("0.1:10:21") == [round(10 ** (k / 10), 8) for k in range(-10, 11)]
    assert axis("0.1:10:21")[1] == 0.12589254
    assert axis("1:8:4") == [1, 2, 4, 8]


def test_config_round_trips_through_its_file():
    for config in (Config(), Config(vae_type="LVAE", dataset="SVHN", use_conv_z=True, beta_y=0.1)):
        Path("config.json").write_text(config.to_json())
        assert Config.from_json(Path("config.json")) == config
    settings = json.loads(config.to_json()) | {"beta_z": 7.0}
    Path("config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="config.json: damaged or edited"):
        Config.from_json(Path("config.json"))
