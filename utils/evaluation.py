"""The evaluation of runs: what they share, what each has been evaluated for, and where the figures are kept.

A step's figures go into the run's metrics.json together with a fingerprint of what they were computed from, so that
the same command again computes only what is missing or stale. utils/steps.py has the steps.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets.loading import Data, load_data
from datasets.table import DATASETS
from models.classifiers import load_classifier
from utils.config import Config
from utils.errors import UserError
from utils.files import digest, digest_of, read_arrays, read_json, write_atomic, write_json
from utils.runs import Run, load_model
from utils.seeds import generator

BATCH = 256  # images at a time; fixed, since the noise is drawn batch by batch
PATIENCE = 60  # seconds to wait for another process that holds a run


class Step(NamedTuple):
    """A part of the evaluation: its figures' names, how they are computed, and the settings they depend on."""

    name: str
    columns: tuple[str, ...]
    compute: Callable[["Subject"], dict] | None
    settings: tuple[str, ...] = ()
    classifier: bool = False  # whether it depends on the data set's classifier
    file: str | None = None  # that it writes beside its figures
    metrics: tuple[str, ...] = ()  # figures of other steps that it depends on


@dataclass(eq=False)
class Bench:
    """What all runs of an evaluation share: settings, data, classifiers; and notes, each said once."""

    device: torch.device
    data_dir: str
    runs_dir: str
    download: bool = False
    classifier_path: str | None = None
    with_classifier: bool = False
    n_samples: int = 10_000
    iw_samples: int = 0
    y_samples: int = 4
    notes: set[str] = field(default_factory=set)
    _data: dict = field(default_factory=dict)
    _classifiers: dict = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}", flush=True)

    def data(self, config: Config) -> Data:
        key = (config.dataset, config.image_shape)
        if key not in self._data:
            self._data[key] = load_data(config, self.data_dir, self.device, self.download)
        return self._data[key]

    def classifier_of(self, config: Config) -> tuple[nn.Module, str] | None:
        """The classifier of a Config's data set and its digest; None, with a note, for images without labels.

        Raises UserError if there should be one and is none.
        """
        name = config.data_name
        if name not in self._classifiers:
            data = self.data(config) if config.dataset not in DATASETS else None
            if data is not None and not data.labelled:
                self.note(f"{name} has no labels: no inception score, recons_acc and the like")
                return None
            path = Path(self.classifier_path or Path(self.runs_dir) / "classifiers" / name)
            self._classifiers[name] = load_classifier(path, config, self.device, data and data.digest)
        return self._classifiers[name]


class Subject:
    """A run under evaluation; the model and its latents are loaded when first needed."""

    def __init__(self, run: Run, bench: Bench):
        self.run, self.config, self.bench = run, run.config, bench

    @functools.cached_property
    def weights_digest(self) -> str:
        return digest_of(self.run.path / "vae.pth")

    @functools.cached_property
    def model(self) -> nn.Module:
        return load_model(self.run, self.bench.device)

    @property
    def test(self):
        return self.bench.data(self.config).test

    def generator(self, *key) -> torch.Generator:
        return generator(self.bench.device, 0, *key)

    @property
    def metrics(self) -> dict:
        """What metrics.json holds of these weights; empty while there is nothing. Raises UserError if it is damaged."""
        known = metrics_of(self.run)
        return known if known.get("weights") == self.weights_digest else {}

    @functools.cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """latents.npz. Raises UserError if step 1 has not written it for these weights, or it is damaged."""
        path = self.run.path / "latents.npz"
        if digest_of(path) != self.metrics.get("files", {}).get(path.name, ""):
            raise UserError(f"{path}: missing, damaged or stale; run eval_beta_grid.py --exclude_mi first")
        return read_arrays(path)

    def forget(self) -> None:
        """Frees the memory of the model and the latents."""
        for name in ("model", "latents"):
            self.__dict__.pop(name, None)

    @torch.no_grad()
    def samples(self, name: str, consume: Callable[[Tensor], Tensor]) -> Tensor:
        """What `consume` gives for each batch of n_samples ancestral samples, together."""
        g, n = self.generator(name), self.bench.n_samples
        sizes = [min(BATCH, n - i) for i in range(0, n, BATCH)]
        return torch.cat([consume(self.model.sample(size, generator=g)) for size in sizes])


def fingerprint(s: Subject, step: Step) -> str:
    """Of all that the step's figures depend on: weights, settings, classifier, figures of other steps."""
    parts = {name: getattr(s.bench, name) for name in step.settings}
    parts |= {name: s.metrics.get(name) for name in step.metrics}
    if step.classifier and (found := s.bench.classifier_of(s.config)) is not None:
        parts["classifier"] = found[1]
    text = json.dumps([s.weights_digest, s.run.config.to_json(), parts], sort_keys=True)
    return digest(text.encode())


def is_done(s: Subject, step: Step) -> bool:
    """Whether metrics.json has the step's figures, of these weights and settings, and its file is there, whole."""
    known = s.metrics
    if known.get("steps", {}).get(step.name) != fingerprint(s, step):
        return False
    return step.file is None or known.get("files", {}).get(step.file) == digest_of(s.run.path / step.file)


def record(s: Subject, step: Step, results: dict) -> None:
    """Merges a step's figures into metrics.json, and writes its file.

    Figures of other weights are dropped. Those that are not finite are left out, with a note.
    """
    for name in [k for k, v in results.items() if isinstance(v, float) and not math.isfinite(v)]:
        s.bench.note(f"{s.run.path.name}: {name} is {results[name]}, left empty")
        results = {k: v for k, v in results.items() if k != name}
    figures = {name: results[name] for name in step.columns if name in results}  # workers end in any order
    with s.run.locked(PATIENCE):
        known = s.metrics
        kept = {k: v for k, v in known.items() if k not in (*step.columns, "steps", "files", "weights")}
        files = known.get("files", {})
        if step.file is not None:
            write_atomic(s.run.path / step.file, results[step.file])
            files = files | {step.file: digest(results[step.file])}
        steps = known.get("steps", {}) | {step.name: fingerprint(s, step)}
        bookkeeping = {"steps": steps, "files": files, "weights": s.weights_digest}
        write_json(s.run.path / "metrics.json", {**kept, **figures, **bookkeeping})


def metrics_of(run: Run) -> dict:
    """What metrics.json holds; empty while there is none. Raises UserError if it is damaged."""
    path = run.path / "metrics.json"
    known = read_json(path) if path.exists() else {}
    for name, value in known.items():
        wrong = not isinstance(value, dict) if name in ("steps", "files") else not isinstance(value, int | float | str)
        if wrong or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: damaged ({name} cannot be {value!r:.40}); remove it, and evaluate the run anew")
    return known
