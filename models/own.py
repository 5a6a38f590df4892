"""Own networks: classes in files that the user names, and in no others; code never runs for lying in a run folder."""

import contextlib
import functools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from utils.errors import UserError, nearest, one_line
from utils.files import digest

COPY = "networks.py"  # of the file, in the folder of a run
IDENTITY = re.compile(r"(\w+)@[0-9a-f]{16}")  # a class and the digest of its file, as config.json has them
FILES: dict[str, tuple[Path, bytes]] = {}  # those that were named in this process, by digest, with their content


def given(path: str | Path) -> str:
    """Takes a file for one whose code may run; its digest. Raises UserError if it cannot be read."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"--networks: {path}: {e.strerror or e}; it takes a Python file") from e
    FILES.setdefault(digest(content), (path, content))
    return digest(content)


def named(text: str) -> str:
    """The identity, CLASS@digest, of FILE:CLASS, before anything runs. Raises UserError if there is no such file."""
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"--networks: takes FILE:CLASS, a Python file and a class in it, got {text!r}")
    return f"{name}@{given(path)}"


def is_given(identity: str | None) -> bool:
    """Whether the file of these networks has been named, if they are own ones at all."""
    return identity is None or identity.partition("@")[2] in FILES


def file_of(identity: str) -> tuple[Path, bytes]:
    """Where the file of these networks is, and its content."""
    return FILES[identity.partition("@")[2]]


def class_of(identity: str) -> type:
    """The class of these networks, whose file has been named. Raises UserError if it is not there."""
    name, _, of_file = identity.partition("@")
    module = module_of(of_file)
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__}
    if name not in classes:
        raise UserError(f"--networks: {module.__file__} has no class {name}{nearest(name, classes)}")
    return classes[name]


@functools.cache
def module_of(of_file: str) -> ModuleType:
    """The file of a digest as a module, run from its content as it was read."""
    path, content = FILES[of_file]
    module = ModuleType(f"own_networks_{of_file}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pickles and dataclasses look for it
    with told(path):
        exec(compile(content, path, "exec"), vars(module))
    return module


@contextlib.contextmanager
def told(path: Path, where: Callable[[], str] = str) -> Iterator[None]:
    """Tells what a user's code raises in one line: where in the file, `where` else, and what."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        lines += [e.lineno] if isinstance(e, SyntaxError) and e.lineno else []
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--networks: {path}{line}{where()}: {type(e).__name__}: {one_line(e)}") from e


def from_copy(words: Sequence[str], identity: str | None, folder: Path) -> list[str]:
    """The words of a command, with the copy in a run's folder in the place of the identity."""
    name = (identity or "").partition("@")[0]
    return [f"{folder / COPY}:{name}" if word == identity else word for word in words]
