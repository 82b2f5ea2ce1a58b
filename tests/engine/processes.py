"""Children that end badly: functions run in a forked process that is killed at its n-th change of the storage, or is run under strace."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate.storage import local

STRACE = shutil.which("strace")
NEEDS_STRACE = pytest.mark.skipif(STRACE is None, reason="needs strace")

# The calls of ``os`` by which ``storage/local.py`` changes a disk.
CHANGES = ("mkdir", "open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "link", "unlink", "rename", "rmdir")


@dataclass(frozen=True)
class Ended:
    """How a child ended: what it gave, or the error that it raised, or the signal that killed it."""

    value: Any = None
    error: BaseException | str | None = None
    signal: int | None = None

    @property
    def result(self) -> Any:
        """What it gave; it must have ended well."""
        assert self.signal is None, f"killed by {signal.Signals(self.signal).name}"
        assert self.error is None, self.error
        return self.value


def start_child(function: Callable[[], Any], *, wait: bool = False) -> tuple[int, int, int]:
    """Run ``function`` in a forked child.

    Returns its process id, the end of a pipe that its result comes out of, and one to let it begin if it is to wait for that.
    """
    result, give = os.pipe()
    begin, let_begin = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads run: those of this process only wait
        child = os.fork()
    if child:
        os.close(give)
        os.close(begin)
        return child, result, let_begin
    try:
        gc.freeze()  # its garbage is its own: to look at all objects of its parent would copy all pages they are on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The threads of torch's pool are not in the child.
        torch.set_num_threads(1)
        os.close(let_begin)
        if wait:
            ctypes.CDLL(None).prctl(0x59616D61, -1)  # PR_SET_PTRACER: anyone may trace it
            os.read(begin, 1)
        try:
            ended = Ended(function())
        except BaseException as error:  # noqa: BLE001 - handed to the parent
            ended = Ended(error=error)
        try:
            data = pickle.dumps(ended)
            pickle.loads(data)  # noqa: S301 - its own
        except Exception:  # noqa: BLE001 - an error that cannot be pickled is told in words
            data = pickle.dumps(Ended(error=f"{type(ended.error).__name__}: {ended.error}"))
        with os.fdopen(give, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


def end_of(child: int, result: int) -> Ended:
    """Wait for a child."""
    with os.fdopen(result, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status))
    return pickle.loads(data)  # noqa: S301 - of a child of ours


def in_child(function: Callable[[], Any]) -> Ended:
    """Run ``function`` in a forked child and wait for it."""
    child, result, let_begin = start_child(function)
    os.close(let_begin)
    return end_of(child, result)


class Changes:
    """The changes of the storage made in this process, in order; at one of them something may happen.

    Parameters
    ----------
    at : int
        Number of the change, from 1, before which ``strike`` is called.
    strike : callable
        Is called with the name of the call, the arguments and the real function.
    """

    def __init__(self, at: int = 0, strike: Callable[..., None] | None = None) -> None:
        self.log: list[tuple[str, str]] = []
        self._at = at
        self._strike = strike
        self._lock = threading.Lock()

    def wrapped(self, name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY):
                return really(*args, **kwargs)
            with self._lock:
                self.log.append((name, _path_of(name, args, kwargs)))
                strikes = len(self.log) == self._at
            if strikes and self._strike is not None:
                self._strike(name, args, really)
            return really(*args, **kwargs)

        return call


def _path_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The path that a call is about."""
    if isinstance(args[0], int):
        path = _file(args[0])
        return f"{path}/{os.fsdecode(args[3])}" if name == "rename" else path
    path = args[1] if name in {"link", "rename"} else args[0]
    folder = kwargs.get("dst_dir_fd", kwargs.get("dir_fd"))
    return str(path) if folder is None else f"{_file(folder)}/{path}"


def _file(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


@contextmanager
def watched(changes: Changes) -> Iterator[Changes]:
    """The calls of ``os`` that change a disk go through ``changes``."""
    really = {name: getattr(os, name) for name in CHANGES}
    library = local._libc

    class Library:
        """The C library, whose renames are changes too."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(library, name)
            if name != "renameat2":
                return found
            return changes.wrapped("rename", found)

    try:
        for name, function in really.items():
            setattr(os, name, changes.wrapped(name, function))
        local._libc = Library()  # type: ignore[assignment]
        yield changes
    finally:
        local._libc = library
        for name, function in really.items():
            setattr(os, name, function)


def unmount(folder: Path) -> None:
    """Unmount a file system; a process that was started a moment ago, such as git, may still be letting go of files that it inherited."""
    until = time.monotonic() + 30
    while (done := subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)).returncode:  # noqa: S607
        assert time.monotonic() < until, done.stderr
        time.sleep(0.1)


def killed_at(number: int, function: Callable[[], Any], *, torn: bool = False) -> Ended:
    """Run ``function`` in a child that is killed before its change of this number; with ``torn`` in the middle of it if it is a write."""

    def strike(name: str, args: tuple[Any, ...], really: Callable[..., Any]) -> None:
        if torn and name == "pwrite":
            fd, data, offset = args
            half = len(data) // 2 // 4096 * 4096 or len(data) // 2
            with suppress(OSError):  # direct I/O writes whole pages or nothing
                really(fd, data[:half], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> Any:
        with watched(Changes(number, strike)):
            return function()

    return in_child(run)


def changes_of(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """The changes of the storage that ``function`` makes, in a child: names of calls and paths."""

    def run() -> list[tuple[str, str]]:
        with watched(Changes()) as changes:
            function()
        return changes.log

    return in_child(run).result


# strace


def under_strace(options: list[str], function: Callable[[], Any], log: Path) -> Ended:
    """Run ``function`` in a child that strace is attached to with these options; what it saw is in ``log``."""
    assert STRACE is not None
    child, result, let_begin = start_child(function, wait=True)
    tracer = subprocess.Popen(
        [STRACE, "-f", "-q", "-y", "-s", "0", "-o", str(log), *options, "-p", str(child)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 30
        while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text() and tracer.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        os.close(let_begin)
    ended = end_of(child, result)
    _, complaints = tracer.communicate(timeout=30)
    if tracer.returncode not in {0, -9, 137} and b"ptrace" in complaints:
        pytest.skip(f"strace cannot attach here: {complaints.decode()}")
    return ended


CHANGING_CALLS = (
    *("mkdir", "mkdirat", "pwrite64", "pwritev", "fallocate", "ftruncate", "fsync", "fdatasync", "copy_file_range"),
    *("link", "linkat", "unlink", "unlinkat", "rename", "renameat", "renameat2", "rmdir"),
)
"""System calls that change what is on a disk."""


def changing_calls(function: Callable[[], Any], log: Path) -> list[tuple[str, int]]:
    """The calls that change the disk which ``function`` makes: each by its name and number, as strace counts them, in each thread anew."""
    under_strace(["-e", f"trace={','.join(CHANGING_CALLS)}"], function, log).result  # noqa: B018 - it has to end well
    made = Counter((thread, name) for thread, name, _ in calls_in(log, succeeded=False))
    return sorted({(name, number) for (_, name), count in made.items() for number in range(1, count + 1)})


def killed_on(call: str, number: int, function: Callable[[], Any], log: Path) -> None:
    """Run ``function`` in a child that is killed on entering its system call of this name and number."""
    ended = under_strace(["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"], function, log)
    assert signal.SIGKILL == ended.signal, (call, number, ended)


_LINE = re.compile(r"^(\d+)\s+(\w+)\((.*)\)\s+=\s+(-?\d+)")
_PATHS = re.compile(r'<([^>]*)>|"([^"]*)"')


def calls_in(log: Path, *, succeeded: bool = True) -> list[tuple[int, str, list[str]]]:
    """The calls that strace saw, those that succeeded or all: thread, name, and the paths among the arguments."""
    found = []
    unfinished: dict[str, str] = {}
    for line in log.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        whole = line
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if "resumed>" in line and thread in unfinished:
            whole = unfinished.pop(thread) + rest.partition("resumed>")[2]
        match = _LINE.match(whole)
        if match and (int(match[4]) >= 0 or not succeeded):
            found.append((int(match[1]), match[2], [one or other for one, other in _PATHS.findall(match[3])]))
    return found
