"""Tests of small files: created by one of many, replaced in one step, never seen in part."""
# ruff: noqa: SIM300 - the expected value stands first

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from expstate.errors import ManifestTooLargeError
from expstate.testing.cases import SMALL, TOKEN, StorageCase, random_bytes, same_bytes, together

if TYPE_CHECKING:
    from pathlib import Path

    from expstate.storage.base import Storage

_PROCESSES = 4
# Each process creates file after file as soon as the parent says so, and prints those that it was the one to create.
_RACER = """
import sys
from expstate.storage.registry import open_storage
storage = open_storage(sys.argv[1])
for line in sys.stdin:
    name = line.strip()
    try:
        storage.create(name, f"{sys.argv[2]} {name}".encode(), token=f"{int(sys.argv[2]):08x}")
        print("won", flush=True)
    except FileExistsError:
        print("lost", flush=True)
"""


class SmallFileTests(StorageCase):
    """What the engine relies on in leases and manifests.

    Attributes
    ----------
    rounds : int
        How often a race is run; a subclass may lower it where each takes long.
    """

    rounds = 25

    def test_a_small_file_is_created_once(self, storage: Storage) -> None:
        """Whole; a second one is refused and leaves nothing."""
        data = random_bytes(300_000)
        storage.create(SMALL, data, token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.create(SMALL, b"second", token="77777777")  # noqa: S106 - no secret

        assert same_bytes(data, storage.read(SMALL))
        assert [SMALL] == self.names(storage)

    def test_of_several_threads_that_create_a_file_one_wins(self, storage: Storage) -> None:
        """And the file is the winner's."""
        for number in range(self.rounds):
            name = f"race-{number}.json"

            def create(thread: int, name: str = name) -> bool:
                try:
                    storage.create(name, b"%d" % thread * 5000, token=f"{thread:08x}")
                except FileExistsError:
                    return False
                return True

            won = together(6, create)
            assert 1 == sum(won)
            assert same_bytes(b"%d" % won.index(True) * 5000, storage.read(name))

    def test_of_several_processes_that_create_a_file_one_wins(self, storage: Storage, place: Path) -> None:
        """And nothing of the others remains."""
        commands = [[sys.executable, "-c", _RACER, self.url(place), str(number)] for number in range(_PROCESSES)]
        racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands]  # noqa: S603
        names = [f"race-{number}.json" for number in range(self.rounds)]
        winners = {}
        for name in names:
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{name}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert ["lost"] * (_PROCESSES - 1) + ["won"] == sorted(answers)
            winners[name] = answers.index("won")
        for racer in racers:
            racer.communicate()
            assert 0 == racer.returncode

        assert sorted(names) == self.names(storage)
        assert {name: f"{winner} {name}".encode() for name, winner in winners.items()} == {name: storage.read(name) for name in names}

    def test_a_small_file_is_replaced(self, storage: Storage) -> None:
        """Whole, whether it is there or not, and longer or shorter than before."""
        for data in (b"first", random_bytes(100_000), b"third"):
            storage.replace(SMALL, data, token=TOKEN)
            assert same_bytes(data, storage.read(SMALL))
        assert [SMALL] == self.names(storage)

    @pytest.mark.parametrize("found", [None, b"other", b"expected and more", b""])
    def test_a_file_is_replaced_only_if_it_is_what_was_expected(self, storage: Storage, found: bytes | None) -> None:
        """Else it stays as it is."""
        if found is not None:
            storage.create(SMALL, found, token=TOKEN)
        with pytest.raises(FileExistsError):
            storage.replace(SMALL, b"new", token=TOKEN, expected=b"expected")

        assert ([] if found is None else [SMALL]) == self.names(storage)
        assert found is None or same_bytes(found, storage.read(SMALL))
        storage.replace(SMALL, b"expected", token=TOKEN)
        storage.replace(SMALL, b"new", token=TOKEN, expected=b"expected")
        assert b"new" == storage.read(SMALL)

    def test_of_several_that_replace_what_they_expect_one_wins(self, storage: Storage, place: Path) -> None:
        """So that no committed file is replaced unseen."""
        storage.create(SMALL, b"old", token=TOKEN)
        for number in range(self.rounds):
            before = storage.read(SMALL)

            def replace(thread: int, before: bytes = before, number: int = number) -> bool:
                try:
                    self.open(place).replace(SMALL, b"%d %d" % (number, thread), token=f"{thread:08x}", expected=before)
                except FileExistsError:
                    return False
                return True

            won = together(6, replace)
            assert 1 == sum(won)
            assert b"%d %d" % (number, won.index(True)) == storage.read(SMALL)

    def test_a_reader_sees_the_old_file_or_the_new_one(self, storage: Storage) -> None:
        """Never nothing, and never a part of either."""
        contents = [bytes([letter]) * size for letter, size in ((65, 100_000), (66, 50_000), (67, 200_000))]
        storage.create(SMALL, contents[0], token=TOKEN)
        seen: list[bytes] = []
        is_over = threading.Event()

        def write() -> None:
            number = 0
            try:
                # A fast storage replaces thirty times before another thread has its turn: it goes on until the reader has looked.
                while number < 30 or len(seen) < 3:  # noqa: PLR2004 - often enough
                    storage.replace(SMALL, contents[number % 3], token=TOKEN)
                    number += 1
            finally:
                is_over.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not is_over.is_set():
            seen.append(storage.read(SMALL))
        writer.join()

        assert seen
        assert set(seen) <= set(contents)

    def test_a_file_that_is_too_large_is_not_read(self, storage: Storage) -> None:
        """One of just the limit is."""
        storage.create(SMALL, bytes(1000), token=TOKEN)
        with pytest.raises(ManifestTooLargeError):
            storage.read(SMALL, limit=999)

        assert same_bytes(bytes(1000), storage.read(SMALL, limit=1000))
