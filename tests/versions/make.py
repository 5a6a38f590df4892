"""Trains runs by the code of a checkout, whole ones and ones that SIGTERM ends, and packs them for test_versions.py.

python -m tests.versions.make CHECKOUT        writes tests/versions/<its commit>.zip
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tests.conftest import CELL

FLAGS = [*CELL, "--learning_rate", "1e-3"]  # whose default has changed
KINDS = {
    "ordinary": [],
    "stacked": ["--cells_at_once", "2", "--beta_y", "1", "2"],
    "muon": ["--optimizer", "muon", "--vae_type", "LVAE"],
    "multi_rate": ["--multi_rate", "--force", "--beta_y", "0.1", "1", "10", "--beta_z", "0.5", "2"],
}
KEPT = (".json", ".pth")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def train(checkout: Path, kind: str, runs_dir: Path, end: bool) -> None:
    """Trains a kind of runs; with `end` until the second epoch is saved."""
    command = [sys.executable, checkout / "train.py", *FLAGS, *KINDS[kind], "--runs_dir", runs_dir]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while end and process.poll() is None and not [*runs_dir.rglob("resume.prev.pth")]:
        time.sleep(0.01)
    if end:
        process.send_signal(signal.SIGTERM)
    assert process.wait() == (128 + signal.SIGTERM if end else 0), f"{kind}: {process.returncode}"


def main(checkout: Path) -> None:
    """Packs all kinds that the checkout has."""
    command = ["git", "-C", checkout, "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.check_output(command, text=True).strip()
    kinds = KINDS if (checkout / "utils" / "training").is_dir() else ("ordinary", "stacked")
    with zipfile.ZipFile(Path(__file__).with_name(f"{commit}.zip"), "w", zipfile.ZIP_LZMA) as archive:
        for kind in kinds:
            for how in ("whole", "half"):
                folder = Path(tempfile.mkdtemp())
                train(checkout, kind, folder, how == "half")
                for file in sorted(p for p in folder.rglob("*") if p.suffix in KEPT and p.name != "resume.prev.pth"):
                    archive.write(file, Path(kind, how, file.relative_to(folder)))
                shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
