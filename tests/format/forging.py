"""Forged snapshots: real ones whose manifest was edited and sealed again, and a guard that sees what reading them does."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import math
import os
import resource
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from blake3 import blake3

from expstate import Snapshot, StateDict, settings
from expstate.engine import part as engine_part
from expstate.engine.digest import block_digests, box_digest
from expstate.errors import ExpstateError, NeedsTrustWarning
from expstate.format import names

GIB = 1024**3
OUTSIDE = [
    "../x-00001-{token}.safetensors",
    "../../etc/passwd",
    "a/../../b-00001-{token}.safetensors",
    "base/../../b-00001-{token}.safetensors",
    "base/../b-00001-{token}.safetensors",
    "base//b-00001-{token}.safetensors",
    "base/./b-00001-{token}.safetensors",
    "..\\x-00001-{token}.safetensors",
    "base\\x-00001-{token}.safetensors",
    "/etc/hostname",
    "/{token}-00001-{token}.safetensors",
    "//host/x-00001-{token}.safetensors",
    "file:///etc/hostname",
    "~/x-00001-{token}.safetensors",
    "~root/x-00001-{token}.safetensors",
    "simplecache::file:///etc/x-00001-{token}.safetensors",
    "reference://x-00001-{token}.safetensors",
    "http://169.254.169.254/x-00001-{token}.safetensors",
    "s3://bucket/x-00001-{token}.safetensors",
    "x\0-00001-{token}.safetensors",
    "x\n-00001-{token}.safetensors",
    "x-00001-{token}.safetensors\n",
    "x y-00001-{token}.safetensors",
    "\u202ex-00001-{token}.safetensors",
    "\u0661-00001-{token}.safetensors",
    "sub/x-00001-{token}.safetensors",
    ".hidden-00001-{token}.safetensors",
    "..-00001-{token}.safetensors",
    "base/..-00001-{token}.safetensors",
    "snapshot.json",
    "annotations.json",
    ".attempt-{token}.json",
    "notes.txt",
    "x-00001.safetensors",
    "x-00001-{token}.safetensors.txt",
    "x-00001-ABCDEF01.safetensors",
    "C:x-00001-{token}.safetensors",
    "",
    ".",
    "..",
    "/",
    "x" * 300 + "-00001-{token}.safetensors",
    "base/" + "x" * 300 + "-00001-{token}.safetensors",
]
"""What a manifest may not call its data files; ``{token}`` stands for the attempt's id."""


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight


def app_state() -> dict[str, Any]:
    """Something of every kind of entry that comes back without trust, the same each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that layouts are in beta, and that quantised tensors will go
        return _app_state()


def _app_state() -> dict[str, Any]:
    torch.manual_seed(7)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.second(model.first(torch.ones(2, 3))).sum().backward()
    optimizer.step()
    values = {"epoch": 3, "rate": 0.5, "nan": math.nan, "large": 2**70, "third": Fraction(1, 3), "name": "a/b%", "none": None}
    tensors = {
        "half": torch.arange(5, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 4),
        "number": torch.tensor(1.5),
        "blocks": torch.arange(400_000, dtype=torch.int32),
        "cut": torch.arange(300_000, dtype=torch.float64).reshape(3, 100_000),
        "inline": torch.arange(400_000, dtype=torch.int32).view(1, -1),
        "table": torch.arange(900_000, dtype=torch.int32).view(1, -1),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([1.0, 2.0]), (3, 2)),
        "rows": torch.eye(3).to_sparse_csr(),
        "eights": torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8),
        "generator": torch.Generator().manual_seed(1),
    }
    arrays = {
        "array": np.arange(6.0).reshape(2, 3),
        "texts": np.array(["a", "bcd"]),
        "records": np.zeros(2, [("x", "<f4"), ("n", "<i8")]),
        "frame": pd.DataFrame({"loss": [0.5, 0.25]}),
        "random": np.random.default_rng(1),
    }
    containers = {"keys": {1: "one", "1": "text", (2, 3): [1, 2]}, "long": "long " * 20_000, "list": [torch.ones(1), (2, "x")]}
    return {
        "model": model,
        "optimizer": optimizer,
        "extra": StateDict(**values, **tensors, **arrays, **containers),
    }


@functools.cache
def live() -> dict[str, Any]:
    """The same objects each time, for restores that change nothing, or put back what is there."""
    return app_state()


def take(folder: Path, state: dict[str, Any], **more: Any) -> None:
    """Take with small data files, so that tensors are cut, and few digests in the manifest; without a word about trust."""
    few = patch.object(engine_part, "INLINE_BLOCKS", 2)
    with settings.override(data_file_bytes=1024 * 1024), few, warnings.catch_warnings():
        warnings.simplefilter("ignore", NeedsTrustWarning)
        Snapshot.take(folder, state, **more)


def seal(body: bytes) -> bytes:
    """A manifest that begins with these bytes, with the digest that belongs to it."""
    return body + b',"blake3":"' + blake3(body).hexdigest().encode() + b'"}\n'


def body_of(document: dict[str, Any]) -> bytes:
    """The bytes of a manifest before its digest."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")[:-1]


class Forged:
    """A snapshot whose manifest can be edited.

    Attributes
    ----------
    folder : Path
        Where it is.
    document : dict
        The manifest as JSON, without its digest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: dict[str, Any] = json.loads((folder / names.MANIFEST).read_bytes())
        del self.document["blake3"]

    @property
    def token(self) -> str:
        """What its data files end in."""
        return names.attempt_of(self.document["id"])

    def entry(self, path: str) -> list[Any]:
        """The record of an entry."""
        return next(entry for entry in self.document["entries"] if entry[1] == path)

    def box(self, path: str, number: int = 0) -> list[Any]:
        """The record of a box."""
        return self.entry(path)[5 if self.entry(path)[0] == "object" else 4][number]

    def file(self, path: str) -> Path:
        """The data file that holds an entry's first byte."""
        return self.folder / self.document["files"][self.box(path)[0]][0]

    def write(self, body: bytes | None = None) -> Snapshot:
        """Put the manifest, or one that begins with ``body``, in place; the snapshot, not read yet."""
        path = self.folder / names.MANIFEST
        path.unlink()
        path.write_bytes(seal(body_of(self.document) if body is None else body))
        return Snapshot(self.folder)


ACTIONS: dict[str, Callable[[Snapshot, Path], Any]] = {
    "open": lambda snapshot, to: snapshot.manifest,
    "entries": lambda snapshot, to: snapshot.entries(),
    "metadata": lambda snapshot, to: snapshot.metadata,
    "restore": lambda snapshot, to: snapshot.restore(live()),
    "atomic restore": lambda snapshot, to: snapshot.restore(live(), atomic=True),
    "read_object": lambda snapshot, to: snapshot.read_object("model/first.weight"),
    "key": lambda snapshot, to: snapshot.get_state_dict_for_key("extra"),
    "verify": lambda snapshot, to: snapshot.verify(),
    "copy": lambda snapshot, to: snapshot.copy(to),
}
"""What people do with a snapshot that they were given; ``to`` is a place for copies."""


# What reading does


class Forbidden(BaseException):
    """The library did what reading a snapshot must not; no ``except Exception`` on the way hides it."""


_FORBIDDEN = ("import", "pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
_FORBIDDEN_FAMILIES = ("socket.", "subprocess.", "urllib.", "ctypes.dlopen", "code.")
# A named tuple is made by evaluating a line of field names that were checked to be identifiers.
_MAY_EVALUATE = {"/collections/__init__.py"}
_MAY_READ = ("/proc/", "/sys/")
_HARMLESS = {"socket.gethostname"}  # it goes into the lease of a copy

_allowed: tuple[str, ...] | None = None
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None or event in _HARMLESS:
        return
    if event == "import" and str(arguments[0]).partition(".")[0] == "tzdata":
        return  # time zones by name, where the system has none
    if (event, arguments) == ("ctypes.dlopen", ("libnvidia-ml.so.1",)):
        return  # where it may have devices, torch counts them so
    problem = ""
    if event in _FORBIDDEN or event.startswith(_FORBIDDEN_FAMILIES):
        problem = f"{event} {arguments!r:.300}"
        if event in {"exec", "compile"} and sys._getframe(1).f_code.co_filename.endswith(tuple(_MAY_EVALUATE)):
            return
    elif event == "open" and not isinstance(arguments[0], int):
        # What is opened relative to an open folder is a plain name: ``dir_fd`` itself is not told.
        path = os.fsdecode(arguments[0])
        inside = path.startswith((*(f"{folder}/" for folder in _allowed), *_MAY_READ)) or path in _allowed or "/zoneinfo/" in path
        # Folders above are opened to make the making of one in them durable.
        above = any(folder.startswith(f"{path}/") for folder in _allowed)
        if ".." in path.split("/") or path.startswith("~") or (path.startswith("/") and not inside and not above):
            problem = f"open {path!r}"
    if problem:
        _seen.append(problem)
        raise Forbidden(problem)


_installed = False


@contextmanager
def guarded(*folders: Path) -> Iterator[None]:
    """Fail if anything in the block runs or imports code, starts processes, connects, or opens files outside ``folders``."""
    global _allowed, _installed  # noqa: PLW0603 - a hook cannot be removed, only switched
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _seen.clear()
    _allowed = tuple(map(str, folders))
    try:
        yield
    finally:
        _allowed = None
    assert [] == _seen


@contextmanager
def little_memory(more_bytes: int = 2 * GIB) -> Iterator[None]:
    """Let this process map only so much more memory than it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def everything(folder: Path, copies: Path) -> dict[str, Any]:
    """What each action gives, or the error of ours that it ends in; any other error comes out."""
    found: dict[str, Any] = {}
    for name, action in ACTIONS.items():
        place = copies / name
        try:
            with guarded(folder, copies):
                found[name] = action(Snapshot(folder), place)
        except ExpstateError as error:
            found[name] = error
            assert not place.exists(), "something was left of a copy that failed"
    return found


def refused(forged: Forged, expected: type[ExpstateError], match: str, body: bytes | None = None) -> None:
    """Every action is refused for the same reason, and neither live state nor the snapshot's surroundings change."""
    forged.write(body)
    before = sorted(forged.folder.parent.rglob("*"))
    model = copy.deepcopy(live()["model"].state_dict())
    found = everything(forged.folder, forged.folder.parent / "copies")
    for action, error in found.items():
        assert isinstance(error, expected), f"{action} gave {error!r}"
        assert match in str(error), f"{action} said {error}"
    assert all(torch.equal(wanted, live()["model"].state_dict()[name]) for name, wanted in model.items())
    assert before == sorted(forged.folder.parent.rglob("*"))


def archive(pickled: bytes, **more: bytes) -> bytes:
    """A file as ``torch.save`` writes it around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **more}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def base64_text(data: bytes) -> str:
    """Bytes as the manifest has them."""
    return base64.b64encode(data).decode()


def digest_text(data: bytes) -> str:
    """The digest of a box with these bytes, as the manifest has it."""
    return base64_text(box_digest(block_digests(memoryview(data))))
