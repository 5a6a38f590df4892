"""What train.py prints before and after: settings, test results, and the rates that were asked for."""

import math
import shlex
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from models.build import build_model
from utils import locks
from utils.cli import next_command
from utils.config import FLAGS, Config
from utils.distributed import duration
from utils.errors import UserError
from utils.names import what_differs
from utils.runs import Run, runs_in


def describe(configs: list[Config], device: torch.device) -> None:
    """Prints the settings of all cells, the tensor shapes and the number of parameters."""
    for name in FLAGS:
        values = list(dict.fromkeys(getattr(c, name) for c in configs))
        print(f"  {name:20s}", *values)
    model = build_model(configs[0])
    print(f"  {'device':20s} {device}")
    print(f"  {'shapes':20s} x {configs[0].image_shape}, y {model.y_shape}, z {model.z_shape}")
    print(f"  {'parameters':20s} {sum(p.numel() for p in model.parameters()):,}")
    print(f"  {'cells':20s} {len(configs)}", flush=True)


def show_status(runs: list[Run], overwrite: bool) -> None:
    """Prints where each run stands, and how long the rest takes at the speed of what is trained."""
    if not runs:  # another process has them all
        return
    names, lines, left, speeds = what_differs([run.config for run in runs]), [], 0.0, []
    for run in runs:
        line, epochs, seconds = standing(run)
        lines.append(line)
        if epochs and seconds:
            speeds.append(seconds / epochs)
        failed = line.startswith("failed")  # they are not trained again
        left += run.config.num_epochs if overwrite else 0 if failed else run.config.num_epochs - epochs
    speeds = speeds or of_others(runs[0])
    width = max(map(len, names))
    print(f"\n{runs[0].path if len(runs) == 1 else runs[0].path.parent}:")
    for name, line in zip(names, lines, strict=True):
        print(f"  {name:{width}s}  {line}")
    kinds = Counter(line.split()[0] for line in lines)
    print(", ".join(f"{n} {kind}" for kind, n in kinds.items()) + "; all are trained anew" * overwrite, end="; ")
    if not left:
        print("nothing left to train")
    elif speeds:
        print(f"{left:.4g} epochs left, about {duration(left * median(speeds))} at {median(speeds):.3g} s an epoch")
    else:
        print(f"{left:.4g} epochs left; how long they take shows once a cell has been trained")


def of_others(run: Run) -> list[float]:
    """Seconds an epoch of the finished runs beside this one that differ in betas, seed and schedule at most."""
    seconds, free = [], {"num_epochs", "warmup_epochs", "lr_schedule", "learning_rate", "optimizer", "init_from"}
    for other in runs_in(run.path.parent)[0]:
        try:
            alike = set(run.config.differs_in(other.config, "model", "training", "data")) <= free | {"data_digest"}
            if alike and other.status == "finished":
                seconds.append(other.result["seconds"] / other.config.num_epochs)
        except (UserError, KeyError):  # a damaged one
            continue
    return seconds


def standing(run: Run) -> tuple[str, float, float]:
    """Where a run stands, in words; the epochs that it has been trained for, and the seconds that they took."""
    try:
        status, total, held = run.status, run.config.num_epochs, locks.holder(run.path)
        if status == "finished":
            return status, total, run.result.get("seconds", 0.0)
        if status == "failed":
            result = run.result
            return f"failed at step {result['step']} of epoch {result['epoch']}", 0, 0
        epochs, seconds, line = 0.0, 0.0, status
        if status == "unfinished":
            if state := run.peek():
                epochs = state["epoch"] + state["step"] / max(1, len(state.get("history", ())))
                seconds = state["seconds"]
            line = f"unfinished at epoch {math.floor(epochs)} of {total}"
        return (f"held by {held}, {line}" if held else line), epochs, seconds
    except UserError as e:
        return f"damaged: {e}", 0, 0


def summarise(runs: list[Run], rate_unit: str, runs_dir: str, data_dir: str) -> None:
    """Prints the test results of all runs, and the commands that inspect and evaluate them."""
    headings = dict(beta_y=10, beta_z=10, loss=10, ll=10) | {"R(y|z)": 8, "R(z)": 8, "PSNR": 6, "seconds": 8}
    print("\n" + " ".join(f"{text:>{width}}" for text, width in headings.items()))
    runs = [Run.open(run.path) if run.status != "new" else run for run in runs]  # with the betas that were found
    for run in runs:
        result, status = run.result, run.status
        line = f"{run.config.beta_y:10.5g} {run.config.beta_z:10.5g} "
        if status == "finished" and result:
            t = result["test"]
            line += f"{t['loss']:10.2f} {t['ll']:10.2f} {t['kl_y']:8.3f} {t['kl_z']:8.3f} {t['psnr'] or math.inf:6.2f} "
            line += f"{result['seconds']:8.1f}"
        elif status == "failed":
            terms = ", ".join(f"{k} {v}" for k, v in result["terms"].items())
            line += f"failed at epoch {result['epoch']}, step {result['step']}: {terms}"
        else:
            line += status
        print(line)
    print("(test images; nats per image, PSNR in dB)")
    if any(run.config.has_target for run in runs):
        print_targets(runs, rate_unit)
    place = f"The run is in {runs[0].path}" if len(runs) == 1 else f"The runs are in {runs[0].path.parent}"
    print(f"\n{place}")
    if all((run.path / "samples.png").is_file() for run in runs):
        print("To look at: samples.png and reconstructions.png (originals above) in the folder of each run")
    print(f"To inspect: python -m utils.board {shlex.quote(str(runs[0].path.parent))}")
    config, where = runs[0].config, {"runs_dir": runs_dir, "data_dir": data_dir}
    command = next_command("eval_beta_grid.py", "--run_batch_name", config.run_batch_name, "--all", **where)
    if not Path(runs_dir, "classifiers", config.data_name, "classifier.pth").exists():  # which step 1 asks for
        command = next_command("train_classifier.py", *config.data_flags, **where) + " && " + command
    print(f"To evaluate: {command}")


def print_targets(runs: list[Run], unit: str) -> None:
    """Prints the rates that were asked for beside those on the training and the test images."""
    print(f"\n{'':10}{'R(y|z)':^31}{'R(z)':^30}")
    print(f"{'':10}" + f"{'asked':>10} {'train':>9} {'test':>9} " * 2 + f"{'beta_y':>10} {'beta_z':>10}")
    nats = math.log(2) if unit == "bits" else 1.0
    for run in runs:
        config, result = run.config, run.result
        if config.has_target and result.get("status") == "finished":
            line = " " * 10
            for layer in "yz":
                asked = getattr(config, f"target_rate_{layer}")
                line += f"{'-' if asked is None else format(asked / nats, '.4g'):>10} "
                line += "".join(f"{result[split][f'kl_{layer}'] / nats:9.3f} " for split in ("train", "test"))
            print(f"{line}{config.beta_y:10.5g} {config.beta_z:10.5g}")
    print(f"({unit} per image)")
