"""Trains on --dataset Gaussian, and prints how far above the least possible loss trainings end (known_plane.md).

python docs/known_plane.py      about seven hours of one core; killed, the same command goes on
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
    "Adam in place of Muon": ("Adam", "Muon"),
    "sharing": ("unfolded", "Muon"),
    "sharing, 64 epochs": ("unfolded, 64 epochs", "Muon, 64 epochs"),
    "LVAE in place of HVAE": ("LVAE, Muon", "Muon"),
    "sharing, LVAE": ("LVAE, unfolded", "LVAE, Muon"),
    "all of unfolded cells": ("unfolded", None),
    "all of unfolded cells, 64 epochs": ("unfolded, 64 epochs", None),
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
    """Test metrics of one of TRAININGS by cell, a list of those of its seeds."""
    cells = defaultdict(list)
    for run in runs_in(Path("runs", batch(name)))[0]:
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
    print("\nExcess, nats, over the cells that both have: how many, mean with its standard error over them, largest")
    for part, (name, other) in PARTS.items():
        shared = [cell for cell in tests[name] if other is None or cell in tests[other]]
        more = np.array([values(tests[name][cell], "above_bound").mean() for cell in shared])
        if other:
            more -= [values(tests[other][cell], "above_bound").mean() for cell in shared]
        error = more.std(ddof=1) / len(more) ** 0.5
        print(f"| {part} | {len(more)} | {more.mean():.2f} +- {error:.2f} | {more.max():.2f} |")


if __name__ == "__main__":
    main()
