"""A snapshot from a stranger: reading it runs nothing, leaves its folder alone, and ends in an error that names what is wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from expstate import Snapshot
from expstate.errors import (
    ExpstateError,
    ManifestError,
    ManifestTooLargeError,
    SnapshotCorruptError,
    UnsafeFileError,
    UnsafePathError,
    UnsupportedFormatError,
)
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format import validate as validation
from tests.campaign import Campaign
from tests.format.forging import (
    OUTSIDE,
    Forged,
    body_of,
    everything,
    guarded,
    little_memory,
    live,
    refused,
)

WEIGHT = "model/first.weight"
pytestmark = pytest.mark.usefixtures("imported")


def test_a_genuine_one_is_read_under_the_same_guard(genuine: Path, tmp_path: Path) -> None:
    """The guard forbids nothing that reading needs, so that what it forbids tells something."""
    found = everything(genuine, tmp_path)

    assert [] == [error for error in found.values() if isinstance(error, Exception)]
    assert found["verify"].ok


def test_the_guard_sees_what_it_forbids(tmp_path: Path) -> None:
    """Each kind of thing that reading must not do is noticed, even where the error is swallowed."""
    deeds: list[Callable[[], object]] = [
        lambda: os.system("true"),  # noqa: S605, S607
        lambda: exec("1"),  # noqa: S102
        lambda: __import__("this_module_is_not_there"),
        lambda: pickle.loads(pickle.dumps(print)),  # noqa: S301
        lambda: open("/etc/hostname"),  # noqa: SIM115
        lambda: __import__("socket").socket(),
        lambda: __import__("subprocess").Popen(["true"]),
    ]
    for deed in deeds:
        with pytest.raises(AssertionError), guarded(tmp_path), contextlib.suppress(BaseException):
            deed()


# H1 to H5: where data files are


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_outside_the_folder_is_never_opened(forged: Forged, name: str) -> None:
    """Whatever a manifest calls its files, only plain names of data files in the folder are looked for (H1 to H4, H30)."""
    forged.document["files"][0][0] = name.format(token=forged.token)

    refused(forged, UnsafePathError, "names a file")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_outside_the_folder_is_never_deleted(forged: Forged, name: str) -> None:
    """Deleting a snapshot takes nothing with it that the snapshot only claims to own; it refuses and stays as it is."""
    secret = forged.folder.parent / f"x-00001-{forged.token}.safetensors"
    secret.write_bytes(b"not the snapshot's")
    for kept in ("notes.txt", "sub"):
        (forged.folder / kept).mkdir()
    forged.document["files"][0][0] = name.format(token=forged.token)
    snapshot = forged.write()
    before = sorted(forged.folder.parent.rglob("*"))
    with guarded(forged.folder), pytest.raises(UnsafePathError):
        snapshot.delete()

    assert before == sorted(forged.folder.parent.rglob("*"))


def test_a_url_with_options_cannot_come_from_a_manifest(forged: Forged) -> None:
    """There is no field in which a manifest could choose host, protocol or options: those it adds are ignored (H4)."""
    forged.document["storage_options"] = {"endpoint_url": "http://169.254.169.254"}
    forged.document["base"] = "s3://evil/x"
    forged.document["entries"][1].append("http://169.254.169.254/")
    snapshot = forged.write()
    with guarded(forged.folder):
        assert snapshot.verify().ok


# H6: what is in the folder


def _link(path: Path, outside: Path) -> None:
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def _dangling(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def _pipe(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _zeros(path: Path, outside: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, 0o20644, os.makedev(1, 5))
        path.open("rb").close()
    except PermissionError:
        pytest.skip("this user, or this file system, makes no devices")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("replace", [_link, _dangling, _pipe, _folder, _zeros])
@pytest.mark.parametrize("which", ["data", "manifest"])
def test_what_is_no_regular_file_is_not_read(forged: Forged, tmp_path: Path, which: str, replace: Callable[[Path, Path], None]) -> None:
    """Links, pipes, devices and folders in the place of files are refused without waiting for them (H6)."""
    path = forged.file(WEIGHT) if which == "data" else forged.folder / names.MANIFEST
    replace(path, tmp_path / "outside")
    found = everything(forged.folder, tmp_path / "copies")
    if which == "data":
        assert {path.name} == {damage.file for damage in found.pop("verify").damages}
        for name in ("open", "entries", "metadata", "key"):
            assert not isinstance(found.pop(name), Exception), "these do not need that file"
    for action, error in found.items():
        assert isinstance(error, ExpstateError), f"{action} gave {error!r}"
        assert path.name in str(error)


def test_a_folder_of_shared_files_that_is_a_link_is_not_followed(forged: Forged, tmp_path: Path) -> None:
    """The one folder below a snapshot's may not lead out of it either (H6)."""
    outside = tmp_path / "outside"
    outside.mkdir()
    name = forged.document["files"][0][0]
    shutil.copy(forged.folder / name, outside / name)
    (forged.folder / "base").symlink_to(outside)
    forged.document["files"][0][0] = f"base/{name}"
    snapshot = forged.write()
    with guarded(forged.folder), pytest.raises(UnsafeFileError, match="link"):
        snapshot.read_object(WEIGHT)
    with guarded(forged.folder), pytest.raises(UnsafeFileError, match="link"):
        snapshot.restore(live())


def test_files_that_are_not_of_the_snapshot_are_left_alone(forged: Forged) -> None:
    """Nothing of what else lies in the folder is imported, run or read; ``verify`` names it (H20)."""
    extra = ["evil.py", "json.py", "msgspec.py", "sitecustomize.py", "torch.pth", "x.ipynb"]
    for name in extra:
        (forged.folder / name).write_text("raise SystemExit('run')")
    with guarded(forged.folder):
        report = Snapshot(forged.folder).verify()

    assert report.ok
    assert tuple(extra) == report.unknown_files


# H12, H13: the manifest as a file

GOOD = b'{"format":1,"id":"' + b"0" * 32 + b'","created_at":"","writer":"","requires":[],"world_size":1,"metadata":{},"provenance":{'


def _body(provenance: bytes, entries: bytes = b"") -> bytes:
    return GOOD + provenance + b'},"keys":[],"files":[],"entries":[' + entries + b"]"


@pytest.mark.parametrize(
    "body",
    [
        _body(b'"x":' + b"[" * 100_000 + b"]" * 100_000),
        _body(b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        _body(b"", b"[" * 100_000 + b"]" * 100_000),
        _body(b'"x":NaN'),
        _body(b'"x":Infinity'),
        _body(b'"x":\xff'),
        _body(b'"x":"\xed\xa0\x80"'),
        _body(b'"x":"\n"'),
        _body(b'"x":01'),
        _body(b'"x":1}, "extra'),
        _body(b'"x"'),
        b"\xef\xbb\xbf" + _body(b""),
        _body(b"").decode().encode("utf-16"),
        b" " + _body(b""),
        b"[]",
        b"null",
        b'{"a":1',
        b'{"format":1,"id":"' + b"0" * 32 + b'"',
        b'{"format":-1,"id":"' + b"0" * 32 + b'"',
        b'{"format":1e0,"id":"' + b"0" * 32 + b'"',
        b'{"format":1,"id":"../../../../etc/passwd"',
        b'{"format":1,"id":"' + b"G" * 32 + b'"',
        _body(b"").replace(b'"world_size":1', b'"world_size":0'),
        _body(b"").replace(b'"world_size":1', b'"world_size":"1"'),
        _body(b"").replace(b'"world_size":1', b'"world_size":' + b"9" * 5000),
        _body(b"").replace(b'"keys":[]', b'"keys":[["a","b"]]'),
        _body(b"", b'["value","a",1,null]'),
        _body(b"", b'["unknown","a",1,null]'),
        _body(b"", b'["value"]'),
        _body(b"", b"[]"),
        _body(b"", b"{}"),
        _body(b"", b'"value"'),
    ],
    ids=lambda body: repr(body[-40:])[:48],
)
def test_json_that_no_take_writes_is_refused(forged: Forged, body: bytes) -> None:
    """Nested too deeply, not JSON, of another encoding or form: one kind of error, whatever the parser trips over (H13)."""
    with little_memory():
        refused(forged, ManifestError, "manifest" if b"world_size" not in body else "", body)


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e999999", "1" + "0" * 100_000])
def test_numbers_without_measure_are_refused_or_harmless(forged: Forged, number: str) -> None:
    """Integers of thousands of digits cost no more than their text and raise nothing but our errors (H13)."""
    body = body_of(forged.document).replace(b'["value","extra/epoch",3,', f'["value","extra/epoch",{number},'.encode())
    forged.write(body)
    for error in everything(forged.folder, forged.folder.parent / "copies").values():
        assert not isinstance(error, Exception) or "manifest" in str(error)


def test_a_lone_surrogate_does_not_come_out_of_a_manifest(forged: Forged) -> None:
    """Text that could not be written again is refused, whether it is written as bytes or as an escape (H13)."""
    body = body_of(forged.document)
    assert b'"a/b%"' in body
    for text in (b'"\\ud800"', b'"\xed\xa0\x80"'):
        refused(forged, ManifestError, "manifest", body.replace(b'"a/b%"', text))


def test_of_a_field_that_is_there_twice_the_last_counts_for_everyone(forged: Forged) -> None:
    """Restore, verify and listing cannot be made to see different things (H13)."""
    body = body_of(forged.document)
    body = body.replace(b'"world_size":1', b'"world_size":5,"world_size":1') + b',"files":[]'

    refused(forged, ManifestError, "lies in file number", body)


def test_a_manifest_that_is_too_large_is_not_read(forged: Forged) -> None:
    """A cap of the reader's own, which the file cannot change, bounds what is read (H12)."""
    size = (forged.folder / names.MANIFEST).stat().st_size
    with patch.object(manifests, "MAX_BYTES", size - 1):
        refused(forged, ManifestTooLargeError, names.MANIFEST, body_of(forged.document))


def test_a_sparse_manifest_of_terabytes_is_not_read(forged: Forged) -> None:
    """The size is looked at before a byte is read (H12)."""
    path = forged.folder / names.MANIFEST
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with little_memory():
        for action, error in everything(forged.folder, forged.folder.parent / "copies").items():
            assert isinstance(error, ManifestTooLargeError), f"{action} gave {error!r}"


def test_a_manifest_of_too_many_entries_is_refused(forged: Forged) -> None:
    """The number of entries has a cap of its own (H12)."""
    with patch.object(validation, "MAX_ENTRIES", len(forged.document["entries"]) - 1):
        refused(forged, ManifestTooLargeError, "entries")


def test_a_manifest_that_was_changed_is_damaged(forged: Forged, tmp_path: Path) -> None:
    """One byte that differs, with the old digest, and nothing of the manifest is believed (H14)."""
    path = forged.folder / names.MANIFEST
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data.replace(b'"extra/epoch",3', b'"extra/epoch",4'))
    for action, error in everything(forged.folder, tmp_path / "copies").items():
        assert isinstance(error, SnapshotCorruptError), f"{action} gave {error!r}"
        assert "digest" in str(error)


# H32: other formats

OF_THE_FUTURE = pytest.mark.campaign("Old snapshots are read", "newer formats and unknown features, which are refused as such")


@OF_THE_FUTURE
@pytest.mark.parametrize("number", [2, 3, 999_999_999])
def test_a_newer_format_is_refused(forged: Forged, number: int, campaign: Campaign) -> None:
    """A format that this version does not know is not guessed at, and the message says what to do (H32)."""
    forged.document["format"] = number
    forged.document["entries"] = {"a": "form of the future"}

    refused(forged, UnsupportedFormatError, "upgrade expstate")
    campaign.tried()


@OF_THE_FUTURE
@pytest.mark.parametrize("entries", [None, {"a": "form of the future"}])
def test_a_feature_that_is_not_known_is_refused(forged: Forged, entries: Any, campaign: Campaign) -> None:
    """What a reader must know is named, even if it makes the records unreadable (H32)."""
    forged.document["requires"] = ["zstd", "\x1b[31m" + "x" * 1000]
    forged.document["entries"] = entries or forged.document["entries"]

    refused(forged, UnsupportedFormatError, "'zstd'")
    campaign.tried()


def test_two_threads_are_refused_alike(forged: Forged) -> None:
    """Guards hold wherever the reading is done."""
    forged.document["files"][0][0] = "../../etc/passwd"
    snapshot = forged.write()
    errors = []

    def read() -> None:
        try:
            snapshot.verify()
        except UnsafePathError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    with guarded(forged.folder):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert 2 == len(errors)
