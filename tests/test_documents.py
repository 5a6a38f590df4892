"""What the documents tell of results: the page of FashionMNIST and its files, and the script of README's record."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import train
import train_classifier
from tests.conftest import ROOT, of_documents
from tests.plane.planes import write_csv
from utils.errors import UserError
from utils.files import write_json
from utils.plane.cells import SETTINGS
from utils.plane.excess import areas, excess_rows
from utils.plane.reading import read_plane

SCRIPTS = {"train.py": train, "train_classifier.py": train_classifier, "eval_beta_grid.py": eval_beta_grid}
PYTHON = """#!/bin/sh
case $1 in -*) exec {python} "$@";; esac
echo "$@" >> commands.txt
cp -r made runs/record_Digits_3
"""


@pytest.fixture
def results(monkeypatch):
    """The script docs/results.py, on copies of its files."""
    module = of_documents("results")
    shutil.copytree(ROOT / "docs/results", "docs/results")
    monkeypatch.setattr(module, "ROOT", Path())
    monkeypatch.setattr(module, "FOLDER", Path("docs/results"))
    return module


def test_the_page_of_results_is_that_of_its_files(results):
    results.main([])
    tables = Path("docs/results/README.md").read_text()
    assert tables == (ROOT / "docs/results/README.md").read_text()
    text, tables = (ROOT / "docs/results.md").read_text(), " ".join(tables.split())
    told = re.findall(r"-?\d+\.\d+ \+- \d+\.\d+", text)
    told += [" | ".join(gain) for gain in re.findall(r"(\d\.\d+) \((\d\.\d+ to \d\.\d+)\)", text)]
    told += re.findall(r"-?\d+\.\d+", text.partition("| statement")[2])
    assert len(told) > 40 and [number for number in told if f" {number}" not in tables] == []
    shares = {f"{float(row['kl_z']):.0f} of {float(row['rate']):.0f}" for row in results.rows_of("advice")}
    told = re.findall(r"\d+ of \d+", text)
    assert len(told) == 6 and shares.issuperset(told)


def test_the_record_of_the_readme_is_of_one_seed_of_these_files(results):
    rows = [row for row in results.rows_of("eval_results") if row["seed"] == "1" and not row["refine_epochs"]]
    plane = read_plane(write_csv(rows, "one", [*rows[0]]))
    excess = [row["excess"] for row in excess_rows(plane)]
    ((area, separate),) = areas(plane).values()
    told = f"| {np.mean(excess):.1f} | {max(excess):.1f} | {100 * area.mean() / separate.mean():.0f} % |"
    assert len(excess) == 9 and told in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["advice", "drivers", "excess"])
def test_a_file_that_does_not_follow_from_the_metrics_is_found(results, file):
    path = Path("docs/results", f"{file}.csv")
    column = {"advice": "value", "drivers": "rate", "excess": "own_kl_z"}[file]
    value = results.rows_of(file)[0][column]
    path.write_text(path.read_text().replace(value, f"{1.001 * float(value)}", 1))
    with pytest.raises(UserError, match=rf"{file}.csv, line 2: {column}"):
        results.main([])


def test_the_record_is_of_new_maps_and_of_their_excess():
    """Of commands that are written down and not run, and of a batch whose numbers are known."""
    for name in ("docs", "bin", "runs/record_Digits_5"):
        Path(name).mkdir(parents=True)
    shutil.copy(ROOT / "docs/record.sh", "docs")
    Path("bin/python").write_text(PYTHON.format(python=sys.executable))
    Path("bin/python").chmod(0o755)
    env = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def record():
        command = ["bash", "docs/record.sh", "Digits", "4", "3", "5"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert record().returncode == 2 and not Path("commands.txt").exists()
    Path("runs/record_Digits_5").rmdir()
    rows = []
    for y, z, excess in ((1, 1, 1), (1, 9, 2), (9, 1, 6), (9, 9, 3)):
        row = {"beta_y": y, "beta_z": z, "seed": 1, "num_epochs": 4, "optimizer": "muon", "kl_y": 8 / y}
        row |= {"status": "finished", "commit": "0123456+", "date": "2026-11-29"}
        rows.append(row | {"run": f"m{y}{z}", "loss": 9 + excess, "kl_z": 4 / z, "multi_rate": "True", "source": 1})
        rows.append(row | {"run": f"o{y}{z}", "loss": 9, "kl_z": 8 / z})
    shutil.move(write_csv(rows, "made", [*SETTINGS, "loss"]).parent, "made")
    Path("made/m11").mkdir()
    write_json(Path("made/m11/training.json"), {"sessions": [{"device": "cpu, X"}]})
    out = record().stdout
    assert out.splitlines()[-1] == "| 2026-11-29 | 0123456+ | cpu, X | 0.00 | 0.00 | +3.0 | +6.0 | 50 % |"
    for script, *argv in (line.split() for line in Path("commands.txt").read_text().splitlines()):
        SCRIPTS[script].parse_args(argv)
