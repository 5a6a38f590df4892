"""Reading a batch's table as cells."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pytest import approx

import train
from tests.conftest import TINY
from tests.plane.planes import HEADER, grid, plane_of, read_csv, rows_of, write_csv
from utils.files import digest_of, write_json
from utils.plane.compare import groups
from utils.plane.reading import read_plane
from utils.runs import Run

MORE = ["multi_rate", "use_conv_z", "data_digest"]  # columns


def test_repeats_with_other_seeds_become_one_cell():
    rows, (first, *others) = rows_of([1, 2]), rows_of([1, 2], seed=3, psnr=30.0)
    plane = read_plane(write_csv([first, *rows, *others]))
    assert len(plane.cells) == 4 and len(plane.cells[0].runs) == 2
    assert [row["psnr"] for row in plane.cells[0].repeats] == [30, 21] and plane.cells[0].seeds == ("3", "2")
    assert plane.values("psnr")[0] == 25.5 and plane.of_seed("psnr", "3").tolist() == [30] * 4
    assert plane.values("rate")[0] == approx(rows[0]["kl_y"] + rows[0]["kl_z"])
    assert plane.values("nelbo")[0] == approx(rows[0]["kl_y"] + rows[0]["kl_z"] - rows[0]["ll"])


def test_the_longest_run_of_a_cell_stands_for_those_that_it_continues(passes, monkeypatch):
    """A cell of 1 epoch is continued to 2, and that to 3; another is trained anew for 2, and only that continued."""
    both, more = ["--beta_y", "1", "5"], ["--init_from", "runs/b"]
    for flags in (["1", *both], ["2", "--beta_y", "5"], ["2", *more], ["3", *both, *more]):
        monkeypatch.setattr("sys.argv", ["train.py", *flags])  # of which sessions tell
        passes(train.main, *TINY, "--run_batch_name", "b", "--num_epochs", *flags)
    runs, more = [Run.open(path) for path in Path("runs/b").iterdir()], ["num_epochs"]
    row = {"kl_y": 1.0, "kl_z": 2.0, "seed": 2, "beta_z": 1}
    rows = [row | {"run": r.path.name, "beta_y": r.config.beta_y, "num_epochs": r.config.num_epochs} for r in runs]
    plane = read_plane(write_csv(rows, header=more))
    shown = sorted((cell.median["beta_y"], cell.settings["num_epochs"]) for cell in plane.cells)
    assert len(rows) == 6 and shown == [(1, "3"), (5, "1"), (5, "3")]
    assert plane.notes[0].startswith("3 run(s) (NoName-Epochs_") and " left out: the longest of each" in plane.notes[0]
    shutil.rmtree(next(r.path for r in runs if r.config.num_epochs == 3))  # it cannot tell any more
    assert len(read_plane(write_csv(rows, header=more)).cells) == 4


def test_saturated_estimates_are_left_out():
    names = ["mi_q_mc", "mi_q_mc_saturated", "mi_q_mc_y", "mi_q_mc_y_saturated"]
    values = [(1.5, 1, 2.0, 0), (1.5, 0, 2.0, 0), (1.5, 0, 2.0, 1), (1.5, 0, 2.0, 1)]
    rows = [row | dict(zip(names, of_row, strict=True)) for row, of_row in zip(rows_of([1, 2]), values, strict=True)]
    plane = read_plane(write_csv(rows, header=names))
    assert_array_equal(plane.values("mi_q_mc"), [math.nan, 1.5, 1.5, 1.5])
    assert_array_equal(plane.values("mi_q_mc_y"), [2.0, 2.0, math.nan, math.nan])
    assert [("mi_q_mc_y" in note, "2 of 4" in note) for note in plane.notes] == [(False, False), (True, True)]


@pytest.mark.parametrize("separator, point", [(",", "."), (";", ","), (";", "."), ("\t", ",")])
def test_a_table_that_a_spreadsheet_saved_is_read(separator, point):
    rows = [row | {"multi_rate": "TRUE", "use_conv_z": "FALSE"} for row in rows_of([0.1, 1])]
    path = write_csv(rows, header=MORE)
    expected = [cell.median for cell in read_plane(path).cells]
    lines = [[*HEADER, *MORE], *([value.replace(".", point) for value in row.values()] for row in read_csv(path))]
    path.write_bytes("\r\n".join(map(separator.join, lines)).encode("utf-8-sig"))
    plane = read_plane(path)
    assert [cell.median for cell in plane.cells] == expected and plane.unfolded.all()
    assert plane.cells[0].settings["use_conv_z"] == "False"


def test_runs_of_earlier_versions_are_of_the_kind_of_those_that_know_their_images():
    rows = rows_of([1, 2, 3])
    rows = [row | {"data_digest": digest} for row, digest in zip(rows, ["", "a", ""] * 3, strict=True)]
    assert list(read_plane(write_csv(rows, header=MORE)).kinds) == [""]
    rows[0]["data_digest"] = "b"
    assert len(read_plane(write_csv(rows, header=MORE)).kinds) == 3


def test_a_layer_that_is_not_there_has_not_collapsed():
    rows = [row | {"kl_z": 0.0, "kl_y": 5.0} for row in grid([1, 2])]
    told = [plane_of(rows, *[{"vae_type": kind}] * 4).about for kind in ("HVAE", "BVAE")]
    assert "R(z) < 0.5 nats in 4 of 4 runs" in told[0] and "nats in" not in told[1]


def test_a_run_that_was_trained_or_evaluated_again_is_not_shown_by_its_old_row():
    rows = rows_of([1, 2])
    for row in rows:
        run = Path("runs/b", row["run"])
        run.mkdir(parents=True)
        (run / "vae.pth").write_bytes(b"weights")
        known = {name: row[name] for name in ("ll", "kl_y", "kl_z")}
        write_json(run / "metrics.json", known | {"weights": digest_of(run / "vae.pth")})
    path = write_csv(rows)
    assert len(read_plane(path).cells) == 4 and not read_plane(path).notes
    Path("runs/b", rows[0]["run"], "vae.pth").write_bytes(b"others")
    write_json(Path("runs/b", rows[1]["run"], "metrics.json"), known | {"ll": known["ll"] + 1})
    plane = read_plane(path)
    assert [cell.runs[0] for cell in plane.cells] == [row["run"] for row in rows[2:]]
    assert (
        plane.notes[0].startswith(f"2 run(s) ({rows[0]['run']}, {rows[1]['run']}) left out") and len(plane.notes) == 1
    )


def test_results_that_were_computed_otherwise_are_not_compared():
    """Of one batch, those like most stay, with a note for each kind; two batches are compared where they are alike."""
    names = ["probe_images", "fid", "fid_features", "recons_acc"]
    rows = [row | dict(zip(names, (500, 1.0, "a", 0.5), strict=True)) for row in rows_of([1, 2])]
    for row, classifier in zip(rows, ("one", "one", "one", "two"), strict=True):
        Path("runs/b", row["run"]).mkdir(parents=True)
        write_json(Path("runs/b", row["run"], "metrics.json"), {"classifiers": {"recons": classifier}})
    rows[0] |= {"probe_images": 100}
    rows[1] |= {"fid_features": "b"}
    plane = read_plane(write_csv(rows, header=names))
    for name, i in (("lr_acc_mean", 0), ("fid", 1), ("recons_acc", 3)):
        assert np.flatnonzero(np.isnan(plane.values(name))).tolist() == [i]
    texts = "probe_images 100, others with probe_images 500", "fid_features b, others", "classifier two, others"
    assert all(any(text in note for note in plane.notes) for text in texts)
    assert np.isfinite(plane.values("psnr")).all()  # of step 1 all are alike
    other = read_plane(write_csv([row | {"probe_images": 100} for row in rows_of([1, 2])], "c", header=names))
    for name, alike in (("lr_acc_mean", False), ("psnr", True)):
        assert (len(groups({"b": plane, "c": other}, [name])) == 1) == alike
