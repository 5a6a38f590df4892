"""Where a run comes from: the code, the command, the machine and the data that made it, and how to make it again."""

import functools
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from datasets.loading import Data
from models import own
from utils.errors import UserError, command_line
from utils.files import digest_of
from utils.machine import name_of
from utils.runs import Run

ROOT = Path(__file__).parent.parent
BETAS = ("beta_y", "beta_z")


@functools.cache
def code() -> dict[str, str | bool | None]:
    """The commit of this code, and whether its Python files are just those; None where git does not tell."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, check=True).stdout.decode().strip()

    try:
        if (ROOT / ".git").exists():  # else this is a copy, perhaps within another repository
            return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain", "--", "*.py")}
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "clean": None}


def provenance(device: torch.device, data: Data) -> dict:
    """What makes a run from now on: one of the `sessions` of training.json and checkpoints, still without its `end`."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    machine = {"device": f"{device}, {name_of(device)}", "threads": torch.get_num_threads()}
    return {**code(), "command": command_line(), **versions, **machine, "data": data.digest, "start": now()}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit_and_date(result: dict) -> dict[str, str]:
    """The commits that made a run and its day, by its training.json; `+` is for files that were changed since."""
    sessions = result.get("sessions", [])
    commits = [s["commit"][:12] + ("" if s["clean"] else "+") for s in sessions if s["commit"]]
    return {"commit": " ".join(dict.fromkeys(commits)), "date": sessions[-1]["end"][:10] if sessions else ""}


@functools.cache
def _digest_of(file: Path, _changed: int) -> str:
    return digest_of(file)  # once, whatever number of cells is asked for


def command_of(run: Run) -> list[str]:
    """The words of a command that makes a run again, after `python`; of an unfolded cell, with its model.

    Raises UserError if the weights that it comes from are in no batch beside its own.
    """
    config, source, batches = run.config, run, run.path.resolve().parent.parent
    if weights := config.source or config.init_from:
        files = (f for f in sorted(batches.glob("*/*/vae.pth")) if _digest_of(f, f.stat().st_mtime_ns) == weights)
        if (file := next(files, None)) is None:
            raise UserError(f"--like: {run.path} comes from weights ({weights}) that no run in {batches} has")
        source = Run.open(file.parent)
    words = ["train.py", *own.from_copy(config.flags(without=BETAS), config.networks, run.path)]
    of_source = vars(source.config) if config.source else {**vars(config), **run.result.get("first_betas", {})}
    for layer in "yz":
        target = getattr(config, f"target_rate_{layer}")
        betas = {of_source[f"beta_{layer}"], of_source[f"beta_max_{layer}"]} - {None}
        betas |= {getattr(config, f"beta_{layer}")} if target is None else set()
        words += [f"--beta_{layer}", *map(str, sorted(betas))]
        words += [f"--target_rate_{layer}", str(target)] if target is not None else []
    words += ["--init_from", str(source.path)] if config.init_from else []
    words += ["--threads", str(session["threads"])] if (session := (run.result.get("sessions") or [None])[-1]) else []
    return [*words, "--force"] if source.result.get("collapsed") else words
