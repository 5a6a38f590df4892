"""A run under evaluation, and what all runs of an evaluation share: settings, data sets, classifiers, features.

A step's metrics are stored in metrics.json with a fingerprint of everything they depend on, so that repeating a
command computes only what is missing or out of date.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.batches import subset
from datasets.loading import Data, load_data
from datasets.table import DATASETS
from models.classifiers import Classifier, InParts, load_classifier
from utils.cli import next_command, wrapped
from utils.config import Config
from utils.errors import UserError
from utils.evaluation.metrics import columns_of, read_metrics
from utils.files import digest, digest_of, read_arrays, write_atomic, write_json
from utils.runs import Run, load_model
from utils.seeds import generator

BATCH = 256  # images per batch; fixed, because the noise depends on it
PATIENCE = 60  # seconds to wait for a lock that another process holds
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # with the beginning of its sha256
TO_FETCH = """pip install torch-fidelity, then \
python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as F; \
F('inception-v3-compat', ['2048'])"; with --with_classifier, fid_classifier is computed instead"""
OF_SOME = ("test_images",)  # settings without which the same is known with a smaller error
Features = Callable[[Tensor], Tensor]  # of images (B, C, H, W) in [0, 1]: (B, F)


def once(function):
    """Keeps what a function of an Evaluation, a Config and more gives for each data set."""

    @functools.wraps(function)
    def kept(evaluation, config, *more):
        key = function, config.dataset, config.image_shape, config.data_digest, *more
        if key not in evaluation.shared:
            evaluation.shared[key] = function(evaluation, config, *more)
        return evaluation.shared[key]

    return kept


@dataclass(eq=False)
class Evaluation:
    """The settings of an evaluation, named as the flags, and what all its runs share."""

    device: torch.device
    data_dir: str
    runs_dir: str
    download: bool = False
    dataset: str | None = None  # where own images are now
    classifier_path: str | None = None
    with_classifier: bool = False
    n_samples: int = 10_000
    iw_samples: int | None = None
    y_samples: int = 4
    probe_images: int = 10_000
    test_images: int | None = None  # of which step 4 and I(y; label) are; None: all
    cpu_n: int = 1
    force: bool = False
    shared: dict = field(default_factory=dict, init=False)
    notes: set[str] = field(default_factory=set, init=False)

    @classmethod
    def of(cls, flags: dict, device: torch.device) -> "Evaluation":
        """That of a script's flags, of which some may be no settings of it, or not given."""
        names = [f.name for f in fields(cls) if f.init and flags.get(f.name) is not None]
        return cls(**{name: flags[name] for name in names} | {"device": device})

    @property
    def settings(self) -> dict:
        """What makes an Evaluation like this one, without what is shared."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def note(self, text: str) -> None:
        """Prints a note, unless it has been printed before."""
        if text not in self.notes:
            self.notes.add(text)
            print(wrapped(f"note: {text}"), flush=True)

    @once
    def data(self, config: Config) -> Data:
        """The data set of a Config. Raises UserError if it is missing, damaged or not what the run was trained on."""
        return load_data(config, self.data_dir, self.device, self.download, self.dataset)

    def has_labels(self, config: Config) -> bool:
        """Whether the images of a Config's data set have labels; a note if they have none."""
        if config.dataset in DATASETS or self.data(config).labelled:
            return True
        what = "metrics that need labels or a classifier are left empty"
        self.note(f"{config.data_name} has no labels: {what}")
        return False

    @once
    def classifiers(self, config: Config) -> list[tuple[Classifier, str]]:
        """The data set's classifiers, with digests; none without labels. Raises UserError if one is missing."""
        if not self.has_labels(config):
            return []
        path = Path(self.classifier_path or Path(self.runs_dir) / "classifiers" / config.data_name)
        folders = {"runs_dir": self.runs_dir, "data_dir": self.data_dir}
        command = next_command("train_classifier.py", *config.data_flags, **folders)
        paths = [path, *(p.parent for p in sorted(path.glob("seed_*/classifier.pth")))]
        return [load_classifier(p, config, self.device, self.data(config), command) for p in paths]

    @functools.cached_property
    def inception(self) -> Features | None:
        """Inception-v3 features (B, 2048); None, with a note, without torch-fidelity or weights."""
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            if hashlib.sha256(path.read_bytes()).hexdigest()[:8] not in INCEPTION:
                raise OSError("not the published file")
        except (ImportError, OSError):
            self.note(f"no fid: it needs the Inception weights at {path}; to fetch them: {TO_FETCH}")
            return None
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(self.device).eval()
        if self.device.type == "cpu":
            net = net.to(memory_format=torch.channels_last)
        return InParts(lambda x: net((x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0])

    @once
    @torch.no_grad()
    def features(self, config: Config, network: Features, n: int | None = None) -> np.ndarray:
        """Features (N, F) of all test images, or of up to n training images."""
        data = self.data(config)
        batches = data.test.batches(BATCH) if n is None else data.train.batches(BATCH, (0, 0))
        parts = [network(x).cpu() for x, _ in itertools.islice(batches, n and math.ceil(n / BATCH))]
        return torch.cat(parts)[:n].numpy()


class EvaluatedRun:
    """A finished run (UserError otherwise); what it is asked for is made or read on first use."""

    def __init__(self, run: Run, evaluation: Evaluation):
        if run.status != "finished":
            raise UserError(f"{run.path}: {run.status}; only finished runs are evaluated")
        self.run, self.path, self.config, self.evaluation = run, run.path, run.config, evaluation
        self.weights = digest_of(self.path / "vae.pth")
        evaluation.data(run.config)  # raises UserError if it is of other images, also if nothing is to be done

    @functools.cached_property
    def model(self) -> nn.Module:
        """In eval mode. Raises UserError if its weights are missing or damaged."""
        return load_model(self.run, self.evaluation.device)

    @property
    def test(self):
        """The test images."""
        return self.evaluation.data(self.config).test

    @property
    def chosen(self) -> Tensor:
        """Indices of the test images that step 4 and I(y; label) are of: fewer of them begin more of them."""
        n, images = self.evaluation.test_images, self.test
        return torch.arange(len(images)) if n is None or n >= len(images) else subset(images.labels.cpu(), n)

    def generator(self, *key) -> torch.Generator:
        """A random generator, seeded by `key`."""
        return generator(self.evaluation.device, 0, *key)

    @functools.cached_property
    def metrics(self) -> dict:
        """metrics.json, or empty if it is of other weights. Raises UserError if it is damaged."""
        metrics = read_metrics(self.path)
        return metrics if metrics.get("weights") == self.weights else {}

    @functools.cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """The arrays of latents.npz. Raises UserError if it is missing, damaged or of other weights."""
        path = self.path / "latents.npz"
        if digest_of(path) != self.metrics.get("files", {}).get(path.name, ""):
            how = "run eval_beta_grid.py --exclude_mi first"
            raise UserError(f"{path}: missing, damaged or stale; {how}")
        return read_arrays(path)

    @functools.cached_property
    def sample_features(self) -> Tensor:
        """Each classifier's features of samples, on the CPU: (n_samples, classifiers, F)."""
        nets = [net for net, _ in self.evaluation.classifiers(self.config)]
        return self.samples(lambda x: torch.stack([net.features(x) for net in nets], 1))

    @torch.no_grad()
    def samples(self, consume: Callable[[Tensor], Tensor]) -> Tensor:
        """What `consume` makes of n_samples ancestral samples, batch by batch; on the CPU."""
        g, n = self.generator("samples"), self.evaluation.n_samples
        sizes = [min(BATCH, n - i) for i in range(0, n, BATCH)]
        return torch.cat([consume(self.model.sample(size, generator=g)).cpu() for size in sizes])

    def compute(self, steps: Iterable) -> None:
        """Computes and records Steps."""
        for step in steps:
            self.record(step, step.compute(self))
        self.forget()

    def forget(self) -> None:
        """Frees the memory of what is large; metrics, which another process may have written, are read again."""
        for name in ("model", "metrics", "latents", "sample_features"):
            self.__dict__.pop(name, None)

    def needs(self, step) -> bool:
        """Whether a Step applies, and is not up to date, with intact files, or is to be redone."""
        if step.labels and not self.evaluation.has_labels(self.config):
            return False
        return self.evaluation.force or not self.has(step)

    def has(self, step) -> bool:
        """Whether a Step is up to date, with intact files."""
        digests, made_of = self.metrics.get("files", {}), self.metrics.get("steps", {}).get(step.name)
        is_current = made_of in (self._fingerprint(step), self._fingerprint(step, OF_SOME))
        return is_current and all(digests.get(name) == digest_of(self.path / name) for name in step.files)

    def _fingerprint(self, step, without: tuple[str, ...] = ()) -> str:
        """Of all that its metrics depend on: weights, settings that are given, classifiers, other metrics."""
        parts = {name: getattr(self.evaluation, name) for name in step.settings if name not in without}
        parts = {name: value for name, value in parts.items() if value is not None}
        parts |= {name: self.metrics.get(name) for name in step.metrics}
        if step.classifier and (classifier := self._classifier()):
            parts["classifier"] = classifier
        if step.version > 1:
            parts["version"] = step.version
        text = json.dumps([self.weights, self.config.to_json(), parts], sort_keys=True)
        return digest(text.encode())

    def _classifier(self) -> str:
        """The digests of the data set's classifiers."""
        return "+".join(digest for _, digest in self.evaluation.classifiers(self.config))

    def record(self, step, results: dict) -> None:
        """Merges a Step's finite results into metrics.json, and writes its files.

        Metrics of other weights go; so do, with a note, those of other steps by another classifier.
        """
        columns, metrics = columns_of(step.name), {}
        for name in (c for c in columns if c in results):
            if isinstance(results[name], float) and not math.isfinite(results[name]):
                self.evaluation.note(f"{self.path.name}: {name} is {results[name]}, left empty")
            else:
                metrics[name] = results[name]
        with self.run.locked(PATIENCE):
            self.__dict__.pop("metrics", None)  # to read what another process may have written
            old, dropped = self.metrics, (*columns, "steps", "files", "weights", "classifiers")
            steps = {**old.get("steps", {}), step.name: self._fingerprint(step)}
            files = old.get("files", {}) | {name: digest(results[name]) for name in step.files}
            classifiers = old.get("classifiers", {}) | ({step.name: self._classifier()} if step.classifier else {})
            first = {name: digests.partition("+")[0] for name, digests in classifiers.items()}
            for name in [n for n in first if step.classifier and first[n] != first[step.name]]:
                self.evaluation.note(f"results of {name} by an earlier classifier are left out; repeat that step")
                dropped += tuple(columns_of(name))
                for of_steps, key in ((steps, name), (classifiers, name), (files, f"per_image_{name}.npz")):
                    of_steps.pop(key, None)
            for name in step.files:
                write_atomic(self.path / name, results[name])
            self.metrics = {k: v for k, v in old.items() if k not in dropped} | metrics
            self.metrics |= {"steps": steps, "files": files, "weights": self.weights}
            self.metrics |= {"classifiers": classifiers} if classifiers else {}
            write_json(self.path / "metrics.json", self.metrics)


def on_all_images(batches: Iterable[dict[str, Tensor | None]]) -> dict[str, np.ndarray]:
    """Concatenates the values of all batches, by name; without those that are None."""
    parts = {}
    for batch in batches:
        for name, value in batch.items():
            if value is not None:
                parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(tensors).numpy() for name, tensors in parts.items()}
