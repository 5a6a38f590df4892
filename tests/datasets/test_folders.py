"""Folders of images: what is found in them, how a file becomes an image, and what is said of it."""

import csv
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, features

import eval_beta_grid
import eval_beta_single
import plot_eval
import train
import train_classifier
from datasets import loading
from datasets.batches import Resident, Streamed
from datasets.folders import centre_crop, open_image, scan
from datasets.loading import load_data
from models.build import build_model
from tests.conftest import TINY, weights
from tests.datasets.files import load, refused, write_folder, write_image
from utils.config import Config
from utils.errors import UserError
from utils.explore import load as load_run
from utils.runs import Run

PETS = Path("pets")
SMALL = ["--image_size", "28", "--image_channels", "1"]
EVALUATE = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_mi", "--exclude_fid"]


def plant(root: Path, tree: str) -> Path:
    """A folder with so many images in each of its folders: `cat 5, train/dog 1`."""
    for branch in tree.split(", "):
        name, n = branch.split()
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(int(n)):
            write_image(root / name / f"{i}.png")
    return root


def said(capfd, root=PETS, **settings) -> list[str]:
    """The lines that loading a folder prints."""
    load(str(root), **{"image_size": 32} | settings)
    return capfd.readouterr().out.splitlines()


def labels_of(root=PETS) -> dict[str, int]:
    """Files below the root that are images of a split, and their labels."""
    folder = scan(root)
    return {os.path.relpath(path, root.absolute()): label for path, label in folder.train + folder.test}


def test_the_first_process_says_once_what_there_is(capfd, monkeypatch):
    write_folder(PETS)
    for name in ("cat/list.txt", "a.npy", "b.npy"):
        Path(PETS, name).write_bytes(b"no image")
    (line,) = said(capfd)
    assert line == "pets: train 8 images, test 2, 2 classes: cat, dog; 3 files skipped (.npy 2, .txt 1)"
    assert said(capfd) == []
    monkeypatch.setenv("RANK", "1")
    assert said(capfd, plant(Path("others"), "cat 5")) == []


LEFT_BEHIND = """
.cache/a.png __MACOSX/cat/a.png @eaDir/a.png lost+found/a.png cat/.thumbs/a.png cat/@eaDir/a.png cat/Thumbs.db
cat/thumbs.db cat/._0.png dog/.DS_Store cat/.ipynb_checkpoints/0-checkpoint.png cat/__MACOSX/._0.png
cat/desktop.ini $RECYCLE.BIN/a.png #recycle/a.png .a.png
"""


def test_what_systems_leave_behind_is_not_looked_at(capfd):
    write_folder(PETS / "train", n=5)
    write_folder(PETS / "val", n=1)
    for name in LEFT_BEHIND.split():
        write_image(Path("a.png"))
        path = PETS / "train" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Path("a.png").rename(path)
    (line,) = said(capfd)
    assert "2 classes: cat, dog" in line and "skipped" not in line
    assert len(labels_of()) == 12


def test_links_are_followed_and_no_folder_is_entered_twice(capfd):
    plant(Path("elsewhere"), "cat 5")
    plant(PETS, "dog 5, eel 5")
    links = {"cat": "../elsewhere/cat", "dog/again": "..", "eel/7.png": "x.png"}
    for link, target in (links | {"eel/6.png": "../dog/0.png"}).items():
        os.symlink(target, PETS / link)
    (line,) = said(capfd)
    assert "3 classes: cat, dog, eel; 2 files skipped" in line
    assert Counter(labels_of().values()) == {0: 5, 1: 5, 2: 6}


TOO_SMALL = "split without regard to classes"
NOTES = {  # what a folder is said to hold, and notes
    "train/ant 2, train/bee 2, train/cat 2, val/bee 1, val/dog 1": [
        *("train 6 images, test 2, 4 classes: ant, bee, cat, dog", "/train: no images of dog"),
        "/val: no images of ant, cat",
    ],
    "cat 5, dog 5, bee 0, fox 0": ["train 8 images, test 2, 2 classes: cat, dog", "no images of bee, fox"],
    "train/a 1, test/a 1, val/a 3": ["train 1 image, test 3, 1 class: a", "pets2/test is not used"],
    "cat 5, dog 5, . 1": ["train 8 images, test 2, 2 classes", "1 image beside the class folders: not used"],
    "a 1, b 1, c 9": ["train 8 images, test 3, 3 classes", TOO_SMALL],
    ", ".join(f"c{i} 2" for i in range(9)): ["train 14 images, test 4, 9 classes", TOO_SMALL],
    "a 2": ["train 1 image, test 1, 1 class"],
    "a 1, b 1": ["train 1 image, test 1, 2 classes", TOO_SMALL],
    "Train/a 3, VALID/a 2": ["train 3 images, test 2, 1 class"],
    "train 5, validation 5": ["train 5 images, test 5, no classes"],
    "a 20, b 5": ["train 20 images, test 5, 2 classes"],
}


def test_notes_on_splits_and_classes(capfd):
    for i, (tree, expected) in enumerate(NOTES.items()):
        lines = said(capfd, plant(Path(f"pets{i}"), tree))
        assert len(lines) == len(expected) and all(a in b for a, b in zip(expected, lines, strict=True)), lines
        assert all(line.startswith(f"note: pets{i}: ") for line in lines[1:])
    last, first = (load(f"pets{n}", image_size=32) for n in (i, 0))
    assert last.train.labels.tolist() == [0] * 16 + [1] * 4
    assert last.test.labels.tolist() == [0] * 4 + [1]
    assert first.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert first.test.labels.tolist() == [1, 3]  # one list of classes for both splits


REFUSED = [  # the folder that is named, and why
    ("inner/cat 2, inner/dog 2", "", "class folders lie deeper, in {}/inner;"),
    ("inner/train/cat 2, inner/val/cat 2", "", "class folders lie deeper, in {}/inner;"),
    ("train/cat 2", "", "--dataset {}/train would be split 80/20"),
    ("Test/cat 2, val/cat 2", "", "no train/; --dataset {}/val would be split"),
    ("train/cat 2, val 2", "/val", "2 images beside class folders"),
    ("cat 5, dog 5, . 11", "", "11 images beside class folders that hold 10"),
    ("cat 1", "", "one image alone"),
    ("train/cat 1, val/cat 0", "/val", "no images"),
    ("cat 0", "", "no images"),
]


def test_another_layout_is_refused_saying_which():
    for i, (tree, where, why) in enumerate(REFUSED):
        root = plant(Path(f"pets{i}"), tree).absolute()
        refused(root, f"{root}{where}: ", why.format(root), image_size=32)
    Path("pets8/cat/a.txt").write_text("")
    Path("pets.zip").write_bytes(b"")
    for size in (None, 32):
        refused("pets8", "pets8: no images", "1 other file", image_size=size)
        refused("pets.zip", "pets.zip: a file", "unpack it", image_size=size)
        refused("./nowhere", "not found", str(Path("nowhere").absolute()), image_size=size)


def test_images_without_classes_train(passes, refused):
    flags = ["--dataset", plant(PETS, ". 5"), "--image_size", "64"]
    out = passes(train.main, *TINY, *flags)
    assert "\npets: train 4 images, test 1, no classes\n" in out and "x (3, 64, 64)" in out
    data = load("pets", image_size=64)
    assert not data.labelled and data.n_classes == 0 and data.train.labels.sum() == 0
    err = refused(train_classifier.main, *flags, "--device", "cpu")
    assert err.startswith("error: --dataset: ") and "pets has no classes" in err
    out = passes(eval_beta_grid.main, *EVALUATE, "--with_classifier", "--n_samples", "20")
    assert out.count("pets_3x64x64 has no labels") == 1
    passes(eval_beta_grid.main, *EVALUATE[:4], "--latents", "test")
    with np.load(next(Path("runs/singles").glob("*/latents_test.npz"))) as arrays:
        assert {"label", "classes"}.isdisjoint(arrays) and len(arrays["index"]) == len(arrays["filename"]) == 1


def test_latents_say_of_which_file_and_class_they_are(passes):
    """Each file named, opened and encoded has the latents beside its name."""
    root = plant(PETS, "train/dog 3, train/cat 4, val/dog 2, val/cat 1")
    (root / "val/dog/1.png").rename(root / "val/dog/\udcff.png")
    passes(train.main, *TINY, "--dataset", root, "--image_size", "32")
    passes(eval_beta_grid.main, *EVALUATE[:4], "--latents", "train", "test")
    (path,) = Path("runs/singles").glob("*NoName*")
    for split, part, n in (("train", "train", 7), ("val", "test", 3)):
        with np.load(path / f"latents_{part}.npz") as arrays:
            files, classes, labels, means = (arrays[name] for name in ("filename", "classes", "label", "z_mean"))
        assert sorted(files) == sorted(str(p.relative_to(root)) for p in root.glob(f"{split}/*/*")) and len(files) == n
        assert [f"{split}/{classes[label]}" for label in labels] == [str(Path(file).parent) for file in files]
        x = torch.stack([centre_crop(32)(open_image(root / file, 3)) for file in files])
        assert_allclose(means, load_run(path).model.q_z(x / 255).mean, rtol=1e-4, atol=1e-5)


def test_the_default_size_is_the_nearest_to_the_images_own_and_outlives_them():
    for side, size in ((8, 28), (30, 28), (31, 32), (48, 32), (49, 64), (96, 64), (97, 128), (193, 256), (300, 256)):
        root = Path(f"side{side}")
        for i, other in enumerate((side, side, 400, side)):
            write_image(root / "train" / f"{i}.png", (side + 100, other))
        write_image(root / "test" / "0.png", (1, 1))
        config = Config(dataset=str(root))
        assert config.image_size == size, side
    Path("config.json").write_text(config.to_json())
    shutil.rmtree(root)
    assert Config.from_json(Path("config.json")) == config


def test_models_have_one_more_layer_down_twice_and_one_up_for_each_doubling():
    sizes = (32, 64, 128)
    for settings in ({}, {"use_conv_z": True}, {"vae_type": "LVAE"}, {"vae_type": "BVAE"}):
        configs = [Config(dataset="/nowhere", image_size=n, conv_channels=6, **settings) for n in sizes]
        models = [build_model(config) for config in configs]
        for model, size in zip(models, sizes, strict=True):
            terms = model(torch.rand(2, 3, size, size), model.noise(2, torch.Generator()))
            assert all(t.isfinite().all() for t in terms) and model.sample(1).shape == (1, 3, size, size)
            assert model.y_shape == models[0].y_shape
        small, middle, large = (Counter(tuple(p.shape) for p in model.parameters()) for model in models)
        kernel = 5 if "use_conv_z" in settings else 4
        if "vae_type" not in settings:
            assert middle - small == large - middle == {(6, 6, kernel, kernel): 3, (6,): 3}


def as_array(path, channels=1) -> np.ndarray:
    return np.asarray(open_image(str(path), channels))


FORMATS = dict(gif="GIF", jfif="JPEG", webp="WEBP", avif="AVIF", jp2="JPEG2000", tga="TGA", pcx="PCX", qoi="QOI")
FORMATS |= dict(ico="ICO", bmp="BMP", tif="TIFF", ppm="PPM", png="PNG", jpg="JPEG")
BY_CONTENT = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "AVIF")


def test_images_are_told_by_their_extension_or_their_content():
    """Of the formats that this Pillow writes."""
    Image.init()
    written = {kind for kind in Image.SAVE if kind != "AVIF" or features.check("avif")}
    colour = Image.new("RGB", (32, 32), (200, 60, 20))
    (PETS / "cat").mkdir(parents=True)
    names = {f"a.{end}": kind for end, kind in FORMATS.items()}
    names |= {kind + end: kind for kind in BY_CONTENT for end in ("_without", ".jpg_large")}
    names = {name: kind for name, kind in names.items() if kind in written}
    for name, kind in names.items():
        path = PETS / "cat" / name
        colour.save(path, kind)
        assert_allclose(as_array(path, 3), np.asarray(colour), atol=6, err_msg=name)
    Path("pets/cat/README").write_text("P6 is a format")
    Path("pets/cat/movie.mpg").write_bytes(b"\0\0\x01\xb3" + bytes(100))
    assert {Path(path).name for path in labels_of()} == {*names}
    assert scan(PETS).skipped == {".mpg": 1, "no extension": 1}


def test_images_are_turned_upright():
    """EXIF 2.3, tag 274: orientations that begin at the bottom, that begin at the right, and that go by columns."""
    stored = np.random.default_rng(0).integers(0, 256, (16, 32), dtype=np.uint8)
    deep = Image.fromarray(stored.astype(np.uint16) * 257)
    grey, exif = Image.fromarray(stored), Image.Exif()
    for image, i in itertools.product((grey.convert("RGB"), grey, deep), range(1, 9)):
        upright = stored[::-1] if i in (3, 4, 6, 7) else stored
        upright = upright[:, ::-1] if i in (2, 3, 7, 8) else upright
        upright = upright.T if i > 4 else upright
        exif[0x0112] = i
        image.save("a.png", exif=exif)
        assert_array_equal(as_array("a.png"), upright, err_msg=f"{image.mode} {i}")


def test_black_ink_on_transparent_paper_is_black_on_white():
    ink = np.zeros((8, 8), bool)
    ink[2:4] = True
    expected, grey = np.where(ink, 0, 255), Image.fromarray(np.where(ink, 0, 7).astype(np.uint8))
    palette = Image.fromarray((~ink).astype(np.uint8))
    palette.putpalette([0, 0, 0, 0, 0, 0])
    deep = Image.fromarray(np.where(ink, 0, 7).astype(np.uint16))
    images = [(grey, 7), (grey.convert("RGB"), (7, 7, 7)), (deep, 7), (palette, 1), (palette, bytes([255, 0]))]
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (8, 8), 0)
        clear.putalpha(Image.fromarray(ink.astype(np.uint8) * 255))
        images.append((clear, None))
    for image, transparency in images:
        image.save("a.png", **{} if transparency is None else {"transparency": transparency})
        for channels in (1, 3):
            pixels = as_array("a.png", channels).reshape(8, 8, channels)
            assert (pixels == expected[..., None]).all(), image.mode
    Image.fromarray(ink).save("a.png", transparency=0)  # white ink on transparent paper is all white
    assert (as_array("a.png") == 255).all()
    Image.new("RGBA", (4, 4), (200, 0, 100, 51)).save("a.png")
    half = [0.2 * 200 + 0.8 * 255, 0.8 * 255, 0.2 * 100 + 0.8 * 255]
    assert_allclose(as_array("a.png", 3)[0, 0], half, atol=1)


def test_16_bits_are_scaled_by_their_own_range():
    values = np.array([[0, 256, 257, 4095, 32768, 65535]], np.uint16)
    for name, stored in (("a.png", "<u2"), ("a.tif", "<u2"), ("a.pgm", "<u2"), ("big.tif", ">u2")):
        Image.fromarray(values.astype(stored)).save(name)
        assert_array_equal(as_array(name), np.round(values / 65535 * 255), err_msg=name)
    assert Path("big.tif").read_bytes()[:2] == b"MM"


def test_32_bits_are_refused_and_of_animations_the_first_image_counts():
    for dtype in (np.float32, np.int32):
        PETS.mkdir(exist_ok=True)
        Image.fromarray(np.ones((32, 32), dtype)).save("pets/a.tif")
        write_image(PETS / "b.png")
        refused("pets", f"{PETS.absolute()}/a.tif: pixels of 32 bits", image_size=32)
    red, *others = [Image.new("RGB", (32, 32), name) for name in ("red", "blue")]
    for kind in ("gif", "png", "tif", "webp"):
        red.save(f"a.{kind}", save_all=True, append_images=others)
        assert_allclose(as_array(f"a.{kind}", 3)[0, 0], (255, 0, 0), atol=4)


def test_images_that_are_too_large_are_refused(monkeypatch):
    write_folder(PETS)
    with pytest.MonkeyPatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", 999)  # of 2,000
        for size in (None, 32):
            refused("pets", "pets/cat/0.png: too many pixels", "2000 pixels", image_size=size)
    monkeypatch.setattr("datasets.loading.memory", lambda: 30_000)
    refused("pets", "pets: needs 30,720 bytes", "30,000", image_size=32)


def test_images_that_do_not_fit_into_the_gpu_are_refused(monkeypatch):
    gpu, size = torch.device("cuda", 0), (1437 + 360) * (28 * 28 + 8)
    monkeypatch.setattr(loading, "Resident", lambda *split: split)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 2 * size))
    assert load_data(Config(), "data", gpu).train[2] == gpu
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size - 1, 2 * size))
    with pytest.raises(UserError, match=f"Digits: needs {size:,} bytes.* {size - 1:,}"):
        load_data(Config(), "data", gpu)


def test_all_damaged_files_are_named_together_before_training(refused):
    for part in ("train", "val"):
        write_folder(PETS / part, n=10)
    paths = sorted(PETS.rglob("*.png"))
    damaged = [*paths[:7], *paths[-7:]]
    for i, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[:200] if i % 2 else b"not an image")
    err = refused(train.main, *TINY, "--dataset", "pets", "--image_size", "32")
    assert not Path("runs").exists()
    assert [str(p) in err for p in damaged] == [True] * 10 + [False] * 4
    assert err.count("damaged image") == 10 and "; 14 images in all" in err


def test_a_pointer_of_git_lfs_is_named(refused):
    write_folder(PETS)
    path = next(PETS.rglob("*.png"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    err = refused(train.main, *TINY, "--dataset", "pets", "--image_size", "32")
    assert str(path) in err and "git lfs pull" in err


def test_a_class_is_the_same_in_both_forms_of_unicode(capfd):
    write_folder(Path("pets/train"), classes=("caf\u00e9", "dog"))
    write_folder(Path("pets/val"), classes=("cafe\u0301", "dog"))
    folder = scan(PETS)
    assert folder.classes == ["caf\u00e9", "dog"] and not folder.notes


def test_sizes_and_channels_and_what_streams():
    write_folder(PETS, n=5)
    for size, n in itertools.product((28, 32, 64, 128, 256), (1, 3)):
        config = dict(image_size=size, image_channels=n)
        data = load("pets", **config)
        assert isinstance(data.train, Streamed if size == 256 else Resident)
        x, labels = next(data.train.batches(8))
        assert x.shape == (8, n, size, size) and sorted(labels.tolist()) == [0] * 4 + [1] * 4
        assert data.n_classes == 2 and sorted(data.test.labels.tolist()) == [0, 1]
        assert f"pets_{n}x{size}x{size}" in Config(dataset="pets", **config).folder_name


def test_training_streams_imagenet_folders(passes, refused):
    plant(Path("data/ImageNet"), "train/cat 3, train/dog 3, val/cat 3, val/dog 3")
    flags = "--dataset ImageNet --conv_channels 2 --num_epochs 1 --batch_size 4 --device cpu"
    flags = flags.split()
    out = passes(train.main, *flags)
    assert "(3, 256, 256)" in out and "\nImageNet: train 6 images, test 6, 2 classes: cat, dog\n" in out
    shutil.rmtree("data/ImageNet/val")
    assert "but no val/ or test/" in refused(train.main, *flags, "--overwrite")


def test_every_evaluation_step_works_for_an_own_folder(script, passes, refused):
    write_folder(PETS, size=(30, 28), n=25)
    flags, batch = ["--dataset", "pets", "--image_channels", "1"], ["--run_batch_name", "singles", "--device", "cpu"]
    passes(train.main, *TINY, *flags)
    step1 = [eval_beta_grid.main, *batch, "--with_classifier", "--n_samples", "20"]
    status, _, err = script(*step1)
    how = f"python train_classifier.py --dataset {PETS.absolute()} --image_size 28 --image_channels 1 makes one"
    assert status == 2 and "pets_1x28x28/classifier.pth: " in err and err.endswith(f"; {how}\n")
    passes(train_classifier.main, *flags, "--num_epochs", "1", "--device", "cpu")
    assert Path("runs/classifiers/pets_1x28x28/classifier.pth").exists()
    (path,) = Path("runs/singles").glob("No*")
    single = [eval_beta_single.main, "--run_path", path, "--device", "cpu"]
    grid = [eval_beta_grid.main, *batch]
    for step in (step1, single, [*grid, "--get_mi_cal_acc"], [*grid, "--recons_acc"]):
        passes(*step)
    os.rename("pets/cat/0.png", "pets/cat/99.png")
    assert "does not hold the images that the run was trained on" in refused(*step1, "--force")


@pytest.fixture
def of_pets(passes):
    """A model of a folder of images, ./pets, in ./runs/singles."""
    write_folder(PETS, n=15)
    passes(train.main, *TINY, "--dataset", "pets", *SMALL)


def test_a_run_whose_images_moved_is_evaluated_once_they_are_told_of(of_pets, script, passes):
    for name in ("data", "disk"):
        Path(name).mkdir()
    moves = [("elsewhere", None), ("data/pets", []), ("disk/pets", ["--data_dir", "disk"])]
    here = "pets"
    for place, flags in [*moves, ("disk/cats", ["--dataset", "disk/cats"])]:
        here = shutil.move(here, place)
        status, _, err = script(eval_beta_grid.main, *EVALUATE, "--force", *(flags or []))
        if flags is None:
            assert status == 1 and "--data_dir (the folder that it is in) or --dataset tells" in err
            continue
        assert status == 0, err
        with open("runs/singles/eval_results.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        assert row["dataset"] == "pets" and float(row["loss"]) > 0
    out = passes(plot_eval.main, "--run_batch_name", "singles", "--device", "cpu", *flags)
    assert "no reconstructions" not in out


def test_other_images_of_the_same_name_are_told_apart(of_pets, script, passes, refused):
    extra = next(Path("pets").rglob("*.png"))
    shutil.copy(extra, extra.with_name("another.png"))
    status, _, err = script(eval_beta_grid.main, *EVALUATE)
    assert status == 1 and "does not hold the images that the run was trained on" in err
    assert "trained on other images" in refused(train.main, *TINY, "--dataset", "pets", *SMALL)
    passes(train.main, *TINY, "--dataset", "pets", *SMALL, "--overwrite")
    passes(eval_beta_grid.main, *EVALUATE)


@pytest.mark.parametrize("kept", ["listed", None])
def test_a_run_of_an_earlier_version_is_of_the_images_that_it_lists(kept, of_pets, passes, refused):
    """It keeps the digest of a list of files, or none; it is evaluated and continued."""
    (path,) = Path("runs/singles").iterdir()
    run = Run.open(path)
    digest = kept and getattr(load_data(run.config, "data", torch.device("cpu")), kept)
    run.with_settings(data_digest=digest).write_config()
    flags = [*TINY, "--dataset", "pets", *SMALL]
    assert "already complete" in passes(train.main, *flags)
    passes(eval_beta_grid.main, *EVALUATE)
    assert "resuming at epoch 2 of 3" in passes(train.main, *flags, "--num_epochs", "3", "--init_from", path)
    if kept:
        write_image(next(PETS.rglob("*.png")).with_name("new.png"))
        assert "trained on other images" in refused(train.main, *flags)


def test_a_training_goes_on_where_images_and_batch_have_moved_to(passes, interrupted):
    write_folder(PETS, n=15)
    longer = [*TINY[:4], "--num_epochs", "4", "--batch_size", "10", "--save_every", "1", "--device", "cpu", *SMALL]
    passes(train.main, *longer, "--dataset", "pets", "--run_batch_name", "whole")
    interrupted(6, *longer, "--dataset", "pets", "--run_batch_name", "cut")
    Path("disk").mkdir()
    shutil.move("pets", "disk/pets")
    shutil.move("runs/cut", "runs/renamed")
    out = passes(train.main, *longer, "--dataset", "disk/pets", "--run_batch_name", "renamed")
    assert "resuming at epoch" in out
    (a,), (b,) = (list(Path("runs", name).iterdir()) for name in ("whole", "renamed"))
    assert weights(a) == weights(b)
