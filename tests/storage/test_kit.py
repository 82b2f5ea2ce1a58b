"""The shipped tests notice a storage that does not keep its promises."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expstate.storage.base import FileInfo, FileWriter, Storage
from expstate.storage.local import LocalStorage
from expstate.testing.cases import DATA, random_bytes
from expstate.testing.faulty import FaultyStorage
from expstate.testing.storage import FolderStorageTests


class Racy(LocalStorage):
    """Looks whether a name is free, and then takes it."""

    def create(self, name: str, data: bytes, *, token: str) -> None:
        if (Path(self.path) / name).exists():
            raise FileExistsError(name)
        time.sleep(0.01)
        self.replace(name, data, token=token)


class Forgetful(LocalStorage):
    """Exchanges and deletes whatever is there."""

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        super().replace(name, data, token=token)

    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        super().delete(name)


class Torn(LocalStorage):
    """Writes over the file that others read."""

    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        path = Path(self.path) / name
        path.chmod(0o644)
        with path.open("wb") as file:
            for start in range(0, len(data), 20_000):
                file.write(data[start : start + 20_000])
                file.flush()
                time.sleep(0.001)


class Stale(LocalStorage):
    """Lists what it saw the first time."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._seen: list[FileInfo] | None = None

    def list(self) -> Iterator[FileInfo]:
        if self._seen is None:
            self._seen = list(super().list())
        yield from self._seen


class Trusting(LocalStorage):
    """Joins names to its path."""

    def stat(self, name: str) -> FileInfo:
        found = (Path(self.path) / name).stat()
        return FileInfo(name, found.st_size, found.st_mtime)


class Overwriting(LocalStorage):
    """Takes a name that is taken."""

    def create_file(self, name: str, size: int) -> FileWriter:
        self.delete(name)
        return super().create_file(name, size)


class Moving(LocalStorage):
    """Takes a file away from where it was."""

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        done = super().link_file(name, source, source_name)
        source.delete(source_name)
        return done


class Pointing(LocalStorage):
    """Has a link that leads to the other file."""

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        path = Path(self.path) / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(Path(source.url) / source_name)
        return True


class Cases(FolderStorageTests):
    """The tests, to be called one by one."""

    def open(self, place: Path) -> Storage:
        return LocalStorage(str(place))


def lossy(path: str) -> Storage:
    storage = FaultyStorage(LocalStorage(path))
    storage.lose("write", 3, keep=4096)
    return storage


def flipping(path: str) -> Storage:
    storage = FaultyStorage(LocalStorage(path))
    storage.flip("read_into", 7, byte=5)
    return storage


BROKEN = [
    (Racy, "test_of_several_threads_that_create_a_file_one_wins", ()),
    (Forgetful, "test_a_file_is_replaced_only_if_it_is_what_was_expected", (b"other",)),
    (Forgetful, "test_a_file_is_deleted_only_if_it_is_what_was_expected", ()),
    (Torn, "test_an_open_file_stays_what_it_was", ("replace",)),
    (Stale, "test_a_data_file_of_the_base_folder_is_a_file_like_others", ()),
    (Trusting, "test_names_that_lead_elsewhere_are_refused", ("/etc/hostname",)),
    (Overwriting, "test_a_data_file_is_created_once", ()),
    (lossy, "test_a_data_file_is_written_by_several_threads_in_any_order", ()),
    (flipping, "test_any_range_of_a_file_is_read", ()),
]


@pytest.mark.parametrize(("broken", "test", "arguments"), BROKEN, ids=[f"{broken.__name__}-{test}" for broken, test, _ in BROKEN])
def test_a_broken_storage_fails_where_a_good_one_passes(tmp_path: Path, broken, test: str, arguments: tuple[object, ...]) -> None:
    for name, make in (("good", LocalStorage), ("broken", broken)):
        (tmp_path / name).mkdir()
        storage = make(str(tmp_path / name))
        list(storage.list())
        if name == "good":
            getattr(Cases(), test)(storage, *arguments)
        else:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                getattr(Cases(), test)(storage, *arguments)


@pytest.mark.parametrize("broken", [Moving, Pointing])
def test_a_storage_that_does_not_really_share_files_fails(tmp_path: Path, broken: type[LocalStorage]) -> None:
    for make in (LocalStorage, broken):
        place = tmp_path / make.__name__
        storage, earlier = make(str(place)), LocalStorage(str(place / "earlier"))
        earlier.prepare()
        Cases.put(earlier, DATA, random_bytes(10_000))
        if make is LocalStorage:
            Cases().test_a_file_of_another_folder_is_here_too(storage, earlier, place, "neither")
        else:
            with pytest.raises(AssertionError):
                Cases().test_a_file_of_another_folder_is_here_too(storage, earlier, place, "neither")


def test_the_storages_for_tests_do_not_need_pytest() -> None:
    """Only the tests themselves do."""
    lines = [
        "import sys, expstate.testing",
        "assert 'pytest' not in sys.modules",
        "import expstate.testing.storage",
        "assert 'pytest' in sys.modules",
    ]

    assert 0 == subprocess.run([sys.executable, "-c", "; ".join(lines)], check=False).returncode
