"""Tests of files that two folders share: each has them to itself, as far as anybody can tell."""
# ruff: noqa: SIM300 - the expected value stands first

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from expstate.errors import ExpstateError
from expstate.testing.cases import BASE, DATA, SMALL, TOKEN, StorageCase, random_bytes, same_bytes, together
from expstate.testing.null import NullStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from expstate.storage.base import Storage

_CONTENT = random_bytes(10_000)


class SharedFileTests(StorageCase):
    """What the engine relies on where a snapshot has files of an earlier one; a storage that cannot share them says so."""

    @pytest.fixture
    def earlier(self, place: Path) -> Iterator[Storage]:
        """Another folder of the storage under test, with a data file in it."""
        earlier = self.open(place / "earlier")
        earlier.prepare()
        self.put(earlier, DATA, _CONTENT)
        yield earlier
        for info in list(earlier.list()):
            earlier.delete(info.name)
        earlier.remove_folder()

    @pytest.mark.parametrize("gone", ["the earlier one", "the later one", "neither"])
    def test_a_file_of_another_folder_is_here_too(self, storage: Storage, earlier: Storage, place: Path, gone: str) -> None:
        """Whole, and for as long as it is wanted in each."""
        if not storage.link_file(BASE, earlier, DATA):
            assert [] == self.names(storage)
            return
        storage.flush()
        if gone == "the earlier one":
            earlier.delete(DATA)
        elif gone == "the later one":
            storage.delete(BASE)
        expected = {"the earlier one": (BASE, None), "the later one": (None, DATA), "neither": (BASE, DATA)}[gone]

        for opened, name in zip((self.open(place), self.open(place / "earlier")), expected, strict=True):
            assert ([] if name is None else [name]) == self.names(opened)
            if name is not None:
                assert len(_CONTENT) == opened.stat(name).size
                assert same_bytes(_CONTENT, opened.read(name))
                assert same_bytes(_CONTENT[4096:], self.read(opened, name, 4096, len(_CONTENT) - 4096))

    def test_a_shared_file_says_in_how_many_places_it_is(self, storage: Storage, earlier: Storage) -> None:
        """By one identity in all of them, as long as there are several; nothing is said of what lies in one place alone."""
        self.put(storage, DATA, random_bytes(10_000, seed=1))
        assert {} == storage.links([DATA, BASE]) == earlier.links([DATA, BASE])
        is_shared = storage.link_file(BASE, earlier, DATA) and bool(storage.links([BASE]))
        here, there = storage.links([DATA, BASE]), earlier.links([DATA])

        if is_shared:
            identity, _ = there[DATA]
            assert {BASE: (identity, 2)} == here
            assert {DATA: (identity, 2)} == there
        else:
            assert {} == here == there
        storage.delete(BASE)
        assert {} == storage.links([DATA, BASE]) == earlier.links([DATA])

    def test_a_file_is_shared_with_many_at_the_same_time(self, storage: Storage, earlier: Storage) -> None:
        """Each has it whole."""
        names = [f"base/model-{number:05}-77777777.safetensors" for number in range(6)]
        done = together(6, lambda number: storage.link_file(names[number], earlier, DATA))

        assert 1 == len(set(done))
        assert (names if done[0] else []) == self.names(storage)
        assert all(same_bytes(_CONTENT, storage.read(name)) for name in self.names(storage))

    def test_what_is_not_there_is_not_shared(self, storage: Storage, earlier: Storage, place: Path) -> None:
        """Nor is what lies in a folder that is not there; nothing is left of the try."""
        assert not storage.link_file(BASE, earlier, "nothing-00001-3f9a2c71.safetensors")
        assert not storage.link_file(BASE, earlier, BASE)
        assert not storage.link_file(BASE, self.open(place / "nowhere"), DATA)
        assert [] == self.names(storage)

    def test_what_lies_in_another_kind_of_storage_is_not_shared(self, storage: Storage) -> None:
        """It has to be written."""
        elsewhere = NullStorage("elsewhere")
        elsewhere.prepare()
        elsewhere.create(SMALL, b"there", token=TOKEN)
        is_shared = storage.link_file(BASE, elsewhere, SMALL)
        elsewhere.delete(SMALL)
        elsewhere.remove_folder()

        assert not is_shared
        assert [] == self.names(storage)

    @pytest.mark.parametrize("name", ["", "..", "/etc/hostname", "../x", "a/../../x", "a//x", "nul\0x"])
    def test_names_that_lead_elsewhere_are_not_shared(self, storage: Storage, earlier: Storage, name: str) -> None:
        """Neither of the one nor of the other folder."""
        for target, source in ((BASE, name), (name, DATA)):
            with pytest.raises(ExpstateError):
                storage.link_file(target, earlier, source)
        assert [] == self.names(storage)
