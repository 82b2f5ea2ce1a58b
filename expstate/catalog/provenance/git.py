"""Commit, branch and changes of the git repository, asked of one ``git`` process that never has more than two seconds.

It writes nothing, asks nobody, runs no hooks, and is ended with all its children when the time is over. Without ``git`` the files of the
repository still tell commit and branch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
import warnings
from typing import TYPE_CHECKING, Any

from expstate.catalog.provenance import project, redact, repository
from expstate.errors import ProvenanceWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.catalog.provenance.gatherers import Seen

SECONDS = 2.0
MOST_DIFF_BYTES = 256 * 1024
_LONGEST_HEAD = 64 * 1024

_log = logging.getLogger("expstate")
_QUIET = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_STATUS = ("status", "--porcelain=v2", "--branch", "--no-ahead-behind", "--no-renames", "--untracked-files=no")
_DIFF = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
_ELSEWHERE = frozenset(
    f"GIT_{name}" for name in ("DIR", "WORK_TREE", "INDEX_FILE", "PREFIX", "COMMON_DIR", "OBJECT_DIRECTORY", "NAMESPACE", "EXTERNAL_DIFF")
)
"""Variables that make git look at another repository than that of the folder, or start other programs."""
_SECRET_FILE = re.compile(rb"^diff --git .*(?:\.env\b|\.netrc|\.pem|\.key|id_(?:rsa|ecdsa|ed25519)|credentials|secrets?\b)", re.MULTILINE)

_abandoned: list[subprocess.Popen[bytes]] = []
_warned = False


def gather(seen: Seen) -> dict[str, Any] | None:
    """What is recorded of the repository that the working folder is in; None if it is in none."""
    if seen.folder is None:
        return None
    found = repository.find(os.path.realpath(seen.folder))
    if found is None:
        return None
    deadline = time.monotonic() + SECONDS
    status = _ask(found, _STATUS, deadline, _says_dirty, _LONGEST_HEAD)
    if status is None:
        commit, branch = found.head()
        said: dict[str, Any] = {"commit": commit, "branch": branch}
    else:
        said = _parse(status)
    remote = found.remote()
    said |= {"remote": None if remote is None else project.shown_remote(remote), "root": str(found.root)}
    if seen.settings.provenance_diff and said.get("dirty") and said["commit"] is not None:
        said |= _diff(found, deadline)
    return {name: value for name, value in said.items() if value is not None}


def _parse(status: bytes) -> dict[str, Any]:
    """What ``git status --porcelain=v2 --branch`` says."""
    head = dict(re.findall(r"^# branch\.(oid|head) (.*)$", status.decode("utf-8", "surrogateescape"), re.MULTILINE))
    commit, branch = head.get("oid"), head.get("head")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": _says_dirty(status),
    }


def _says_dirty(status: bytes) -> bool:
    # Everything that is no header is a change: no need to wait for all of them.
    return re.search(rb"^[^#\n]", status, re.MULTILINE) is not None


def _diff(found: repository.Repository, deadline: float) -> dict[str, Any]:
    data = _ask(found, _DIFF, deadline, lambda data: len(data) > MOST_DIFF_BYTES, 2 * MOST_DIFF_BYTES)
    if data is None:
        return {}
    text = data.decode("utf-8", "replace")
    if _SECRET_FILE.search(data) is not None or redact.is_secret(text):
        return {"diff": redact.hashed(text)}
    if len(data) <= MOST_DIFF_BYTES:
        return {"diff": text}
    # Whole lines: half a secret is no secret to the patterns.
    return {"diff": data[:MOST_DIFF_BYTES].rpartition(b"\n")[0].decode("utf-8", "replace"), "diff_is_cut": True}


def _ask(
    found: repository.Repository, arguments: Sequence[str], deadline: float, enough: Callable[[bytes], bool], most_bytes: int
) -> bytes | None:
    """What git answers, or as much of it as is enough; None if it fails, is not there, or takes too long."""
    program = shutil.which("git")
    if program is None:
        return None
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE and not name.startswith("GIT_TRACE")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    process = subprocess.Popen(  # noqa: S603 - git itself, with arguments of our own
        [program, *_QUIET, *arguments],
        cwd=found.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # so that it can be ended with its children
    )
    answer = b""
    finished = False
    try:
        answer, finished = _read(process, deadline, enough, most_bytes)
        # One that has closed its output is about to end.
        failed = finished and process.wait(max(0.1, deadline - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        failed = True
    finally:
        _end(process)
    if not finished and not enough(answer):
        _warn()
        return None
    return None if failed else answer


def _read(process: subprocess.Popen[bytes], deadline: float, enough: Callable[[bytes], bool], most_bytes: int) -> tuple[bytes, bool]:
    """What came before the deadline, and whether that is all."""
    assert process.stdout is not None
    answer = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(answer) <= most_bytes and not enough(bytes(answer)):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return bytes(answer), False
            data = os.read(process.stdout.fileno(), 64 * 1024)
            if not data:
                return bytes(answer), True
            answer += data
    return bytes(answer), False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with its children, if it has not ended; never wait for one that cannot be ended."""
    assert process.stdout is not None
    process.stdout.close()
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            _abandoned.append(process)  # waiting for a disk that does not answer


def _warn() -> None:
    global _warned  # noqa: PLW0603 - once per process
    if _warned:
        return
    _warned = True
    message = f"git took longer than {SECONDS:g} s: whether files were changed was not recorded; EXPSTATE_PROVENANCE=off asks it no more"
    try:
        warnings.warn(message, ProvenanceWarning, stacklevel=2)
    except ProvenanceWarning:  # where warnings are errors, a take does not fail for this one
        _log.warning(message)
