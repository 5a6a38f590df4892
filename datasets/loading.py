"""Puts a data set where training can batch it: images of 256 pixels stream, smaller ones are on the device."""

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import UserError, one_line
from utils.files import digest

from . import arrays
from .batches import Resident, Streamed
from .folders import Folder, content_digest, count, decode, enumeration
from .table import DATASETS, LARGE, DataSet, lookup


class Data(NamedTuple):
    """Both splits of a data set, and its number of classes; 0: images without labels, which are all 0."""

    train: Resident | Streamed
    test: Resident | Streamed
    n_classes: int
    digest: str | None = None  # of its images and labels, in their order
    listed: str | None = None  # of a folder's list of files, by which earlier versions told it
    folder: Folder | None = None  # where it is from, if from a folder of images

    def is_of(self, digest: str | None) -> bool:
        """Whether what keeps that digest is of these images; of earlier versions, what keeps none may be."""
        return digest in (None, self.digest, self.listed)

    @property
    def labelled(self) -> bool:
        return self.n_classes > 0


def load_data(config, data_dir: str, device: torch.device, download: bool = False, moved_to: str | None = None) -> Data:
    """Both splits of the Config's data set, under `data_dir` or a folder of its name there; prints what it holds.

    Own images may have `moved_to` another place. Raises UserError where files are missing, damaged, not those
    that the run was trained on, or do not fit into memory.
    """
    row, name = lookup(config), Path(config.dataset).name
    if config.dataset in DATASETS:
        roots = [Path(data_dir) / name, Path(data_dir)]
    else:
        roots = [Path(moved_to)] if moved_to else [Path(config.dataset), Path(data_dir) / name]
    roots += [Path(row.elsewhere)] if row.elsewhere else []
    if download and row.fetch is not None:
        try:
            row.fetch(Path(data_dir))
        except (OSError, RuntimeError) as e:
            raise UserError(f"--download: could not fetch {name} ({e})") from e
    content, root = _read(name, row, roots)
    if isinstance(content, Folder):
        data = _of_folder(name, content, row.shape, device)
    else:
        data = _of_arrays(name, content, row, root, device)
    if not data.is_of(config.data_digest):
        raise UserError(f"{config.data_name}: {root} does not hold the images that the run was trained on")
    return data


def _of_arrays(name: str, content, row: DataSet, root: Path, device: torch.device) -> Data:
    try:
        splits = [_checked(*split, row) for split in content]
    except ValueError as e:
        raise UserError(f"{name}: {root} holds {e}") from e
    origin = f"; from {root}" if str(root) == row.elsewhere else ""
    n, n_test = (len(images) for images, _ in splits)
    _tell(f"{name}: train {n:,} images, test {n_test:,}, {row.n_classes} classes{origin}", root.resolve())
    return Data(*_resident(name, splits, device), row.n_classes, content_of(splits))


def _read(name: str, row: DataSet, roots: list[Path]):
    """What the row's reader finds in the first folder that has any of its files, and that folder."""
    for root in roots:
        try:
            return row.reader(root), root
        except FileNotFoundError:
            continue
        except UserError:
            raise
        except PermissionError as e:
            raise UserError(f"{e.filename or root}: no permission to read {name} there") from e
        except Exception as e:  # the libraries' parsers raise anything on damaged files
            raise UserError(f"{name}: the files under {root} are damaged or not the data set's: {one_line(e)}") from e
    how = "; --download fetches it" if row.fetch is not None else ""
    if row.reader is arrays.scan:
        how = "; where it is now, --data_dir (the folder that it is in) or --dataset tells"
    where = " or ".join(str(root.resolve()) for root in roots)
    raise UserError(f"{name}: not found; looked in {where} for {row.files}{how}")


def _checked(images, labels, row: DataSet) -> tuple[torch.Tensor, torch.Tensor]:
    """The one gate behind every reader: uint8 (N, C, H, W), int64 (N,). Raises ValueError with what is there."""
    images, labels = np.asarray(images), np.asarray(labels)
    shape, n = row.shape, len(images) if images.ndim else 0
    if images.shape == (n, *shape[1:], shape[0]) and images.shape[1:] != shape:
        images = images.transpose(0, 3, 1, 2)
    if images.shape != (n, *shape) or n == 0:
        raise ValueError(f"images {images.shape}, not (N, {', '.join(map(str, shape))})")
    if images.dtype != np.uint8:
        span = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "uif" else ""
        raise ValueError(f"pixels of {images.dtype}{span}, not uint8 from 0 to 255")
    if labels.shape != (n,) or labels.dtype.kind not in "uif" or (labels != np.floor(labels)).any():
        raise ValueError(f"{n:,} images, but labels {labels.shape} of {labels.dtype} that are not a whole number each")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= row.n_classes:
        raise ValueError(f"labels from {low:g} to {high:g}, not from 0 to {row.n_classes - 1}")
    return torch.from_numpy(np.require(images, requirements="CW")), torch.from_numpy(labels.astype(np.int64))


def _of_folder(name: str, folder: Folder, shape: tuple[int, int, int], device: torch.device) -> Data:
    n, (channels, size, _), samples = len(folder.train), shape, folder.train + folder.test
    classes, skipped = folder.classes, folder.skipped
    what = f"{count(len(classes), 'class')}: {enumeration(classes)}" if classes else "no classes"
    line = f"{name}: train {count(n, 'image')}, test {len(folder.test):,}, {what}"
    if skipped:
        kinds = enumeration(f"{kind} {n:,}" for kind, n in skipped.most_common())
        line += f"; {count(skipped.total(), 'file')} skipped ({kinds})"
    for text in (line, *(f"note: {name}: {note}" for note in folder.notes)):
        _tell(text, Path(folder.root))
    if size == LARGE[1]:
        splits = [Streamed(part, shape, device) for part in (folder.train, folder.test)]
        files = [(folder.root, 0)] if folder.is_file else samples
        content = digest(f"{n} {content_digest(files)}".encode())
    else:
        _check_memory(name, len(samples) * channels * size**2, memory(), "this machine has")
        images, labels = decode(samples, channels, size), torch.tensor([label for _, label in samples])
        splits = [(images[:n], labels[:n]), (images[n:], labels[n:])]
        splits, content = _resident(name, splits, device), content_of(splits)
    return Data(*splits, len(folder.classes), content, folder.digest, folder)


def content_of(splits: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """The digest of images and labels, split by split."""
    sha256 = hashlib.sha256()
    for tensor in (tensor for split in splits for tensor in split):
        sha256.update(f"{tuple(tensor.shape)}".encode())
        sha256.update(tensor.numpy())
    return sha256.hexdigest()[:16]


def _resident(name: str, splits: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> list[Resident]:
    """Images and labels moved to the device. Raises UserError if they do not fit into a GPU's free memory."""
    if device.type == "cuda":
        size = sum(tensor.nbytes for split in splits for tensor in split)
        _check_memory(name, size, torch.cuda.mem_get_info(device)[0], "the GPU has free")
    return [Resident(*split, device) for split in splits]


def _check_memory(name: str, size: int, available: int, whose: str) -> None:
    if size > available:
        raise UserError(f"{name}: needs {size:,} bytes of memory, {whose} {available:,}")


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _tell(line: str, where: Path) -> None:
    """Prints a line about a folder, once; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
