"""Puts a data set where training can batch it.

Images of 256 pixels stream (`Streamed`); smaller ones live on the training device (`Resident`).
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import UserError, one_line

from . import folders
from .batches import Resident, Streamed
from .folders import Folder, count, decode, listed, listed_counts, look, notes_of, printable
from .table import DATASETS, LARGE, DataSet, lookup


class Data(NamedTuple):
    """Both splits of a data set, and its number of classes; 0 means images without labels, whose labels are all 0."""

    train: Resident | Streamed
    test: Resident | Streamed
    n_classes: int
    digest: str | None = None  # of a folder's list of files

    @property
    def labelled(self) -> bool:
        return self.n_classes > 0


def load_data(config, data_dir: str, device: torch.device, download: bool = False, moved_to: str | None = None) -> Data:
    """Both splits of the Config's data set, under `data_dir` or a folder of the data set's name in it.

    A folder of images is looked for at `moved_to`, or else where the Config says and then under `data_dir`. Prints what
    it found in one line. Raises UserError, saying where it looked and what belongs there, when the files are missing or
    damaged, or not those that the Config's run was trained on.
    """
    row, own = lookup(config), config.dataset not in DATASETS
    name = Path(config.dataset).name if own else config.dataset
    roots = [Path(data_dir) / name, *([] if own else [Path(data_dir)])]
    if own:
        roots = [Path(moved_to)] if moved_to else [Path(config.dataset), *roots]
    roots += [Path(row.elsewhere)] if row.elsewhere else []
    if download and row.fetch is not None:
        try:
            row.fetch(Path(data_dir))
        except (OSError, RuntimeError) as e:
            raise UserError(f"--download: could not fetch {name} ({e})") from e
    found, root = _read(name, row, roots)
    try:
        if isinstance(found, Folder):
            if config.data_digest not in (None, found.digest):
                raise UserError(
                    f"{name}: {root} does not hold the images that the run was trained on: files were added, removed "
                    "or renamed"
                )
            return _of_folder(name, found, row.shape, device)
        splits = [_checked(*split, row) for split in found]
    except ValueError as e:
        raise UserError(f"{name}: {root} holds {e}") from e
    line = f"{name}: train {count(len(splits[0][0]), 'image')}, test {len(splits[1][0]):,}"
    _tell(f"{line}, {count(row.n_classes, 'class')}" + f"; from {root}" * (str(root) == row.elsewhere), root.resolve())
    return Data(*(Resident(*split, device) for split in splits), row.n_classes)


def _read(name: str, row: DataSet, roots: list[Path]):
    """What the row's reader finds in the first of the folders that has any of its files, and that folder."""
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
            why = one_line(e)
            raise UserError(f"{name}: the files under {root} are damaged or not the data set's: {why}") from e
    how = "; --download fetches it" if row.fetch is not None else ""
    if packed := [p for root in roots if row.archive and root.is_dir() for p in sorted(root.glob(row.archive))]:
        how = f"; {listed(packed)} is there: unpack it"
    if row.reader is folders.scan:
        how = "; where it is now, --data_dir (the folder that it is in) or --dataset tells"
    where = " or ".join(str(r.resolve()) for r in roots)
    raise UserError(f"{name}: not found; looked in {where} for {row.files}{how}")


def _checked(images, labels, row: DataSet) -> tuple[torch.Tensor, torch.Tensor]:
    """The one gate behind every reader: uint8 (N, C, H, W) and int64 (N,). Raises ValueError with what it found."""
    images, labels = np.asarray(images), np.asarray(labels)
    shape, n = row.shape, len(images) if images.ndim else 0
    if images.shape == (n, *shape[1:], shape[0]) and images.shape[1:] != shape:
        images = images.transpose(0, 3, 1, 2)
    if images.shape != (n, *shape) or n == 0:
        raise ValueError(f"images {images.shape}, not (N, {', '.join(map(str, shape))})")
    if images.dtype != np.uint8:
        span = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "uif" else ""
        raise ValueError(f"pixels of {images.dtype}{span}, not uint8 from 0 to 255")
    if labels.shape != (n,):
        raise ValueError(f"{n:,} images, but labels {labels.shape}")
    if labels.dtype.kind not in "uif" or (labels != np.floor(labels)).any():
        raise ValueError(f"labels of {labels.dtype} that are not whole numbers")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= row.n_classes:
        raise ValueError(f"labels from {low:g} to {high:g}, not from 0 to {row.n_classes - 1}")
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))


def _of_folder(name: str, found: Folder, shape: tuple[int, int, int], device: torch.device) -> Data:
    line = f"{name}: train {count(len(found.train), 'image')}, test {len(found.test):,}, "
    line += f"{count(len(found.classes), 'class')}: {listed(found.classes)}" if found.classes else "no classes"
    if n := found.skipped.total():
        line += f"; {count(n, 'file')} skipped ({listed_counts(found.skipped)})"
    notes, (channels, size, _), parts = list(found.notes), shape, (found.train, found.test)
    where = Path(found.root)
    _tell(line, where)
    if size == LARGE[1]:
        splits = [Streamed(samples, shape, device) for samples in parts]
        notes += look(found.train + found.test, channels)
    else:
        needs, has = len(found.train + found.test) * channels * size**2, memory()
        if needs > has:
            raise UserError(f"{name}: needs {needs:,} bytes of memory at {size} pixels, this machine has {has:,}")
        decoded = [decode(samples, channels, size) for samples in parts]
        if wrong := [problem for _, _, problems in decoded for problem in problems]:
            more = f"; {len(wrong)} images in all" if len(wrong) > 1 else ""
            raise UserError("; ".join(wrong[:10]) + more)
        notes += notes_of([opened for _, some, _ in decoded for opened in some])
        labels = [torch.tensor([label for _, label in samples]) for samples in parts]
        splits = [Resident(images, y, device) for (images, _, _), y in zip(decoded, labels, strict=True)]
    for note in notes:
        _tell(f"note: {name}: {note}", where)
    return Data(*splits, len(found.classes), found.digest)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


@functools.cache
def _tell(line: str, where: Path) -> None:
    """Prints a line about a folder, once; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), flush=True)
