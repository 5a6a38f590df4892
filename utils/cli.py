"""The command line: parsers whose errors are one line, and the flags that make a grid of Configs."""

import argparse
import dataclasses
import math
import os
import re
import shlex
import sys
import textwrap
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

from models import own
from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from utils.config import Config


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names the flag."""

    def __init__(self, description: str, files: bool = True):
        self.files = files  # whether the script reads data sets and run folders
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(description=description, allow_abbrev=False, formatter_class=layout)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for a flag

    def error(self, message: str):
        message = re.sub("invalid int value:", "must be a whole number, got", message.removeprefix("argument "))
        raise UserError(re.sub("invalid (float|positive) value:", "must be a number, got", message))

    def _add_machine_flags(self):
        flag = self.add_argument_group("machine").add_argument
        flag("--device", help="cuda, cuda:1, cpu (default: cuda if available, else cpu)")
        threads = "CPU threads to compute with (default: OMP_NUM_THREADS, or as many as it may use cores)"
        flag("--threads", type=partial(whole, most=1024), help=threads)
        if self.files:
            data_dir = "folder of the data sets (default: $HIT_DATA_DIR, else data)"
            flag("--data_dir", default=default_data_dir(), help=data_dir)
            flag("--runs_dir", default="runs", help="folder of the batches of runs (default: runs)")
            flag("--download", action="store_true", help="download a missing data set from its authors")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parses. White space around arguments goes (pasted commands, lines of Windows), `~` is the home.

        Raises UserError for what is wrong, and for a list of values given twice, of which the last would count.
        """
        self._add_machine_flags()
        argv = [a.strip("\r\n") for a in (sys.argv[1:] if argv is None else argv) if not a.isspace()]
        argv = [re.sub("(?<==)~.*|^~.*", lambda path: os.path.expanduser(path[0]), a) for a in argv]
        flags = [a.partition("=")[0] for a in argv if a.startswith("--")]
        for flag, action in self._option_string_actions.items():
            if action.nargs == "+" and flags.count(flag) > 1:
                raise UserError(f"{flag}: given twice; several values go after one flag, {flag} A B")
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        name = unknown[0].partition("=")[0]
        if name.startswith("-"):
            raise UserError(f"{name}: unknown argument{nearest(name, self._option_string_actions)}")
        before = ["arguments", *(a for a in argv[: argv.index(unknown[0])] if a.startswith("--"))]
        raise UserError(f"{before[-1]}: too many values, got {unknown[0]!r}")


def add_run_flags(parser) -> None:
    """For scripts that read runs: what these need that is in no run folder, or does not run from there."""
    parser.add_argument("--dataset", metavar="PATH", help="where the runs' own images are now, if they have moved")
    networks = "the files of the runs' own networks"
    parser.add_argument("--networks", nargs="+", type=own.given, metavar="FILE", help=networks)


def add_bench_flags(parser: Parser) -> None:
    """Adds the flags that the evaluation scripts share."""
    group = parser.add_argument_group("evaluation")
    add_run_flags(group)
    classifier = "folder or weights of the classifier (default: runs/classifiers/<data set>)"
    group.add_argument("--classifier_path", help=classifier)
    samples = "samples of z that approximate q(y|x), for the mutual information of y (default: 4)"
    group.add_argument("--y_samples", type=partial(whole, most=1000), default=4, help=samples)
    group.add_argument("--force", action="store_true", help="recompute results that are up to date")


def wrapped(text: str, width: int = 100, indent: int = 0) -> str:
    """A text for a terminal of so many columns, indented from its second line on."""
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def wrapped_command(command: str) -> str:
    """A command on lines of at most 100 columns, to paste."""
    together = re.sub(" (?!--)", "\0", command)  # a flag and its values
    return wrapped(together, 98, indent=4).replace("\n", " \\\n").replace("\0", " ")


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
    return os.path.expanduser(os.environ.get("HIT_DATA_DIR", "data"))


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
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return float(text)


def at_least_0(text: str) -> float:
    """A number >= 0, as a flag's value."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text!r}")
    return float(text)


def axis(text: str) -> list[float]:
    """The values of a grid's axis: one number, or LO:HI:N for N log-spaced ones, to 8 decimals."""
    try:
        if ":" not in text:
            return [float(text)]
        low, high, n = text.split(":")
        low, high, n = float(low), float(high), int(n)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or LO:HI:N, got {text!r}") from None
    if not (1e-6 <= low < high < math.inf and 2 <= n <= 1000):
        raise argparse.ArgumentTypeError(f"LO:HI:N needs 1e-6 <= LO < HI and N from 2 to 1000, got {text!r}")
    step = math.log10(high / low) / (n - 1)
    exact = [low * 10 ** (step * k) for k in range(n)]
    return next(values for d in (8, 12, 16, 20) if len({*(values := [round(value, d) for value in exact])}) == n)


def batch_folder(runs_dir: str, batch: str) -> Path:
    """The folder of a batch. Raises UserError for what cannot be its name."""
    if not batch or batch == "classifiers" or batch[0] == "." or set(batch) & set("/\\"):
        raise UserError(f"--run_batch_name: must be the name of a folder of runs in {runs_dir}, got {batch!r}")
    return Path(runs_dir) / batch


def add_config_flags(parser: Parser, only: tuple[str, ...] = ()) -> None:
    """A flag for each field of Config that has one, several values of betas and seeds, and rates; or some fields'."""
    from utils.config import FLAGS, Config, kind_of

    groups = {}
    if not only:
        _add_rate_flags(parser)
    for field in (f for f in dataclasses.fields(Config) if f.name in (only or FLAGS)):
        title, kind, choices = field.metadata["part"], kind_of(field), field.metadata.get("choices")
        group = groups.setdefault(title, parser.add_argument_group(title))
        text = field.metadata["help"].replace("%", "%%")
        name = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        how = {"default": field.default, "type": kind, "metavar": name}
        if kind is bool:
            how = {"action": "store_true"}
        elif field.name == "seed":
            how |= {"nargs": "+", "default": None}
            text += "; several values train the grid once for each"
        elif field.name in ("beta_y", "beta_z"):
            how |= {"nargs": "+", "default": None, "type": axis}
            text += "; several values (or LO:HI:N, N log-spaced ones) make a grid"
        elif field.name == "networks":
            how |= {"type": own.named, "metavar": "FILE:CLASS"}
        if kind is not bool and field.default not in (None, ""):
            text += f" (default: {field.default})"
        group.add_argument(f"--{field.name}", help=text, **how)


def _add_rate_flags(parser: Parser) -> None:
    group = parser.add_argument_group("rates instead of betas")
    for layer, rate in (("y", "R(y|z)"), ("z", "R(z)")):
        text = f"{rate} wanted, in place of a beta_{layer}; several values, or LO:HI:N"
        group.add_argument(f"--target_rate_{layer}", nargs="+", type=axis, metavar="RATE", help=text)
    group.add_argument("--rate_unit", choices=("nats", "bits"), default="nats", help="of the targets (default: nats)")


def grid_configs(args: argparse.Namespace) -> list["Config"]:
    """The Config of every cell: all pairs of betas, for every seed, without duplicates.

    A target rate takes the place of its layer's beta, which is still to be found; with --multi_rate such cells are
    added to those of the betas.
    """
    from utils.config import FLAGS, Config

    settings = {name: getattr(args, name) for name in FLAGS}
    nats = math.log(2) if args.rate_unit == "bits" else 1.0
    betas, axes = [], []
    for layer in "yz":
        beta, rate = f"beta_{layer}", f"target_rate_{layer}"
        values, targets = (list(chain(*(getattr(args, name) or []))) for name in (beta, rate))
        betas.append([{beta: value} for value in values or [1.0]])
        axes.append([{rate: round(target * nats, 8), **betas[-1][0]} for target in targets] or betas[-1])
    grids = [betas, axes] if args.multi_rate else [axes]
    cells = [
        Config(**settings | y | z | {"seed": seed})
        for (ys, zs), seed in product(grids, args.seed or [Config.seed])
        for y, z in product(ys, zs)
    ]
    return list(dict.fromkeys(cells))
