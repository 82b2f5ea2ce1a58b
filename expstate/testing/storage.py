"""The tests that every storage must pass: subclass ``StorageTests``, say how a storage is opened, and let pytest collect the class.

``FolderStorageTests`` adds what must hold where the files lie in a folder of this machine, so that links and pipes can be put there.
"""
# ruff: noqa: SIM300 - the expected value stands first

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from expstate.errors import ExpstateError, UnsafeFileError
from expstate.settings import MIB
from expstate.testing.cases import BASE, DATA, SMALL, TOKEN, random_bytes
from expstate.testing.data_files import DataFileTests
from expstate.testing.shared_files import SharedFileTests
from expstate.testing.small_files import SmallFileTests

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from expstate.storage.base import Storage

UNSAFE = ["", ".", "..", "/", "/etc/hostname", "../x", "a/../../x", "a/./x", "a//x", "a/", "nul\0x"]


class StorageTests(DataFileTests, SmallFileTests, SharedFileTests):
    """What the engine relies on in any storage.

    Examples
    --------
    A storage is tested by a class of this form, in a file that pytest collects::

        class TestMyStorage(StorageTests):
            def open(self, place):
                return MyStorage(f"my://{place}")
    """

    def test_the_list_shows_what_was_just_written(self, storage: Storage, place: Path) -> None:
        """To every storage object of the folder, with sizes and times."""
        self.put(storage, DATA, random_bytes(5000))
        storage.create(SMALL, b"12345", token=TOKEN)
        other = self.open(place)
        infos = {info.name: info for info in other.list()}

        assert {DATA: 5000, SMALL: 5} == {name: info.size for name, info in infos.items()}
        assert infos[DATA] == other.stat(DATA)
        storage.delete(DATA)
        assert [SMALL] == self.names(other)

    def test_times_are_those_of_the_storages_clock(self, storage: Storage) -> None:
        """So that ages can be told without the clock of this machine."""
        before = storage.clock()
        storage.create(SMALL, b"12345", token=TOKEN)
        first = storage.stat(SMALL).modified_at
        time.sleep(0.05)
        storage.replace(SMALL, b"54321", token=TOKEN)
        after = storage.clock()

        # Stamps are as coarse as the tick of a clock.
        assert before - 2 <= first <= storage.stat(SMALL).modified_at <= after + 2

    def test_what_is_deleted_is_gone(self, storage: Storage) -> None:
        """At once, and what was not there is no error."""
        self.put(storage, DATA, random_bytes(100))
        storage.delete(DATA)
        storage.delete(DATA)
        storage.flush()

        assert [] == self.names(storage)
        with pytest.raises(FileNotFoundError):
            storage.stat(DATA)

    def test_a_file_is_deleted_only_if_it_is_what_was_expected(self, storage: Storage) -> None:
        """So that a file that someone else has put there meanwhile stays."""
        with pytest.raises(FileExistsError):
            storage.delete(SMALL, expected=b"old")
        storage.create(SMALL, b"new", token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.delete(SMALL, expected=b"old")

        assert b"new" == storage.read(SMALL)
        storage.delete(SMALL, expected=b"new")
        assert [] == self.names(storage)

    @pytest.mark.parametrize("name", UNSAFE)
    def test_names_that_lead_elsewhere_are_refused(self, storage: Storage, name: str) -> None:
        """By every operation, before anything is touched."""
        operations: list[Callable[[], object]] = [
            lambda: storage.create_file(name, 1),
            lambda: storage.create(name, b"x", token=TOKEN),
            lambda: storage.replace(name, b"x", token=TOKEN),
            lambda: storage.open_file(name),
            lambda: storage.read(name),
            lambda: storage.stat(name),
            lambda: storage.delete(name),
        ]
        for operation in operations:
            with pytest.raises(ExpstateError):
                operation()
        assert [] == self.names(storage)

    def test_a_folder_with_files_is_not_removed(self, storage: Storage) -> None:
        """However often it is asked for."""
        storage.create(SMALL, b"12345", token=TOKEN)
        storage.remove_folder()

        assert b"12345" == storage.read(SMALL)

    def test_a_storage_says_what_the_engine_needs_to_know(self, storage: Storage) -> None:
        """Its URL, how writes are aligned, and how large a data file should be."""
        assert storage.url
        assert storage.alignment >= 1
        assert storage.alignment & (storage.alignment - 1) == 0
        assert storage.data_file_bytes >= MIB


class FolderStorageTests(StorageTests):
    """What must hold besides where the files of a storage are files of this machine."""

    def folder(self, place: Path) -> Path:
        """The folder that the files are in."""
        return place

    def test_the_folder_is_made_and_removed(self, place: Path) -> None:
        """With those above it; only the first to make it is told so."""
        inner = place / "a" / "b"
        assert self.open(inner).prepare()
        assert not self.open(inner).prepare()
        self.open(inner).remove_folder()

        assert not self.folder(inner).exists()

    def test_listing_a_folder_that_is_not_there(self, place: Path) -> None:
        """It is not found, rather than empty."""
        with pytest.raises(FileNotFoundError):
            list(self.open(place / "nowhere").list())

    def test_other_folders_links_and_pipes_are_not_listed(self, storage: Storage, place: Path) -> None:
        """Snapshots may nest, and people keep other things there."""
        folder = self.folder(place)
        storage.create(SMALL, b"12345", token=TOKEN)
        (folder / "nested").mkdir()
        (folder / "nested" / SMALL).write_bytes(b"another snapshot")
        (folder / "link").symlink_to("/etc/hostname")
        os.mkfifo(folder / "pipe")
        names = self.names(storage)
        for name in ("link", "pipe"):
            (folder / name).unlink()

        assert [SMALL] == names

    @pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder"])
    def test_what_is_no_regular_file_is_refused(self, storage: Storage, place: Path, kind: str) -> None:
        """At once: a pipe that nobody writes to would wait for ever."""
        path = self.folder(place) / DATA
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"link": "/etc/hostname", "dangling link": "/nowhere/at/all", "device": "/dev/zero"}[kind])
        for look in (storage.open_file, storage.read, storage.stat):
            with pytest.raises(UnsafeFileError):
                look(DATA)
        for create in (lambda: storage.create_file(DATA, 1), lambda: storage.create(DATA, b"x", token=TOKEN)):
            with pytest.raises(FileExistsError):
                create()
        if kind != "folder":
            storage.delete(DATA)
            assert not path.is_symlink()
            assert not path.exists()

    def test_links_to_folders_are_not_followed(self, storage: Storage, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A ``base`` that leads elsewhere is neither read nor written through nor listed."""
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        name = BASE.removeprefix("base/")
        (elsewhere / name).write_bytes(b"theirs")
        (self.folder(place) / "base").symlink_to(elsewhere)
        for operation in (storage.open_file, storage.read, storage.stat, lambda name: storage.create_file(f"{name}.new", 1)):
            with pytest.raises(UnsafeFileError):
                operation(BASE)
        names = self.names(storage)
        with pytest.raises(UnsafeFileError):
            storage.delete(BASE)
        (self.folder(place) / "base").unlink()

        assert [] == names
        assert [name] == sorted(item.name for item in elsewhere.iterdir())
        assert b"theirs" == (elsewhere / name).read_bytes()

    def test_a_shared_file_is_one_file_with_two_names(self, storage: Storage, place: Path) -> None:
        """That neither folder can write by accident."""
        earlier = self.open(place / "earlier")
        earlier.prepare()
        self.put(earlier, DATA, random_bytes(10_000))
        there, here = self.folder(place / "earlier") / DATA, self.folder(place) / BASE

        assert storage.link_file(BASE, earlier, DATA)
        assert here.samefile(there)
        assert {0o100444} == {path.stat().st_mode for path in (here, there)}

    def test_the_folder_of_shared_files_goes_with_the_last_of_them(self, storage: Storage, place: Path) -> None:
        """And not before, nor as long as anything else is in it."""
        base = self.folder(place) / "base"
        names = [f"base/model-{number:05}-77777777.safetensors" for number in range(2)]
        for name in names:
            self.put(storage, name, b"12345")
        storage.delete(names[0])
        assert [base / names[1].removeprefix("base/")] == list(base.iterdir())
        (base / "notes.txt").write_bytes(b"theirs")
        storage.delete(names[1])
        assert [base / "notes.txt"] == list(base.iterdir())
        (base / "notes.txt").unlink()
        self.put(storage, names[0], b"12345")
        storage.delete(names[0])

        assert not base.exists()

    def test_a_shared_file_does_not_take_a_name_that_is_taken(self, storage: Storage, place: Path) -> None:
        """What has it stays."""
        earlier = self.open(place / "earlier")
        earlier.prepare()
        for opened, data in ((earlier, b"theirs"), (storage, b"mine")):
            self.put(opened, BASE, data)
        with pytest.raises(FileExistsError):
            storage.link_file(BASE, earlier, BASE)

        assert b"mine" == storage.read(BASE)
        assert {} == storage.links([BASE]) == earlier.links([BASE])

    @pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "in a linked folder"])
    def test_what_is_no_regular_file_is_not_shared(self, storage: Storage, place: Path, kind: str) -> None:
        """Nothing is left of the try, and nothing is read through a link."""
        earlier = self.open(place / "earlier")
        earlier.prepare()
        self.put(earlier, DATA, random_bytes(10_000))
        path = self.folder(place / "earlier") / BASE
        if kind == "in a linked folder":
            (self.folder(place / "elsewhere")).mkdir()
            self.put(self.open(place / "elsewhere"), BASE.removeprefix("base/"), b"theirs")
            path.parent.symlink_to("../elsewhere")
        else:
            path.parent.mkdir()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to({"link": f"../{DATA}", "dangling link": "nowhere"}[kind])

        assert not storage.link_file(BASE, earlier, BASE)
        assert not (self.folder(place) / "base").exists()
        assert {} == earlier.links([BASE])
