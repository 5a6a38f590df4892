"""Files, written whole or not at all, and read without ever running what they hold."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import locks
from utils.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(folder: Path, flag: str = "--runs_dir") -> None:
    """Raises UserError if no file can be written to the folder, or to the first one above it that exists."""
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell
    except OSError as e:
        if e.errno not in FULL:  # `write_atomic` tells more
            raise UserError(f"{folder}: cannot write there ({e.strerror or e}); choose another {flag}") from e


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Raises UserError when it cannot be written, with what is needed and what there is when the disk is full; Lost when
    the folder's lock is.
    """
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            locks.check(path.parent)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as e:  # names no file, or the temporary one
        why = f"cannot be written ({e.strerror or e})"
        if e.errno in FULL:
            why = f"disk full: needs {len(data):,} bytes, has {shutil.disk_usage(path.parent).free:,}"
        raise UserError(f"{path}: {why}") from e


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text in UTF-8; names of files that this locale could not decode are written as they are."""
    write_atomic(path, text.encode(errors="surrogateescape"))


def digest(data: bytes) -> str:
    """A short digest, to tell contents apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of(path: Path) -> str | None:
    """Of a file's content; None if it is not there."""
    try:
        return digest(path.read_bytes())
    except OSError:
        return None


def write_json(path: Path, values: dict) -> None:
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Raises UserError naming the file if it holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: unreadable or damaged ({e})") from e
    return values


def save_tensors(path: Path, tensors: dict) -> None:
    """`write_atomic` of tensors and plain values, as torch saves them."""
    import torch

    buffer = io.BytesIO()  # not a path: torch would write the file's name into it, and bytes would differ
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path) -> dict:
    """Tensors and plain values of a file, on the CPU; checks its checksums and executes nothing.

    Raises UserError naming the file if it is damaged or holds anything else.
    """
    import torch

    clean = io.BytesIO()  # of what Python's reader has checked: torch trusts the archive's headers
    try:
        with zipfile.ZipFile(clean, "w") as copy:
            for name, content in _unzipped(path).items():
                copy.writestr(name, content)
        clean.seek(0)
        state = torch.load(clean, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no dictionary of tensors")
        return state
    except Exception as e:  # the readers raise anything on damaged files
        what = "it may hold code, refused" if isinstance(e, pickle.UnpicklingError) else "damaged"
        raise UserError(f"{path}: {what} ({one_line(e)[:200]})") from e


def _unzipped(path: Path, names: Iterable[str] = ()) -> dict[str, bytes]:
    """The entries of an archive, or those of some names, whose checksums are right."""
    with zipfile.ZipFile(path) as archive:
        wanted = [name for name in archive.namelist() if not names or name in names]
        entries = {name: archive.read(name) for name in wanted}
        if len(entries) < len(wanted):
            raise zipfile.BadZipFile("two entries of one name")
    return entries


def to_csv(rows: Sequence[Mapping], columns: Iterable[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def npz(arrays: dict[str, "np.ndarray"]) -> bytes:
    """The content of an NPZ file with these arrays."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_arrays(path: Path, names: Iterable[str] = ()) -> dict[str, "np.ndarray"]:
    """An NPZ's arrays, or those of some names. Raises UserError naming the file if it is missing or damaged."""
    import numpy as np

    try:
        entries = _unzipped(path, [f"{name}.npy" for name in names])
        files = {Path(name): io.BytesIO(content) for name, content in entries.items()}
        read = np.lib.format.read_array
        return {f.stem: read(content, allow_pickle=False) for f, content in files.items() if f.suffix == ".npy"}
    except Exception as e:  # numpy and zipfile raise anything on damaged files
        raise UserError(f"{path}: missing or damaged ({e})") from e
