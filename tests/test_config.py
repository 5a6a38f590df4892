"""Questions to Config, and a flag added in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

from tests.conftest import ROOT, TINY, python
from utils.config import Config, fields_of

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
    shutil.copytree(ROOT, "copy", ignore=shutil.ignore_patterns(".git", "runs", "tests", "docs", "__pycache__"))
    path = Path("copy/utils/config.py")
    before, seed, after = path.read_text().partition("    seed: int")
    path.write_text(before + FLAG + seed + after)
    process = python("-c", USED)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    configs = {path.parent.name: json.loads(path.read_text()) for path in Path("runs").rglob("config.json")}
    values = sorted((config["dropout"], "dropout_0.3" in name) for name, config in configs.items())
    assert values == [(0, False), (0.3, True)]
    assert out.count("already complete") == 1 and out.endswith("--dropout: must be >= 0, got -1.0\n")


def test_every_field_has_one_part():
    parts = ("model", "objective", "training", "data", "repeat", "name")
    assert sorted(name for part in parts for name in fields_of(part)) == sorted(fields_of())
    assert fields_of("name") == ["run_name", "run_batch_name"]


def test_what_differs_is_asked_by_part_as_far_as_it_matters():
    a = Config(beta_y=2.0, num_epochs=4, run_name="a")
    b = Config(beta_z=3.0, num_epochs=5, seed=7, sigma=0.5)
    assert a.differs_in(b, "objective") == ["beta_y", "beta_z"] and a.differs_in(b, "model") == []
    assert a.differs_in(b) == ["num_epochs", "beta_y", "beta_z", "seed", "run_name"]
    gauss = Config(px_y_family_ll="GaussianFixedSigma", sigma=0.5)
    assert gauss.differs_in(dataclasses.replace(gauss, sigma=0.6), "model") == ["sigma"]


def test_a_longer_training_continues_one_that_differs_in_nothing_else():
    short = Config(num_epochs=4, run_name="a")
    longer = dataclasses.replace(short, num_epochs=6, run_batch_name="b")
    assert longer.continues(short) and not short.continues(longer) and not short.continues(short)
    for change in ({"seed": 3}, {"beta_y": 2.0}, {"lr_schedule": "cosine"}, {"z_dims": 3}, {"batch_size": 7}):
        assert not dataclasses.replace(longer, **change).continues(short), change
    falling = dataclasses.replace(short, lr_schedule="cosine")
    assert not dataclasses.replace(falling, num_epochs=6).continues(falling)
