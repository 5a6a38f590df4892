"""Processes that start in milliseconds: forks of one in which the libraries are imported already.

Most of what a trial of reliability costs is the import of torch in each of its processes. A fork
runs its script to the end of the interpreter, as any other does; what is killed in a trial is started afresh.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRELOADED = ("train", "train_classifier", "eval_beta_grid", "eval_beta_single", "plot_eval")
PRELOADED += ("torch.utils.tensorboard", "torchvision.utils", "torchvision.transforms.v2", "sklearn.datasets")
PRELOADED += ("sklearn.svm", "sklearn.linear_model", "joblib", "utils.plane.figures")
PRELOADED += ("utils.training.unfold", "utils.training.schedule", "utils.training.classifier", "utils.evaluation.batch")
# set by pytest, and by libraries once a training has run in this process
IGNORED = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")


class Process:
    """What subprocess.Popen tells of a process, for one that the zygote forks."""

    def __init__(self, zygote: socket.socket, code: str | None, argv: list[str]):
        pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, status
        ours, theirs = zip(*pipes, strict=True)
        request = json.dumps({"code": code, "argv": argv, "cwd": os.getcwd()}).encode()
        socket.send_fds(zygote, [len(request).to_bytes(4) + request], theirs)
        for fd in theirs:
            os.close(fd)
        self.stdout, self.stderr = (os.fdopen(fd, "r", encoding="utf-8", errors="surrogateescape") for fd in ours[:2])
        self.status, self.returncode, self.args = os.fdopen(ours[2], "rb", buffering=0), None, argv
        self.pid = int.from_bytes(self.status.read(4))
        self.readers: dict[str, threading.Thread] = {}
        self.read: dict[str, str] = {}

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.status], [], [], 0)[0]:
            with self.status:
                self.returncode = int.from_bytes(self.status.read(4), signed=True)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self.status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        end = None if timeout is None else time.monotonic() + timeout
        for name in ("stdout", "stderr"):
            if name not in self.readers:
                self.readers[name] = threading.Thread(target=self._read, args=[name], daemon=True)
                self.readers[name].start()
        for thread in self.readers.values():
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return self.read["stdout"], self.read["stderr"]

    def _read(self, name: str) -> None:
        stream = getattr(self, name)
        self.read[name] = "" if stream.closed else stream.read()
        stream.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_zygote: socket.socket | None = None
_variables: dict[str, str] = {}


def can_fork() -> bool:
    """Whether a fork would have this process's environment variables."""
    return hasattr(os, "fork") and (_zygote is None or _environment() == _variables)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in IGNORED}


def fork(name: str, argv: list[str], code: str | None) -> Process:
    """Runs a script, or the code instead of it, with the arguments `argv` in a fork of the zygote."""
    global _zygote, _variables
    if _zygote is None:
        _variables = _environment()
        _zygote, theirs = socket.socketpair()
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
    return Process(_zygote, code, [str(ROOT / name), *argv])


def serve(requests: socket.socket) -> None:
    """Forks for every request; returns in the fork, as the process that was asked for, and when there are no more."""
    while True:
        head, descriptors, *_ = socket.recv_fds(requests, 4, 3)
        if not head:
            return None
        out, err, status = descriptors
        size, request = int.from_bytes(head), b""
        while len(request) < size:
            request += requests.recv(size - len(request))
        if os.fork() == 0:  # waits for the process, whose parent it is
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                requests.close()
                os.close(status)
                return json.loads(request), out, err
            for fd in (out, err):
                os.close(fd)
            os.write(status, pid.to_bytes(4))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status, code.to_bytes(4, signed=True))
            os._exit(0)
        for fd in (out, err, status):
            os.close(fd)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for module in PRELOADED:
        __import__(module)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has set to be ignored
    gc.freeze()  # no collection need look at what was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait are not waited for
    found = serve(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        asked, out, err = found
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(asked["cwd"])
        sys.argv = asked["argv"]
        if asked["code"] is None:
            runpy.run_path(asked["argv"][0], run_name="__main__")
        else:
            exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
