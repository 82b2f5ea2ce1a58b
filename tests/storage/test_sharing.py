"""A file is shared between folders of a disk in the best way that the disk has, and never by half."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expstate import settings
from expstate.errors import NoSpaceError, StorageError, StoragePermissionError
from expstate.settings import MIB
from expstate.storage import sharing
from expstate.storage.local import LocalStorage
from expstate.testing import FaultyStorage, NullStorage
from expstate.testing.cases import BASE, DATA, aligned, random_bytes
from tests.engine.processes import unmount

CONTENT = random_bytes(10_000)


@pytest.fixture
def earlier(tmp_path: Path) -> LocalStorage:
    """A folder with a data file."""
    storage = LocalStorage(str(tmp_path / "earlier"))
    storage.prepare()
    writer = storage.create_file(DATA, len(CONTENT))
    writer.write(0, aligned(CONTENT))
    writer.finish()
    return storage


@pytest.fixture
def later(tmp_path: Path) -> LocalStorage:
    """An empty folder."""
    storage = LocalStorage(str(tmp_path / "later"))
    storage.prepare()
    return storage


def left(storage: LocalStorage) -> list[str]:
    return sorted(info.name for info in storage.list())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Disk:
    """What a disk answers to links, and to copies of blocks; it counts the latter, and what is made durable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, link: int, clone: int = 0) -> None:
        self._answer = clone
        self.cloned = 0
        self.flushed: list[int] = []
        self._flush = os.fsync

        monkeypatch.setattr(os, "link", self.refusing(link))
        monkeypatch.setattr(sharing.fcntl, "ioctl", self.clone)
        monkeypatch.setattr(os, "fsync", self.fsync)

    @staticmethod
    def refusing(number: int) -> Callable[..., None]:
        """What fails with this error."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    def clone(self, fd: int, request: int, source: int) -> int:
        assert 0x40049409 == request
        self.cloned += 1
        if self._answer:
            raise OSError(self._answer, os.strerror(self._answer))
        return os.write(fd, os.pread(source, 100_000, 0))

    def fsync(self, fd: int) -> None:
        self.flushed.append(os.fstat(fd).st_size)
        self._flush(fd)


NO_LINKS = [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]
NO_CLONES = [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM]
BROKEN = [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EIO, StorageError)]


@pytest.mark.parametrize("number", NO_LINKS)
def test_where_there_are_no_links_the_blocks_are_shared(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """By a file of its own, as whole, as durable and as safe from accidents as one that was written."""
    disk = Disk(monkeypatch, number)

    assert later.link_file(BASE, earlier, DATA)
    assert [len(CONTENT)] == disk.flushed
    assert CONTENT == later.read(BASE)
    assert 0o100444 == (Path(later.path) / BASE).stat().st_mode
    assert not (Path(later.path) / BASE).samefile(Path(earlier.path) / DATA)
    assert {} == later.links([BASE])
    with pytest.raises(FileExistsError):
        later.link_file(BASE, earlier, DATA)
    assert CONTENT == later.read(BASE)


@pytest.mark.parametrize("link", NO_LINKS)
@pytest.mark.parametrize("clone", NO_CLONES)
def test_where_nothing_can_be_shared_that_is_said_and_nothing_is_left(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch, link: int, clone: int
) -> None:
    disk = Disk(monkeypatch, link, clone)
    before = open_files()

    assert not later.link_file(BASE, earlier, DATA)
    assert 1 == disk.cloned
    assert [] == list(Path(later.path).iterdir())
    assert CONTENT == earlier.read(DATA)
    assert before == open_files()


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A small file system that shares blocks."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("xfsprogs is not installed")
    image, folder = tmp_path / "image", tmp_path / "xfs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    for command in (["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot make one here: {done.stderr.strip()}")
    yield folder
    unmount(folder)


@pytest.mark.root
def test_on_a_disk_that_shares_blocks_a_second_file_takes_no_room(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what becomes of one does not touch the other."""
    old, new = (LocalStorage(str(xfs / name)) for name in ("old", "new"))
    content = random_bytes(20 * MIB + 1)
    for storage in (old, new):
        storage.prepare()
    writer = old.create_file(DATA, len(content))
    writer.write(0, aligned(content))
    writer.finish()
    monkeypatch.setattr(os, "link", Disk.refusing(errno.EMLINK))
    os.sync()
    before = os.statvfs(xfs)
    assert new.link_file(BASE, old, DATA)
    os.sync()
    after = os.statvfs(xfs)

    assert (before.f_bavail - after.f_bavail) * after.f_frsize < MIB
    assert {} == new.links([BASE])
    (xfs / "old" / DATA).chmod(0o644)
    (xfs / "old" / DATA).write_bytes(bytes(len(content)))
    old.delete(DATA)
    assert content == new.read(BASE)
    with settings.override(direct_io=False):
        assert content == LocalStorage(new.path).read(BASE)


def test_nothing_is_shared_between_two_disks(earlier: LocalStorage, tmp_path: Path) -> None:
    """The system says so itself."""
    memory = Path("/dev/shm")  # noqa: S108
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk here")
    elsewhere = LocalStorage(str(memory / f"expstate-{os.getpid()}-{tmp_path.name}"))
    elsewhere.prepare()
    is_shared = elsewhere.link_file(BASE, earlier, DATA)
    found = left(elsewhere)
    elsewhere.remove_folder()

    assert not is_shared
    assert [] == found
    assert not Path(elsewhere.path).exists()


@pytest.mark.parametrize(("number", "expected"), [*BROKEN, (errno.EACCES, StoragePermissionError)])
def test_a_link_that_fails_for_another_reason_is_an_error(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[StorageError]
) -> None:
    disk = Disk(monkeypatch, number)
    before = open_files()
    with pytest.raises(expected, match=DATA) as caught:
        later.link_file(BASE, earlier, DATA)

    assert number == caught.value.errno
    assert 0 == disk.cloned
    assert [] == left(later)
    assert before == open_files()


def test_after_a_link_that_failed_no_folder_is_left(earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the file that was to be is deleted, which the folder was made for."""
    Disk(monkeypatch, errno.EIO)
    with pytest.raises(StorageError):
        later.link_file(BASE, earlier, DATA)
    later.delete(BASE)

    assert [] == os.listdir(later.path)


@pytest.mark.parametrize(("number", "expected"), BROKEN)
@pytest.mark.parametrize("step", ["clone", "fsync"])
def test_blocks_that_cannot_be_shared_for_another_reason_are_an_error(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch, step: str, number: int, expected: type[StorageError]
) -> None:
    """And what there is of the file goes."""
    Disk(monkeypatch, errno.EXDEV, number if step == "clone" else 0)

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    before = open_files()
    with pytest.raises(expected, match=DATA):
        later.link_file(BASE, earlier, DATA)

    assert [] == left(later)
    assert before == open_files()


def test_an_interrupt_between_the_blocks_and_the_disk_leaves_nothing(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, errno.EXDEV)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        later.link_file(BASE, earlier, DATA)

    assert [] == left(later)


@pytest.mark.parametrize("step", ["link", "clone"])
@pytest.mark.parametrize("instead", [None, "/etc/hostname"])
def test_a_source_that_goes_in_the_moment_of_sharing_is_not_shared(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch, step: str, instead: str | None
) -> None:
    """Whether nothing is there then, or a link that leads elsewhere."""
    really_link = os.link
    source = Path(earlier.path) / DATA

    def link(*args: str, **kwargs: int) -> None:
        source.unlink()
        if instead is not None:
            source.symlink_to(instead)
        if step == "clone":
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        really_link(*args, **kwargs)

    monkeypatch.setattr(os, "link", link)

    assert not later.link_file(BASE, earlier, DATA)
    assert [] == list(Path(later.path).iterdir())


def test_a_target_that_goes_in_the_moment_of_sharing_is_not_found(
    earlier: LocalStorage, later: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a data file that is created then: someone has cleaned up."""
    really_link = os.link

    def link(*args: str, **kwargs: int) -> None:
        (Path(later.path) / "base").rmdir()
        really_link(*args, **kwargs)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileNotFoundError):
        later.link_file(BASE, earlier, DATA)
    monkeypatch.undo()
    later.remove_folder()
    with pytest.raises(FileNotFoundError):
        later.link_file(BASE, earlier, DATA)


def test_a_file_that_is_deleted_while_it_is_shared_is_whole_or_not_there(earlier: LocalStorage, later: LocalStorage) -> None:
    """Never empty and never half."""
    for number in range(50):
        name, source = f"base/part-{number:05}-77777777.safetensors", f"part-{number:05}-3f9a2c71.safetensors"
        assert earlier.link_file(source, earlier, DATA)
        deleting = threading.Thread(target=earlier.delete, args=(source,))
        deleting.start()
        is_shared = later.link_file(name, earlier, source)
        deleting.join()

        assert ([name] if is_shared else []) == [found for found in left(later) if found == name]
        assert not is_shared or CONTENT == later.read(name)
    assert CONTENT == earlier.read(DATA)


def test_storages_for_tests_share_files_too(tmp_path: Path) -> None:
    """The null storage what it knows of a file; the faulty one what its own storage shares."""
    null = NullStorage("sharing")
    null.prepare()
    null.create_file(DATA, 5000).finish()
    assert null.link_file(BASE, null, DATA)
    assert 5000 == null.stat(BASE).size
    with pytest.raises(FileExistsError):
        null.link_file(BASE, null, DATA)
    assert not null.link_file("base/x", null, "nothing")
    for name in (DATA, BASE):
        null.delete(name)
    null.remove_folder()

    faulty = FaultyStorage(LocalStorage(str(tmp_path)))
    faulty.create_file(DATA, 0).finish()
    faulty.fail("link_file", 2, error=StorageError("broken", errno.EIO))
    assert faulty.link_file(BASE, faulty, DATA)
    with pytest.raises(StorageError, match="broken"):
        faulty.link_file("base/x", faulty, DATA)
    assert faulty.links([BASE]) == {BASE: faulty.links([DATA])[DATA]}
    assert 2 == faulty.links([BASE])[BASE][1]
