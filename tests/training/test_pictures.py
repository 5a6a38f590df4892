"""The pictures that a training leaves in its run folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

import train
from datasets.loading import load_data
from tests.training.test_unfold import FLAGS, GRID, cells_of
from utils.images import tiled
from utils.runs import Run, load_model
from utils.seeds import generator

CPU = torch.device("cpu")


def tiles(path, rows):
    """The 28 x 28 images of a picture of 16 columns, (rows, 16, 28, 28) in [0, 1]; the frame is 2 pixels wide."""
    pixels = np.asarray(Image.open(path).convert("L"), np.float32) / 255
    assert pixels.shape == (rows * 30 + 2, 16 * 30 + 2)
    return np.array(
        [[pixels[30 * r + 2 : 30 * r + 30, 30 * c + 2 : 30 * c + 30] for c in range(16)] for r in range(rows)]
    )


@pytest.mark.parametrize("n, channels, columns, line", [(16, 1, 8, 2), (5, 3, 3, 1), (2, 1, 2, 1)])
def test_images_are_tiled_as_torchvision_does(n, channels, columns, line):
    images = torch.rand(n, channels, 5, 7)
    assert torch.equal(tiled(images, columns, 0.5, line), make_grid(images, columns, line, pad_value=0.5))


def test_they_are_the_models_own(trained):
    (path,) = trained()
    check(Run.open(path))


def test_unfolded_cells_have_theirs(script):
    assert script(train.main, *FLAGS, *GRID)[0] == 0
    cells, (source,) = cells_of()
    for run in cells.values():
        check(run)
    assert (source.path / "samples.png").is_file()


def check(run):
    """Originals above, reconstructions below; samples from the run's seed; to the rounding of eight bits."""
    model = load_model(run, CPU)
    images = next(iter(load_data(run.config, "data", CPU).test.batches(16)))[0]
    originals, reconstructions = tiles(run.path / "reconstructions.png", 2)
    np.testing.assert_allclose(originals, images[:, 0], atol=1 / 255)
    with torch.no_grad():
        np.testing.assert_allclose(reconstructions, model.reconstruct(images)[:, 0], atol=1.5 / 255)
        samples = model.sample(64, generator=generator("cpu", run.config.seed, "samples"))
    np.testing.assert_allclose(tiles(run.path / "samples.png", 4).reshape(64, 28, 28), samples[:, 0], atol=1.5 / 255)
