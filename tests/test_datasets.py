"""Readers of the real formats, on small files written here in exactly those formats; batches."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import train
from datasets import readers
from datasets.batches import Resident, Streamed
from datasets.loading import load_data
from tests.conftest import TINY
from utils.config import Config
from utils.errors import UserError

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def write_mnist(root: Path, n=20) -> np.ndarray:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n)))
    return images


def write_cifar10(root: Path, n=20) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = RNG.integers(0, 256, (n, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rows, "labels": [i % 10 for i in range(n)], "batch_label": name, "filenames": ["a"] * n}
        (folder / name).write_bytes(pickle.dumps({k.encode(): v for k, v in batch.items()}, protocol=2))
    return rows


def write_svhn(root: Path, n=20) -> np.ndarray:
    root.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    for part in ("train", "test"):
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": images, "y": labels})
    return images


def write_folder(root: Path, size=(40, 50), classes=("cat", "dog"), n=5) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


def load(name, root="data", **settings):
    return load_data(Config(dataset=name, **settings), root, CPU)


def test_digits_come_with_the_house():
    data = load("Digits")
    assert data.train.images.shape == (1437, 1, 28, 28) and data.test.images.shape == (360, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    share = torch.bincount(data.test.labels) / torch.bincount(torch.cat([data.test.labels, data.train.labels]))
    assert (share - 0.2).abs().max() < 0.01
    assert torch.equal(data.test.images, load("Digits").test.images)


@pytest.mark.parametrize("root", ["data", "data/MNIST"])
def test_mnist_idx(root):
    images = write_mnist(Path(root))
    data = load("MNIST")
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(images))
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


def test_binary_mnist_is_black_and_white():
    images = write_mnist(Path("data"))
    data = load("BinaryMNIST")
    x, _ = next(data.test.batches(20))
    assert torch.equal(x[:, 0], torch.from_numpy(images / 255 >= 0.5).float())


def test_cifar10_pickles():
    rows = write_cifar10(Path("data"))
    data = load("CIFAR10")
    assert data.train.images.shape == (100, 3, 32, 32)
    assert torch.equal(data.test.images, torch.from_numpy(rows.reshape(-1, 3, 32, 32)))


def test_svhn_mat():
    images = write_svhn(Path("data"))
    data = load("SVHN")
    assert torch.equal(data.test.images[7, 1], torch.from_numpy(images[:, :, 1, 7]))
    assert data.test.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_cifar10_pickle_that_runs_code_is_refused():
    write_cifar10(Path("data"))
    Path("data/cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({"data": Malicious()}))
    with pytest.raises(UserError, match="refused"):
        load("CIFAR10")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN"])
def test_damaged_files_are_named(name):
    {"MNIST": write_mnist, "CIFAR10": write_cifar10, "SVHN": write_svhn}[name](Path("data"))
    for path in Path("data").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"^{name}: the files under data are damaged"):
        load(name)


@pytest.mark.parametrize("name", ["MNIST", "BinaryMNIST", "CIFAR10", "SVHN", "ImageNet"])
def test_a_missing_data_set_gives_one_line(name, script):
    status, _, err = script(train.main, *TINY, "--dataset", name, "--data_dir", "nowhere")
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
    assert err.startswith(f"error: {name}: not found; looked in {Path('nowhere').resolve()}")
    assert ("--download" in err) == (name != "ImageNet")


def test_download_without_a_network_gives_one_line(script, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    status, _, err = script(train.main, *TINY, "--dataset", "MNIST", "--download")
    assert (status, err) == (2, "error: --download: could not fetch MNIST (no network)\n")


@pytest.mark.parametrize("name", ["MNIST", "BinaryMNIST", "CIFAR10", "SVHN"])
def test_training_reads_the_real_formats(name, script):
    {"CIFAR10": write_cifar10, "SVHN": write_svhn}.get(name, write_mnist)(Path("elsewhere"))
    status, out, err = script(train.main, *TINY, "--dataset", name, "--data_dir", "elsewhere")
    assert status == 0, err
    assert len(list(Path("runs/singles").iterdir())) == 1


def test_training_streams_imagenet_folders(script):
    for part in ("train", "val"):
        write_folder(Path("data/ImageNet", part), n=3)
    flags = ["--dataset", "ImageNet", "--conv_channels", 2, "--num_epochs", 1, "--batch_size", 4, "--device", "cpu"]
    status, out, err = script(train.main, *flags)
    assert status == 0, err
    assert "(3, 256, 256)" in out


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_own_folder_of_images(size, channels, script):
    write_folder(Path("pets"), n=5)
    flags = ["--dataset", "pets", "--image_size", size, "--image_channels", channels]
    status, out, err = script(train.main, *TINY, *flags)
    assert status == 0, err
    data = load("pets", image_size=size, image_channels=channels)
    assert data.train.images.shape == (8, channels, size, size) and data.n_classes == 2
    assert sorted(data.test.labels.tolist()) == [0, 1]
    assert f"pets_{channels}x{size}x{size}" in next(Path("runs/singles").iterdir()).name


def test_own_folder_with_its_own_split():
    write_folder(Path("pets/train"), n=3)
    write_folder(Path("pets/test"), n=2)
    data = load("pets", image_size=32)
    assert (len(data.train), len(data.test)) == (6, 4)


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
    samples = readers.folder(Path("pets"), train=True).samples

    def epoch(workers, **kwargs):
        split = Streamed(samples, (3, 256, 256), CPU)
        split.workers = workers
        return torch.cat([x for x, _ in split.batches(3, **kwargs)])

    first = epoch(1, shuffle=(2, 0))
    assert torch.equal(first, epoch(2, shuffle=(2, 0)))
    assert torch.equal(first[3:], epoch(2, shuffle=(2, 0), start=1))
    assert not torch.equal(first, epoch(2, shuffle=(2, 1)))
    assert torch.equal(epoch(1), epoch(2))


def test_a_damaged_image_is_named():
    write_folder(Path("pets/train"), n=2)
    write_folder(Path("pets/val"), n=2)
    Path("pets/val/cat/0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"pets/val/cat/0.png"):
        load("pets", image_size=32)
    streamed = load("pets", image_size=256)
    with pytest.raises(UserError, match=r"^\S*pets/val/cat/0.png: damaged image[^\n]*$"):
        list(streamed.test.batches(2))
