"""Readers of the real formats, on small files written here in exactly those formats; batches."""

import gzip
import os
import pickle
import shutil
import struct
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torch import from_numpy

import train
import train_classifier
from datasets import table
from datasets.batches import Resident, Streamed
from datasets.folders import scan
from datasets.readers import read_idx
from datasets.table import DATASETS, DataSet
from models.classifiers import OPTIMIZERS, build_classifier
from tests.conftest import TINY
from tests.datasets import files
from tests.datasets.files import CPU, MNIST, RNG, load, refused, write_idx, write_mnist
from utils.config import Config

DEBIAN = Path(DATASETS["FashionMNIST"].elsewhere)
CYCLE = [i % 10 for i in range(20)]  # the labels that the helpers write


def test_digits_come_with_the_house(capfd):
    data = load("Digits")
    assert data.train.images.shape == (1437, 1, 28, 28) and data.test.images.shape == (360, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    share = torch.bincount(data.test.labels) / torch.bincount(torch.cat([data.test.labels, data.train.labels]))
    assert (share - 0.2).abs().max() < 0.01
    assert torch.equal(data.test.images, load("Digits").test.images)
    assert capfd.readouterr().out == "Digits: train 1,437 images, test 360, 10 classes\n"  # once
    binary = load("BinaryDigits")
    assert torch.equal(binary.test.images, (data.test.images >= 128) * 255)
    assert torch.equal(binary.train.labels, data.train.labels)


def test_idx_files_in_every_place_black_and_white_or_not(monkeypatch):
    for name in ("FashionMNIST", "BinaryFashionMNIST"):  # not those of the system
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], elsewhere=None))
    roots, places = ["data", "data/{}"], ["{}/raw", "{}", "raw", "."]
    for root, place, name in product(roots, places, ["MNIST", "FashionMNIST", "KMNIST"]):
        images = from_numpy(write_mnist(Path(root.format(name)), below=place.format(name)))
        data = load(name)
        assert torch.equal(data.train.images[:, 0], images)
        assert data.test.labels.tolist() == CYCLE
        if name != "KMNIST" and root == "data":
            x, _ = next(load(f"Binary{name}").test.batches(20))
            assert torch.equal(x[:, 0], (images / 255 >= 0.5).float())
        shutil.rmtree("data")


def test_idx_files_by_both_names_gzipped_or_not():
    for dot, ending, zipped in product([False, True], ["", ".gz"], [False, True]):
        names = [(n.replace("-idx", ".idx") if dot else n) + ending for n in MNIST]
        images = write_mnist(Path("data"), names=names, zipped=zipped)
        assert torch.equal(load("MNIST").test.images[:, 0], from_numpy(images))
        shutil.rmtree("data")


def test_qmnist_has_the_label_in_the_first_of_eight_columns():
    raw, images = Path("data/QMNIST/raw"), RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = RNG.integers(100, 2000, (20, 8), dtype=np.int32)
    labels[:, 0] = CYCLE
    for part in ("train", "test"):
        write_idx(raw / f"qmnist-{part}-images-idx3-ubyte", images)
        write_idx(raw / f"qmnist-{part}-labels-idx2-int.gz", labels, zipped=True)
    data = load("QMNIST")
    assert torch.equal(data.test.images[:, 0], from_numpy(images)) and data.train.labels.tolist() == CYCLE


@pytest.mark.parametrize("split, first, n", [("letters", 1, 26), ("balanced", 0, 47), ("digits", 0, 10)])
def test_emnist_is_turned_upright_and_counts_its_classes_from_0(split, first, n):
    raw, stored = Path("data/EMNIST/raw"), RNG.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % n).astype(np.uint8)
    for part in ("train", "test"):
        write_idx(raw / f"emnist-{split}-{part}-images-idx3-ubyte", stored)
        write_idx(raw / f"emnist-{split}-{part}-labels-idx1-ubyte", labels + np.uint8(first))
    data = load(f"EMNIST{split.title()}")
    assert data.n_classes == n and data.train.labels.tolist() == labels.tolist()
    assert data.train.images[3, 0, 5, 20] == stored[3, 20, 5]


def test_what_is_missing_is_named():
    for missing in MNIST:
        write_mnist(Path("data"))
        path = Path("data/MNIST/raw", missing)
        path.unlink()
        refused("MNIST", f"{path}: missing")


def test_an_idx_file_that_holds_more_or_less_than_it_promises_is_refused():
    for shape, n in (((2**32 - 1,) * 3, 100), ((20, 28, 28), 20 * 784 - 1), ((20, 28, 28), 20 * 784 + 1)):
        data = struct.pack(">IIII", 2051, *shape) + bytes(n)
        for content in (data, gzip.compress(data)):
            Path("file").write_bytes(content)
            with pytest.raises(ValueError, match=f"^file: holds {n:,} values"):
                read_idx(Path("file"))


def test_files_that_are_no_idx_files_or_of_another_set_are_named():
    write_mnist(Path("data"), below=".")
    write_idx(Path("data", MNIST[1]), np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, *range(10)], np.uint8))
    assert len(load("MNIST").train) == 20
    refused("KMNIST", f"data/{MNIST[1]}: holds MNIST, not KMNIST")
    for content in (b"", b"\0\0", b"\0\0\x08\x03\0", b"<html>", b"\x1f\x8b", b"\0\0\x07\x01" + bytes(9)):
        Path("data", MNIST[2]).write_bytes(content)
        refused("MNIST", "the files under data are damaged", MNIST[2])


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs apt-get install dataset-fashion-mnist")
def test_the_real_fashion_mnist_is_found_without_a_flag():
    """Xiao, Rasul & Vollgraf (2017) and many since: mean 0.2860, std 0.3530 of the training pixels."""
    data = load("FashionMNIST")
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5] and len(data.test) == 10_000
    x = data.train.images.double() / 255
    assert x.mean().item() == pytest.approx(0.2860, abs=5e-5) and x.std().item() == pytest.approx(0.3530, abs=5e-5)


def is_cifar10(rows) -> None:
    data = load("CIFAR10")
    assert data.train.images.shape == (100, 3, 32, 32) and data.test.labels.tolist() == CYCLE
    assert torch.equal(data.test.images, from_numpy(rows.reshape(-1, 3, 32, 32)))


def test_cifar10_pickles_of_every_protocol():
    kinds = [np.ndarray.tolist, lambda y: y, list, lambda y: y.astype(np.uint8), lambda y: [np.uint8(v) for v in y]]
    for protocol, labels, keys in product(range(6), kinds, [str, str.encode]):
        is_cifar10(files.write_cifar10(Path("data"), protocol=protocol, labels=labels, keys=keys))


def test_cifar10_pickles_of_old_numpy_and_with_channels_last():
    rows = files.write_cifar10(Path("data"))
    for path in Path("data/cifar-10-batches-py").iterdir():
        content = path.read_bytes()
        assert content.count(b"cnumpy._core.multiarray\n_reconstruct\n") == 1
        path.write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
    is_cifar10(rows)
    is_cifar10(files.write_cifar10(Path("data"), data=lambda r: r.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()))


def test_cifar100_has_fine_labels():
    folder, rows = Path("data/cifar-100-python"), RNG.integers(0, 256, (100, 3072), dtype=np.uint8)
    folder.mkdir(parents=True)
    batch = {b"data": rows, b"fine_labels": list(range(100)), b"coarse_labels": [i // 5 for i in range(100)]}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = load("CIFAR100")
    assert data.n_classes == 100 and data.test.labels.tolist() == list(range(100))
    (folder / "test").unlink()
    refused("CIFAR100", "cifar-100-python/test: missing")


class Malicious:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_cifar10_pickle_that_runs_code_is_refused():
    files.write_cifar10(Path("data"))
    path = Path("data/cifar-10-batches-py/test_batch")
    touch = Malicious(os.system, ("touch executed",))
    disguised = Malicious(eval, ("__import__('os').system('touch executed')",))
    for harm in (touch, disguised, np.array([touch], dtype=object), pickle.loads):
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps({"data": harm}, protocol=protocol))
            refused("CIFAR10", "test_batch", "refused")
            assert not Path("executed").exists()


def test_svhn_counts_0_as_10_and_may_have_images_first_and_doubles_for_labels():
    images = files.write_svhn(Path("data"))
    data = load("SVHN")
    assert torch.equal(data.test.images[7, 1], from_numpy(images[:, :, 1, 7]))
    assert data.test.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    scipy.io.savemat("data/test_32x32.mat", {"X": images.transpose(3, 0, 1, 2), "y": np.arange(20.0) % 10 + 1})
    other = load("SVHN").test
    assert torch.equal(other.images, data.train.images) and torch.equal(other.labels, data.train.labels)


IMAGES, LABELS = np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)
ODD = [
    (IMAGES.astype(np.float32) + 0.5, LABELS, "pixels of float32 from 0.5 to 0.5"),
    (IMAGES.astype(np.int64) - 300, LABELS, "pixels of int64 from -300 to -300"),
    (IMAGES.reshape(4, 3072), LABELS, "images (4, 3072), not (N, 3, 32, 32)"),
    (IMAGES[:0], LABELS[:0], "images (0, 3, 32, 32)"),
    (np.uint8(3), LABELS, "images ()"),
    (IMAGES, LABELS[:3], "4 images, but labels (3,) of int64"),
    (IMAGES, LABELS - 1, "labels from -1 to 2, not from 0 to 9"),
    (IMAGES, LABELS + 7, "labels from 7 to 10, not from 0 to 9"),
    (IMAGES, LABELS + 0.5, "4 images, but labels (4,) of float64"),
    (IMAGES, LABELS.astype(str), "4 images, but labels (4,) of <U21"),
]


def test_the_gate_says_what_a_file_holds_and_transposes_channels_last(monkeypatch):
    def holds(images, labels):
        row = DataSet((3, 32, 32), "MoL", lambda root: ((IMAGES, LABELS), (images, labels)), "files", n_classes=10)
        monkeypatch.setitem(DATASETS, "Odd", row)

    for images, labels, message in ODD:
        holds(images, labels)
        refused("Odd", f"Odd: {Path('data/Odd')} holds {message}")
    images = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    holds(images, LABELS.astype(float))
    test = load("Odd").test
    assert torch.equal(test.images, from_numpy(images).permute(0, 3, 1, 2))
    assert test.labels.dtype == torch.int64 and test.labels.tolist() == [0, 1, 2, 3]


def test_training_reads_real_formats_and_damaged_files_are_named(passes, refused):
    for name, write, part in (("MNIST", write_mnist, MNIST[0]), ("CIFAR10", files.write_cifar10, "data_batch_1")):
        write(Path("elsewhere", name))
        passes(train.main, *TINY, "--dataset", name, "--data_dir", "elsewhere")
        assert name in next(Path("runs/singles").iterdir()).name
        shutil.rmtree("runs")
        for path in Path("elsewhere", name).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:50])
        err = refused(train.main, *TINY, "--dataset", name, "--data_dir", "elsewhere")
        assert f"{name}: the files under elsewhere/{name} are damaged" in err and part in err
    files.write_svhn(Path("data"))
    Path("data/train_32x32.mat").write_bytes(b"MATLAB 5.0")
    files.refused("SVHN", "the files under data are damaged", "train_32x32")


def test_a_missing_data_set_gives_one_line(script, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    for name in [n for n, row in DATASETS.items() if "nothing" not in row.files and not row.elsewhere]:
        status, _, err = script(train.main, *TINY, "--dataset", name, "--data_dir", "nowhere")
        assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
        assert err.startswith(f"error: {name}: not found; looked in {Path('nowhere').resolve()}")
        assert ("--download" in err) == (name != "ImageNet")
    monkeypatch.setattr("torchvision.datasets.EMNIST.download", no_network)
    status, _, err = script(train.main, *TINY, "--dataset", "EMNISTLetters", "--download")
    assert (status, err) == (2, "error: --download: could not fetch EMNISTLetters (no network)\n")


def test_a_row_of_the_table_is_all_that_a_new_data_set_takes(passes, monkeypatch):
    def stripes(root):
        images = np.zeros((40, 1, 28, 28), np.uint8)
        images[::2, :, ::2], images[1::2, :, :, ::2] = 255, 255
        return ((images, np.arange(40) % 2),) * 2

    monkeypatch.setitem(table.DATASETS, "Stripes", DataSet((1, 28, 28), "Bernoulli", stripes, "nothing", n_classes=2))
    assert "Stripes: train 40 images, test 40, 2 classes\n" in passes(train.main, *TINY, "--dataset", "Stripes")
    flags = ["--dataset", "Stripes", "--num_epochs", "3", "--batch_size", "4", "--device", "cpu"]
    assert "test accuracy 1.0000" in passes(train_classifier.main, *flags)


def test_every_row_and_every_shape_of_a_folder_has_a_classifier():
    own = [dict(dataset="/nowhere", image_size=size, image_channels=n) for size in (32, 64, 128, 256) for n in (1, 3)]
    for config in [*(Config(dataset=name) for name in DATASETS), *(Config(**settings) for settings in own)]:
        row = table.lookup(config)
        model = build_classifier(config, row.n_classes or 3).to(CPU).eval()
        assert model(torch.rand(1, *row.shape)).shape == (1, row.n_classes or 3)
        assert row.recipe.optimizer in OPTIMIZERS


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
    files.write_folder(Path("pets"), size=(300, 280), n=4)
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
