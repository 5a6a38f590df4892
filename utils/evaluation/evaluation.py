"""The settings of an evaluation, and what its runs share: data sets, classifiers, features of test images."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.loading import Data, load_data
from datasets.table import DATASETS
from models.classifiers import Classifier, InParts, load_classifier
from utils.cli import next_command
from utils.config import Config

BATCH = 256  # images per batch; fixed, because the noise depends on it
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's file, and the beginning of its sha256
Features = Callable[[Tensor], Tensor]  # of images (B, C, H, W) in [0, 1]: (B, F)
T = TypeVar("T")


@dataclass(eq=False)
class Evaluation:
    """The settings of an evaluation, named as the flags, and what all its runs share, made once."""

    device: torch.device
    data_dir: str
    runs_dir: str
    download: bool = False
    dataset: str | None = None  # where a folder of images is now
    classifier_path: str | None = None
    with_classifier: bool = False
    n_samples: int = 10_000
    iw_samples: int | None = None
    y_samples: int = 4
    probe_images: int = 10_000
    cpu_n: int = 1
    force: bool = False
    shared: dict = field(default_factory=dict, init=False)  # by what it is, and of which data set
    notes: set[str] = field(default_factory=set, init=False)

    def note(self, text: str) -> None:
        """Prints a note, unless it has been printed before."""
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}", flush=True)

    def once(self, what: Hashable, config: Config, make: Callable[[], T]) -> T:
        """What `make` gives for the data set of a Config, made at the first call."""
        key = what, config.dataset, config.image_shape
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def data(self, config: Config) -> Data:
        """The data set of a Config. Raises UserError if it is missing or damaged."""
        how = self.data_dir, self.device, self.download, self.dataset
        return self.once("data", config, lambda: load_data(config, *how))

    def has_labels(self, config: Config) -> bool:
        """Whether the images of a Config's data set have labels; a note if they have none."""
        if config.dataset in DATASETS or self.data(config).labelled:
            return True
        self.note(f"{config.data_name} has no labels: metrics that need labels or a classifier are left empty")
        return False

    def classifiers(self, config: Config) -> list[tuple[Classifier, str]]:
        """The classifiers of a Config's data set, of one seed each, with digests; none for images without labels.

        Raises UserError if there should be one and is none.
        """
        return self.once("classifiers", config, lambda: self._load_classifiers(config))

    def _load_classifiers(self, config: Config) -> list[tuple[Classifier, str]]:
        if not self.has_labels(config):
            return []
        of_files = None if config.dataset in DATASETS else self.data(config).digest
        path = Path(self.classifier_path or Path(self.runs_dir) / "classifiers" / config.data_name)
        paths = [path, *(p.parent for p in sorted(path.glob("seed_*/classifier.pth")))]
        folders = {"runs_dir": self.runs_dir, "data_dir": self.data_dir}
        command = next_command("train_classifier.py", *config.data_flags, **folders)
        return [load_classifier(p, config, self.device, of_files, command) for p in paths]

    @functools.cached_property
    def inception(self) -> Features | None:
        """Inception-v3 features (B, 2048); None, with a note, without torch-fidelity or its weights."""
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            if hashlib.sha256(path.read_bytes()).hexdigest()[:8] not in INCEPTION:
                raise OSError("not the published file")
        except (ImportError, OSError):
            self.note(
                f"no fid: it needs the Inception weights at {path}; to fetch them: pip install torch-fidelity, then "
                'python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as F;'
                " F('inception-v3-compat', ['2048'])\"; with --with_classifier, fid_classifier is computed instead"
            )
            return None
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(self.device).eval()
        if self.device.type == "cpu":
            net = net.to(memory_format=torch.channels_last)
        return InParts(lambda x: net((x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0])

    def features(self, config: Config, network: Features, split: str) -> np.ndarray:
        """Features of a split, (N, F): of all test images, or of up to n_samples training images."""
        return self.once((network, split), config, lambda: self._features(config, network, split))

    @torch.no_grad()
    def _features(self, config: Config, network: Features, split: str) -> np.ndarray:
        images = getattr(self.data(config), split)
        batches, n = images.batches(BATCH), len(images)
        if split == "train":
            batches, n = images.batches(BATCH, (0, 0)), min(n, self.n_samples)
        parts = [network(x).cpu() for x, _ in itertools.islice(batches, math.ceil(n / BATCH))]
        return torch.cat(parts)[:n].numpy()


SETTINGS = [f.name for f in fields(Evaluation) if f.init]
