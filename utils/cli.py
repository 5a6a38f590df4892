"""The command line: parsers whose errors are one line, and the flags that make a grid of Configs."""

import argparse
import dataclasses
import math
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from utils.config import Config

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$|-nan$", re.IGNORECASE)
NO_VALUE = "takes no value; give the flag to turn it on, leave it out otherwise"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names the flag."""

    def __init__(self, description: str, files: bool = True):
        self.files = files  # whether the script reads data sets and run folders
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
        )

        self._negative_number_matcher = NEGATIVE  # argparse's own takes -1e-3 for a flag

    def error(self, message: str):
        message = message.removeprefix("argument ")
        message = re.sub(r"invalid int value: (.*)", r"must be a whole number, got \1", message)
        message = re.sub(r"invalid float value: (.*)", r"must be a number, got \1", message)
        message = re.sub(r"ignored explicit argument (.*)", rf"{NO_VALUE}, got \1", message)
        raise UserError(message)

    def _check(self, argv: list[str]) -> None:
        """Raises UserError for what argparse would take in silence, or answer in words that do not name the flag."""
        given = [self._option_string_actions.get(a.split("=")[0]) for a in argv]
        for i, action in enumerate(given):
            flag = argv[i].split("=")[0]
            if action is not None and action.nargs == "+" and action in given[:i]:
                raise UserError(f"{flag}: given twice; several values go after one flag, {flag} A B")
            is_flag = flag.startswith("--")  # of no such name, which is told of later
            if action is None and not is_flag and i and given[i - 1] is not None and given[i - 1].nargs == 0:
                raise UserError(f"{argv[i - 1]}: {NO_VALUE}, got {argv[i]!r}")

    def _add_machine_flags(self):
        common = self.add_argument_group("machine")
        common.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if available, else cpu)")
        common.add_argument(
            "--threads",
            type=partial(whole, most=1024),
            help="CPU threads to compute with (default: OMP_NUM_THREADS, or as many as it may use cores)",
        )
        if not self.files:
            return
        common.add_argument(
            "--data_dir",
            default=default_data_dir(),
            help="folder of the data sets (default: $HIT_DATA_DIR, else data)",
        )
        common.add_argument("--runs_dir", default="runs", help="folder of the batches of runs (default: runs)")
        common.add_argument("--download", action="store_true", help="download a missing data set from its authors")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parses; arguments of white space (a backslash and a space ending a pasted command) are dropped."""
        self._add_machine_flags()
        argv = [a for a in (sys.argv[1:] if argv is None else argv) if not a.isspace()]
        self._check(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [f for f in self._option_string_actions if f.startswith("--")]
            raise UserError(f"{unknown[0]}: unknown argument{nearest(unknown[0].split('=')[0], flags)}")
        return args


def add_moved_flag(parser) -> None:
    """For scripts that read runs: where a folder of images is now."""
    parser.add_argument("--dataset", metavar="FOLDER", help="where the runs' folder of images is now, if it has moved")


def add_bench_flags(parser: Parser) -> None:
    """Adds the flags that the evaluation scripts share."""
    group = parser.add_argument_group("evaluation")
    add_moved_flag(group)
    group.add_argument(
        "--classifier_path", help="folder or weights of the classifier (default: runs/classifiers/<data set>)"
    )
    group.add_argument(
        "--y_samples",
        type=partial(whole, most=1000),
        default=4,
        help="samples of z that approximate q(y|x), for the mutual information of y (default: 4)",
    )
    group.add_argument("--force", action="store_true", help="recompute results that are up to date")


def next_command(*words: str, runs_dir: str, data_dir: str) -> str:
    """A command to paste: those words, and the flags of the folders that are not the defaults."""
    command = ["python", *words]
    if runs_dir != "runs":
        command += ["--runs_dir", runs_dir]
    if data_dir != default_data_dir():
        command += ["--data_dir", data_dir]
    return shlex.join(command)


def default_data_dir() -> str:
    """Where the data sets are, unless --data_dir says otherwise."""
    return os.environ.get("HIT_DATA_DIR", "data")


def whole(text: str, least: int = 1, most: int = 10**9) -> int:
    """A whole number within bounds, as a flag's value."""
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
    return int(text)


def whole_or_auto(text: str) -> int | None:
    """None for auto, or a whole number >= 1."""
    return None if text == "auto" else whole(text)


def positive(text: str) -> float:
    """A number > 0, as a flag's value."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def batch_folder(runs_dir: str, batch: str) -> Path:
    """The folder of a batch. Raises UserError for what cannot be its name."""
    if not batch or batch == "classifiers" or batch[0] == "." or set(batch) & set("/\\"):
        raise UserError(f"--run_batch_name: must be the name of a folder of runs in {runs_dir}, got {batch!r}")
    return Path(runs_dir) / batch


def add_config_flags(parser: Parser, grid: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> None:
    """A flag for each field of Config, or for some; those named in `grid` take several values."""
    from utils.config import FLAGS, Config, kind_of

    groups = {}
    if grid:
        add_target_flags(parser)
    for field in (f for f in dataclasses.fields(Config) if f.name in (only or FLAGS)):
        title, kind = field.metadata["part"], kind_of(field)
        group = groups.setdefault(title, parser.add_argument_group(title))
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            group.add_argument(f"--{field.name}", action="store_true", help=text)
            continue
        shown = {"default": field.default, "type": kind, "metavar": kind.__name__.upper()}
        if "choices" in field.metadata:
            shown["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        if field.name in grid:
            several = "; several values (or LO:HI:N, N log-spaced ones) make a grid"
            if kind is int:
                several = "; several values train the grid once for each"
            shown |= {"nargs": "+", "default": None, "type": axis if kind is float else int}
            text += several
        if field.default not in (None, ""):
            text += f" (default: {field.default})"
        group.add_argument(f"--{field.name}", help=text, **shown)


def axis(text: str) -> list[float]:
    """The values of a grid's axis: one number, or LO:HI:N for N log-spaced ones, to 8 decimals."""
    if ":" not in text:
        try:
            return [float(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number or LO:HI:N, got {text!r}") from None
    try:
        lo, hi, n = text.split(":")
        lo, hi, n = float(lo), float(hi), int(n)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or LO:HI:N, got {text!r}") from None
    if not (1e-6 <= lo < hi < math.inf and 2 <= n <= 1000):
        raise argparse.ArgumentTypeError(f"LO:HI:N needs 1e-6 <= LO < HI and N from 2 to 1000, got {text!r}")
    step = math.log10(hi / lo) / (n - 1)
    return [round(lo * 10 ** (step * k), 8) for k in range(n)]


def add_target_flags(parser: Parser) -> None:
    """Flags that ask for rates instead of betas."""
    group = parser.add_argument_group("rates instead of betas")
    for layer, rate in (("y", "R(y|z)"), ("z", "R(z)")):
        group.add_argument(
            f"--target_rate_{layer}",
            nargs="+",
            type=axis,
            metavar="RATE",
            help=f"{rate} wanted, in place of a beta_{layer}; several values, or LO:HI:N",
        )
    group.add_argument("--rate_unit", choices=("nats", "bits"), default="nats", help="of the targets (default: nats)")


def grid_configs(args: argparse.Namespace) -> list["Config"]:
    """The Config of every cell: all pairs of betas, for every seed, without duplicates.

    A rate that is asked for takes the place of its layer's beta, which is still to be found; with --multi_rate such
    cells are added to those of the betas.
    """
    from utils.config import FLAGS, Config

    settings = {name: getattr(args, name) for name in FLAGS}
    nats = math.log(2) if args.rate_unit == "bits" else 1.0

    def values(name):
        return [v for some in getattr(args, name) or [] for v in some]

    betas = {layer: [{f"beta_{layer}": b} for b in values(f"beta_{layer}") or [1.0]] for layer in "yz"}
    asked = {
        layer: [{f"target_rate_{layer}": round(r * nats, 8), **betas[layer][0]} for r in values(f"target_rate_{layer}")]
        for layer in "yz"
    }
    axes = [tuple(betas.values())] if args.multi_rate or not any(asked.values()) else []
    axes += [tuple(asked[layer] or betas[layer] for layer in "yz")] if any(asked.values()) else []
    seeds = args.seed or [Config.seed]
    cells = [
        Config(**settings | of_y | of_z | {"seed": seed})
        for ys, zs in axes
        for seed in seeds
        for of_y in ys
        for of_z in zs
    ]
    return list(dict.fromkeys(cells))
