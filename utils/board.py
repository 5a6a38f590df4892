"""TensorBoard for a batch, in which runs are named by what tells them apart.

    python -m utils.board runs/grid               the flags that follow are TensorBoard's

TensorBoard names runs after their folders, so it is shown a temporary folder of links with short names. Runs that
begin later appear when it is started again.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from utils.errors import UserError, run_script
from utils.names import what_differs


def link(batch: Path, folder: Path) -> int:
    """Makes a link in `folder` to each run of a batch, named by what differs; returns their number.

    Raises UserError if there are none.
    """
    from utils.runs import runs_in

    runs, problems = runs_in(batch)
    for problem in problems.values():
        print(f"note: {problem}; left out", file=sys.stderr)
    if not runs:
        raise UserError(f"{batch}: no runs in it")
    for run, name in zip(runs, what_differs([run.config for run in runs]), strict=True):
        there = folder / name.replace("/", "_")
        there = there if not there.exists() else there.with_name(f"{there.name}, {run.path.name}")
        there.symlink_to(run.path.resolve())
    return len(runs)


def main() -> int:
    """Runs TensorBoard until it ends; returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    with tempfile.TemporaryDirectory(prefix="board-") as folder:
        n = link(Path(sys.argv[1]), Path(folder))
        print(f"{n} runs of {sys.argv[1]}", flush=True)
        return subprocess.run([sys.executable, "-m", "tensorboard.main", "--logdir", folder, *sys.argv[2:]]).returncode


if __name__ == "__main__":
    run_script(main)
