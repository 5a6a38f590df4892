"""The steps of the evaluation, and what the scripts need to know of them; metrics.py says which columns they fill."""

from collections.abc import Iterable
from functools import partial

from utils.evaluation.evaluation import Evaluation
from utils.evaluation.generation import fid, fid_classifier, reconstructions, sample_quality
from utils.evaluation.information import mi_p, mi_y, mi_z
from utils.evaluation.latents import export, fits, pca, scores
from utils.evaluation.rates import importance_weighted, rates, units
from utils.evaluation.run import Step

RATES = ("kl_z", "kl_z_se", "kl_y", "kl_y_se")
SAMPLES = ("n_samples",)


def _probes(name: str, paper: bool, **more) -> Step:
    file = f"per_image_{name}.npz"
    return Step(name, partial(scores, file=file), partial(fits, paper=paper), labels=True, files=(file,), **more)


_STEPS = (
    Step("rates", rates, files=("latents.npz", "per_image.npz"), version=2),
    Step("units", units),
    Step("iw", importance_weighted, settings=("iw_samples",)),
    Step("is", sample_quality, settings=SAMPLES, classifier=True, version=2),
    Step("fid", fid, settings=SAMPLES, version=2),
    Step("fid_classifier", fid_classifier, settings=SAMPLES, classifier=True, version=2),
    Step("mi_z", mi_z, metrics=RATES[:2], labels=True, version=2),
    Step("mi_p", mi_p, classifier=True),
    Step("mi_y", mi_y, settings=("y_samples",), metrics=RATES, labels=True, version=2),
    _probes("probes", paper=False, settings=("probe_images",), version=3),
    _probes("probes_paper", paper=True),
    Step("recons", reconstructions, classifier=True, files=("per_image_recons.npz",), version=2),
    Step("pca", pca, files=("pca.npz",)),
    Step("latents_train", partial(export, split="train"), files=("latents_train.npz",)),
    Step("latents_test", partial(export, split="test"), files=("latents_test.npz",)),
)
STEPS = {step.name: step for step in _STEPS}


def possible(names: Iterable[str], evaluation: Evaluation) -> list[Step]:
    """The steps of these names, without those that an evaluation has no network for: one of two FIDs, and mi_p."""
    left_out = set() if evaluation.with_classifier else {"fid_classifier", "mi_p"}
    if "fid" in names:
        left_out.add("fid" if evaluation.inception is None else "fid_classifier")
    return [STEPS[name] for name in names if name not in left_out]
