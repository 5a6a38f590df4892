"""Flags and Configs: what is refused is told in the flag's words, what is told can be pasted; names, questions."""

import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import train
from tests.conftest import ROOT, TINY, python
from tests.reliability.trials import ended
from utils.cli import axis
from utils.config import Config, fields_of
from utils.distributed import Lines, progress
from utils.errors import UserError

REFUSED = r"""
--beta_y 1 -.5E+2                               got -50.0
--beta_y 0:1:3                                  got '0:1:3'
--seed=1 --z_dims 2 --seed 3                    given twice
--beta_z nan                                    got nan
--vae_type BVAE --beta_z 1 2                    BVAE
--z_dims 0                                      got 0
--qz_family GumbelSoftmax --z_dims 1            at least 2 categories, got 1
--conv_channels 1000000                         at most 4096, got 1000000
--batch_size 999999999999999999999999999999     at most
--use_conv_z --linear_y_with_dims 8             vector z
--vae_type HVEA                                 unknown 'HVEA'; did you mean HVAE? (valid: HVAE, LVAE, BVAE)
--dataset ImageNet --vae_type LVAE              128 pixels
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
--image_size 28                                 own images
--dataset . --image_size 65                     28, 32, 64, 128, 256
--save_every x                                  got 'x'
"""


def test_refused_flags_are_named_and_leave_no_folder(script):
    """In each line, the last flag is the one to blame, and what follows is said of it."""
    for line in REFUSED.strip().splitlines():
        given, said = re.split(r"\s{2,}", line, maxsplit=1)
        given = given.replace("XXX", "x" * 300).replace("UNDECODABLE", "\udcff")
        flags = shlex.split(given)
        status, _, err = script(train.main, *TINY, *flags)
        blamed = [flag for flag in flags if flag.startswith("--")][-1].partition("=")[0]
        assert status == 2 and err.startswith(f"error: {blamed}: ") and said in err, (line, err)
        assert err.count("\n") == 1 and not Path("runs").exists(), line


def test_of_a_flag_of_one_value_the_last_counts(passes):
    """As shells' aliases and scripts rely on."""
    flags = ["--num_epochs", "2", "--num_epochs", "3"]
    assert "num_epochs           3" in passes(train.main, *flags, "--dry_run")


def test_the_next_command_can_be_pasted(passes):
    out = passes(train.main, *TINY, "--runs_dir", "my runs", "--run_batch_name", "it's")
    (command,) = re.findall("To evaluate: python (.*)", out.replace(" \\\n", " "))
    both = "train_classifier.py --dataset Digits --runs_dir 'my runs' && python eval_beta_grid.py"
    both += """ --run_batch_name "it's" --all --runs_dir 'my runs'"""
    assert shlex.split(command) == shlex.split(both)
    (board,) = re.findall("To inspect: tensorboard --logdir (.*)", out)
    assert shlex.split(board) == ["my runs/it's"]


def test_progress_in_a_file_is_a_line_each_half_minute():
    assert type(progress([])) is Lines
    file = io.StringIO()
    for _ in Lines(range(8), file=file, disable=False):
        pass
    first, last = file.getvalue().strip().splitlines()
    assert first.startswith("0%|") and last.startswith("100%|####")
    assert "\r" not in file.getvalue()


PAPER = dict(dataset="CIFAR10", num_epochs=500, conv_channels=32, z_dims=32)


def test_folder_names_are_the_papers_and_tell_the_model():
    fixed = Config(**PAPER, px_y_family_ll="GaussianFixedSigma", sigma=0.71)
    assert fixed.folder_name == (
        "NoName-Epochs_500-BatchSize_256-c_32-CIFAR10-HVAE-px_y_family_ll_GaussianFixedSigma-"
        "qz_family_DiagonalGaussian-Beta_y_1.0-Beta_z_1.0-ll_sigma_0.71-z_dim_32"
    )
    lvae = Config("LVAE", "SVHN", use_conv_z=True, no_warmup=True, run_name="mine", seed=3)
    assert lvae.folder_name.startswith("mine-Epochs_200-")
    for config, end in (
        (lvae, "-Beta_y_1.0-Beta_z_1.0-use_conv_z-no_warmup-seed_3"),
        (Config(linear_y_with_dims=64), "-z_dim_8-linear_y_dims_64"),
        (Config(warmup_epochs=7), "-z_dim_8-warmup_epochs_7"),
        (Config(sigma=0.5), "-Beta_y_1.0-Beta_z_1.0-z_dim_8"),
    ):
        assert config.folder_name.endswith(end)


def test_defaults_are_the_papers_but_for_the_digits():
    """What trains within a minute."""
    names = ("num_epochs", "batch_size", "learning_rate", "z_dims")
    for config, expected in (
        (Config(), (60, 128, 9e-4, 8)),
        (Config(dataset="CIFAR10"), (200, 256, 3e-4, 10)),
        (Config(num_epochs=7), (7, 128, 9e-4, 8)),
    ):
        assert tuple(getattr(config, name) for name in names) == expected
    for muon in ({"optimizer": "muon"}, {"multi_rate": True}, {"dataset": "CIFAR10", "optimizer": "muon"}):
        config = Config(**muon)
        assert (config.optimizer, config.learning_rate) == ("muon", 7e-3)
    assert Config("LVAE").warmup_epochs == 12 and Config().warmup_epochs == 0
    assert Config("LVAE", no_warmup=True).warmup_epochs == 0
    assert replace(Config(), beta_y=2) == Config(beta_y=2.0)
    assert len({Config(), Config(beta_y=1)}) == 1


def test_homes_and_line_ends_of_windows_in_flags(passes, monkeypatch):
    """Where no shell reads a `~`, or a script of commands has another system's lines."""
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    for where in (["--runs_dir=~/a"], ["--runs_dir", "~/a\r"]):
        assert train.parse_args(where).runs_dir == str(Path("home/a").absolute())
    monkeypatch.setenv("HIT_DATA_DIR", "~/sets")
    assert train.parse_args([]).data_dir == str(Path("home/sets").absolute())
    assert train.parse_args(["--run_name", "a~b"]).run_name == "a~b"


def test_axis():
    assert axis("0.3") == [0.3] and axis("1:8:4") == [1, 2, 4, 8]
    assert axis("0.1:10:21") == [round(10 ** (k / 10), 8) for k in range(-10, 11)]
    assert axis("0.1:10:21")[1] == 0.12589254
    assert len(set(axis("1e-6:2e-6:200"))) == len(set(axis("1e-6:1.00001e-6:1000")[::10])) * 2 == 200


def test_config_round_trips_through_its_file():
    path = Path("config.json")
    for config in (Config(), Config("LVAE", "SVHN", use_conv_z=True, beta_y=0.1)):
        path.write_text(config.to_json())
        assert Config.from_json(path) == config
    path.write_text(json.dumps(json.loads(config.to_json()) | {"beta_z": 7.0}))
    with pytest.raises(UserError, match="config.json: damaged or edited"):
        Config.from_json(path)
    path.write_text(json.dumps({"dataset": "Digits", "sigma": 10**400}))
    with pytest.raises(UserError, match="config.json: --sigma: must be a number"):
        Config.from_json(path)


PARTS = ("model", "objective", "training", "data", "repeat", "name")
FLAG = '    dropout: float = _flag(0.0, "share of units", "training", least=0, in_name=True)\n'
USED = f"""
import sys
sys.path.insert(0, "copy")
import train
from utils.errors import UserError
for flags in ([], ["--dropout", "0.3"], ["--dropout", "0.3"]):
    assert train.main([*{TINY}, *flags]) == 0
try:
    train.main(["--dropout", "-1"])
except UserError as e:
    print(e)
"""


def test_a_flag_is_one_line_in_one_file():
    """In a copy of the project; its process imports torch, which takes longer than five seconds beside others."""
    unused = shutil.ignore_patterns(".git", "runs", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, "copy", ignore=unused)
    path = Path("copy/utils/config.py")
    before, seed, after = path.read_text().partition("    seed: int")
    path.write_text(before + FLAG + seed + after)
    status, out, err = ended(python("-c", USED))
    assert status == 0, err
    for path in Path("runs").rglob("config.json"):
        is_set = "dropout_0.3" in path.parent.name
        assert json.loads(path.read_text())["dropout"] == (0.3 if is_set else 0.0)
    assert len(list(Path("runs").glob("*/*dropout_0.3*"))) == 1
    assert out.count("already complete") == 1 and out.endswith("--dropout: must be >= 0, got -1.0\n")


def test_every_field_has_one_part():
    assert sorted(name for part in PARTS for name in fields_of(part)) == sorted(fields_of())
    assert fields_of("name") == ["run_name", "run_batch_name"]


def test_what_differs_is_asked_by_part_as_far_as_it_matters():
    a = Config(beta_y=2.0, num_epochs=4, run_name="a")
    b = Config(beta_z=3.0, num_epochs=5, seed=7, sigma=0.5)
    assert a.differs_in(b, "objective") == ["beta_y", "beta_z"] and a.differs_in(b, "model") == []
    assert a.differs_in(b) == ["num_epochs", "beta_y", "beta_z", "seed", "run_name"]
    gauss = Config(px_y_family_ll="GaussianFixedSigma", sigma=0.5)
    assert gauss.differs_in(replace(gauss, sigma=0.6), "model") == ["sigma"]


def test_a_longer_training_continues_one_that_differs_in_nothing_else():
    short = Config(num_epochs=4, run_name="a")
    longer = replace(short, num_epochs=6, run_batch_name="b")
    assert longer.continues(short) and not short.continues(longer) and not short.continues(short)
    for change in ({"seed": 3}, {"beta_y": 2.0}, {"lr_schedule": "cosine"}, {"z_dims": 3}, {"batch_size": 7}):
        assert not replace(longer, **change).continues(short), change
    falling = replace(short, lr_schedule="cosine")
    assert not replace(falling, num_epochs=6).continues(falling)
