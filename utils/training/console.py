"""What train.py prints: settings and status before, a bar meanwhile, results on the test images after."""

import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from models import own
from models.build import build_model
from utils import locks
from utils.cli import next_command, wrapped, wrapped_command
from utils.config import FLAGS, MUONS_RATE, Config, what_differs
from utils.distributed import duration, is_first, progress
from utils.errors import UserError
from utils.runs import Run, runs_in

FORMAT = "{percentage:3.0f}%|{bar:16}| {desc} · {remaining} left"
# The settings that do not change what an epoch takes.
FREE = {"num_epochs", "warmup_epochs", "lr_schedule", "learning_rate", "optimizer", "init_from", "data_digest"}
FREE |= {"refine_epochs"}
HEADINGS = {"beta_y": 10, "beta_z": 10, "loss": 10, "ll": 10, "R(y|z)": 8, "R(z)": 8, "PSNR": 6, "seconds": 8}


def describe(configs: list[Config], device: torch.device, cells: list[Config]) -> None:
    """Has the first process print the settings of all trainings, tensor shapes, and how many parameters and cells."""
    if not is_first():
        return
    model = build_model(configs[0])
    lines = {name: " ".join(map(str, dict.fromkeys(getattr(c, name) for c in configs))) for name in FLAGS}
    lines["refine_epochs"] = cells[0].refine_epochs
    lines |= {"device": device, "shapes": f"x {configs[0].image_shape}, y {model.y_shape}, z {model.z_shape}"}
    lines |= {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "cells": len(cells)}
    for name, value in lines.items():
        print(wrapped(f"  {name:20s} {value}", indent=23), flush=True)
    config = configs[0]
    if config.optimizer == "muon" and config.sharing != 1 and config.learning_rate < MUONS_RATE / 3:
        print(f"note: --learning_rate {config.learning_rate:g} is small for Muon, whose usual one is {MUONS_RATE:g}")


def show_status(runs: list[Run], overwrite: bool, starts: Mapping[Path, Run]) -> int:
    """Prints where each run stands, and how long the rest takes at the speed of what is trained; returns 0.

    New runs in `starts`, by path, start from others.
    """
    if not runs:  # another process has them all
        return 0
    names, kinds, speeds, epochs_left = what_differs([run.config for run in runs]), Counter(), [], 0.0
    width = max(map(len, names))
    print(f"\n{runs[0].path if len(runs) == 1 else runs[0].path.parent}:")
    for run, name in zip(runs, names, strict=True):
        line, epochs, seconds = standing(run, starts.get(run.path))
        print(f"  {name:{width}s}  {line}")
        kinds[line.split()[0]] += 1
        if epochs and seconds:
            speeds.append(seconds / epochs)
        if overwrite:
            epochs_left += run.config.own_epochs
        elif not line.startswith("failed"):  # they are not trained again
            epochs_left += run.config.own_epochs - epochs
    speeds = speeds or speeds_of_others(runs[0])
    print(", ".join(f"{n} {kind}" for kind, n in kinds.items()), end="; all are trained anew; " if overwrite else "; ")
    if not epochs_left:
        print("nothing left to train")
    elif speeds:
        speed = median(speeds)
        print(f"{epochs_left:.4g} epochs left, about {duration(epochs_left * speed)} at {speed:.3g} s an epoch")
    else:
        print(f"{epochs_left:.4g} epochs left; how long they take shows once a cell has been trained")
    return 0


def speeds_of_others(run: Run) -> list[float]:
    """Seconds an epoch of the finished runs beside this one whose epochs are of the same work."""
    seconds = []
    for other in runs_in(run.path.parent)[0]:
        different = run.config.differs_in(other.config, "model", "training", "data")
        is_alike = FREE.issuperset(different) and run.config.is_conditioned == other.config.is_conditioned
        if is_alike and standing(other)[0] == "finished":
            seconds.append(standing(other)[2] / other.config.num_epochs)
    return seconds


def standing(run: Run, start: Run | None = None) -> tuple[str, float, float]:
    """Where a run stands, in words; the epochs of its own that it has been trained for, and the seconds that they took.

    A new one may continue another, its `start`; whatever else it starts from, its epochs are all to be trained.
    """
    try:
        line, total, epochs, seconds = run.status, run.config.last_epoch, 0.0, 0.0
        first = run.config.first_epoch
        if line == "finished":
            return line, run.config.own_epochs, run.result.get("seconds", 0.0)
        if line == "new" and start is not None and run.config.continues(start.config):
            epochs, seconds = start.config.num_epochs, start.result.get("seconds", 0.0)
            return f"new from epoch {epochs} of {total}", epochs, seconds
        if line == "failed":
            return f"failed at step {run.result['step']} of epoch {run.result['epoch']}", 0, 0
        if line == "unfinished":
            if run.checkpoints:
                state = run.read_state(run.checkpoints[0])
                epochs = state["epoch"] + state["step"] / max(1, len(state.get("history", ()))) - first
                seconds = state["seconds"]
            line = f"unfinished at epoch {first + math.floor(epochs)} of {total}"
        holder = locks.holder(run.path)
        return f"held by {holder}, {line}" if holder else line, epochs, seconds
    except UserError as e:
        return f"damaged: {e}", 0, 0


class GridBar:
    """The bar of several runs; it counts steps of single cells, those of earlier trainings as well.

    `trained` are the epochs that they have been trained for, by path.
    """

    def __init__(self, runs: list[Run], trained: Mapping[Path, float]):
        self.waiting = dict(trained)  # of the cells that have not begun here
        self.names = dict(zip([run.path for run in runs], what_differs([run.config for run in runs]), strict=True))
        self.cells, self.done, self.steps, self.bar = len(runs), 0, 0, None

    def begin(self, training) -> None:
        """A training begins or goes on."""
        first = training.config.first_epoch
        self.steps = training.steps * training.config.own_epochs
        if self.bar is None:
            often = {} if sys.stderr and sys.stderr.isatty() else {"miniters": training.steps}  # a line an epoch
            self.bar = progress(total=self.cells * self.steps, dynamic_ncols=True, bar_format=FORMAT, **often)
        for run in training.runs:
            self.waiting.pop(run.path, None)  # of halves it is gone
        self._jump(training, len(training.runs) * ((training.epoch - first) * training.steps + training.steps_done))
        self.show(training, math.nan)

    def update(self, steps: int) -> None:
        """So many steps of single cells have been made."""
        self.bar.update(steps)

    def _jump(self, training, steps: int) -> None:
        """Counts so many steps of the cells of now, and all those of others, without taking that for speed."""
        n = self.done * self.steps + steps + round(sum(self.waiting.values()) * training.steps)
        if not self.bar.disable:
            self.bar.initial += n - self.bar.n
            self.bar.last_print_n += n - self.bar.n
            self.bar.n = n

    def show(self, training, loss: float) -> None:
        """Says which cells are trained, the epochs that are done, and the loss, if it is finite."""
        first, last = self.done + 1, self.done + len(training.runs)
        text = f"epoch {training.epoch}/{training.config.last_epoch}"
        if first < last:
            text = f"cells {first} to {last} of {self.cells} · {text}"
        elif self.cells > 1:
            text = f"cell {first}/{self.cells}, {self.names[training.runs[0].path]} · {text}"
        if math.isfinite(loss):
            text += f" · loss {loss:.4g}"
        self.bar.set_description_str(text, refresh=False)

    def end(self, training) -> None:
        """A training is done: of several cells, a line for each."""
        self.done += len(training.runs)
        self._jump(training, 0)
        for run in training.written.values() if self.cells > 1 else ():
            t, seconds = run.result["test"], run.result["seconds"]
            rates = f"loss {t['loss']:.4g}, R(y|z) {t['kl_y']:.3g}, R(z) {t['kl_z']:.3g} nats"
            tqdm.write(f"finished: {self.names[run.path]} · {rates} · {duration(seconds)}")
            sys.stdout.flush()

    def skip(self, runs: list[Run]) -> None:
        """These cells are not trained here after all."""
        self.cells -= len(runs)
        for run in runs:
            del self.waiting[run.path]
        if self.bar is not None:
            self.bar.total = self.cells * self.steps

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


def summarise(runs: list[Run], rate_unit: str, runs_dir: str, data_dir: str, labelled: bool) -> None:
    """Prints the test results of all runs, and the commands that inspect and evaluate them.

    The evaluation of `labelled` images asks for a classifier.
    """
    several = len({run.config.seed for run in runs}) > 1
    print("\n" + f"{'seed':>10} " * several + " ".join(f"{text:>{width}}" for text, width in HEADINGS.items()))
    runs = [Run.open(run.path) if run.status != "new" else run for run in runs]  # with betas that were steered
    for run in runs:
        seed = f"{run.config.seed:10d} " * several
        print(f"{seed}{run.config.beta_y:10.5g} {run.config.beta_z:10.5g} {outcome(run)}")
    print("(test images; nats per image, PSNR in dB)")
    if any(run.config.has_target for run in runs):
        print_targets(runs, rate_unit)
    batch, config = runs[0].path.parent, runs[0].config
    print(f"\nThe run is in {runs[0].path}" if len(runs) == 1 else f"\nThe runs are in {batch}")
    if all((run.path / "samples.png").is_file() for run in runs):
        print("To look at: samples.png and reconstructions.png (originals above) in the folder of each run")
    print(f"To inspect: tensorboard --logdir {shlex.quote(str(batch))}")
    where = {"runs_dir": runs_dir, "data_dir": data_dir}
    words = ["--networks", str(own.file_of(config.networks)[0])] if config.networks else []
    command = next_command("eval_beta_grid.py", "--run_batch_name", config.run_batch_name, "--all", *words, **where)
    if labelled and not Path(runs_dir, "classifiers", config.data_name, "classifier.pth").exists():
        command = f"{next_command('train_classifier.py', *config.data_flags, **where)} && {command}"
    print(wrapped_command(f"To evaluate: {command}"))
    print_above_bound(runs)


def outcome(run: Run) -> str:
    """A run's results on the test images, or what became of it."""
    result, status = run.result, run.status
    if status == "finished" and result:
        t = result["test"]
        rates = f"{t['loss']:10.2f} {t['ll']:10.2f} {t['kl_y']:8.3f} {t['kl_z']:8.3f}"
        return f"{rates} {t['psnr'] or math.inf:6.2f} {result['seconds']:8.1f}"
    if status == "failed":
        terms = ", ".join(f"{k} {v}" for k, v in result["terms"].items())
        return f"failed at epoch {result['epoch']}, step {result['step']}: {terms}"
    return status


def print_above_bound(runs: list[Run]) -> None:
    """Prints how far the losses are above that of the best of all models, where it is known."""
    for run, name in zip(runs, what_differs([run.config for run in runs]), strict=True):
        test = run.result.get("test", {})
        if "above_bound" in test:
            excess, se = test["above_bound"], test["above_bound_se"]
            best = f"nats above the best possible loss on these images, {test['loss'] - excess:.2f}"
            print(f"{name}: " * (len(runs) > 1) + f"{excess:.2f} +- {se:.2f} {best}")


def print_targets(runs: list[Run], unit: str) -> None:
    """Prints the rates that were asked for beside those on the training and the test images."""
    several = len({run.config.seed for run in runs}) > 1
    print(f"\n{'':10}{'R(y|z)':^31}{'R(z)':^30}")
    print(f"{'seed' * several:>10}" + f"{'asked':>10} {'train':>9} {'test':>9} " * 2 + f"{'beta_y':>10} {'beta_z':>10}")
    nats = math.log(2) if unit == "bits" else 1.0
    for run in runs:
        config, result, line = run.config, run.result, f"{run.config.seed if several else '':>10}"
        if config.has_target and result.get("status") == "finished":
            for layer in "yz":
                target = getattr(config, f"target_rate_{layer}")
                line += f"{'-' if target is None else format(target / nats, '.4g'):>10} "
                line += "".join(f"{result[split][f'kl_{layer}'] / nats:9.3f} " for split in ("train", "test"))
            print(f"{line}{config.beta_y:10.5g} {config.beta_z:10.5g}")
    print(f"({unit} per image)")
