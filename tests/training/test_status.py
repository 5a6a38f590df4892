"""--dry_run: where each cell stands, and how long the rest takes; nothing is trained or written."""

import fcntl
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

import train
from tests.conftest import TINY
from utils import locks
from utils.board import link
from utils.distributed import duration
from utils.errors import UserError
from utils.files import write_json
from utils.runs import Run
from utils.training.summary import standing

GRID = [
    *TINY,
    "--batch_size",
    "300",
    "--num_epochs",
    "4",
    "--beta_y",
    "0.1",
    "1",
    "5",
    "--run_batch_name",
    "grid",
    "--save_every",
    "1",
]


def of_cells(out):
    return dict(re.findall(r"^  (beta_y \S+, beta_z \S+)  +(.+)$", out, re.M))


def files():
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path("runs").rglob("*") if p.is_file()}


def test_every_status_and_the_time_to_go(script, interrupted):
    status, out, _ = script(train.main, *GRID, "--dry_run")
    assert status == 0 and set(of_cells(out).values()) == {"new"} and not Path("runs").exists()
    assert "3 new; 12 epochs left; how long they take shows once a cell has been trained" in out
    interrupted(2 * 5 + 3 + 4 * 5, *GRID)  # the second cell in its third epoch
    paths = {json.loads((p / "config.json").read_text())["beta_y"]: p for p in Path("runs/grid").iterdir()}
    assert set(paths) == {0.1, 1.0}
    result = json.loads((paths[0.1] / "training.json").read_text())
    write_json(paths[0.1] / "training.json", result | {"seconds": 400.0})  # a hundred an epoch
    before = files()
    status, out, _ = script(train.main, *GRID, "--dry_run")
    shown = of_cells(out)
    assert shown == {
        "beta_y 0.1, beta_z 1": "finished",
        "beta_y 1, beta_z 1": "unfinished at epoch 2 of 4",
        "beta_y 5, beta_z 1": "new",
    }
    assert re.search("1 finished, 1 unfinished, 1 new; 6 epochs left, about 5 min at 5[0-9.]+ s an epoch", out)
    assert files() == before
    with Run.open(paths[1.0]).locked():
        out = script(train.main, *GRID, "--dry_run")[1]
        assert re.fullmatch(
            r"held by pid \d+ on host \S+, unfinished at epoch 2 of 4", of_cells(out)["beta_y 1, beta_z 1"]
        )
    before = files()
    out = script(train.main, *GRID, "--dry_run", "--overwrite")[1]
    assert "; all are trained anew; 12 epochs left, about " in out and files() == before
    assert script(train.main, *GRID)[0] == 0
    assert "3 finished; nothing left to train" in script(train.main, *GRID, "--dry_run")[1]


def test_a_failed_cell_and_a_damaged_one(trained, script):
    (path,) = trained()
    write_json(path / "training.json", {"status": "failed", "epoch": 2, "step": 7, "terms": {}})
    assert standing(Run.open(path)) == ("failed at step 7 of epoch 2", 0, 0)
    (path / "resume.pth").write_bytes(b"no")
    assert standing(Run.open(path))[0].startswith(f"damaged: {path}/resume.pth: damaged")
    status, out, _ = script(train.main, *TINY, "--dry_run")
    assert status == 0 and "damaged: " in out and (path / "resume.pth").exists()


def test_the_speed_of_a_longer_training_is_that_of_the_shorter_ones_beside_it(trained, script):
    (path,) = trained("--num_epochs", "2", "--beta_y", "3")
    result = json.loads((path / "training.json").read_text())
    write_json(path / "training.json", result | {"seconds": 200.0})
    longer = ["--num_epochs", "6", "--beta_y", "0.1", "1", "--run_batch_name", path.parent.name, "--dry_run"]
    out = script(train.main, *TINY, *longer)[1]
    assert "2 new; 12 epochs left, about 20 min at 100 s an epoch" in out
    assert "how long they take shows once" in script(train.main, *TINY, *longer, "--batch_size", "50")[1]


def test_a_checkpoint_within_an_epoch_counts_by_its_steps(trained, monkeypatch):
    (path,) = trained()
    monkeypatch.setattr(Run, "status", "unfinished")
    monkeypatch.setattr(Run, "peek", lambda run: {"epoch": 1, "step": 3, "history": [0] * 4, "seconds": 7.0})
    assert standing(Run.open(path)) == ("unfinished at epoch 1 of 2", 1.75, 7.0)


def test_holders_by_lock_files(monkeypatch, tmp_path):
    """Where the file system has no flock."""
    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    assert locks.holder(tmp_path) is None
    with locks.locked(tmp_path):
        assert locks.holder(tmp_path).startswith("pid ")
    assert locks.holder(tmp_path) is None and locks.holder(tmp_path / "nowhere") is None


def test_whoever_asks_for_the_holder_keeps_no_training_from_starting(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with locks.locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith("pid ")


def no_flock(*_):
    raise OSError(locks.errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    "seconds, text", [(40, "40 s"), (90, "2 min"), (720, "12 min"), (12600, "3.5 h"), (181440, "2.1 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_is_shown_short_names(trained, tmp_path):
    paths = trained("--beta_y", "0.1", "5")
    shown, other = tmp_path / "shown", paths[0].with_name("copy")
    shutil.copytree(paths[0], other)
    Path("runs/singles/figures").mkdir()
    shown.mkdir()
    assert link(Path("runs/singles"), shown) == 3
    names = sorted(p.name for p in shown.iterdir())
    first, again = sorted([paths[0].name, other.name])
    assert names == ["beta_y 0.1, beta_z 1", f"beta_y 0.1, beta_z 1, {again}", "beta_y 5, beta_z 1"]
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(shown)).Reload()
    assert sorted(multiplexer.Runs()) == names
    with pytest.raises(UserError, match="nowhere: no runs in it"):
        link(Path("nowhere"), shown)
