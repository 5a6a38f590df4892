"""What is measured on a part of the images is of all kinds of them, though they lie in the order of their classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_beta_grid
import plot_eval
import train
from datasets.batches import Resident, chosen, subset
from datasets.loading import load_data
from tests.conftest import EVALUATION, TINY
from utils.config import Config
from utils.evaluation.steps import kernel_distance
from utils.files import read_json
from utils.runs import Run, load_model
from utils.training import log, multi_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 3, 10, 50, 99, 120, 500])
def test_a_subset_has_each_label_in_proportion(n):
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    indices = subset(labels, n)
    assert len(indices) == len(set(indices.tolist())) == min(n, 100)
    counts = labels[indices].bincount(minlength=3)
    assert all(abs(count - min(n, 100) * share) <= 1 for count, share in zip(counts, (0.6, 0.3, 0.1), strict=True))
    assert torch.equal(subset(labels, 500)[:n], indices)
    split = Resident(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1), labels, CPU)
    images, of_images = chosen(split, n)
    assert torch.equal((images.flatten() * 255).round().long(), indices) and torch.equal(of_images, labels[indices])


def test_without_labels_it_is_random_and_always_the_same():
    one, other = (subset(torch.zeros(1000), 100) for _ in range(2))
    assert torch.equal(one, other) and 350 < one.float().mean() < 650 and one.max() > 800


def test_a_kernel_distance_of_some_features_is_of_all_kinds():
    """Of features in the order of their classes: 0 to themselves, not that of a class to both."""
    rng = np.random.default_rng(0)
    a, b = (np.r_[rng.normal(0, 1, (600, 4)), rng.normal(6, 1, (600, 4))] for _ in range(2))
    whole, (some, se) = kernel_distance(a, b)[0], kernel_distance(a, b, most=400)
    assert abs(some - whole) < 5 * se
    assert kernel_distance(a[:400], b[:400])[0] + 10 * se < kernel_distance(a[:400], b)[0]  # what would be told of one


def write_sorted() -> None:
    """./sorted, in which all pictures of one class are dark, and come before the mosaics of the other."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 80), ("val", 60)):
        for name, picture in (
            ("a", lambda: np.full((28, 28), 8)),
            ("b", lambda: np.kron(rng.integers(0, 256, (4, 4)), np.ones((7, 7)))),
        ):
            folder = Path("sorted", split, name)
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(picture().astype(np.uint8)).save(folder / f"{i:03d}.png")


def test_a_sorted_set_through_every_command(passes, monkeypatch):
    """With parts of 40 images; long, since a grid is trained, unfolded, evaluated and drawn."""
    monkeypatch.setattr(multi_rate, "TRAIN_IMAGES", 40)
    monkeypatch.setattr(multi_rate, "SEARCHED_IMAGES", 40)
    monkeypatch.setattr(log, "N_CURVES", 40)
    monkeypatch.setattr("utils.plane.traversals.N_RATES", 40)
    write_sorted()
    flags = [*TINY[:4], "--batch_size", "16", "--device", "cpu", "--dataset", "sorted", "--image_channels", "1"]
    flags += ["--num_epochs", "6", "--learning_rate", "3e-3", "--multi_rate", "--force"]
    passes(train.main, *flags, "--beta_y", "0.02", "2", "--beta_z", "0.1", "1")
    cells = [Run.open(path) for path in Path("runs/singles").iterdir() if "_to_" not in path.name]
    data = load_data(cells[0].config, "data", CPU)
    for run in cells:
        told = run.result["train"]
        with torch.no_grad():
            x, model = data.train.images.float() / 255, load_model(run, CPU)
            terms = model(x, model.noise(len(x), torch.Generator().manual_seed(1)))
        for name in ("kl_y", "kl_z", "ll"):
            assert told[name] == pytest.approx(getattr(terms, name).mean().item(), rel=0.25)
    (source,) = (Run.open(path) for path in Path("runs/singles").glob("*_to_*"))
    assert multi_rate.Search(load_model(source, CPU), data, 16).images.labels.sum() == 20
    passes(eval_beta_grid.main, *EVALUATION, "--exclude_mi")
    passes(plot_eval.main, *EVALUATION[:2])
    passes(plot_eval.main, "--traverse", cells[0].path)
    (line,) = {
        x.split(",")[3] for x in Path("runs/singles/figures/traversals/between.csv").read_text().splitlines()[1:]
    }
    test = read_json(cells[0].path / "training.json")["test"]
    assert float(line) == pytest.approx(test["kl_z"], rel=0.2, abs=0.1)
    for run in cells:  # originals of both classes stand above the reconstructions
        above = np.asarray(Image.open(run.path / "reconstructions.png").convert("L"), float)[2:30]
        spread = [above[:, 2 + 30 * i : 30 + 30 * i].std() for i in range(16)]
        assert sum(s > 30 for s in spread) == 8
    assert Config.from_json(cells[0].path / "config.json").data_digest == data.digest
