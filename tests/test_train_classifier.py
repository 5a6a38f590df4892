"""train_classifier.py, and the classifiers that it makes."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch

import train_classifier
from models.classifiers import NETWORKS, augmented, evaluator, load_classifier
from tests.conftest import start
from tests.datasets.files import write_cifar10, write_svhn
from utils.config import Config
from utils.errors import UserError
from utils.evaluation.subject import Bench
from utils.files import read_json
from utils.locks import locked


def test_the_classifier_resumes_bit_for_bit_and_is_found(script):
    flags = ["--device", "cpu", "--num_epochs", "2", "--batch_size", "500"]
    status, _, err = script(train_classifier.main, *flags)
    assert status == 0, err
    folder = Path("runs/classifiers/Digits")
    assert 0 < read_json(folder / "config.json")["test_accuracy"] <= 1
    status, out, _ = script(train_classifier.main, *flags)
    assert status == 0 and "already complete" in out
    status, _, err = script(train_classifier.main, *flags[:2], "--num_epochs", "3")
    assert status == 2 and "--num_epochs (2)" in err
    before = (folder / "classifier.pth").read_bytes()
    status, out, err = script(train_classifier.main, *flags, "--seed", "3", "2", "3")
    assert status == 0 and f"the classifier is in {folder}/seed_3" in out and out.count("already complete") == 1, err
    assert (folder / "classifier.pth").read_bytes() == before != (folder / "seed_3/classifier.pth").read_bytes()
    bench = Bench(torch.device("cpu"), "data", "runs")
    assert len({digest for _, digest in bench.classifiers_of(Config())}) == 2
    (folder / "seed_4").mkdir()  # unfinished
    assert len(Bench(torch.device("cpu"), "data", "runs").classifiers_of(Config())) == 2
    process = start("train_classifier.py", *flags, "--runs_dir", "killed")
    end = time.monotonic() + 60
    while not Path("killed/classifiers/Digits/resume.pth").exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    status, out, err = script(train_classifier.main, *flags, "--runs_dir", "killed")
    assert status == 0 and "resuming at epoch" in out, err
    assert Path("killed/classifiers/Digits/classifier.pth").read_bytes() == (folder / "classifier.pth").read_bytes()


def test_a_classifier_that_another_process_trains_is_left_to_it(script):
    flags = ["--device", "cpu", "--num_epochs", "1", "--batch_size", "1000"]
    folder = Path("runs/classifiers/Digits")
    folder.mkdir(parents=True)
    settings = {
        "dataset": "Digits",
        "num_epochs": 1,
        "batch_size": 1000,
        "learning_rate": Config().recipe.learning_rate,
    }
    (folder / "config.json").write_text(json.dumps(settings | {"seed": 2}))
    with locked(folder):
        status, _, err = script(train_classifier.main, *flags, "--seed", "2", "3")
        assert status == 0 and f"note: {folder}: locked by pid" in err and "it trains that one" in err
        assert (folder / "seed_3/classifier.pth").exists() and not (folder / "classifier.pth").exists()
        status, _, err = script(train_classifier.main, *flags)
        assert status == 2 and err.count("\n") == 1 and "locked by pid" in err


@pytest.mark.parametrize("n_classes", [math.inf, math.nan, -1, 2**50, "ten", None, []])
def test_a_damaged_number_of_classes_is_told(n_classes, script):
    assert script(train_classifier.main, "--device", "cpu", "--num_epochs", "1", "--batch_size", "1000")[0] == 0
    path = Path("runs/classifiers/Digits/config.json")
    path.write_text(json.dumps(read_json(path) | {"n_classes": n_classes}))
    with pytest.raises(UserError, match="classifier.pth: does not fit .*config.json|config.json"):
        load_classifier(path.parent, Config(), torch.device("cpu"))


@pytest.mark.parametrize("name", NETWORKS)
def test_classifiers_say_the_same_of_images_in_parts(name):
    plain, x = NETWORKS[name]((3, 32, 32), 10).eval(), torch.rand(70, 3, 32, 32)
    with torch.no_grad():
        expected = plain(x), plain.features(x)
        net = evaluator(copy.deepcopy(plain), torch.device("cpu"))
        for ours, theirs in zip((net(x), net.features(x)), expected, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dataset", ["SVHN", "CIFAR10"])
def test_colour_classifiers_train(dataset, script):
    {"SVHN": write_svhn, "CIFAR10": write_cifar10}[dataset](Path("data"), n=2)
    status, out, err = script(train_classifier.main, "--dataset", dataset, "--num_epochs", 1, "--device", "cpu")
    assert status == 0, err
    model, _ = load_classifier(Path("runs/classifiers", dataset), Config(dataset=dataset), torch.device("cpu"))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "Imagenet"], "--dataset: unknown 'Imagenet'; did you mean ImageNet?"),
        (["--image_size", "32"], "--image_size: is for a folder of images"),
        (["--learning_rate", "0"], "--learning_rate: must be > 0"),
        (["--num_epochs", "0"], "--num_epochs: must be a whole number >= 1"),
        (["--dataset", "SVHN"], "SVHN: not found; looked in"),
    ],
)
def test_bad_input_to_the_classifier(flags, message, script):
    status, _, err = script(train_classifier.main, *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1 and not Path("runs").exists()


def test_augmentation_moves_and_mirrors_each_image_on_its_own():
    x = torch.zeros(64, 1, 8, 8)
    x[:, :, 3, 2] = 1
    g = torch.Generator().manual_seed(0)
    places = augmented(x, 2, False, g).flatten(1).argmax(1)
    rows, columns = places // 8, places % 8
    assert set(rows.tolist()) == {1, 2, 3, 4, 5} and set(columns.tolist()) == {0, 1, 2, 3, 4}
    both = augmented(x, 0, True, g).flatten(1).argmax(1) % 8
    assert set(both.tolist()) == {2, 5}
    untouched = augmented(x, 0, False, g)
    assert torch.equal(untouched, x)
