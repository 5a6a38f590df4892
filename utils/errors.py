"""Errors that are the user's to mend: one line on stderr, exit status 2, no traceback."""

import contextlib
import difflib
import errno
import io
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Bad input or surroundings; the message names the flag, file or value and what would be right."""


# Ctrl-C; a scheduler; a terminal, or what reads our output, was closed; SLURM shortly before the time limit.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# How often OpenMP's threads look for each other before they sleep, about 50 microseconds: its own 3 milliseconds cost
# whole time slices where others use the machine too, and a thread that is waited for is not running at all.
SPINS = "5000"


def _raise(number, _):
    raise KeyboardInterrupt(number)


def _end_quietly(number, _) -> NoReturn:
    os._exit(128 + number)


def heeded_signals() -> list[int]:
    """The signals that end this process; not SIGHUP where it was started by nohup."""
    return [n for n in ENDING_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def _let_signals_end_quietly() -> None:
    """Lets signals end the process at once, without a word: at its start and its end there is nothing to save."""
    if threading.current_thread() is threading.main_thread():
        for number in heeded_signals():
            signal.signal(number, _end_quietly)


def let_signals_raise() -> None:
    """Lets signals that would end a script at once raise KeyboardInterrupt from now on, so that it can save."""
    for number in heeded_signals():
        if signal.getsignal(number) is _end_quietly:
            signal.signal(number, _raise)


@contextlib.contextmanager
def signals_postponed(*numbers: int) -> Iterator[None]:
    """Lets these signals come to this process afterwards, and never to the processes that it starts meanwhile."""
    came, handlers = set(), {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # of this thread, which started processes inherit
    try:
        if threading.current_thread() is threading.main_thread():  # where another thread receives it
            handlers = {n: signal.signal(n, lambda number, _: came.add(number)) for n in numbers}
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in came:
        signal.raise_signal(number)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A tail for an error message: the valid names, the nearest one first if there is one."""
    valid = list(valid)
    close = {v.lower(): v for v in reversed(valid)}
    match = difflib.get_close_matches(name.lower(), close, n=1)
    return (f"; did you mean {close[match[0]]}?" if match else "") + f" (valid: {', '.join(valid)})"


def is_out_of_memory(e: BaseException | None) -> bool:
    """Whether a GPU's memory did not hold what was asked for: as torch says it, or a library below or above it."""
    if e is None or "out of memory" in str(e) or "ALLOC_FAILED" in str(e):
        return e is not None
    return is_out_of_memory(e.__cause__ or e.__context__)


def one_line(e: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def command_line(*without: str) -> str:
    """The command as it was given, without some of its flags."""
    launcher = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{launcher} {shlex.join(word for word in sys.argv if word not in without)}"


class _Output(io.FileIO):
    """Standard output or error. When its reader goes, the rest goes nowhere, and the process ends as of SIGHUP.

    Where it cannot be written for another reason, say a full disk, only the output ends.
    """

    reader_gone = False

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as e:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if e.errno in (errno.EPIPE, errno.EIO):
                _Output.reader_gone = True
                signal.raise_signal(signal.SIGHUP)
            return len(data)


def _guard_outputs() -> None:
    """Lets standard output and error survive the end of their reader, and take any character in any locale."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # else something else has replaced it
            raw = _Output(stream.fileno(), "w", closefd=False)
            buffer = raw if stream.write_through else io.BufferedWriter(raw)  # PYTHONUNBUFFERED wants none
            how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **how))


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits with its status; a UserError, or a full GPU, becomes one line and status 2.

    A signal gives status 128 + its number (Ctrl-C 130, SIGTERM 143), and the command that continues; until `main` has
    called `let_signals_raise`, as `machine.prepare` does, it ends the process at once.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's and scipy's; its last digits depend on how many there are
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    try:
        Path.home()
    except RuntimeError:  # of a user without an entry; some libraries cannot do without
        os.environ["HOME"] = tempfile.gettempdir()
    if threading.current_thread() is threading.main_thread():
        if sys.getfilesystemencoding() == "ascii":  # in which other libraries cannot open what has other characters
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        _guard_outputs()
        _let_signals_end_quietly()
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
            _let_signals_end_quietly()
        sys.exit(status)
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt as e:
        for number in ENDING_SIGNALS:  # one is enough
            signal.signal(number, signal.SIG_IGN)
        if not _Output.reader_gone:
            print(f"\ninterrupted; rerun to continue: {command_line('--overwrite', '--force')}", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))
    except OSError as e:
        message = f"{e.filename or 'the system'}: {e.strerror or one_line(e)}"
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        message = f"--device: {one_line(e)}"  # with what was needed, and what was free
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
