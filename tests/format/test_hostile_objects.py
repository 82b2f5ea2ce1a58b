"""Objects from a stranger: without trust, nothing of a pickle runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from blake3 import blake3

from expstate import Snapshot, StateDict
from expstate.engine.digest import block_digests
from expstate.errors import (
    PickleNotAllowedError,
    SnapshotCorruptError,
)
from expstate.state.objects import safe_mode_holds
from tests.format.forging import (
    Forged,
    archive,
    base64_text,
    digest_text,
    guarded,
    little_memory,
    live,
)

WEIGHT = "model/first.weight"
pytestmark = pytest.mark.usefixtures("imported")


NEEDS_SAFE_MODE = pytest.mark.skipif(not safe_mode_holds(), reason="this torch reads no pickled object without trust")


# H16, H17: objects


class Exploit:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def put_object(forged: Forged, data: bytes) -> None:
    """Make ``data`` the bytes of the object, with every digest and size right."""
    path = forged.file("call/call")
    header = path.read_bytes()[: forged.document["files"][forged.box("call/call")[0]][2]]
    path.unlink()
    path.write_bytes(header + data)
    record = forged.document["files"][forged.box("call/call")[0]]
    record[1] = len(header) + len(data)
    record[3] = base64_text(blake3(header).digest())
    forged.entry("call/call")[3] = len(data)
    blocks = block_digests(memoryview(data))
    box = forged.box("call/call")
    box[2] = digest_text(data)
    box[3] = None if len(blocks) == 32 else base64_text(blocks)
    # The claim of its author that it is harmless.
    forged.entry("call/call")[4] = False
    forged.write()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _with_storage_of(numel: int) -> bytes:
    """A tensor that says that its storage is larger than the record that holds it."""
    buffer = io.BytesIO(_saved(torch.zeros(4, 4)))
    with zipfile.ZipFile(buffer) as file:
        members = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    pickled = members.pop("data.pkl")
    assert 1 <= pickled.count(b"K\x10")
    return archive(pickled.replace(b"K\x10", b"\x8a\x08" + numel.to_bytes(8, "little"), 1), **members)


def _legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _tar(marker: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Exploit(marker))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50_000_000))
    return buffer.getvalue()


# Pickles by hand: what calls os.system, eval and __import__, and what only names torch.load.
_COMMAND = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."
EXPLOITS: dict[str, Callable[[Path], bytes]] = {
    "saved": lambda marker: _saved(Exploit(marker)),
    "in a list": lambda marker: _saved([1, {"a": (Exploit(marker),)}]),
    "pickle": lambda marker: pickle.dumps(Exploit(marker)),
    "legacy": lambda marker: _legacy(Exploit(marker)),
    "legacy and plain": lambda marker: _legacy([1]),
    "tar": _tar,
    "system": lambda marker: archive(_COMMAND),
    "eval": lambda marker: archive(b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x001+10\x85R."),
    "import": lambda marker: archive(b"\x80\x02cthis_module_is_not_there\nx\n."),
    "attribute": lambda marker: archive(b"\x80\x02ctorch\nhub.load\n."),
    "loader": lambda marker: archive(b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R."),
    "items of a tensor": lambda marker: archive(b"\x80\x02ccollections\nOrderedDict\n)RK\x01K\x02s" + b"0" * 100 + b"cposix\nsystem\n."),
    "constant code": lambda marker: archive(_COMMAND, constants=_COMMAND, **{"code/a.py": b"import os"}),
    "storage": lambda marker: _with_storage_of(2**40),
    "storage of a little more": lambda marker: _with_storage_of(64),
    "negative storage": lambda marker: _with_storage_of(2**64 - 1),
    "bomb": lambda marker: _bomb(),
    "nothing": lambda marker: b"\0",
    "zeros": lambda marker: bytes(10_000),
    "noise": lambda marker: random.Random(1).randbytes(5000),
    "no pickle": lambda marker: archive(b""),
    "endless": lambda marker: archive(b"\x80\x02" + b"(" * 10_000),
    "large text": lambda marker: archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
}


@NEEDS_SAFE_MODE
@pytest.mark.parametrize("exploit", EXPLOITS)
def test_an_object_that_would_run_code_is_refused(forged: Forged, tmp_path: Path, exploit: str) -> None:
    """Without ``trust`` nothing of an object runs, whatever its author says of it, and nothing falls back to running it (H16, H17)."""
    marker = tmp_path / "it was run"
    put_object(forged, EXPLOITS[exploit](marker))
    empty = StateDict(call=None)
    with little_memory():
        for read in (
            lambda: Snapshot(forged.folder).read_object("call/call"),
            lambda: Snapshot(forged.folder).get_state_dict_for_key("call"),
            lambda: Snapshot(forged.folder).restore({"call": empty}),
        ):
            with guarded(forged.folder), pytest.raises((PickleNotAllowedError, SnapshotCorruptError)):
                read()

    assert {"call": None} == dict(empty)
    assert not marker.exists()


@NEEDS_SAFE_MODE
def test_an_object_is_listed_and_verified_without_being_read(forged: Forged, tmp_path: Path) -> None:
    """What would run code can be looked at, verified, copied and left out (H16)."""
    marker = tmp_path / "it was run"
    put_object(forged, EXPLOITS["saved"](marker))
    with guarded(forged.folder, tmp_path / "copy"):
        snapshot = Snapshot(forged.folder)
        listed = [entry.path for entry in snapshot.entries("call*")]
        ok = snapshot.verify().ok
        copied = snapshot.copy(tmp_path / "copy").verify().ok
        restored = snapshot.restore(live()).keys

    assert ["call", "call/call"] == listed
    assert ok
    assert copied
    assert ("model", "optimizer", "extra") == restored
    assert not marker.exists()


def test_an_object_that_would_run_code_is_named(forged: Forged, tmp_path: Path) -> None:
    """The error says which entry, what it holds and what would let it through (H16)."""
    put_object(forged, EXPLOITS["saved"](tmp_path / "it was run"))
    with guarded(forged.folder), pytest.raises(PickleNotAllowedError, match=r"'call/call'.*trust=True"):
        Snapshot(forged.folder).read_object("call/call")


def test_a_torch_whose_safe_mode_is_broken_reads_no_object(forged: Forged, tmp_path: Path) -> None:
    """Where ``weights_only`` does not hold, even harmless objects need ``trust`` (H17)."""
    put_object(forged, _saved([1, 2]))
    with (
        patch("expstate.state.objects.safe_mode_holds", return_value=False),
        guarded(forged.folder),
        pytest.raises(PickleNotAllowedError, match=r"needs trust=True.*2\.10 can"),
    ):
        Snapshot(forged.folder).read_object("call/call")
