"""What made a run is kept with it, told of it, and makes it again."""

import csv
import json
import platform
import shlex
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_beta_grid
import plot_eval
import train
from tests.conftest import CELL, EVALUATION, ROOT, TINY, all_weights
from tests.datasets.files import write_folder
from tests.reliability.trials import first, there
from utils import provenance
from utils.cli import grid_configs
from utils.config import Config, _sha256
from utils.errors import UserError
from utils.files import read_json, write_json

MODEL = [*TINY, "--run_batch_name", "b"]


def git(*words: str, folder: Path = ROOT) -> str:
    return subprocess.check_output(["git", "-C", folder, *words], text=True).strip()


def test_every_process_that_trains_a_run_is_kept(passes, interrupted, monkeypatch):
    """With its commit, command, versions, device, threads, data, start and end; the table and the report tell."""
    monkeypatch.setattr("sys.argv", ["train.py", "--overwrite", "a b"])
    before = datetime.now(UTC).replace(microsecond=0)
    monkeypatch.setattr(provenance, "code", lambda: {"commit": "a" * 40, "clean": True})
    interrupted(40, *CELL)
    monkeypatch.setattr(provenance, "code", lambda: {"commit": "f" * 40, "clean": False})
    passes(train.main, *CELL)
    one, two = read_json(there("training.json")[0])["sessions"]
    assert [(s["commit"][0], s["clean"]) for s in (one, two)] == [("a", True), ("f", False)]
    assert one["command"] == "python train.py --overwrite 'a b'"
    versions = (platform.python_version(), torch.__version__, np.__version__)
    for session in (one, two):
        assert tuple(session[name] for name in ("python", "torch", "numpy")) == versions
        assert session["device"].startswith("cpu, ") and session["threads"] == 1
        assert before <= datetime.fromisoformat(session["start"]) <= datetime.fromisoformat(session["end"])
        before = datetime.fromisoformat(session["end"])
    assert one["data"] == two["data"]
    passes(eval_beta_grid.main, *EVALUATION, "--exclude_mi")
    (row,) = csv.DictReader(Path("runs/singles/eval_results.csv").read_text().splitlines())
    assert (row["commit"], row["date"]) == (f"{'a' * 12} {'f' * 12}+", two["end"][:10])
    passes(plot_eval.main, *EVALUATION[:2])
    report = Path("runs/singles/figures/report.html").read_text()
    assert f"{'a' * 12} {'f' * 12}+" in report and row["date"] in report


def test_a_failed_run_says_what_made_it(script):
    assert script(train.main, *TINY, "--learning_rate", "1e20")[0] == 1
    (session,) = read_json(there("training.json")[0])["sessions"]
    assert session["commit"] == provenance.code()["commit"]


def test_unfolded_cells_say_what_made_their_model(multi_rate):
    results = [read_json(path) for path in multi_rate.glob("m/*/training.json")]
    counts = [len(result["sessions"]) for result in results]
    assert sorted(counts) == [1] + [2] * 6
    (model,) = (result for result in results if len(result["sessions"]) == 1)
    assert all(result["sessions"][0] == model["sessions"][0] for result in results)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="is about a clone")
def test_code_without_its_repository_has_no_commit(monkeypatch):
    """A copy within another repository, of a name that no text has."""
    folder = Path("copy\udce9")
    folder.mkdir()
    git("init", "-q", folder=Path())
    git("-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "x", folder=Path())
    for root in (folder.absolute(), ROOT):
        monkeypatch.setattr(provenance, "ROOT", root)
        commit = provenance.code.__wrapped__()["commit"]
        assert commit == (git("rev-parse", "HEAD") if root == ROOT else None)


OTHERS = {
    "ordinary": ["--vae_type", "LVAE", "--beta_y", "0.5", "--warmup_epochs", "1", "--seed", "4", "--run_name", "x y"],
    "unfolded": ["--multi_rate", "--force", "--beta_y", "0.1", "1", "--beta_z", "0.5", "2"],
    "refined": ["--multi_rate", "--force", "--beta_y", "0.1", "1", "--beta_z", "0.5", "2", "--refine_epochs", "1"],
    "started": ["--beta_z", "2", "--init_from", "runs/source/*"],
    "steered": ["--target_rate_y", "2", "--beta_y", "3", "--run_name=-x", "--threads", "2"],
    "folder": ["--dataset", "my pets", "--image_channels", "1", "--num_epochs", "3"],
}


@pytest.mark.parametrize("kind", first(1, "refined", "steered", "unfolded", "folder", "started", "ordinary"))
def test_a_command_makes_a_run_again(kind, passes, refused):
    """The runs of that command have the bytes of the ones that it was asked for."""
    passes(train.main, *TINY, "--run_batch_name", "source")
    write_folder(Path("my pets"))
    flags = [word if "*" not in word else str(next(Path().glob(word))) for word in OTHERS[kind]]
    passes(train.main, *MODEL, *flags)
    for path in sorted(Path("runs/b").iterdir())[::3]:
        command = shlex.split(passes(train.main, "--like", path))
        assert command[:2] == ["python", "train.py"]
        torch.set_num_threads(1)
        passes(train.main, *command[2:], "--device", "cpu", "--runs_dir", "again")
        assert all_weights("again/b")[path.name] == all_weights("runs/b")[path.name]
        shutil.rmtree("again")
    if kind == "started":
        shutil.rmtree("runs/source")
        assert "--like: " in refused(train.main, "--like", path)
    assert "no config.json" in refused(train.main, "--like", "nothing")
    assert "no config.json" in refused(train.main, "--like", "")
    assert "goes without --beta_y" in refused(train.main, "--like", path, "--beta_y", "3")


def test_flags_are_the_fewest_whatever_depends_on_them():
    for settings in ({"num_epochs": 300, "warmup_epochs": 100}, {"vae_type": "LVAE", "warmup_epochs": 0}):
        config = Config(**settings)
        assert grid_configs(train.parse_args(config.flags())) == [config]
    assert Config(num_epochs=300).flags() == ["--num_epochs", "300"] and Config().flags() == []


@pytest.mark.parametrize("sessions", [[{}], "x", None, [{"commit": 3}], [[]]])
def test_damaged_sessions_are_told(sessions, trained, refused):
    (path,) = trained()
    write_json(path / "training.json", read_json(path / "training.json") | {"sessions": sessions})
    assert f"{path}/training.json: damaged" in refused(eval_beta_grid.main, *EVALUATION, "--exclude_mi")


def test_settings_of_newer_code_are_not_ignored():
    path, settings = Path("config.json"), json.loads(Config().to_json())
    settings |= {"dropout": 0.3}
    del settings["sha256"]
    path.write_text(json.dumps(settings))  # as of the paper's code, which has others
    assert Config.from_json(path) == Config()
    path.write_text(json.dumps(settings | {"sha256": _sha256(settings)}))
    with pytest.raises(UserError, match="config.json: has --dropout, which this version .* does not know"):
        Config.from_json(path)
