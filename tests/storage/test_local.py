"""The local disk keeps every promise of a storage: past the page cache and through it, with every way of making files exclusively."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expstate import settings
from expstate.errors import NoSpaceError, SnapshotCorruptError, SnapshotWriteError, StorageError, StoragePermissionError, UnsafeFileError
from expstate.settings import MIB
from expstate.storage import files, local
from expstate.storage.base import Storage
from expstate.storage.local import LocalStorage
from expstate.testing.cases import DATA, SMALL, TOKEN, aligned, random_bytes
from expstate.testing.small_files import SmallFileTests
from expstate.testing.storage import FolderStorageTests

TEMPORARY = f".{SMALL}.{TOKEN}"


class TestLocalStorage(FolderStorageTests):
    """Direct I/O, and files without a name that are linked."""

    def open(self, place: Path) -> Storage:
        return LocalStorage(str(place))


class TestLocalStorageThroughThePageCache(FolderStorageTests):
    """As the user may ask for."""

    def open(self, place: Path) -> Storage:
        with settings.override(direct_io=False):
            return LocalStorage(str(place))

    # It takes seconds, and small files do not go past the page cache anyway.
    test_of_several_processes_that_create_a_file_one_wins = None

    def test_parts_need_not_be_aligned(self, storage: Storage) -> None:
        data = random_bytes(10_000)
        writer = storage.create_file(DATA, len(data))
        self.fill(writer, data, 777)
        writer.finish()

        assert 1 == storage.alignment
        assert data == storage.read(DATA)


class TestLocalStorageInMemory(FolderStorageTests):
    """A file system that lives in memory does some of this differently."""

    # It takes seconds.
    test_of_several_processes_that_create_a_file_one_wins = None

    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Path]:
        memory = Path("/dev/shm")  # noqa: S108
        if not memory.is_dir():
            pytest.skip("there is no file system in memory here")
        place = memory / f"expstate-{os.getpid()}-{tmp_path.name}"
        place.mkdir()
        yield place
        shutil.rmtree(place, ignore_errors=True)

    def open(self, place: Path) -> Storage:
        return LocalStorage(str(place))


@pytest.fixture
def without_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_O_TMPFILE", 0)


def _refused(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refused)


class _LibraryWithoutRename:
    """A C library from before exclusive renames."""


@pytest.fixture
def without_exclusive_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_libc", _LibraryWithoutRename())


@pytest.mark.usefixtures("without_unnamed_files")
class TestLocalStorageByLinks(SmallFileTests):
    """File systems without O_TMPFILE (older network disks)."""

    open = TestLocalStorage.open

    def test_of_several_processes_that_create_a_file_one_wins(self, storage: Storage, place: Path) -> None:
        """Forked ones, since another interpreter would know nothing of what is missing here."""
        results = [Path(f"{place}-{number}") for number in range(4)]
        start, go = os.pipe()
        children = []
        for number, result in enumerate(results):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(start, 1)  # until the parent lets go
                won = [name for name in RACES if _creates(storage, name, number)]
                result.write_text(" ".join(won))
                os._exit(0)
            children.append(child)
        os.close(go)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        os.close(start)
        won = [result.read_text().split() for result in results]

        assert [0] * 4 == statuses
        assert sorted(RACES) == sorted(name for names in won for name in names)
        assert sorted(RACES) == self.names(storage)
        assert all(f"{number} {name}".encode() == storage.read(name) for number, names in enumerate(won) for name in names)


RACES = [f"race-{number}.json" for number in range(25)]


def _creates(storage: Storage, name: str, number: int) -> bool:
    try:
        storage.create(name, f"{number} {name}".encode(), token=f"{number:08x}")
    except FileExistsError:
        return False
    return True


@pytest.mark.usefixtures("without_links")
class TestLocalStorageByRenames(TestLocalStorageByLinks):
    """File systems without hard links (FAT, some FUSE)."""


@pytest.mark.usefixtures("without_links", "without_exclusive_renames")
class TestLocalStorageByExclusiveOpen(TestLocalStorageByLinks):
    """File systems with neither."""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT])
def test_a_link_that_is_refused_is_gone_around(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    storage.create(SMALL, b"first", token=TOKEN)
    with pytest.raises(FileExistsError):
        storage.create(SMALL, b"second", token=TOKEN)

    assert b"first" == (tmp_path / SMALL).read_bytes()
    assert [SMALL] == names(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_link_that_fails_leaves_nothing(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    for unnamed in (True, False):
        if not unnamed:
            monkeypatch.setattr(local, "_O_TMPFILE", 0)
        with pytest.raises(StorageError) as caught:
            storage.create(SMALL, b"first", token=TOKEN)
        assert number == caught.value.errno

    assert [] == names(tmp_path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_a_file_system_without_unnamed_files(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    really_open = os.open

    def open_named(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_named)
    storage.create(SMALL, b"first", token=TOKEN)

    assert b"first" == storage.read(SMALL)
    assert [SMALL] == names(tmp_path)


def test_a_direct_write_that_is_refused_goes_through_the_page_cache(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_write = os.pwrite
    refused = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if os.get_blocking(fd) and files.fcntl.fcntl(fd, files.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = random_bytes(10_000)
    writer = storage.create_file(DATA, len(data))
    writer.write(0, aligned(data[:8192]))
    writer.write(8192, aligned(data[8192:]))
    writer.finish()

    assert [0] == refused
    assert data == (tmp_path / DATA).read_bytes()


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EIO, StorageError)])
def test_errors_of_the_system_become_ours(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, expected: type[StorageError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected, match=DATA) as caught:
        storage.create_file(DATA, 4096).write(0, aligned(bytes(4096)))

    assert number == caught.value.errno


def test_a_file_that_could_not_be_allocated_is_not_left(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(NoSpaceError, match="bytes free"):
        storage.create_file(DATA, 4096)

    assert [] == names(tmp_path)


@pytest.mark.parametrize("direct", [True, False])
def test_a_write_that_did_not_happen_leaves_a_doubtful_range(tmp_path: Path, direct: bool) -> None:
    with settings.override(direct_io=direct):
        storage = LocalStorage(str(tmp_path))
    data = random_bytes(4 * MIB)
    writer = storage.create_file(DATA, len(data))
    for start in (0, MIB, 3 * MIB):  # not the third
        writer.write(start, aligned(data[start : start + MIB]))

    assert [(2 * MIB, 3 * MIB)] == list(writer.finish())


def test_a_file_that_was_not_written_to_its_end_is_refused(tmp_path: Path) -> None:
    with settings.override(direct_io=False):
        storage = LocalStorage(str(tmp_path))
    writer = storage.create_file(DATA, 2 * MIB)
    writer.write(0, aligned(bytes(MIB)))
    with pytest.raises(SnapshotWriteError, match="2,097,152"):
        writer.finish()


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_small_file_whose_write_was_lost_is_not_created(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(local, "_O_TMPFILE", 0)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: len(data))
    with pytest.raises(SnapshotWriteError, match="lost a write"):
        storage.create(SMALL, b"manifest", token=TOKEN)
    with pytest.raises(SnapshotWriteError, match="lost a write"):
        storage.replace(SMALL, b"manifest", token=TOKEN)

    assert [] == names(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / DATA).write_bytes(random_bytes(2 * MIB))
    with storage.open_file(DATA) as reader:
        os.truncate(tmp_path / DATA, MIB + 100)
        with pytest.raises(SnapshotCorruptError, match="ends after"):
            reader.read_into(0, aligned(bytes(2 * MIB)))
        with pytest.raises(SnapshotCorruptError, match="ends after"):
            reader.read_into(MIB, aligned(bytes(8192)))


def test_a_data_file_cannot_be_written_by_accident(storage: LocalStorage, tmp_path: Path) -> None:
    storage.create_file(DATA, 0).finish()
    storage.create(SMALL, b"manifest", token=TOKEN)
    storage.replace(SMALL, b"manifest 2", token=TOKEN)

    assert {0o100444} == {path.stat().st_mode for path in tmp_path.iterdir()}


def test_a_leftover_temporary_file_does_not_stand_in_the_way(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / TEMPORARY).symlink_to("/etc/hostname")
    storage.replace(SMALL, b"new", token=TOKEN)

    assert [SMALL] == names(tmp_path)
    assert b"new" == (tmp_path / SMALL).read_bytes()


def test_a_path_stays_where_it_was_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("run")
    storage.prepare()
    monkeypatch.chdir("/")
    storage.create(SMALL, b"manifest", token=TOKEN)

    assert [SMALL] == names(tmp_path / "run")
    assert str(tmp_path / "run") == storage.url


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        LocalStorage(str(tmp_path / "file")).prepare()
    with pytest.raises(StorageError, match="file"):
        LocalStorage(str(tmp_path / "file" / "run")).prepare()
    with pytest.raises(StorageError):
        LocalStorage(str(tmp_path / ("x" * 300))).prepare()


def test_a_socket_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / DATA))
        for look in (storage.open_file, storage.read, storage.stat):
            with pytest.raises(UnsafeFileError):
                look(DATA)


def test_nothing_stays_open(storage: LocalStorage, tmp_path: Path) -> None:
    """Neither of what succeeds nor of what fails."""
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "pipe")
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            storage.create(SMALL, b"manifest", token=TOKEN)
        storage.replace(SMALL, b"manifest", token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.replace(SMALL, b"manifest", token=TOKEN, expected=b"other")
        with pytest.raises(UnsafeFileError):
            storage.open_file("pipe")
        with contextlib.suppress(FileExistsError):
            storage.create_file(DATA, 4096).abort()
        storage.read(SMALL)
        list(storage.list())
        storage.flush()
        storage.clock()

    assert before == len(os.listdir("/proc/self/fd"))


def test_the_lock_of_an_exchange_is_let_go(storage: LocalStorage) -> None:
    """Whether it succeeds or fails, the next one does not wait."""
    storage.create(SMALL, b"old", token=TOKEN)
    with pytest.raises(FileExistsError):
        storage.replace(SMALL, b"new", token=TOKEN, expected=b"other")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(storage.replace(SMALL, b"new", token="77777777", expected=b"old")),  # noqa: S106
        daemon=True,
    )
    thread.start()
    thread.join(20)

    assert [None] == done
    assert b"new" == storage.read(SMALL)


@pytest.mark.root
def test_a_folder_of_someone_else(tmp_path: Path) -> None:
    """A user who may not write there gets an error that says so."""
    (tmp_path / "theirs").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    caught = []

    def refused(action: Callable[[], object]) -> None:
        with pytest.raises(StoragePermissionError) as error:
            action()
        caught.append(error.value.errno)

    def try_as_nobody() -> None:
        # This thread alone becomes someone else.
        setresuid = 117
        assert 0 == ctypes.CDLL(None, use_errno=True).syscall(setresuid, 65534, 65534, 65534)
        storage = LocalStorage(str(tmp_path / "theirs"))
        refused(lambda: storage.create(SMALL, b"x", token=TOKEN))
        refused(lambda: storage.create_file(DATA, 1))
        refused(LocalStorage(f"{storage.path}/inner").prepare)

    thread = threading.Thread(target=try_as_nobody)
    thread.start()
    thread.join()

    assert [errno.EACCES] * 3 == caught
    assert [] == names(tmp_path / "theirs")
