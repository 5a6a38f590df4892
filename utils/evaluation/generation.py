"""The steps of the evaluation that judge samples: inception score, Frechet and kernel distances."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.classifiers import InParts
from utils.evaluation.metrics import frechet_distance, inception_score, kernel_distance
from utils.evaluation.probes import standard_error
from utils.evaluation.subject import BATCH, Bench, Subject

INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "6726825d")  # torch-fidelity's file, prefix of its sha256


@torch.no_grad()
def sample_quality(s: Subject) -> dict[str, float]:
    """The inception score of samples: the mean over the data set's classifiers, with its standard error."""
    nets = [net for net, _ in s.bench.classifiers_of(s.config)]
    if not nets:
        return {}
    log_p = [
        torch.log_softmax(net.head(features.to(s.bench.device)).double(), 1)
        for net, features in zip(nets, s.sample_features.unbind(1), strict=True)
    ]
    scores = [inception_score(part) for part in log_p]
    result = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    if len(nets) > 1:
        result["is_mean_se"] = standard_error(np.array([score["is_mean"] for score in scores]))
    return {**result, "n_classifiers": len(nets), "n_samples": s.bench.n_samples}


def fid(s: Subject) -> dict[str, float | str]:
    """Frechet distance between samples and test images in Inception-v3 features."""
    features = inception_features(s.bench)
    if features is None:
        return {}
    return _distances(s, "fid", "kid", "inception-v3-compat", features, s.samples(features))


def fid_classifier(s: Subject) -> dict[str, float | str]:
    """Frechet distance between samples and test images in the features of the data set's classifier."""
    found = s.bench.classifier_of(s.config)
    if found is None:
        return {}
    net, source = found[0], f"{s.config.data_name} classifier {found[1]}"
    return _distances(s, "fid_classifier", "kid_classifier", source, net.features, s.sample_features[:, 0])


@torch.no_grad()
def _distances(
    s: Subject, name: str, kernel: str, source: str, features: Callable[[Tensor], Tensor], of_samples: Tensor
) -> dict:
    data, floors, most = s.bench.data(s.config), s.bench.floors, s.bench.n_samples
    real, fake = s.bench.test_features(s.config, features).numpy(), of_samples.numpy()
    if (key := (s.config.data_name, features)) not in floors:
        batches = itertools.islice(data.train.batches(BATCH, (0, 0)), math.ceil(most / BATCH))
        floors[key] = frechet_distance(real, torch.cat([features(x).cpu() for x, _ in batches]).numpy()[:most])
    halves = [frechet_distance(real[i::2], fake[i::2]) for i in (0, 1)]
    distance, se = kernel_distance(real, fake)
    return {
        name: frechet_distance(real, fake),
        f"{name}_se": abs(halves[0] - halves[1]) / 2,
        f"{name}_floor": floors[key],
        **{f"{name}_features": source, f"{name}_samples": len(fake), kernel: distance, f"{kernel}_se": se},
    }


@functools.cache
def inception_features(bench: Bench) -> Callable[[Tensor], Tensor] | None:
    """A function from images (B, C, H, W) in [0, 1] to Inception-v3 features (B, 2048).

    None, with a note, if torch-fidelity or its weights are not installed.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION[0]
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION[1]):
            raise OSError("not the published file")
    except (ImportError, OSError):
        bench.note(
            f"no fid: it needs the Inception weights at {path}; to fetch them: pip install torch-fidelity, then "
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as F; '
            "F('inception-v3-compat', ['2048'])\"; with --with_classifier, fid_classifier is computed instead"
        )
        return None
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(bench.device).eval()
    if bench.device.type == "cpu":
        net = net.to(memory_format=torch.channels_last)

    def features(x):
        return net((x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0]

    return InParts(features)
