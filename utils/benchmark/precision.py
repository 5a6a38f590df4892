"""The effect of the precision on the test metrics, compared with the effect of the seed."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from models.stack import TERMS
from utils.errors import UserError
from utils.runs import Run


def precision(args: argparse.Namespace) -> None:
    """Prints test metrics of finished runs by precision, with their spread over seeds, and differences from fp32.

    Raises UserError if fewer than two seeds have fp32 runs, or if the runs differ in other settings.
    """
    folder = Path(args.runs or "")
    runs = [Run.open(p.parent) for p in sorted(folder.glob("*/config.json"))] if args.runs else []
    runs = [run for run in runs if run.status == "finished" and run.result]
    metrics, names = {}, (*TERMS, "psnr")
    for run in runs:
        c = run.config
        test = [run.result["test"][name] for name in names]
        metrics.setdefault((c.beta_y, c.beta_z), {}).setdefault(c.precision, {})[c.seed] = np.array(test, float)
    free = {"beta_y": 1.0, "beta_z": 1.0, "seed": 0, "precision": "fp32", "run_name": ""}
    if len({dataclasses.replace(run.config, **free) for run in runs}) > 1:
        raise UserError(f"{folder}: holds runs that differ in more than betas, seed and precision")
    metrics = {betas: by for betas, by in metrics.items() if len(by.get("fp32", ())) > 1}
    if not metrics:
        raise UserError("precision: needs a folder of finished runs, with fp32 runs of several seeds, e.g. runs/BATCH")
    print(f"{'beta_y':>8} {'beta_z':>8} {'':12} {'n':>3}" + "".join(f" {name:>20}" for name in names))

    def line(betas, name, values, spread):
        cells = "".join(f" {m:10.3f} +- {s:6.3f}" for m, s in zip(np.mean(values, 0), spread, strict=True))
        print(f"{betas[0]:8.4g} {betas[1]:8.4g} {name:12} {len(values):3}{cells}")

    for betas, by in sorted(metrics.items()):
        for name in sorted(by, key=lambda name: (name != "fp32", name)):
            values = [*by[name].values()]
            line(betas, name, values, np.std(values, 0, ddof=1) if len(values) > 1 else np.full(len(names), np.nan))
            differences = [by[name][seed] - by["fp32"][seed] for seed in by[name] if seed in by["fp32"]]
            if name != "fp32" and len(differences) > 1:
                line(betas, " - fp32", differences, np.std(differences, 0, ddof=1) / len(differences) ** 0.5)
    print("(mean +- standard deviation over seeds; ` - fp32`: mean +- standard error of the difference per seed;")
    print(" test images, nats per image, psnr in dB)")
