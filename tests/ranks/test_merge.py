"""The parts of many ranks become one manifest, in which each finds its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate.engine import merge
from expstate.engine.merge import RankPart
from expstate.errors import AppStateError
from expstate.format.manifest import AliasEntry, Box, ContainerEntry, Entry, FileRecord, ObjectEntry, TensorEntry, ValueEntry

DIGEST = bytes(32)


def _file(name: str) -> FileRecord:
    return FileRecord(name, 1000, 100, DIGEST)


def _box(file: int, start: int, size: int, blocks: bytes | tuple[int, int] | None = None) -> Box:
    return Box(file, 100, DIGEST, blocks, (start,), (size,))


def _tensor(path: str, *boxes: Box, rank: int | None = None, shape: tuple[int, ...] = (8,), dtype: str = "float32") -> TensorEntry:
    return TensorEntry(path, dtype, shape, boxes, rank=rank)


def _merged(*of_ranks: list[Entry], files: int = 1) -> list[Entry]:
    parts = [RankPart(tuple(_file(f"{rank}-{number}") for number in range(files)), tuple(found)) for rank, found in enumerate(of_ranks)]
    # As they travel.
    names, entries = merge.merge(merge.decode(merge.encode(part)) for part in parts)
    assert [record.name for part in parts for record in part.files] == [record.name for record in names]
    return list(entries)


def test_equal_values_become_one():
    assert [ValueEntry("s/x", 3)] == _merged([ValueEntry("s/x", 3, 0)], [ValueEntry("s/x", 3, 1)])


def test_values_that_differ_stay_each_with_its_rank():
    own = [ValueEntry("s/x", 3, 0)], [ValueEntry("s/x", 4, 1)]
    assert [*own[0], *own[1]] == _merged(*own)


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ("1", 1), ([1], [True]), ({"a": 1}, {"a": True})])
def test_what_is_equal_to_python_and_not_the_same_stays_apart(one, other):
    assert [0, 1] == [entry.rank for entry in _merged([ValueEntry("s/x", one, 0)], [ValueEntry("s/x", other, 1)])]


def test_a_value_that_one_of_three_lacks_is_not_everyone_s():
    assert [0, 2] == [entry.rank for entry in _merged([ValueEntry("s/x", 3, 0)], [], [ValueEntry("s/x", 3, 2)])]


def test_containers_of_one_type_and_metadata_become_one():
    assert [ContainerEntry("s", "dict")] == _merged(*([ContainerEntry("s", "dict", None, rank)] for rank in range(3)))
    assert [0, 1] == [
        entry.rank for entry in _merged([ContainerEntry("s", "dict", None, 0)], [ContainerEntry("s", "OrderedDict", None, 1)])
    ]
    assert [0, 1] == [entry.rank for entry in _merged([ContainerEntry("s", "tuple", 2, 0)], [ContainerEntry("s", "tuple", 3, 1)])]


def test_tensors_of_each_rank_stay_though_they_are_alike():
    entries = _merged([_tensor("s/x", _box(0, 0, 8), rank=0)], [_tensor("s/x", _box(0, 0, 8), rank=1)])
    assert [(0, 0), (1, 1)] == [(entry.rank, entry.boxes[0].file) for entry in entries]


def test_one_tensor_of_all_has_the_boxes_of_all_in_order():
    (entry,) = _merged([_tensor("s/x", _box(1, 4, 4, (0, 7)))], [_tensor("s/x")], [_tensor("s/x", _box(0, 0, 4))], files=2)
    assert entry.rank is None
    # Files are counted over all ranks: two of each.
    assert [(4, (0,)), (1, (4,))] == [(box.file, box.starts) for box in entry.boxes]
    assert (0, 7) == entry.boxes[1].blocks


def test_a_box_that_two_ranks_have_written_counts_once():
    (entry,) = _merged([_tensor("s/x", _box(0, 0, 4))], [_tensor("s/x", _box(0, 0, 4))], [_tensor("s/x", _box(0, 4, 4))])
    assert [(0, (0,)), (2, (4,))] == [(box.file, box.starts) for box in entry.boxes]


def test_files_of_digests_are_counted_over_all_ranks_too():
    (entry,) = _merged([_tensor("s/x", _box(0, 0, 4))], [_tensor("s/x", _box(0, 4, 4, (1, 50)))], files=2)
    assert (3, 50) == entry.boxes[1].blocks


def test_an_object_of_all_is_the_one_that_was_written():
    written = ObjectEntry("s/x", "a.B", 5, needs_trust=False, boxes=(Box(0, 100, DIGEST),))
    assert [written] == _merged([written], [ObjectEntry("s/x", "a.B", 6, needs_trust=False, boxes=())])


def test_an_alias_is_everyone_s_if_its_target_is():
    def entries(rank: int, *, shared: bool) -> list[Entry]:
        return [
            _tensor("s/x", *([_box(0, 0, 8)] if rank == 0 or not shared else []), rank=None if shared else rank),
            AliasEntry("s/y", "s/x", rank),
        ]

    assert AliasEntry("s/y", "s/x") == _merged(entries(0, shared=True), entries(1, shared=True))[-1]
    assert [0, 1] == [entry.rank for entry in _merged(entries(0, shared=False), entries(1, shared=False)) if isinstance(entry, AliasEntry)]


@pytest.mark.parametrize("empty", [0, 1])
def test_a_rank_without_a_part_does_not_see_that_tensors_are_tied(empty):
    tied: list[Entry] = [_tensor("s/x", _box(0, 0, 8)), AliasEntry("s/y", "s/x", 1 - empty)]
    loose: list[Entry] = [_tensor("s/x"), _tensor("s/y")]
    of_ranks = [tied, loose] if empty else [loose, tied]
    assert [_tensor("s/x", _box(1 - empty, 0, 8)), AliasEntry("s/y", "s/x")] == _merged(*of_ranks)


def test_what_is_shared_on_some_ranks_only_is_named():
    with pytest.raises(AppStateError, match=r"entry 's/x' belongs to all ranks on some, and to one rank on others \(1\)"):
        _merged([_tensor("s/x", _box(0, 0, 8))], [_tensor("s/x", _box(0, 0, 8), rank=1)])


def test_a_value_where_others_have_part_of_a_tensor_is_named():
    with pytest.raises(AppStateError, match=r"entry 's/x' belongs to all ranks on some, and to one rank on others \(1\)"):
        _merged([_tensor("s/x", _box(0, 0, 8))], [ValueEntry("s/x", 3, 1)])


@pytest.mark.parametrize("other", [_tensor("s/x", shape=(9,)), _tensor("s/x", dtype="float64")])
def test_another_shape_or_dtype_is_named(other):
    with pytest.raises(AppStateError, match=r"entry 's/x' is one tensor of all ranks: float32 \(8,\) on rank 0, and .* on rank 1"):
        _merged([_tensor("s/x", _box(0, 0, 8))], [other])


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_each_of_two_ranks_finds_its_own_in_its_order(first, second):
    """Of two ranks that come to what both have in the same order."""
    own = [sorted(first), sorted(second)]
    entries = _merged(*([ValueEntry(f"s/{number}", rank, rank) for number in numbers] for rank, numbers in enumerate(own)))
    for rank, numbers in enumerate(own):
        assert [f"s/{number}" for number in numbers] == [entry.path for entry in entries if entry.rank == rank]


@given(
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from("xyz"), unique=True), max_size=4), min_size=1, max_size=4)
)
def test_a_container_comes_before_what_is_in_it(of_ranks):
    def entries(rank: int, state: dict[str, list[str]]) -> list[Entry]:
        found: list[Entry] = [ContainerEntry("s", "dict", None, rank)]
        for name, inner in state.items():
            found += [ContainerEntry(f"s/{name}", "dict", rank, rank), *(ValueEntry(f"s/{name}/{path}", rank, rank) for path in inner)]
        return found

    merged = _merged(*(entries(rank, state) for rank, state in enumerate(of_ranks)))
    for rank in range(len(of_ranks)):
        seen: set[str] = set()
        for entry in merged:
            if entry.rank in {None, rank}:
                assert entry.path == "s" or entry.path.rpartition("/")[0] in seen
                seen.add(entry.path)


def test_many_ranks_with_shards_of_many_tensors():
    """A world of 256 with 200 tensors each: what comes out is in the order of the ranks, and complete."""
    size, tensors = 256, 200

    def part(rank: int) -> RankPart:
        shards = (_tensor(f"s/{number}", _box(0, rank, 1), shape=(size,)) for number in range(tensors))
        return RankPart((_file(str(rank)),), (ContainerEntry("s", "dict", None, rank), *shards))

    files, entries = merge.merge(map(part, range(size)))
    assert size == len(files)
    assert 1 + tensors == len(entries)
    assert all([(rank, (rank,)) for rank in range(size)] == [(box.file, box.starts) for box in entry.boxes] for entry in entries[1:])
