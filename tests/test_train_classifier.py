"""train_classifier.py, and the classifiers that it makes."""

import copy
from pathlib import Path

import pytest
import torch

from datasets.loading import load_data
from models.classifiers import NETWORKS, augmented, evaluator, load_classifier
from tests.datasets.files import write_cifar10, write_folder, write_svhn
from train_classifier import main
from utils.config import Config
from utils.evaluation.run import Evaluation
from utils.files import read_json
from utils.locks import locked

CPU = torch.device("cpu")
FLAGS = ["--device", "cpu", "--batch_size", "500"]
PETS = [*FLAGS, "--dataset", "pets", "--image_channels", "1", "--num_epochs", "2"]


def test_the_classifier_is_trained_once_a_seed_and_found(passes, refused):
    folder, flags = Path("runs/classifiers/Digits"), [*FLAGS, "--num_epochs", "1"]
    passes(main, *flags)
    assert 0 < read_json(folder / "config.json")["test_accuracy"] <= 1
    assert "already complete" in passes(main, *flags)
    assert "--num_epochs (1)" in refused(main, *FLAGS, "--num_epochs", "3")
    before = (folder / "classifier.pth").read_bytes()
    out = passes(main, *flags, "--seed", "3", "2", "3")
    assert f"the classifier is in {folder}/seed_3" in out and out.count("already complete") == 1
    assert (folder / "classifier.pth").read_bytes() == before != (folder / "seed_3/classifier.pth").read_bytes()
    (folder / "seed_4").mkdir()  # unfinished
    assert len({digest for _, digest in Evaluation(CPU, "data", "runs").classifiers(Config())}) == 2


def test_an_interrupted_classifier_continues_to_the_same_bytes(script, passes, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    write_folder(Path("pets"), size=(28, 28))
    passes(main, *PETS, "--runs_dir", "whole")
    with monkeypatch.context() as m:
        accuracies = iter([lambda *_: 0.0, interrupt])  # after the first epoch, and in the second
        m.setattr("utils.training.classifier.accuracy", lambda *args: next(accuracies)(*args))
        assert script(main, *PETS)[0] == 130
    assert "resuming at epoch 1" in passes(main, *PETS)
    ours, expected = (Path(root, "classifiers/pets_1x28x28/classifier.pth") for root in ("runs", "whole"))
    assert ours.read_bytes() == expected.read_bytes()


def test_a_classifier_that_another_process_trains_is_left_to_it(script, passes, refused):
    write_folder(Path("pets"), size=(28, 28))
    folder = Path("runs/classifiers/pets_1x28x28")
    passes(main, *PETS, "--seed", "2")
    (folder / "classifier.pth").unlink()
    with locked(folder):
        status, _, err = script(main, *PETS, "--seed", "2", "3")
        assert status == 0 and f"note: {folder}: locked by pid" in err
        assert (folder / "seed_3/classifier.pth").exists() and not (folder / "classifier.pth").exists()
        assert "locked by pid" in refused(main, *PETS)


def test_a_classifier_that_another_process_finishes_meanwhile_is_kept(passes, monkeypatch):
    def load(*args):
        kept.rename(weights)  # as another process would, while this one loads its data
        return load_data(*args)

    flags = [*FLAGS, "--num_epochs", "1"]
    weights, kept = Path("runs/classifiers/Digits/classifier.pth"), Path("kept")
    passes(main, *flags)
    config = read_json(weights.with_name("config.json"))
    weights.rename(kept)
    monkeypatch.setattr("datasets.loading.load_data", load)
    assert "already complete" in passes(main, *flags)
    assert read_json(weights.with_name("config.json")) == config and "test_accuracy" in config


@pytest.mark.parametrize("name", NETWORKS)
def test_classifiers_say_the_same_of_images_in_parts(name):
    plain, x = NETWORKS[name]((3, 32, 32), 10).eval(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        expected = plain(x), plain.features(x)
        net = evaluator(copy.deepcopy(plain), CPU)
        net.features.part = 2
        for ours, theirs in zip((net(x), net.features(x)), expected, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_colour_classifiers_train(passes):
    for dataset, write in (("SVHN", write_svhn), ("CIFAR10", write_cifar10)):
        write(Path("data"), n=2)
        passes(main, "--dataset", dataset, "--num_epochs", 1, "--device", "cpu")
        model, _ = load_classifier(Path("runs/classifiers", dataset), Config(dataset=dataset), CPU)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_bad_input_to_the_classifier(refused):
    for flag, value in (("--dataset", "Imagenet"), ("--learning_rate", "0"), ("--num_epochs", "0")):
        assert refused(main, flag, value).startswith(f"error: {flag}: ")
    err = refused(main, "--dataset", "SVHN")
    assert err.startswith("error: SVHN: not found") and not Path("runs").exists()


def test_augmentation_moves_and_mirrors_each_image_on_its_own():
    x, g = torch.zeros(64, 1, 8, 8), torch.Generator().manual_seed(0)
    x[:, :, 3, 2] = 1
    for crop, flip, rows, columns in ((2, False, {1, 2, 3, 4, 5}, {0, 1, 2, 3, 4}), (0, True, {3}, {2, 5})):
        places = augmented(x, crop, flip, g).flatten(1).argmax(1)
        assert {*(places // 8).tolist()} == rows
        assert {*(places % 8).tolist()} == columns
        assert crop == 0 or len(places.unique()) > 10  # rows and columns move apart
    assert torch.equal(augmented(x, 0, False, g), x)
