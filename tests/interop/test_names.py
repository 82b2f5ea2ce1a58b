"""Names and paths lead to each other and back, whatever dicts and lists are nested in a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from expstate.errors import InvalidArgumentError, SnapshotWriteError
from expstate.format.manifest import ContainerEntry, Entry, TensorEntry, ValueEntry
from expstate.interop.names import Names, assemble, entry_path, place_of
from expstate.state import paths, tree
from expstate.state.values import decode, encode

from .states import trained

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3) | st.just(torch.ones(1))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
STATES = st.dictionaries(
    TEXTS,
    st.recursive(LEAVES, lambda inner: st.dictionaries(TEXTS, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3)),
    max_size=4,
)


def entries_of(leaves: list[tree.Leaf]) -> list[Entry]:
    found: list[Entry] = []
    for leaf in leaves:
        if isinstance(leaf, tree.Container):
            found.append(ContainerEntry(leaf.path, leaf.type, leaf.meta))
        elif isinstance(leaf, tree.Value):
            found.append(ValueEntry(leaf.path, leaf.encoded))
        else:
            found.append(TensorEntry(leaf.path, "float32", (1,), ()))
    return found


def built(entries: tuple[Entry, ...]) -> Any:
    parts = [tree.Part("%whole", "dict", None, None)]
    for entry in entries:
        path = f"%whole/{entry.path}"
        if isinstance(entry, ContainerEntry):
            parts.append(tree.Part(path, entry.type, entry.meta, None))
        else:
            parts.append(tree.Part(path, None, None, decode(entry.value) if isinstance(entry, ValueEntry) else torch.ones(1)))
    return tree.build(parts, {})


@given(STATES)
def test_nesting_comes_back_and_names_are_those_of_dcp(state: dict[str, Any]) -> None:
    try:
        flat, mapping = flatten_state_dict(state)
    except ValueError:
        assume(False)  # noqa: FBT003 - DCP has one name for two of its values
    places = [place_of(name, mapping) for name in flat]
    leaves = [leaf for name, value in flat.items() for leaf in tree.flatten_items([(entry_path(place_of(name, mapping), "%top"), value)])]
    try:
        keys, entries = assemble(places, reversed(entries_of(leaves)), "%top")
    except InvalidArgumentError:
        assert "%top" in state
        return
    found = built(entries)
    found |= found.pop("%top", {})

    assert repr(state) == repr({name: found[name] for name in state})
    assert [record.key for record in keys] == [paths.unquote(entry.path) for entry in entries if "/" not in entry.path]
    assert mapping == {name: named.place for name, named in Names(entries, "%top").found.items()}


def test_order_is_that_of_the_state_dict_whoever_wrote_what() -> None:
    places = [("m", "b"), ("m", "a"), ("l", 1), ("l", 0), ("x",)]
    entries = [ValueEntry(path, 1) for path in ("state/x", "l/0", "m/a", "l/1", "m/b")]

    assert ["m", "m/b", "m/a", "l", "l/0", "l/1", "state", "state/x"] == [entry.path for entry in assemble(places, entries, "state")[1]]


def test_holes_of_lists_are_none() -> None:
    _, entries = assemble([("l", 2)], [ValueEntry("l/2", encode("x"))], "state")

    assert {"l": [None, None, "x"]} == built(entries)


def test_numbers_key_the_state_of_an_optimizer_alone() -> None:
    _, optimizer = trained()
    for params, expected in (([0, 1], [["0", 0], ["1", 1]]), (["0", "1"], None), ([0], None)):
        places = [("o", "state", "0", "step"), ("o", "state", "1", "step"), ("o", "param_groups", 0, "params")]
        entries = [ValueEntry("o/state/0/step", 1), ValueEntry("o/state/1/step", 1), ValueEntry("o/param_groups/0/params", params)]
        found = {entry.path: entry for entry in assemble(places, entries, "state")[1]}
        assert expected == found["o/state"].meta  # type: ignore[union-attr]

    _, entries = assemble([("m", "state", "0")], [ValueEntry("m/state/0", 1)], "state")
    assert {"m": {"state": {"0": 1}}} == built(entries)
    assert 0 in optimizer.state_dict()["state"]


def test_what_does_not_go_together_is_refused() -> None:
    for places, match in (
        ([("a", "b"), ("a", "b", "c")], "others below it"),
        ([("a", "b", "c"), ("a", "b")], "several values"),
        ([("a", -1)], "of the list"),
        ([("a", 10**12)], "of the list"),
        ([("a",) * 1000], "nested more than"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            assemble(places, [ValueEntry(entry_path(place, "s"), 1) for place in places], "s")
    with pytest.raises(SnapshotWriteError, match="no rank has written entry 'a/b'"):
        assemble([("a", "b")], [], "s")
