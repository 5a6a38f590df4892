"""Readers of the real formats, on small files written here in exactly those formats."""

import os
import pickle
import struct
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

import train
import train_classifier
from datasets import table
from datasets.readers import read_idx
from datasets.table import DATASETS, DataSet
from tests.conftest import TINY
from tests.datasets.files import CPU, MNIST, RNG, load, write_cifar10, write_idx, write_mnist, write_svhn
from utils.errors import UserError

DEBIAN = Path(DATASETS["FashionMNIST"].elsewhere)


@pytest.fixture
def nothing_of_debian(monkeypatch):
    for name in ("FashionMNIST", "BinaryFashionMNIST"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], elsewhere=None))


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


# --- MNIST's format ---

PLACES = ["{}/raw", "{}", "raw", "."]


@pytest.mark.parametrize("name, family", [("MNIST", "MNIST"), ("FashionMNIST", "FashionMNIST"), ("KMNIST", "KMNIST")])
@pytest.mark.parametrize("root", ["data", "data/{}"])
@pytest.mark.parametrize("place", PLACES)
def test_idx_files_are_found_in_every_place(name, family, root, place, nothing_of_debian):
    images = write_mnist(Path(root.format(name)), below=place.format(family))
    data = load(name)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(images))
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_by_both_names_gzipped_or_not_whatever_they_are_called(dot, ending, zipped):
    names = [(n.replace("-idx", ".idx") if dot else n) + ending for n in MNIST]
    images = write_mnist(Path("data"), names=names, zipped=zipped)
    assert torch.equal(load("MNIST").test.images[:, 0], torch.from_numpy(images))


@pytest.mark.parametrize("name", ["BinaryMNIST", "BinaryFashionMNIST"])
def test_binary_images_are_black_and_white(name, nothing_of_debian):
    images = write_mnist(Path("data"), below=name.removeprefix("Binary") + "/raw")
    x, _ = next(load(name).test.batches(20))
    assert torch.equal(x[:, 0], torch.from_numpy(images / 255 >= 0.5).float())


def test_qmnist_has_the_label_in_the_first_of_eight_columns():
    raw, images = Path("data/QMNIST/raw"), RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = RNG.integers(100, 2000, (20, 8), dtype=np.int32)
    labels[:, 0] = np.arange(20) % 10
    for part in ("train", "test"):
        write_idx(raw / f"qmnist-{part}-images-idx3-ubyte", images)
        write_idx(raw / f"qmnist-{part}-labels-idx2-int.gz", labels, zipped=True)
    data = load("QMNIST")
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(images))
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]


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


@pytest.mark.parametrize("missing", MNIST)
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_half_a_data_set_names_the_file_that_is_missing(missing, name):
    write_mnist(Path("data"), below=f"{name}/raw")
    path = Path("data", name, "raw", missing)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path}: missing, while .* is there$"):
        load(name)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "shape, held, message",
    [
        ((3_500, 1000, 1000), 100, "promises 3,500,000,000 bytes, which it cannot hold"),
        ((2**32 - 1,) * 3, 100, "promises 79,228,[0-9,]* bytes, which it cannot hold"),
        ((20, 28, 28), 20 * 784 - 1, "holds fewer than the 15,680 bytes|promises 15,680 bytes, which it cannot"),
        ((20, 28, 28), 20 * 784 + 1, "holds more than the 15,680 bytes"),
    ],
)
def test_an_idx_header_that_does_not_keep_its_promise(zipped, shape, held, message):
    import gzip

    data = struct.pack(">I", 2051) + struct.pack(">III", *shape) + bytes(held)
    Path("file").write_bytes(gzip.compress(data) if zipped else data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^file: ({message})"):
        read_idx(Path("file"))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_gzip_bomb_is_refused_before_memory_is_asked_for():
    import gzip

    with gzip.open("file", "wb", compresslevel=9) as file:
        file.write(struct.pack(">IIII", 2051, 10**6, 1100, 1))
        for _ in range(1100):
            file.write(bytes(10**6))
    with pytest.raises(ValueError, match="promises 1,100,000,000 bytes, which it cannot hold"):
        read_idx(Path("file"))


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"\0\0\x08\x03\0", b"<html>", b"\x1f\x8b", b"\0\0\x07\x01" + bytes(9)]
)
def test_files_that_are_no_idx_files_are_named(content):
    write_mnist(Path("data"))
    Path("data/MNIST/raw", MNIST[2]).write_bytes(content)
    with pytest.raises(UserError, match=f"^MNIST: the files under data/MNIST are damaged .*{MNIST[2]}: "):
        load("MNIST")


def test_one_set_in_the_place_of_another_is_noticed():
    write_mnist(Path("data"), below=".")
    first = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, *range(10)], np.uint8)
    write_idx(Path("data", MNIST[1]), first)
    assert len(load("MNIST").train) == 20
    with pytest.raises(UserError, match=f"data/{MNIST[1]}: holds MNIST, not KMNIST; put each into a folder"):
        load("KMNIST")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs apt-get install dataset-fashion-mnist")
def test_the_real_fashion_mnist_is_found_without_a_flag(capfd):
    data = load("FashionMNIST")
    assert f"FashionMNIST: train 60,000 images, test 10,000, 10 classes; from {DEBIAN}\n" in capfd.readouterr().out
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    # Xiao, Rasul & Vollgraf (2017) and many since: mean 0.2860, std 0.3530 of the training pixels
    x = data.train.images.double() / 255
    assert x.mean().item() == pytest.approx(0.2860, abs=5e-5) and x.std().item() == pytest.approx(0.3530, abs=5e-5)
    binary = load("BinaryFashionMNIST").test.images
    assert torch.equal(binary, (data.test.images >= 128).to(torch.uint8) * 255)


# --- CIFAR ---


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "labels",
    [lambda y: y.tolist(), lambda y: y, list, lambda y: y.astype(np.uint8), lambda y: [np.uint8(v) for v in y]],
)
@pytest.mark.parametrize("keys", [str, str.encode])
def test_cifar10_pickles_of_every_protocol(protocol, labels, keys):
    rows = write_cifar10(Path("data"), protocol=protocol, labels=labels, keys=keys)
    data = load("CIFAR10")
    assert data.train.images.shape == (100, 3, 32, 32) and data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert torch.equal(data.test.images, torch.from_numpy(rows.reshape(-1, 3, 32, 32)))


class FromBuffer:
    """Rows as a pickle of protocol 5 rebuilds them."""

    def __init__(self, rows):
        self.rows = rows

    def __reduce__(self):
        from numpy._core.numeric import _frombuffer

        return _frombuffer, (self.rows.tobytes(), self.rows.dtype, self.rows.shape, "C")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_cifar10_pickles_of_old_and_new_numpy(core):
    rows = write_cifar10(Path("data"), data=FromBuffer, labels=lambda y: [np.uint8(v) for v in y])
    for path in Path("data/cifar-10-batches-py").iterdir():
        content = path.read_bytes()
        for name in (b"numeric\n_frombuffer\n", b"multiarray\nscalar\n"):
            assert content.count(b"cnumpy._core." + name) == 1
        path.write_bytes(content.replace(b"numpy._core.", f"numpy.{core}.".encode()))
    data = load("CIFAR10")
    assert torch.equal(data.test.images, torch.from_numpy(rows.reshape(-1, 3, 32, 32)))
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


def test_cifar10_with_channels_last_is_transposed():
    rows = write_cifar10(Path("data"), data=lambda rows: rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    assert torch.equal(load("CIFAR10").test.images, torch.from_numpy(rows.reshape(-1, 3, 32, 32)))


def test_cifar100_has_fine_labels():
    folder, rows = Path("data/cifar-100-python"), RNG.integers(0, 256, (100, 3072), dtype=np.uint8)
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        batch = {b"data": rows, b"fine_labels": list(range(100)), b"coarse_labels": [i // 5 for i in range(100)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = load("CIFAR100")
    assert data.n_classes == 100 and data.test.labels.tolist() == list(range(100))
    (folder / "test").unlink()
    with pytest.raises(UserError, match="cifar-100-python/test: missing, while train is there"):
        load("CIFAR100")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_an_archive_beside_the_folder_is_named_as_what_to_unpack(name):
    Path("data").mkdir()
    archive = f"data/cifar-{name.removeprefix('CIFAR')}-python.tar.gz"
    tarfile.open(archive, "w:gz").close()
    with pytest.raises(UserError, match=f"^{name}: not found; .*; {archive} is there: unpack it$"):
        load(name)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Disguised:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch executed')",)


@pytest.mark.parametrize("harm", [Malicious(), Disguised(), np.array([Malicious()], dtype=object), pickle.loads])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_cifar10_pickle_that_runs_code_is_refused(harm, protocol):
    write_cifar10(Path("data"))
    Path("data/cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({"data": harm}, protocol=protocol))
    with pytest.raises(UserError, match="refused"):
        load("CIFAR10")
    assert not Path("executed").exists()


def test_a_cifar10_pickle_that_names_more_bytes_than_it_holds_asks_for_no_memory():
    write_cifar10(Path("data"))
    Path("data/cifar-10-batches-py/test_batch").write_bytes(b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".")
    with pytest.raises(UserError, match="ends within an array of 1,099,511,627,776 bytes"):
        load("CIFAR10")


# --- SVHN ---


def test_svhn_mat():
    images = write_svhn(Path("data"))
    data = load("SVHN")
    assert torch.equal(data.test.images[7, 1], torch.from_numpy(images[:, :, 1, 7]))
    assert data.test.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize("start", [b"MATLAB 7.3 MAT-file, Platform: GLNXA64", b"\x89HDF\r\n\x1a\n\0\0\0"])
def test_svhn_in_matlabs_new_format_says_how_to_convert_it(start):
    write_svhn(Path("data"))
    Path("data/test_32x32.mat").write_bytes(start + bytes(1000))
    with pytest.raises(
        UserError, match=r"^data/test_32x32.mat: MATLAB's format 7.3; [^\n]*h5py.File\('data/test_32x32.h5'"
    ):
        load("SVHN")


def test_svhn_with_images_first_is_transposed_and_doubles_are_labels():
    images = write_svhn(Path("data"))
    held = {"X": images.transpose(3, 0, 1, 2), "y": np.arange(20.0) % 10 + 1}
    scipy.io.savemat("data/test_32x32.mat", held)
    data = load("SVHN")
    assert torch.equal(data.test.images, data.train.images) and torch.equal(data.test.labels, data.train.labels)


# --- one gate behind all of them ---

IMAGES, LABELS = np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES.astype(np.float32) + 0.5, LABELS, "pixels of float32 from 0.5 to 0.5, not uint8 from 0 to 255"),
        (IMAGES.astype(np.int64) - 300, LABELS, "pixels of int64 from -300 to -300, not uint8"),
        (IMAGES.astype(np.uint16), LABELS, "pixels of uint16 from 0 to 0, not uint8"),
        (IMAGES.astype(object), LABELS, "pixels of object, not uint8"),
        (IMAGES.reshape(4, 32, 3, 32), LABELS, "images (4, 32, 3, 32), not (N, 3, 32, 32)"),
        (IMAGES.reshape(4, 3072), LABELS, "images (4, 3072), not (N, 3, 32, 32)"),
        (IMAGES.reshape(12, 32, 32), LABELS, "images (12, 32, 32), not"),
        (IMAGES[:0], LABELS[:0], "images (0, 3, 32, 32), not"),
        (np.uint8(3), LABELS, "images (), not"),
        (IMAGES, LABELS[:3], "4 images, but labels (3,)"),
        (IMAGES, LABELS[:, None], "4 images, but labels (4, 1)"),
        (IMAGES, LABELS - 1, "labels from -1 to 2, not from 0 to 9"),
        (IMAGES, LABELS + 7, "labels from 7 to 10, not from 0 to 9"),
        (IMAGES, LABELS + 0.5, "labels of float64 that are not whole numbers"),
        (IMAGES, LABELS * np.nan, "labels of float64 that are not whole numbers"),
        (IMAGES, LABELS.astype(str), "labels of <U21 that are not whole numbers"),
    ],
)
def test_the_gate_says_what_it_found(images, labels, message, monkeypatch):
    row = DataSet((3, 32, 32), "MoL", lambda root: ((IMAGES, LABELS), (images, labels)), "files", n_classes=10)
    monkeypatch.setitem(DATASETS, "Odd", row)
    with pytest.raises(UserError) as e:
        load("Odd")
    assert str(e.value).startswith(f"Odd: {Path('data/Odd')} holds {message}")


def test_the_gate_transposes_channels_last_and_takes_whole_floats(monkeypatch):
    images = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    row = DataSet((3, 32, 32), "MoL", lambda root: ((images, LABELS.astype(float)),) * 2, "files", n_classes=10)
    monkeypatch.setitem(DATASETS, "Odd", row)
    data = load("Odd")
    assert torch.equal(data.train.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.train.labels.dtype == torch.int64 and data.train.labels.tolist() == [0, 1, 2, 3]


# --- the scripts ---


@pytest.mark.parametrize(
    "name, write, named",
    [
        ("MNIST", write_mnist, MNIST[0]),
        ("CIFAR10", write_cifar10, "data_batch_1"),
        ("SVHN", write_svhn, "train_32x32.mat"),
    ],
)
def test_damaged_files_are_named(name, write, named):
    write(Path("data", name))
    for path in Path("data").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"^{name}: the files under data/{name} are damaged .*{named}"):
        load(name)


@pytest.mark.parametrize("name", [n for n, row in DATASETS.items() if "ships" not in row.files and not row.elsewhere])
def test_a_missing_data_set_gives_one_line(name, script):
    status, _, err = script(train.main, *TINY, "--dataset", name, "--data_dir", "nowhere")
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
    assert err.startswith(f"error: {name}: not found; looked in {Path('nowhere').resolve()}")
    assert ("--download" in err) == (name != "ImageNet")


@pytest.mark.parametrize(
    "name, owner", [("MNIST", "MNIST"), ("FashionMNIST", "MNIST"), ("EMNISTLetters", "EMNIST"), ("QMNIST", "QMNIST")]
)
def test_download_without_a_network_gives_one_line(name, owner, script, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{owner}.download", no_network)
    status, _, err = script(train.main, *TINY, "--dataset", name, "--download")
    assert (status, err) == (2, f"error: --download: could not fetch {name} (no network)\n")


@pytest.mark.parametrize("name", ["MNIST", "BinaryMNIST", "CIFAR10", "SVHN"])
def test_training_reads_the_real_formats(name, script):
    {"CIFAR10": write_cifar10, "SVHN": write_svhn}.get(name, write_mnist)(Path("elsewhere"))
    status, out, err = script(train.main, *TINY, "--dataset", name, "--data_dir", "elsewhere")
    assert status == 0, err
    assert len(list(Path("runs/singles").iterdir())) == 1


def test_a_row_of_the_table_is_all_that_a_new_data_set_takes(script, monkeypatch):
    def stripes(root):
        images = np.zeros((40, 1, 28, 28), np.uint8)
        images[::2, :, ::2], images[1::2, :, :, ::2] = 255, 255
        return ((images, np.arange(40) % 2),) * 2

    monkeypatch.setitem(table.DATASETS, "Stripes", DataSet((1, 28, 28), "Bernoulli", stripes, "nothing", n_classes=2))
    status, out, err = script(train.main, *TINY, "--dataset", "Stripes")
    assert status == 0 and "Stripes: train 40 images, test 40, 2 classes\n" in out, err
    flags = ["--dataset", "Stripes", "--num_epochs", "3", "--batch_size", "4", "--device", "cpu"]
    status, out, err = script(train_classifier.main, *flags)
    assert status == 0 and "test accuracy 1.0000" in out, err


def test_every_row_has_a_recipe_that_can_be_built():
    from models.classifiers import OPTIMIZERS, build_classifier
    from utils.config import Config

    for name, row in DATASETS.items():
        model = build_classifier(Config(dataset=name), row.n_classes or 3).to(CPU).eval()
        assert model(torch.rand(1, *row.shape)).shape == (1, row.n_classes or 3)
        assert row.recipe.optimizer in OPTIMIZERS
