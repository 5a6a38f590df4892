"""Trains on --dataset Gaussian, and prints how far above the least possible loss trainings end (known_plane.md).

python docs/known_plane.py      about eight hours of one core; killed, the same command goes on
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets.table import optimum  # noqa: E402
from utils.config import Config  # noqa: E402
from utils.runs import runs_in  # noqa: E402

ADAM, MUON, MULTI_RATE = ["--optimizer", "adam", "--learning_rate", "2e-3"], [], ["--multi_rate", "--force"]
THREE, FIVE, SEEDS = ["0.1:10:3"], ["0.1:10:5"], ["1", "2", "3"]
TRAININGS = {  # by heading: the model, epochs, how, values of each beta, seeds
    "Adam": ("HVAE", 16, ADAM, THREE, SEEDS),
    "Muon": ("HVAE", 16, MUON, FIVE, SEEDS),
    "unfolded": ("HVAE", 16, MULTI_RATE, FIVE, SEEDS),
    "Muon, 64 epochs": ("HVAE", 64, MUON, THREE, SEEDS[:1]),
    "unfolded, 64 epochs": ("HVAE", 64, MULTI_RATE, FIVE, SEEDS[:1]),
    "LVAE, Muon": ("LVAE", 16, MUON, FIVE, SEEDS[:1]),
    "LVAE, unfolded": ("LVAE", 16, MULTI_RATE, FIVE, SEEDS[:1]),
}
PARTS = {  # what an excess is made of: by how much one is above another, or above the least possible loss
    "architecture, at most": ("Muon, 64 epochs", None),
    "training for 16 epochs, not 64": ("Muon", "Muon, 64 epochs"),
    "sharing": ("unfolded", "Muon"),
    "all, of unfolded cells": ("unfolded", None),
    "Adam in place of Muon": ("Adam", "Muon"),
    "64 epochs: sharing": ("unfolded, 64 epochs", "Muon, 64 epochs"),
    "64 epochs: all, of unfolded cells": ("unfolded, 64 epochs", None),
    "LVAE: architecture and training": ("LVAE, Muon", None),
    "LVAE: sharing": ("LVAE, unfolded", "LVAE, Muon"),
    "LVAE: all, of unfolded cells": ("LVAE, unfolded", None),
}


def flags(name: str) -> list[str]:
    """Of train.py, for one of TRAININGS."""
    model, epochs, how, betas, seeds = TRAININGS[name]
    grid = ["--beta_y", *betas, "--beta_z", *betas, "--seed", *seeds, "--run_batch_name", batch(name)]
    return ["--dataset", "Gaussian", "--vae_type", model, "--num_epochs", str(epochs), *how, *grid]


def batch(name: str) -> str:
    """The batch of one of TRAININGS."""
    return "known_plane_" + name.replace(", ", "_").replace(" ", "_")


def results(name: str) -> dict[tuple[float, float], list[dict[str, float]]]:
    """Test metrics of one of TRAININGS by cell, a list of those of its seeds in their order."""
    cells = defaultdict(list)
    for run in sorted(runs_in(Path("runs", batch(name)))[0], key=lambda run: run.config.seed):
        if not run.config.is_conditioned:
            cells[round(run.config.beta_y, 4), round(run.config.beta_z, 4)].append(run.result["test"])
    return cells


def values(of_seeds: list[dict], name: str) -> np.ndarray:
    """A metric of a cell's seeds, (S,)."""
    return np.array([test[name] for test in of_seeds])


def with_error(of_seeds: list[dict]) -> str:
    """A cell's excess, nats, with the standard error over seeds, or of one seed over its test images."""
    excess = values(of_seeds, "above_bound")
    error = excess.std(ddof=1) / len(excess) ** 0.5 if len(excess) > 1 else of_seeds[0]["above_bound_se"]
    return f"{excess.mean():.2f} +- {error:.2f}"


def rates(of_seeds: list[dict]) -> str:
    """A cell's R(y|z) and R(z), nats."""
    return " + ".join(f"{values(of_seeds, rate).mean():.1f}" for rate in ("kl_y", "kl_z"))


def part(of: dict[tuple, list[dict]], other: dict[tuple, list[dict]] | None, cells: list[tuple]) -> str:
    """The excess of cells, or by how much it is above another one's, nats: mean with the error over seeds, largest."""
    both = [of] if other is None else [of, other]
    if not all(cell in tests for cell in cells for tests in both):
        return ""
    more, *less = (np.array([values(tests[cell], "above_bound") for cell in cells]) for tests in both)  # (cells, seeds)
    for of_other in less:
        alike = more.shape == of_other.shape
        more = more - of_other if alike else (more.mean(1) - of_other.mean(1))[:, None]
    of_seeds = more.mean(0)
    error = f" +- {of_seeds.std(ddof=1) / len(of_seeds) ** 0.5:.2f}" if len(of_seeds) > 1 else ""
    return f"{of_seeds.mean():.2f}{error}, {more.mean(1).max():.2f}"


def main() -> None:
    """Trains what is not there yet, and prints the excess, the rates, and what the excess is made of."""
    for name in TRAININGS:
        subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(name)], check=True)
    tests = {name: results(name) for name in TRAININGS}
    for text, least, heading in ((with_error, "loss", "least loss"), (rates, "rate", "R at least loss")):
        print(f"\n| beta_y, beta_z | {heading} | {' | '.join(tests)} |\n|---|" + "---:|" * (1 + len(tests)))
        for y, z in sorted(tests["unfolded"]):
            best = getattr(optimum(Config(dataset="Gaussian", beta_y=y, beta_z=z)), least)
            of_cell = (text(of[y, z]) if (y, z) in of else "" for of in tests.values())
            print(f"| {y:.3g}, {z:.3g} | {best:.2f} | {' | '.join(of_cell)} |")
    print("\n| part of the excess: mean, largest | nine cells | all 25 |\n|---|---:|---:|")
    for heading, (name, other) in PARTS.items():
        parts = (part(tests[name], tests.get(other), [*cells]) for cells in (tests["Adam"], tests["unfolded"]))
        print(f"| {heading} | {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
