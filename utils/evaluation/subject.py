"""Runs under evaluation, the resources that they share, and the storage of their metrics.

A step's metrics are stored in the run's metrics.json with a fingerprint of everything they depend on, so that
repeating a command computes only what is missing or out of date. steps.py defines the steps.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets.loading import Data, load_data
from datasets.table import DATASETS
from models.classifiers import load_classifier
from utils.cli import next_command
from utils.config import Config
from utils.errors import UserError
from utils.evaluation.probes import OF_PAPER
from utils.files import digest, digest_of, read_arrays, read_json, write_atomic, write_json
from utils.runs import Run, load_model
from utils.seeds import generator

BATCH = 256  # images per batch; fixed, because the noise depends on it
PATIENCE = 60  # seconds to wait for a lock that another process holds


class Step(NamedTuple):
    """A step of the evaluation: the columns that it fills, how, and the settings that they depend on."""

    name: str
    columns: tuple[str, ...]
    compute: Callable[["Subject"], dict] | None
    settings: tuple[str, ...] = ()
    classifier: bool = False  # whether it depends on the data set's classifier
    files: tuple[str, ...] = ()  # that it writes in addition to the metrics
    metrics: tuple[str, ...] = ()  # metrics of other steps that it depends on
    labels: bool = False  # whether it needs the images' labels
    version: int = 1  # counts the changes of what it computes


@dataclass(eq=False)
class Bench:
    """The resources that all runs of an evaluation share: settings, data sets, classifiers, notes."""

    device: torch.device
    data_dir: str
    runs_dir: str
    download: bool = False
    dataset: str | None = None  # where a folder of images is now
    classifier_path: str | None = None
    with_classifier: bool = False
    n_samples: int = 10_000
    iw_samples: int = 0
    y_samples: int = 4
    probe_images: int = 10_000
    notes: set[str] = field(default_factory=set)
    floors: dict = field(default_factory=dict)  # Frechet distances of training images to test images
    _test_features: dict = field(default_factory=dict)
    _data: dict = field(default_factory=dict)
    _classifiers: dict = field(default_factory=dict)

    @classmethod
    def of(cls, args) -> "Bench":
        """The Bench with the settings of a script's parsed flags."""
        given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(cls) if f.init}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def note(self, text: str) -> None:
        """Prints a note, unless it has been printed before."""
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}", flush=True)

    def data(self, config: Config) -> Data:
        """The data set of a Config, loaded once. Raises UserError if it is missing or damaged."""
        key = (config.dataset, config.image_shape)
        if key not in self._data:
            self._data[key] = load_data(config, self.data_dir, self.device, self.download, self.dataset)
        return self._data[key]

    def has_labels(self, config: Config) -> bool:
        """Whether the images of a Config's data set have labels; a note if they have none."""
        if config.dataset in DATASETS or self.data(config).labelled:
            return True
        self.note(f"{config.data_name} has no labels: metrics that need labels or a classifier are left empty")
        return False

    def classifier_of(self, config: Config) -> tuple[nn.Module, str] | None:
        """The first of `classifiers_of`; None if there is none."""
        return next(iter(self.classifiers_of(config)), None)

    def classifiers_of(self, config: Config) -> list[tuple[nn.Module, str]]:
        """The classifiers of a Config's data set, of one seed each, with digests; none for images without labels.

        Raises UserError if there should be one and is none.
        """
        name = config.data_name
        if not self.has_labels(config):
            return []
        if name not in self._classifiers:
            data = self.data(config) if config.dataset not in DATASETS else None
            path = Path(self.classifier_path or Path(self.runs_dir) / "classifiers" / name)
            folders = {"runs_dir": self.runs_dir, "data_dir": self.data_dir}
            how = next_command("train_classifier.py", *config.data_flags, **folders)
            paths = [path, *(p.parent for p in sorted(path.glob("seed_*/classifier.pth")))]
            self._classifiers[name] = [
                load_classifier(p, config, self.device, data and data.digest, how) for p in paths
            ]
        return self._classifiers[name]

    @torch.no_grad()
    def test_features(self, config: Config, features: Callable[[Tensor], Tensor]) -> Tensor:
        """What a network makes of a Config's test images, (N, F) on the CPU; computed once for all runs."""
        if (key := (config.data_name, features)) not in self._test_features:
            batches = self.data(config).test.batches(BATCH)
            self._test_features[key] = torch.cat([features(x).cpu() for x, _ in batches])
        return self._test_features[key]


class Subject:
    """A run under evaluation; its model, its latents and the features of its samples are made on first use."""

    def __init__(self, run: Run, bench: Bench):
        self.run, self.config, self.bench = run, run.config, bench

    @functools.cached_property
    def weights_digest(self) -> str:
        """The digest of vae.pth."""
        return digest_of(self.run.path / "vae.pth")

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model in eval mode. Raises UserError if its weights are missing or damaged."""
        return load_model(self.run, self.bench.device)

    @property
    def test(self):
        """The test images."""
        return self.bench.data(self.config).test

    def generator(self, *key) -> torch.Generator:
        """A random generator, seeded by `key`."""
        return generator(self.bench.device, 0, *key)

    @property
    def metrics(self) -> dict:
        """metrics.json, or empty if it does not belong to these weights. Raises UserError if it is damaged."""
        known = metrics_of(self.run)
        return known if known.get("weights") == self.weights_digest else {}

    @functools.cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """The arrays of latents.npz. Raises UserError if it is missing, damaged or of other weights."""
        path = self.run.path / "latents.npz"
        if digest_of(path) != self.metrics.get("files", {}).get(path.name, ""):
            raise UserError(f"{path}: missing, damaged or stale; run eval_beta_grid.py --exclude_mi first")
        return read_arrays(path)

    @functools.cached_property
    def sample_features(self) -> Tensor:
        """What each classifier of the data set makes of n_samples samples: (n_samples, classifiers, F), on the CPU."""
        nets = [net for net, _ in self.bench.classifiers_of(self.config)]
        return self.samples(lambda x: torch.stack([net.features(x) for net in nets], 1))

    def forget(self) -> None:
        """Frees the memory of what is made on first use."""
        for name in ("model", "latents", "sample_features"):
            self.__dict__.pop(name, None)

    @torch.no_grad()
    def samples(self, consume: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `consume` to n_samples ancestral samples, batch by batch; the concatenated results, on the CPU."""
        g, n = self.generator("samples"), self.bench.n_samples
        sizes = [min(BATCH, n - i) for i in range(0, n, BATCH)]
        return torch.cat([consume(self.model.sample(size, generator=g)).cpu() for size in sizes])


@contextlib.contextmanager
def listed(problems: dict[Path, str], path: Path) -> Iterator[None]:
    """Records any exception in `problems` under a run's path, so that the evaluation of other runs continues."""
    try:
        yield
    except UserError as e:
        problems[path] = str(e) if str(path) in str(e) else f"{path}: {e}"
    except Exception as e:
        problems[path] = f"{path}: {type(e).__name__}: {' '.join(str(e).split())}"


def can_do(subject: Subject, step: Step) -> bool:
    """Whether the run's images have the labels that a step needs; a note if they do not."""
    return not step.labels or subject.bench.has_labels(subject.config)


def fingerprint(s: Subject, step: Step) -> str:
    """The digest of all that a step's metrics depend on: weights, settings, classifier, metrics of other steps."""
    parts = {name: getattr(s.bench, name) for name in step.settings}
    parts |= {name: s.metrics.get(name) for name in step.metrics}
    if step.classifier and (found := s.bench.classifiers_of(s.config)):
        parts["classifier"] = "+".join(digest for _, digest in found)
    parts |= {"version": step.version} if step.version > 1 else {}
    text = json.dumps([s.weights_digest, s.run.config.to_json(), parts], sort_keys=True)
    return digest(text.encode())


def is_done(s: Subject, step: Step) -> bool:
    """Whether the step's metrics are up to date and its files are intact."""
    known = s.metrics
    if known.get("steps", {}).get(step.name) != fingerprint(s, step):
        return False
    return all(known.get("files", {}).get(name) == digest_of(s.run.path / name) for name in step.files)


def record(s: Subject, step: Step, results: dict) -> None:
    """Merges a step's results into metrics.json, and writes the step's files.

    Metrics of other weights are dropped. Non-finite values are left out, with a note.
    """
    for name in [k for k, v in results.items() if isinstance(v, float) and not math.isfinite(v)]:
        s.bench.note(f"{s.run.path.name}: {name} is {results[name]}, left empty")
        results = {k: v for k, v in results.items() if k != name}
    metrics = {name: results[name] for name in step.columns if name in results}  # in the order of the columns
    with s.run.locked(PATIENCE):
        known = s.metrics
        kept = {k: v for k, v in known.items() if k not in (*step.columns, "steps", "files", "weights")}
        files = known.get("files", {})
        for name in step.files:
            write_atomic(s.run.path / name, results[name])
            files = files | {name: digest(results[name])}
        steps = known.get("steps", {}) | {step.name: fingerprint(s, step)}
        bookkeeping = {"steps": steps, "files": files, "weights": s.weights_digest}
        write_json(s.run.path / "metrics.json", {**kept, **metrics, **bookkeeping})


def metrics_of(run: Run) -> dict:
    """The content of a run's metrics.json; empty if there is none. Raises UserError if it is damaged."""
    path = run.path / "metrics.json"
    known = read_json(path) if path.exists() else {}
    for name, value in known.items():
        wrong = not isinstance(value, dict) if name in ("steps", "files") else not isinstance(value, int | float | str)
        if wrong or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: damaged ({name} cannot be {value!r:.40}); remove it and evaluate the run again")
    return _renamed(known)


def _renamed(known: dict) -> dict:
    """Metrics under the names that they have now.

    Accuracies without a number of training images are from when the paper's protocol was the only one, and a bound on
    them without an upper end of the information is from when the biased estimate stood for it.
    """
    names = {} if "probe_images" in known else {n + y: f"{n}{y}_paper" for n in OF_PAPER for y in ("", "_y")}
    if "mi_z_high" not in known:
        known.pop("acc_bound", None)
    return {names.get(name, name): value for name, value in known.items()}
