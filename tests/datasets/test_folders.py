"""Folders of images: what is found in them, how a file becomes an image, and what is said of it."""

import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import eval_beta_grid
import eval_beta_single
import train
import train_classifier
from datasets.batches import Resident, Streamed
from datasets.folders import SIZES, open_image, scan
from models.build import build_model
from tests.conftest import TINY
from tests.datasets.files import load, write_folder, write_image
from utils.config import Config
from utils.errors import UserError

PETS = Path("pets")


def said(capfd, **settings) -> list[str]:
    """The lines that loading ./pets prints."""
    load("pets", **{"image_size": 32} | settings)
    return capfd.readouterr().out.splitlines()


def found(root=PETS) -> dict[str, int]:
    """Files below the root that are images of a split, and their labels."""
    folder = scan(root)
    return {os.path.relpath(path, root.absolute()): label for path, label in folder.train + folder.test}


# --- what is found ---


def test_the_line_says_what_there_is(capfd):
    write_folder(PETS)
    Path("pets/cat/list.txt").write_text("no image")
    for name in ("a.npy", "b.npy"):
        Path("pets", name).write_bytes(b"no image")
    (line,) = said(capfd)
    assert line == "pets: train 8 images, test 2, 2 classes: cat, dog; 3 files skipped (.npy 2, .txt 1)"
    assert load("pets", image_size=32).n_classes == 2 and capfd.readouterr().out == ""  # said once


def test_long_lists_are_shortened(capfd):
    write_folder(PETS, classes=[f"c{i:02}" for i in range(30)], n=5)
    for i in range(30):
        Path(f"pets/x.k{i:02}").write_bytes(b"")
    (line,) = said(capfd)
    assert ", 30 classes: c00, c01, c02, c03, c04, c05, c06, c07, c08, ... c29; 30 files skipped (" in line
    assert len(line) < 250


def test_of_several_processes_the_first_speaks(capfd, monkeypatch):
    write_folder(PETS)
    monkeypatch.setenv("RANK", "1")
    assert said(capfd) == []


@pytest.mark.parametrize(
    "name",
    [".cache/a.png", "__MACOSX/cat/a.png", "@eaDir/a.png", "lost+found/a.png", "cat/.thumbs/a.png", "cat/@eaDir/a.png"]
    + ["cat/Thumbs.db", "cat/thumbs.db", "cat/._0.png", "dog/.DS_Store", "cat/.ipynb_checkpoints/0-checkpoint.png"]
    + ["cat/__MACOSX/._0.png", "cat/desktop.ini", "$RECYCLE.BIN/a.png", "#recycle/a.png", ".a.png"],
)
@pytest.mark.parametrize("top", ["pets", "pets/train"])
def test_what_systems_leave_behind_is_not_looked_at(name, top, capfd):
    write_folder(Path(top), n=5)
    if top != "pets":
        write_folder(Path("pets/val"), n=1)
    path = Path(top, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(Path("whole.png"))
    path.write_bytes(Path("whole.png").read_bytes())
    (line,) = said(capfd)
    assert "2 classes: cat, dog" in line and "skipped" not in line
    assert len(found()) == (10 if top == "pets" else 12)


def test_each_real_folder_is_visited_once(capfd):
    write_folder(PETS)
    os.symlink("..", "pets/cat/again")
    os.symlink("../cat", "pets/cat/self")
    os.symlink("cat", "pets/alias")  # sorted before the real one
    (line,) = said(capfd)
    assert line == "pets: train 8 images, test 2, 2 classes: cat, dog; 3 files skipped (repeated link 3)"
    assert set(found().values()) == {0, 1}


def test_each_real_file_is_one_image_and_links_to_other_places_are_followed(capfd):
    write_folder(Path("elsewhere"), classes=["cat"], n=5)
    write_folder(PETS, classes=["dog", "eel"])
    os.symlink("../elsewhere/cat", "pets/cat")
    os.symlink("../dog/0.png", "pets/eel/0-again.png")
    write_image(Path("single.png"))
    for name in ("5.png", "6.png"):
        os.symlink("../../single.png", f"pets/eel/{name}")
    os.symlink("nowhere.png", "pets/eel/7.png")
    os.mkfifo("pets/eel/8.png")
    (line,) = said(capfd)
    assert "3 classes: cat, dog, eel; 4 files skipped (repeated link 2, broken link 1, no file 1)" in line
    assert Counter(found().values()) == {0: 5, 1: 5, 2: 6}


def test_samples_come_in_torchvisions_order():
    import torchvision

    write_folder(PETS, classes=["b", "a", "a/x", "a-b", "C"])
    ours, theirs = scan(PETS), torchvision.datasets.ImageFolder("pets")
    assert sorted(ours.train + ours.test) == sorted((os.path.abspath(p), y) for p, y in theirs.samples)
    assert ours.classes == theirs.classes
    write_folder(Path("split/val"), classes=["b"])
    shutil.move("pets", "split/train")
    ours, theirs = scan(Path("split")), torchvision.datasets.ImageFolder("split/train")
    assert ours.train == [(os.path.abspath(p), y) for p, y in theirs.samples]


# --- splits and classes ---


@pytest.mark.parametrize("train_name", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test_name", ["val", "Valid", "validation", "test", "TEST", "testing"])
def test_splits_by_name_whatever_the_case(train_name, test_name):
    write_folder(PETS / train_name, n=3)
    write_folder(PETS / test_name, n=2)
    data = load("pets", image_size=32)
    assert (len(data.train), len(data.test), data.n_classes) == (6, 4, 2)


def test_one_class_list_for_both_splits(capfd):
    write_folder(PETS / "train", classes=["ant", "bee", "cat"], n=2)
    write_folder(PETS / "val", classes=["bee", "dog"], n=1)
    line, *notes = said(capfd)
    assert line == "pets: train 6 images, test 2, 4 classes: ant, bee, cat, dog"
    assert notes == ["note: pets: pets/train: no images of dog", "note: pets: pets/val: no images of ant, cat"]
    data = load("pets", image_size=32)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [1, 3]


def test_an_empty_class_is_a_note(capfd):
    write_folder(PETS)
    Path("pets/bee").mkdir()
    Path("pets/fox").mkdir()
    Path("pets/fox/list.txt").write_text("")
    line, note = said(capfd)
    assert "2 classes: cat, dog; 1 file skipped" in line and note == "note: pets: pets: no images in bee, fox"


def test_of_val_and_test_the_first_is_taken_and_the_rest_is_a_note(capfd):
    for part in ("train", "test", "val", "extra"):
        write_folder(PETS / part, n=1 + (part == "val"))
    line, note = said(capfd)
    assert "test 4," in line and note == "note: pets: beside train/ and val/, extra, test is not used"


@pytest.mark.parametrize(
    "folders, message",
    [
        (["pets/inner/cat", "pets/inner/dog"], "pets: its class folders lie deeper, in {0}/pets/inner; give"),
        (["pets/a/b/cat", "pets/a/b/dog"], "pets: its class folders lie deeper, in {0}/pets/a/b; give --dataset {0}"),
        (["pets/train/x/cat", "pets/train/x/dog", "pets/val/cat"], "pets/train: its class folders lie deeper"),
        (["pets/inner/train/cat", "pets/inner/val/cat"], "pets: the name of a split, train, in place of a class"),
        (["pets/cat/train", "pets/cat/test", "pets/dog/train"], "pets: the name of a split, test, in place of a class"),
        (["pets/train/train/cat", "pets/val/cat"], "pets/train: the name of a split, train, in place of a class"),
        (["pets/train/cat"], "pets: has train/, but no val/ or test/; --dataset {0}/pets/train would be split 80/20"),
        (["pets/Test/cat", "pets/val/cat"], "pets: has val/, but no train/; --dataset {0}/pets/val would be split"),
        (["pets/train/cat", "pets/Train/cat", "pets/val/cat"], "pets: has Train, train: which is it?"),
        (["pets/train/cat", "pets/training/cat", "pets/val/cat"], "pets: has train, training: which is it?"),
        (["pets/train/cat", "pets/val"], "pets/val: holds images without class folders, unlike {0}/pets/train"),
        (["pets/train", "pets/val/cat"], "pets/train: holds images without class folders, unlike {0}/pets/val"),
    ],
)  # fmt: skip
def test_another_layout_is_refused_saying_which(folders, message):
    for folder in folders:
        write_folder(Path(folder).parent, classes=[Path(folder).name], n=2)
    with pytest.raises(UserError) as e:
        load("pets", image_size=32)
    assert str(e.value).startswith(f"{Path.cwd()}/{message.format(Path.cwd())}")


def test_an_empty_split_and_an_empty_folder_say_so():
    write_folder(PETS / "train")
    Path("pets/val/cat").mkdir(parents=True)
    with pytest.raises(UserError, match="pets/val: no images there that can be read$"):
        load("pets", image_size=32)
    shutil.rmtree("pets/train")
    Path("pets/val/cat/a.txt").write_text("")
    for settings in ({"image_size": 32}, {}):
        with pytest.raises(UserError, match=r"pets: no images there that can be read \(.txt 1\)$"):
            load("pets", **settings)


def test_not_found_is_said_only_of_what_does_not_exist(script):
    for flags in (["--image_size", "32"], []):
        status, _, err = script(train.main, *TINY, "--dataset", "./pets", *flags)
        assert status == 2 and "not found" in err and str(PETS.absolute()) in err and not Path("runs").exists()
        Path("pets.zip").write_bytes(b"")
        status, _, err = script(train.main, *TINY, "--dataset", "pets.zip", *flags)
        assert status == 2 and "pets.zip: a file, not a folder of images; if it is an archive, unpack it" in err
        assert "not found" not in err


def test_images_beside_class_folders(capfd):
    write_folder(PETS)
    write_image(PETS / "logo.png")
    line, note = said(capfd)
    assert "train 8 images" in line and note == "note: pets: pets: 1 image beside the class folders: not used"
    for i in range(10):
        write_image(PETS / f"{i}.png")
    with pytest.raises(UserError, match="pets: 11 images beside class folders that hold 10: which?"):
        load("pets", image_size=32)


@pytest.mark.parametrize("sizes", [[1, 1, 9], [2] * 9, [1], [2], [1, 1], [30, 1]])
def test_small_classes_split_with_a_note(sizes, capfd):
    for i, n in enumerate(sizes):
        write_folder(PETS, classes=[f"c{i}"], n=n)
    if sum(sizes) == 1:
        with pytest.raises(UserError, match="pets: one image alone cannot be split"):
            load("pets", image_size=32)
        return
    line, *notes = said(capfd)
    n_test = -(-sum(sizes) // 5)
    assert f"train {sum(sizes) - n_test} image" in line and f"test {n_test}, {len(sizes)} class" in line
    in_proportion = min(sizes) > 1 and len(sizes) <= n_test
    assert notes == [
        "note: pets: classes too small to have a share of the test images each: split without regard to classes"
    ] * (not in_proportion)


# --- without classes ---


@pytest.mark.parametrize("split", [False, True])
def test_images_without_classes_train(split, script):
    for part in ("train", "val") if split else ("",):
        for i in range(5):
            write_image(PETS / part / f"{i}.png")
    status, out, err = script(train.main, *TINY, "--dataset", "pets", "--image_size", "28")
    n = "5 images, test 5" if split else "4 images, test 1"
    assert status == 0 and f"\npets: train {n}, no classes\n" in out, err
    data = load("pets", image_size=28)
    assert not data.labelled and data.n_classes == 0 and data.train.labels.sum() == 0
    status, _, err = script(train_classifier.main, "--dataset", "pets", "--image_size", "28", "--device", "cpu")
    assert status == 2 and err == "error: --dataset: pets has no classes that a classifier could learn\n"
    flags = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_mi", "--exclude_fid", "--with_classifier"]
    status, out, err = script(eval_beta_grid.main, *flags, "--n_samples", "20")
    assert (
        status == 0
        and out.count("pets_3x28x28 has no labels: metrics that need labels or a classifier are left empty") == 1
    )


# --- sizes ---


def test_the_default_size_is_the_nearest_to_the_images_own():
    for side, size in ((8, 28), (30, 28), (31, 32), (48, 32), (49, 64), (96, 64), (97, 128), (193, 256), (300, 256)):
        root = Path(f"side{side}")
        for i, other in enumerate((side, side, 400, side)):
            write_image(root / "train" / f"{i}.png", (side + 100, other))
        write_image(root / "test" / "0.png", (1, 1))
        assert Config(dataset=str(root)).image_size == size, side


def test_a_run_whose_folder_is_gone_keeps_its_size():
    write_folder(PETS, size=(60, 60))
    config = Config(dataset="pets")
    Path("config.json").write_text(config.to_json())
    shutil.rmtree("pets")
    assert config.image_size == 64 and Config.from_json(Path("config.json")) == config


def test_an_impossible_size_says_which_are_possible():
    write_folder(PETS)
    with pytest.raises(UserError, match="^--image_size: must be 28, 32, 64, 128, 256 for a folder of images, got 48$"):
        Config(dataset="pets", image_size=48)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("flags", [[], ["--use_conv_z"], ["--vae_type", "LVAE"], ["--vae_type", "BVAE"]])
def test_sizes_between_train(size, flags, script):
    write_folder(PETS, size=(size, size + 9))
    status, out, err = script(train.main, *TINY, "--dataset", "pets", *flags)
    assert status == 0 and f"x (3, {size}, {size})" in out and f"pets_3x{size}x{size}" in out, err


@pytest.mark.parametrize("conv, kernel", [(False, 4), (True, 5)])
def test_each_doubling_is_one_more_layer_down_twice_and_one_up(conv, kernel):
    def layers(size):
        config = Config(dataset="/nowhere", image_size=size, use_conv_z=conv, conv_channels=6)
        model = build_model(config)
        return model, Counter(tuple(p.shape) for p in model.parameters())

    (_, small), (middle, more), (large, most) = map(layers, (32, 64, 128))
    assert more - small == most - more == {(6, 6, kernel, kernel): 3, (6,): 3}
    assert middle.y_shape == large.y_shape == layers(32)[0].y_shape


# --- how a file becomes an image ---


def as_array(path, channels=1) -> np.ndarray:
    return np.asarray(open_image(str(path), channels))


@pytest.mark.parametrize("name", ["a.gif", "a.jfif", "a.webp", "a.avif", "a.jp2", "a.tga", "a.pcx", "a.qoi", "a.ico"])
def test_every_format_that_pillow_reads_is_found_and_read(name):
    kind = {".jfif": "JPEG", ".jp2": "JPEG2000"}.get(Path(name).suffix, Path(name).suffix[1:].upper())
    Image.init()
    if kind not in Image.SAVE or kind == "AVIF" and not features.check("avif"):
        pytest.skip(f"this Pillow does not write {kind}")
    Path("pets/cat").mkdir(parents=True)
    colour = Image.new("RGB", (32, 32), (200, 60, 20))
    colour.save(PETS / "cat" / name, kind)
    colour.save(PETS / "cat" / "b.png")
    assert len(found()) == 2
    np.testing.assert_allclose(as_array(PETS / "cat" / name, 3), np.asarray(colour), atol=6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "AVIF"])
@pytest.mark.parametrize("name", ["no_extension", "strange.jpg_large", "photo.2021"])
def test_images_are_told_by_content(kind, name, capfd):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    write_folder(PETS, classes=["cat"])
    Image.new("RGB", (32, 32), "red").save(PETS / "cat" / name, kind)
    Path("pets/cat/README").write_text("P6 is a format")
    Path("pets/cat/movie.mpg").write_bytes(b"\0\0\x01\xb3" + bytes(100))
    (line,) = said(capfd)
    assert f"cat/{name}" in found() and line.endswith("; 2 files skipped (.mpg 1, no extension 1)")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_images_are_turned_upright(orientation, mode):
    stored = np.zeros((16, 32), np.uint8)
    stored[:4, :8] = 255  # its corner, in the first row and column
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored).convert(mode) if mode != "I;16" else Image.fromarray(stored.astype(np.uint16) * 257)
    image.save("a.png", exif=exif)
    # EXIF 2.3, tag 274: where the 0th row and the 0th column are
    where = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    where |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}
    row, column = where[orientation].split()
    upright = as_array("a.png")
    tall = row in ("left", "right")
    assert upright.shape == ((32, 16) if tall else (16, 32))
    vertical, horizontal = (column, row) if tall else (row, column)
    high, wide = (8, 4) if tall else (4, 8)
    corner = upright[:high] if vertical == "top" else upright[-high:]
    corner = corner[:, :wide] if horizontal == "left" else corner[:, -wide:]
    assert (corner == 255).all() and (upright == 255).sum() == 32


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "P with alphas", "L with tRNS", "RGB with tRNS", "I;16 with tRNS", "1"]
)
def test_black_ink_on_transparent_paper_is_black_on_white(mode, channels):
    ink = np.zeros((8, 8), bool)
    ink[2:4] = True
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 8), 0)
        image.putalpha(Image.fromarray(ink.astype(np.uint8) * 255))
        image.save("a.png")
    elif mode.startswith("P"):
        image = Image.fromarray((~ink).astype(np.uint8))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.save("a.png", transparency=bytes([255, 0]) if "alphas" in mode else 1)
    elif mode.startswith("I"):
        Image.fromarray(np.where(ink, 0, 7).astype(np.uint16)).save("a.png", transparency=7)
    elif mode == "1":
        Image.fromarray(ink).save("a.png", transparency=0)  # white ink on transparent paper is all white
        assert (as_array("a.png", channels) == 255).all()
        return
    else:
        image = Image.fromarray(np.where(ink, 0, 7).astype(np.uint8)).convert(mode.split()[0])
        image.save("a.png", transparency=7 if mode[0] == "L" else (7, 7, 7))
    pixels = as_array("a.png", channels)
    expected = np.where(ink, 0, 255)
    np.testing.assert_array_equal(pixels, expected if channels == 1 else expected[..., None].repeat(3, 2))


def test_half_transparent_pixels_are_half_white():
    Image.new("RGBA", (4, 4), (200, 0, 100, 51)).save("a.png")
    np.testing.assert_allclose(
        as_array("a.png", 3)[0, 0], [0.2 * 200 + 0.8 * 255, 0.8 * 255, 0.2 * 100 + 0.8 * 255], atol=1
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "big_endian.tif"])
def test_16_bits_are_scaled_by_their_own_range(name):
    values = np.array([[0, 256, 257, 4095, 32768, 65535]], np.uint16)
    if name == "big_endian.tif":
        big = values.astype(">u2")
        entries = [(256, 3, 1, 6 << 16), (257, 3, 1, 1 << 16), (258, 3, 1, 16 << 16), (259, 3, 1, 1 << 16)]
        entries += [(262, 3, 1, 1 << 16), (273, 4, 1, 8), (277, 3, 1, 1 << 16), (278, 3, 1, 1 << 16), (279, 4, 1, 12)]
        ifd = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *e) for e in entries) + bytes(4)
        Path(name).write_bytes(b"MM\0*" + struct.pack(">I", 20) + big.tobytes() + ifd)
    else:
        Image.fromarray(values).save(name)
    np.testing.assert_array_equal(as_array(name), np.round(values / 65535 * 255))


def write_levels(path, top, dtype=np.uint16, low=0.0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(low, top, 32 * 32).reshape(32, 32).astype(dtype)).save(path)


@pytest.mark.parametrize("size", [32, 256])
def test_16_bits_that_use_few_of_them_are_a_note(size, capfd):
    for i, top in enumerate((4095, 3000, 0)):
        write_levels(f"pets/{i}.png", top)
    _, note = said(capfd, image_size=size)
    assert note.startswith("note: pets: 16-bit images reach only 4,095 of 65,535, so they are dark (")
    write_levels("pets/3.png", 60000)
    shutil.move("pets", "bright")
    load("bright", image_size=size)
    assert "note" not in capfd.readouterr().out


@pytest.mark.parametrize("top", [1, 255, 65535])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_float_and_32_bit_images_are_scaled_from_their_range(top, dtype):
    write_levels("a.tif", top, dtype)
    exact = np.linspace(0, top, 1024).astype(dtype).reshape(32, 32) / top * 255
    np.testing.assert_allclose(as_array("a.tif"), exact, atol=0.5 + 1e-4)


@pytest.mark.parametrize(
    "low, top, dtype, message",
    [
        (-1, 1, np.float32, "pixels from -1 to 1"),
        (0, 70000, np.int32, "pixels from 0 to 70000"),
        (0, 1e9, np.float32, "pixels from 0 to 1e+09"),
        (0, np.nan, np.float32, "pixels from nan to nan"),
        (0, np.inf, np.float32, "pixels from nan to nan"),
    ],
)
def test_other_ranges_are_refused_naming_file_and_range(low, top, dtype, message):
    with np.errstate(invalid="ignore"):
        write_levels("pets/a.tif", top, dtype, low)
    write_levels("pets/b.tif", 255, dtype)
    with pytest.raises(UserError) as e:
        load("pets", image_size=32)
    expected = f"{Path.cwd()}/pets/a.tif: {message}: not in [0, 1], [0, 255] or [0, 65535]"
    assert str(e.value) == expected


def test_float_images_of_several_ranges_are_a_note(capfd):
    write_levels("pets/a.tif", 1, np.float32)
    write_levels("pets/b.tif", 255, np.float32)
    _, note = said(capfd)
    assert note == (
        "note: pets: float or 32-bit images of different ranges, each scaled by its own: a.tif [0, 1], b.tif [0, 255]"
    )


def test_of_animations_the_first_frame_is_used_with_a_note(capfd):
    write_folder(PETS, classes=["cat"])
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    for kind in ("gif", "png", "tif", "webp"):
        frames[0].save(PETS / "cat" / f"a.{kind}", save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(as_array(PETS / "cat" / f"a.{kind}", 3)[0, 0], (255, 0, 0), atol=4)
    _, note = said(capfd)
    assert note.startswith("note: pets: of animations and pages only the first is used (")
    assert all(f"a.{kind}" in note for kind in ("gif", "png", "tif", "webp"))


def test_400_megapixels_are_refused_in_one_line(script):
    write_folder(PETS)
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    Path("pets/cat/9.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
    )
    for flags in ([], ["--image_size", "32"]):
        status, _, err = script(train.main, *TINY, "--dataset", "pets", *flags)
        assert status == 2 and err.count("\n") == 1 and "pets/cat/9.png: too many pixels (" in err
        assert "400000000 pixels" in err and not Path("runs").exists()


# --- damage ---


@pytest.mark.parametrize("n", [1, 3, 14])
def test_all_damaged_files_are_named_together_before_training(n, script):
    write_folder(PETS / "train", n=10)
    write_folder(PETS / "val", n=10)
    paths = sorted(PETS.rglob("*.png"))
    damaged = [*paths[: n // 2], *paths[-(n - n // 2) :]]
    for i, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[:200] if i % 2 else b"not an image")
    status, _, err = script(train.main, *TINY, "--dataset", "pets", "--image_size", "32")
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
    assert [str(p) in err for p in damaged] == [True] * min(n, 10) + [False] * (n - min(n, 10))
    assert err.count("damaged image") == min(n, 10) and (f"; {n} images in all" in err) == (n > 1)


def test_a_damaged_image_is_named():
    write_folder(Path("pets/train"), n=2)
    write_folder(Path("pets/val"), n=2)
    Path("pets/val/cat/0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"pets/val/cat/0.png"):
        load("pets", image_size=32)
    streamed = load("pets", image_size=256)
    with pytest.raises(UserError, match=r"^\S*pets/val/cat/0.png: damaged image[^\n]*$"):
        list(streamed.test.batches(2))


def test_more_than_the_memory_holds_is_refused(monkeypatch):
    write_folder(PETS)
    monkeypatch.setattr("datasets.loading.memory", lambda: 30_000)
    with pytest.raises(UserError, match="^pets: needs 30,720 bytes of memory at 32 pixels, this machine has 30,000$"):
        load("pets", image_size=32)


# --- what a folder is known by ---


def test_the_digest_is_of_the_list_of_files_wherever_they_lie():
    write_folder(PETS)
    first = load("pets", image_size=32).digest
    assert len(first) == 16
    shutil.move("pets", "elsewhere")
    assert load("elsewhere", image_size=64).digest == first
    os.rename("elsewhere/cat/0.png", "elsewhere/cat/9.png")
    assert load("elsewhere", image_size=32).digest != first


def test_names_that_no_terminal_shows(capfd):
    write_folder(PETS, classes=[os.fsdecode(b"\xffcat"), "dog\x1b[31m\n"])
    (line,) = said(capfd)
    assert line == "pets: train 8 images, test 2, 2 classes: dog?[31m?, ?cat"
    for name in (b"pets\xff", b"pets\n"):
        os.rename("pets" if PETS.exists() else b"pets\xff", name)
        with pytest.raises(UserError, match=r"^--dataset: runs are named after the folder, so rename '.*pets\\"):
            load(os.fsdecode(name), image_size=32)


# --- the scripts ---


@pytest.mark.parametrize("size, split", [(28, Resident), (64, Resident), (128, Resident), (256, Streamed)])
def test_what_is_held_in_memory_and_what_streams(size, split):
    write_folder(PETS, n=1)
    assert isinstance(load("pets", image_size=size).train, split) and size in SIZES


def test_training_streams_imagenet_folders(script):
    for part in ("train", "val"):
        write_folder(Path("data/ImageNet", part), n=3)
    flags = ["--dataset", "ImageNet", "--conv_channels", 2, "--num_epochs", 1, "--batch_size", 4, "--device", "cpu"]
    status, out, err = script(train.main, *flags)
    assert status == 0, err
    assert "(3, 256, 256)" in out and "\nImageNet: train 6 images, test 6, 2 classes: cat, dog\n" in out
    shutil.rmtree("data/ImageNet/val")
    status, _, err = script(train.main, *flags, "--overwrite")
    assert status == 2 and "data/ImageNet: has train/, but no val/ or test/" in err


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


def test_every_evaluation_step_works_for_an_own_folder(script):
    write_folder(PETS, size=(30, 28), n=25)
    flags = ["--dataset", "pets", "--image_channels", "1"]
    batch = ["--run_batch_name", "singles", "--device", "cpu"]
    assert script(train.main, *TINY, *flags)[0] == 0
    step1 = [eval_beta_grid.main, *batch, "--with_classifier", "--n_samples", "20"]
    status, _, err = script(*step1)
    how = f"python train_classifier.py --dataset {PETS.absolute()} --image_size 28 --image_channels 1 makes one"
    assert status == 2 and err.endswith(f"pets_1x28x28/classifier.pth: no trained classifier there; {how}\n")
    status, out, err = script(train_classifier.main, *flags, "--num_epochs", "1", "--device", "cpu")
    assert status == 0 and Path("runs/classifiers/pets_1x28x28/classifier.pth").exists(), err
    assert script(*step1)[0] == 0
    assert (
        script(eval_beta_single.main, "--run_path", next(Path("runs/singles").glob("No*")), "--device", "cpu")[0] == 0
    )
    assert script(eval_beta_grid.main, *batch, "--get_mi_cal_acc")[0] == 0
    assert script(eval_beta_grid.main, *batch, "--recons_acc")[0] == 0
    os.rename("pets/cat/0.png", "pets/cat/99.png")
    status, _, err = script(*step1, "--force")
    assert status == 2 and "does not hold the images that the run was trained on" in err


@pytest.mark.parametrize("size, channels", [(32, 1), (28, 3), (64, 3), (128, 1), (256, 3)])
def test_every_shape_has_a_classifier(size, channels, script):
    write_folder(PETS, size=(size, size), n=3)
    flags = ["--dataset", "pets", "--image_size", size, "--image_channels", channels, "--num_epochs", 1]
    status, out, err = script(train_classifier.main, *flags, "--batch_size", 2, "--device", "cpu")
    assert status == 0, err
    assert Path(f"runs/classifiers/pets_{channels}x{size}x{size}/classifier.pth").exists()
