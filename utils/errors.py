"""Errors that are the user's to mend: one line on stderr, exit status 2, no traceback."""

import difflib
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input or surroundings; the message names the flag, file or value and what would be right."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _terminate(*_):
    raise Terminated


def nearest(name: str, valid: Iterable[str]) -> str:
    """A tail for an error message: the valid names, the nearest one first if there is one."""
    valid = list(valid)
    close = {v.lower(): v for v in reversed(valid)}
    match = difflib.get_close_matches(name.lower(), close, n=1)
    return (f"; did you mean {close[match[0]]}?" if match else "") + f" (valid: {', '.join(valid)})"


def is_out_of_memory(e: BaseException | None) -> bool:
    """Whether a GPU's memory did not hold what was asked for: as torch says it, or a library below or above it."""
    while e is not None:
        if "out of memory" in str(e) or "ALLOC_FAILED" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False


def one_line(e: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def command_line() -> str:
    """The command that continues: as it was given, without --overwrite, which would start anew."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)  # of python -m
    program = [sys.argv[0]] if module is None else ["-m", module.removesuffix(".__main__")]
    launcher = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{launcher} {shlex.join([*program, *(a for a in sys.argv[1:] if a not in ('--overwrite', '--force'))])}"


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits with its status; a UserError becomes one line and status 2.

    Ctrl-C gives status 130, SIGTERM 143, and the command that continues.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main())
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt as e:
        for number in (signal.SIGINT, signal.SIGTERM):  # one is enough
            signal.signal(number, signal.SIG_IGN)
        print(f"\ninterrupted; rerun to continue: {command_line()}", file=sys.stderr)
        sys.exit(143 if isinstance(e, Terminated) else 130)
    except OSError as e:
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"{e.filename or 'writing'}: {e.strerror}"
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
