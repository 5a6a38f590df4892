"""Batches, of images in memory and of files."""

from pathlib import Path

import pytest
import torch

from datasets.batches import Resident, Streamed
from datasets.folders import scan
from tests.datasets.files import CPU, write_folder
from utils.errors import UserError


def test_resident_batches_cover_every_image_once_in_the_epochs_order():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    split = Resident(images, torch.arange(10), CPU)

    def order(**kwargs):
        return [label for _, labels in split.batches(4, **kwargs) for label in labels.tolist()]

    assert order() == list(range(10))
    first = order(shuffle=(2, 0))
    assert sorted(first) == list(range(10)) and first != list(range(10))
    assert order(shuffle=(2, 0)) == first
    assert order(shuffle=(2, 1)) != first and order(shuffle=(3, 0)) != first
    assert order(shuffle=(2, 0), start=1) == first[4:]
    x, labels = next(split.batches(10))
    torch.testing.assert_close(x.flatten(), labels / 255)


def test_streamed_crops_do_not_depend_on_the_workers():
    write_folder(Path("pets"), size=(300, 280), n=4)
    samples = scan(Path("pets")).train

    def epoch(workers, **kwargs):
        split = Streamed(samples, (3, 256, 256), CPU)
        split.workers = workers
        return torch.cat([x for x, _ in split.batches(3, **kwargs)])

    first = epoch(1, shuffle=(2, 0))
    assert torch.equal(first, epoch(2, shuffle=(2, 0)))
    assert torch.equal(first[3:], epoch(2, shuffle=(2, 0), start=1))
    assert not torch.equal(first, epoch(2, shuffle=(2, 1)))
    assert torch.equal(epoch(1), epoch(2))


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no such file")]
    + [RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")],
)
def test_a_killed_worker_is_told_whatever_was_being_handed_over(monkeypatch, error):
    def loader(*_, **__):
        raise error
        yield

    monkeypatch.setattr("datasets.batches.DataLoader", loader)
    with pytest.raises(UserError, match="a process that reads images was killed.*--shm-size"):
        next(Streamed([("a.png", 0)], (1, 8, 8), CPU).batches(1))
