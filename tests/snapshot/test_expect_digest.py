"""``expect_digest`` pins a snapshot: whoever can write its folder cannot have anything else read through it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, cli
from expstate.errors import (
    InvalidArgumentError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotReplacedError,
)
from tests.catalog.forging import forge

READS: dict[str, Callable[[Snapshot, Path], Any]] = {
    "manifest": lambda snapshot, to: snapshot.manifest,
    "id": lambda snapshot, to: snapshot.id,
    "metadata": lambda snapshot, to: snapshot.metadata,
    "keys": lambda snapshot, to: snapshot.keys(),
    "entries": lambda snapshot, to: snapshot.entries(),
    "nbytes": lambda snapshot, to: snapshot.nbytes,
    "nbytes_unique": lambda snapshot, to: snapshot.nbytes_unique,
    "read_object": lambda snapshot, to: snapshot.read_object("model/weight"),
    "key": lambda snapshot, to: snapshot.get_state_dict_for_key("model"),
    "restore": lambda snapshot, to: snapshot.restore({"model": torch.nn.Linear(2, 2)}),
    "dry run": lambda snapshot, to: snapshot.restore({"model": torch.nn.Linear(2, 2)}, dry_run=True),
    "verify": lambda snapshot, to: snapshot.verify(),
    "diff": lambda snapshot, to: snapshot.diff({"model": torch.nn.Linear(2, 2)}),
    "diff with it": lambda snapshot, to: Snapshot.take(to / "other", {"a": StateDict(x=1)}).diff(snapshot),
    "copy": lambda snapshot, to: snapshot.copy(to / "copy"),
    "export": lambda snapshot, to: snapshot.export(to / "export"),
    "base": lambda snapshot, to: Snapshot.take(to / "next", {"model": torch.nn.Linear(2, 2)}, base=snapshot),
    "delete": lambda snapshot, to: snapshot.delete(),
}


def take(folder: Path, **more: Any) -> Snapshot:
    return Snapshot.take(folder, {"model": torch.nn.Linear(2, 2)}, **more)


@pytest.mark.parametrize("read", READS)
def test_what_is_expected_is_read(tmp_path: Path, read: str) -> None:
    digest = take(tmp_path / "one").metadata.digest

    READS[read](Snapshot(tmp_path / "one", expect_digest=digest.upper()), tmp_path)


@pytest.mark.parametrize("read", READS)
def test_another_snapshot_is_not_read(tmp_path: Path, read: str) -> None:
    """One that was taken over it, with everything in order but for its digest; nothing is made of it and nothing is removed."""
    digest = take(tmp_path / "one").metadata.digest
    take(tmp_path / "one", overwrite=True)
    with pytest.raises(SnapshotChangedError, match=f"{tmp_path / 'one'}.*not {digest}"):
        READS[read](Snapshot(tmp_path / "one", expect_digest=digest), tmp_path)

    assert Snapshot(tmp_path / "one").verify().ok
    assert {"one", "other"} >= {path.name for path in tmp_path.iterdir()}


def test_one_with_the_same_id_is_another_if_a_byte_differs(tmp_path: Path) -> None:
    """The id is a name, which anyone can give."""
    snapshot = take(tmp_path / "one", step=1)
    digest = snapshot.metadata.digest
    forge(snapshot, metadata={"step": 2})

    assert (snapshot.id, 2) == (Snapshot(tmp_path / "one").id, Snapshot(tmp_path / "one").metadata.step)
    with pytest.raises(SnapshotChangedError):
        Snapshot(tmp_path / "one", expect_digest=digest).restore({"model": torch.nn.Linear(2, 2)})


def test_of_another_nothing_is_believed(tmp_path: Path) -> None:
    """Not even that a newer version of this library is needed for it."""
    snapshot = take(tmp_path / "one")
    digest = snapshot.metadata.digest
    forge(snapshot, format=7)
    with pytest.raises(SnapshotChangedError):
        Snapshot(tmp_path / "one", expect_digest=digest).verify()


def test_a_damaged_one_is_damaged_and_a_missing_one_missing(tmp_path: Path) -> None:
    """These are told apart from one that was exchanged: its claim to be the expected one, or none, is not believed."""
    digest = take(tmp_path / "one").metadata.digest
    path = tmp_path / "one" / "snapshot.json"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(SnapshotNotFoundError):
        Snapshot(tmp_path / "one", expect_digest=digest).verify()
    path.write_bytes(data.replace(b'"world_size":1', b'"world_size":2'))
    with pytest.raises(SnapshotCorruptError):
        Snapshot(tmp_path / "one", expect_digest=digest).verify()


def test_files_are_those_of_the_expected_manifest(tmp_path: Path) -> None:
    """So weights cannot be exchanged below it."""
    snapshot = take(tmp_path / "one")
    file = tmp_path / "one" / snapshot.manifest.files[0].name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(SnapshotCorruptError):
        Snapshot(tmp_path / "one", expect_digest=snapshot.metadata.digest).get_state_dict_for_key("model")


def test_one_that_is_exchanged_later_is_noticed(tmp_path: Path) -> None:
    """What was read of it stays true; what is read anew is looked at again."""
    pinned = Snapshot(tmp_path / "one", expect_digest=take(tmp_path / "one").metadata.digest)
    pinned.restore({"model": torch.nn.Linear(2, 2)})
    take(tmp_path / "one", overwrite=True)
    with pytest.raises(SnapshotChangedError):
        pinned.verify()
    with pytest.raises(SnapshotReplacedError):
        pinned.restore({"model": torch.nn.Linear(2, 2)})
    with pytest.raises(SnapshotReplacedError):
        pinned.delete()

    assert Snapshot(tmp_path / "one").verify().ok


@pytest.mark.parametrize("wrong", ["", "x", "0" * 63, "0" * 65, "g" * 64, " " + "0" * 63, "٣" * 64, b"0" * 64, 0, ["0" * 64]])
def test_what_is_no_digest_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    """An empty one, of a variable that was not set, is no leave to read anything."""
    take(tmp_path / "one")
    with pytest.raises(InvalidArgumentError, match="expect_digest"):
        Snapshot(tmp_path / "one", expect_digest=wrong)
    with pytest.raises(InvalidArgumentError, match="expect_digest"):
        Snapshot.find(tmp_path / "one", catalog=False, expect_digest=wrong)


@pytest.mark.parametrize("in_catalog", [True, False])
def test_a_ref_leads_to_no_other(tmp_path: Path, in_catalog: bool) -> None:
    """What a catalog says of it does not matter: it may be of the same hands."""
    catalog = Catalog(tmp_path / "catalog.db")
    one = take(tmp_path / "one", name="best", catalog=catalog)
    other = take(tmp_path / "two", name="best", catalog=catalog)
    option: Any = catalog if in_catalog else False
    ref = "best" if in_catalog else other.path
    found = Snapshot.find(ref, catalog=option, expect_digest=other.metadata.digest)

    assert other.id == found.id
    with pytest.raises(SnapshotChangedError, match=one.metadata.digest):
        Snapshot.find(ref, catalog=option, expect_digest=one.metadata.digest)
    # What was found stays pinned.
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(SnapshotChangedError):
        found.verify()
    catalog.close()


def test_a_take_that_goes_on_is_waited_for_and_compared(tmp_path: Path) -> None:
    """Its digest is not known before."""
    catalog = Catalog(tmp_path / "catalog.db")
    pending = Snapshot.async_take(tmp_path / "one", {"a": StateDict(x=1)}, name="going", catalog=catalog)
    with pytest.raises(SnapshotChangedError):
        Snapshot.find("going", catalog=catalog, expect_digest="0" * 64)

    assert pending.wait().id == Snapshot.find("going", catalog=catalog, expect_digest=pending.wait().metadata.digest).id
    assert pending.wait().verify().ok
    catalog.close()


def test_verbs_that_read_one_snapshot_can_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = take(tmp_path / "one")
    commands = [
        ["read", one.path, "model/bias"],
        ["copy", one.path, str(tmp_path / "copy")],
        ["export", one.path, str(tmp_path / "export")],
    ]
    for command in commands:
        assert 1 == cli.main([*command, "--expect-digest", "0" * 64])
        assert one.metadata.digest in capsys.readouterr().err
        assert 1 == cli.main([*command, "--expect-digest", "0"])
        assert "--expect-digest must be" in capsys.readouterr().err
        assert 0 == cli.main([*command, "--expect-digest", one.metadata.digest])

    assert one.id == Snapshot(tmp_path / "copy").id
