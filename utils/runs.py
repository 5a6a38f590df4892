"""Run folders: their files, their status, their checkpoints.

config.json     the run's Config
networks.py     a copy of the file of its own networks, if it has some
vae.pth         the trained weights: the model's state_dict, nothing else
training.json   how the training ended, "finished", or "failed" with epoch and step, and what made it
adam.pth        once finished: Adam's moments, with which more epochs go on as if they had never ended
resume.pth      while unfinished: weights, optimiser and position (resume.prev.pth: the one before)
events.out.*    TensorBoard
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models import own
from models.build import build_model
from models.stack import TERMS
from utils.config import Config
from utils.errors import UserError
from utils.files import check_writable, load_tensors, read_json, save_tensors, write_atomic, write_json, write_text
from utils.locks import locked

FORMAT = 1  # of checkpoints; those from before it was counted lack `sessions`, what made them (provenance.py)
CHECKPOINTS = ("resume.pth", "resume.prev.pth")  # a kill between the two renames of a save leaves the latter alone

# The paper's layer names (their stems, for numbered ones) in the order in which our models define theirs.
ORDER = [
    *("qz_conv1", "qz_conv2", "qz_conv2_dy", "qz_conv3", "qz_convs", "qz_convs_dy", "qz_convs_dz"),
    *("qz_mu", "qz_pre_sp", "qz_logit"),
    *("qy_conv1_x", "qy_conv2_x", "qy_conv_x", "qy_l1_z", "qy_conv1_z", "qy_deconv_z", "qy_conv1_zx", "qy_convs_zx"),
    *("qy_conv1_dy", "qy_convs_dy", "qy_mu", "qy_pre_sp"),
    *("py_l1", "py_mu", "py_pre_sp", "py_deconvs"),
    *("px_l1", "px_conv1", "px_convs", "px_conv2", "px_conv3", "px_deconvs"),
]
LAYER = re.compile(r"(q[zy]|p[xy])_\w+(\.\d+)?")


class OtherVersion(UserError):
    """A file was written by a newer version of this code."""


@dataclass(frozen=True)
class Run:
    """A run folder and its Config."""

    path: Path
    config: Config

    @classmethod
    def of(cls, config: Config, runs_dir: str) -> "Run":
        """Where the run of that Config is, or will be."""
        return cls(Path(runs_dir) / config.run_batch_name / config.folder_name, config)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run, ours or of the paper's code. Raises UserError naming the file that is wrong."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json there, so not a run folder")
        return cls(path, Config.from_json(path / "config.json"))

    @property
    def status(self) -> str:
        """Where the training stands: "new", "unfinished", "finished" or "failed"."""
        if not (self.path / "config.json").exists():
            return "new"
        if (self.path / "resume.pth").exists() or not (self.path / "vae.pth").exists():
            return "unfinished"
        return self.result.get("status", "finished")  # the paper's code leaves no training.json

    @property
    def result(self) -> dict:
        """What training.json holds; empty while there is none."""
        path = self.path / "training.json"
        result = read_json(path) if path.exists() else {}
        is_right = isinstance(result.get("train", {}), dict) and isinstance(result.get("status", ""), str)
        if not is_right or not _are_sessions(result.get("sessions", [])):
            raise UserError(f"{path}: damaged; remove it, the run counts as finished without it")
        return result

    def check(self, overwrite: bool) -> None:
        """Raises UserError if the folder cannot be written, or holds another configuration to be kept."""
        if not overwrite and self.status != "new":
            self._check_config(Config.from_json(self.path / "config.json"))
        elif not overwrite and self.path.is_dir() and any(p.name[0] != "." for p in self.path.iterdir()):
            raise UserError(f"{self.path}: holds files but no config.json; remove it, or --overwrite it")
        check_writable(self.path)

    def _check_config(self, theirs: Config) -> None:
        if theirs.data_digest not in (None, self.config.data_digest):
            raise UserError(
                f"{self.path}: trained on other images by the name of {self.config.data_name}; "
                "choose another --run_batch_name, or --overwrite it"
            )
        if theirs.networks != self.config.networks:
            raise UserError(
                f"{self.path}: trained with --networks of {theirs.networks}, whose copy is {own.COPY} there, not of "
                f"{self.config.networks}; choose another --run_name or --run_batch_name, or --overwrite it"
            )
        # a folder may be renamed, and say nothing of its images; `sharing` is that of the version
        free = {"run_batch_name", "data_digest", "sharing"}
        free |= {f"beta_{n}" for n in "yz" if getattr(theirs, f"target_rate_{n}") is not None}  # steered
        different = [f"--{n} {getattr(theirs, n)}" for n in self.config.differs_in(theirs) if n not in free]
        if different:
            raise UserError(
                f"{self.path}: exists with another configuration ({', '.join(different)}); "
                "choose another --run_name or --run_batch_name, or --overwrite it"
            )

    def create(self) -> None:
        """Makes the folder and its config.json, where they are not there yet."""
        if not (self.path / "config.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config()
        self.keep_networks()

    def locked(self, patience: float = 0.0) -> contextlib.AbstractContextManager:
        """Holds the folder for this process; see utils/locks.py."""
        return locked(self.path, patience)

    def with_settings(self, **settings) -> "Run":
        """The run with some settings changed."""
        return Run(self.path, dataclasses.replace(self.config, **settings))

    def of_data(self, data, source: "Run | None" = None) -> "Run":
        """The run with the digest of the Data that it is trained on, as it has it, or the one that it continues."""
        exists = (self.path / "config.json").exists()
        stored = Config.from_json(self.path / "config.json") if exists else source and source.config
        is_listed = stored is not None and stored.data_digest is not None and stored.data_digest == data.listed
        return self.with_settings(data_digest=data.listed if is_listed else data.digest)

    def new_model(self) -> nn.Module:
        """Its model, with new weights. Raises UserError for own networks whose file has not been named."""
        if not own.is_given(self.config.networks):
            others = "".join(f"; {path} is of {of_file}" for of_file, (path, _) in own.FILES.items())
            raise UserError(
                f"{self.path}: made with own networks, {self.config.networks}; add --networks FILE, with their file, "
                f"or with its copy there, {own.COPY}: neither runs unless you name it{others}"
            )
        return build_model(self.config)

    def write_config(self) -> None:
        """Writes the configuration anew."""
        write_text(self.path / "config.json", self.config.to_json())

    def keep_networks(self) -> None:
        """Writes a copy of the file of its own networks, if it has some and there is none yet."""
        if self.config.networks and not (self.path / own.COPY).exists():
            write_atomic(self.path / own.COPY, own.file_of(self.config.networks)[1])

    def restart(self) -> None:
        """Removes all that training and evaluation wrote, and writes the configuration anew."""
        for file in self.path.iterdir():
            if file.name != "config.json" and not file.name.startswith(".lock"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.write_config()
        self.keep_networks()

    def save_state(self, state: dict) -> None:
        """Writes a checkpoint, and keeps the previous one."""
        path, written = self.path / "resume.pth", self.path / ".resume.tmp"
        save_tensors(written, state)
        if path.exists():
            os.replace(path, path.with_name("resume.prev.pth"))
        os.replace(written, path)

    def load_state(self) -> tuple[dict | None, list[str]]:
        """The newest undamaged checkpoint, None if there is none, and a line for each damaged one.

        Raises UserError if there are checkpoints and all are damaged.
        """
        problems = []
        for path in self.checkpoints:
            try:
                state = self.read_state(path)
                if problems:  # otherwise the next save would keep it as the previous one
                    (self.path / "resume.pth").unlink()
                return state, problems
            except OtherVersion:
                raise
            except UserError as e:
                problems.append(str(e))
        if problems:
            raise UserError(f"{'; '.join(problems)}; no undamaged checkpoint is left; --overwrite starts from scratch")
        return None, problems

    @property
    def checkpoints(self) -> list[Path]:
        """The files of its checkpoints, the newest first."""
        return [self.path / name for name in CHECKPOINTS if (self.path / name).exists()]

    def step_back(self, position: tuple[int, int]) -> dict | None:
        """Goes back to the previous checkpoint if that is at (epoch, step) = `position`; None if it is not."""
        previous = self.path / "resume.prev.pth"
        with contextlib.suppress(UserError):
            state = self.read_state(previous)
            if (state["epoch"], state["step"]) == position:
                os.replace(previous, self.path / "resume.pth")
                return state
        return None

    def read_state(self, path: Path) -> dict:
        """The checkpoint in a file of its folder. Raises UserError if it is damaged, or of another model.

        That of a finished training, adam.pth, is completed by the weights.
        """
        state = load_tensors(path)
        if type(version := state.get("format")) is int and version > FORMAT:
            raise OtherVersion(f"{path}: saved by newer code (format {version}, not {FORMAT}); use that")
        if path.name == "adam.pth":
            ended = {"epoch": self.config.num_epochs, "step": 0, "seconds": self.result.get("seconds", 0.0)}
            state |= {**ended, "weights": load_tensors(self.path / "vae.pth")}
        with torch.device("cpu" if self.config.networks else "meta"):  # own ones may compute with numbers
            layout = _layout(dict(self.new_model().named_parameters()))
        if not _is_state(state, layout):
            raise UserError(f"{path}: damaged, or the checkpoint of another model")
        return state

    def finish(self, weights: dict[str, torch.Tensor], result: dict, adam: dict | None = None) -> None:
        """Writes the weights, how the training ended and Adam's moments, if given; removes the checkpoints."""
        write_json(self.path / "training.json", result)
        if adam is not None:
            save_tensors(self.path / "adam.pth", adam)
        save_tensors(self.path / "vae.pth", weights)
        for name in reversed(CHECKPOINTS):  # in this order: it is unfinished as long as resume.pth is there
            (self.path / name).unlink(missing_ok=True)


def runs_in(batch: Path) -> tuple[list[Run], dict[Path, str]]:
    """The runs in a batch's folder, sorted by name, and what is wrong with the other folders there, by path."""
    runs, problems = [], {}
    for path in sorted(p for p in batch.glob("[!.]*") if p.name != "figures" and any(p.glob("[!.]*"))):
        try:
            runs.append(Run.open(path))
        except UserError as e:
            problems[path] = str(e)
    return runs, problems


def is_cell(path: Path) -> bool:
    """Whether a folder in a batch is a run to evaluate: neither figures, nor the model that cells are unfolded from."""
    try:
        return not Run.open(path).config.is_conditioned
    except UserError:
        return path.name != "figures"


def _are_sessions(values) -> bool:
    """Whether they are what provenance.py makes, as far as anything reads it."""
    kinds = {"commit": str | None, "clean": bool | None, "threads": int, "end": str}
    return isinstance(values, list) and all(
        isinstance(of_one, dict) and all(isinstance(of_one.get(name, ...), kind) for name, kind in kinds.items())
        for of_one in values
    )


def _layout(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


def _is_state(state: dict, layout: dict) -> bool:
    """Whether a training of a model with that layout can have saved it."""
    sessions = state.get("sessions", [])
    threads, spread = state.get("threads", 1), state.get("spread", 0.0)
    is_right = type(threads) is int and 1 <= threads <= 1024 and type(spread) is float and 0 <= spread <= 1
    try:
        is_right &= all(_layout(state[key]) == layout for key in ("weights", "exp_avg", "exp_avg_sq"))
        is_right &= all(type(state[key]) is int and state[key] >= 0 for key in ("adam_steps", "epoch", "step"))
        is_right &= math.isfinite(state["seconds"])
        is_right &= _are_sessions(sessions) and type(state.get("format", 0)) is int
        json.dumps(sessions, allow_nan=False)
        if "betas" in state:  # of a cell whose betas are steered
            is_right &= state["betas"].shape == state["log_rates"].shape == (2,)
        if state["step"]:  # within an epoch
            steps, n_terms = state["history"].shape
            is_right &= state["step"] < steps and n_terms == len(TERMS) and isinstance(state["noise"], torch.Tensor)
        return is_right
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # a value of another kind
        return False


def load_model(run: Run, device: torch.device) -> nn.Module:
    """The trained model of a run, in eval mode. Raises UserError naming the file that is wrong."""
    path = run.path / "vae.pth"
    if not path.exists():
        raise UserError(f"{path}: not there; the run is unfinished")
    state, model = _unwrapped(load_tensors(path)), run.new_model()
    try:
        if not all(t.is_floating_point() for t in state.values()):
            raise ValueError("not all of them are floating-point tensors")
        model.load_state_dict(_translated(state, model))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        why = f"or are of another version of the code ({' '.join(str(e).split())[:200]})"
        raise UserError(f"{path}: the weights do not fit {run.path}/config.json, {why}") from e
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"{path}: holds weights that are not finite")
    return model.to(device).eval()


def _unwrapped(state: dict) -> dict[str, torch.Tensor]:
    """The weights of a file that holds more, or the weights of a wrapped model (DataParallel, torch.compile)."""
    for name in ("state_dict", "model_state_dict"):
        if isinstance(state.get(name), dict):
            return _unwrapped(state[name])
    for prefix in ("module.", "_orig_mod."):
        if state and all(isinstance(name, str) and name.startswith(prefix) for name in state):
            return _unwrapped({name.removeprefix(prefix): t for name, t in state.items()})
    return state


def _translated(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A state_dict of the paper's code with the parameter names of `model`; any other is returned unchanged.

    Raises ValueError if its layers do not correspond to those of the model.
    """
    layers = {name.rpartition(".")[0] for name in state if name != "log_sigma"}
    if not layers or not all(LAYER.fullmatch(layer) for layer in layers):
        return state

    def position(layer: str) -> tuple[int, int]:
        stem, _, number = layer.partition(".")
        return ORDER.index(stem), int(number or 0)

    ours = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters() if "log_sigma" not in name)
    if len(ours) != len(layers):
        raise ValueError(f"{len(layers)} layers instead of {len(ours)}")
    pairs = list(zip(ours, sorted(layers, key=position), strict=True))
    renamed = {f"{our}.{part}": state[f"{their}.{part}"] for our, their in pairs for part in ("weight", "bias")}
    if "log_sigma" in state:
        renamed["likelihood.log_sigma"] = state["log_sigma"]
    return renamed
