"""A run under evaluation, and a step of it. steps.py lists the steps.

A step's metrics are stored in the run's metrics.json with a fingerprint of everything they depend on, so that
repeating a command computes only what is missing or out of date.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.evaluation.evaluation import BATCH, Evaluation
from utils.evaluation.metrics import columns_of
from utils.evaluation.results import read_metrics
from utils.files import digest, digest_of, read_arrays, write_atomic, write_json
from utils.runs import Run, load_model
from utils.seeds import generator

PATIENCE = 60  # seconds to wait for a lock that another process holds


class EvaluatedRun:
    """A finished run; its model, latents, metrics and features of samples are made or read on first use.

    Raises UserError if the run is unfinished or failed.
    """

    def __init__(self, run: Run, evaluation: Evaluation):
        if run.status != "finished":
            raise UserError(f"{run.path}: {run.status}; only finished runs are evaluated")
        self.run, self.path, self.config, self.evaluation = run, run.path, run.config, evaluation
        self.weights = digest_of(self.path / "vae.pth")

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model in eval mode. Raises UserError if its weights are missing or damaged."""
        return load_model(self.run, self.evaluation.device)

    @property
    def test(self):
        """The test images."""
        return self.evaluation.data(self.config).test

    def generator(self, *key) -> torch.Generator:
        """A random generator, seeded by `key`."""
        return generator(self.evaluation.device, 0, *key)

    @functools.cached_property
    def metrics(self) -> dict:
        """metrics.json, or empty if it does not belong to these weights. Raises UserError if it is damaged."""
        metrics = read_metrics(self.path)
        return metrics if metrics.get("weights") == self.weights else {}

    @functools.cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """The arrays of latents.npz. Raises UserError if it is missing, damaged or of other weights."""
        path = self.path / "latents.npz"
        if digest_of(path) != self.metrics.get("files", {}).get(path.name, ""):
            raise UserError(f"{path}: missing, damaged or stale; run eval_beta_grid.py --exclude_mi first")
        return read_arrays(path)

    @functools.cached_property
    def sample_features(self) -> Tensor:
        """What each classifier of the data set makes of n_samples samples: (n_samples, classifiers, F), on the CPU."""
        nets = [net for net, _ in self.evaluation.classifiers(self.config)]
        return self.samples(lambda x: torch.stack([net.features(x) for net in nets], 1))

    @torch.no_grad()
    def samples(self, consume: Callable[[Tensor], Tensor]) -> Tensor:
        """What `consume` makes of n_samples ancestral samples, batch by batch; on the CPU."""
        g, n = self.generator("samples"), self.evaluation.n_samples
        sizes = [min(BATCH, n - i) for i in range(0, n, BATCH)]
        return torch.cat([consume(self.model.sample(size, generator=g)).cpu() for size in sizes])

    def forget(self) -> None:
        """Frees the memory of what is large."""
        for name in ("model", "latents", "sample_features"):
            self.__dict__.pop(name, None)

    def needs(self, step: "Step") -> bool:
        """Whether a step applies to the run, and is not up to date, with intact files, or is to be done anyway."""
        if step.labels and not self.evaluation.has_labels(self.config):
            return False
        digests = self.metrics.get("files", {})
        return (
            self.evaluation.force
            or self.metrics.get("steps", {}).get(step.name) != self._fingerprint(step)
            or any(digests.get(name) != digest_of(self.path / name) for name in step.files)
        )

    def _fingerprint(self, step: "Step") -> str:
        """The digest of all that a step's metrics depend on: weights, settings, classifiers, other metrics."""
        parts = {name: getattr(self.evaluation, name) for name in step.settings}
        parts |= {name: self.metrics.get(name) for name in step.metrics}
        if step.classifier and (classifiers := self.evaluation.classifiers(self.config)):
            parts["classifier"] = "+".join(digest for _, digest in classifiers)
        if step.version > 1:
            parts["version"] = step.version
        text = json.dumps([self.weights, self.config.to_json(), parts], sort_keys=True)
        return digest(text.encode())

    def record(self, step: "Step", results: dict) -> None:
        """Merges a step's results into metrics.json, and writes the step's files.

        Metrics of other weights are dropped. Values that are not finite are left out, with a note.
        """
        columns, metrics = columns_of(step.name), {}
        for name in (c for c in columns if c in results):
            if isinstance(results[name], float) and not math.isfinite(results[name]):
                self.evaluation.note(f"{self.path.name}: {name} is {results[name]}, left empty")
            else:
                metrics[name] = results[name]
        with self.run.locked(PATIENCE):
            self.__dict__.pop("metrics", None)  # to read what another process may have written
            stored = self.metrics
            kept = {k: v for k, v in stored.items() if k not in (*columns, "steps", "files", "weights")}
            steps = {**stored.get("steps", {}), step.name: self._fingerprint(step)}
            files = {**stored.get("files", {}), **{name: digest(results[name]) for name in step.files}}
            for name in step.files:
                write_atomic(self.path / name, results[name])
            self.metrics = {**kept, **metrics, "steps": steps, "files": files, "weights": self.weights}
            write_json(self.path / "metrics.json", self.metrics)


class Step(NamedTuple):
    """A step of the evaluation: how it computes its columns (`columns_of`), and what these depend on.

    Some have `jobs`, functions with arguments for worker processes, which may read a file that is written for them.
    `compute` gets the run and their results, and returns metrics by column, and the contents of files by name.
    """

    name: str
    compute: Callable[..., dict]
    jobs: Callable[[EvaluatedRun, Path], list[tuple]] | None = None
    settings: tuple[str, ...] = ()  # fields of Evaluation
    metrics: tuple[str, ...] = ()  # of other steps
    classifier: bool = False  # whether it depends on the data set's classifiers
    labels: bool = False  # whether it needs the images' labels
    files: tuple[str, ...] = ()  # that it writes in addition to the metrics
    version: int = 1  # counts the changes of what it computes


def on_all_images(batches: Iterable[dict[str, Tensor | None]]) -> dict[str, np.ndarray]:
    """Concatenates what there is of each batch of images, by name; without what is None."""
    parts = {}
    for batch in batches:
        for name, value in batch.items():
            if value is not None:
                parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(tensors).numpy() for name, tensors in parts.items()}


@contextlib.contextmanager
def failures_in(problems: dict[Path, str], path: Path) -> Iterator[None]:
    """Records any exception in `problems` under a run's path, so that the evaluation of other runs continues."""
    try:
        yield
    except BrokenProcessPool:
        problems[path] = f"{path}: a worker process was killed (out of memory?)"
    except UserError as e:
        problems[path] = str(e) if str(path) in str(e) else f"{path}: {e}"
    except Exception as e:
        problems[path] = f"{path}: {type(e).__name__}: {' '.join(str(e).split())}"
