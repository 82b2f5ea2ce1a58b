"""A lineage shows all that a snapshot came from and all that came from it, however many, and whatever a forged record says."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.errors import RefNotFoundError

from .made import data, enter

Take = Callable[..., Snapshot]


def an_id(number: int) -> str:
    return f"{number:08x}" * 4


def family(catalog: Catalog, *pairs: tuple[int, int | None]) -> None:
    """Records by number, with the numbers of their parents."""
    for number, parent in pairs:
        enter(
            catalog,
            id=an_id(number),
            parent=None if parent is None else an_id(parent),
            name=f"n{number}",
            step=number,
            created_at=1000 + number,
        )


def numbers(relatives: object) -> list[int]:
    return [int(relative.id[:8], 16) for relative in relatives]  # type: ignore[attr-defined]


# 1 - 2 - 3 - 4 - 7
#      \   \ 5 - 8 - 9
#       6
FAMILY = ((1, None), (2, 1), (3, 2), (4, 3), (5, 3), (6, 2), (7, 4), (8, 5), (9, 8))


def test_a_lineage_is_ancestors_and_descendants(any_catalog: Catalog) -> None:
    """Parents before children, the largest branch last; brothers and what came from them are not in it."""
    family(any_catalog, *FAMILY)
    lineage = any_catalog.lineage("n3")

    assert [1, 2, 3, 4, 7, 5, 8, 9] == numbers(lineage)
    assert [1, 2] == numbers(lineage.ancestors)
    assert [4, 7, 5, 8, 9] == numbers(lineage.descendants)
    assert (8, an_id(3)) == (len(lineage), lineage.id)
    assert sorted(number for number, _ in FAMILY) == sorted(numbers(any_catalog.lineage("n1")))


def test_it_is_drawn_as_a_tree(catalog: Catalog) -> None:
    """Branches to the right, the way that goes on straight down."""
    family(catalog, *FAMILY)

    assert str(catalog.lineage("n2")).splitlines() == [
        "○ 00000001 n1 step 1",
        "● 00000002 n2 step 2",
        "├─○ 00000006 n6 step 6",
        "○ 00000003 n3 step 3",
        "├─○ 00000004 n4 step 4",
        "│ ○ 00000007 n7 step 7",
        "○ 00000005 n5 step 5",
        "○ 00000008 n8 step 8",
        "○ 00000009 n9 step 9",
    ]


def test_it_is_plain_values_for_json(catalog: Catalog) -> None:
    """Flat, so that no chain is too deep for a parser."""
    family(catalog, (1, None), (2, 1))
    found = json.loads(json.dumps(catalog.lineage("n1").to_dict()))

    assert an_id(1) == found["id"]
    assert [(an_id(1), None, "n1", 1, True), (an_id(2), an_id(1), "n2", 2, True)] == [
        (each["id"], each["parent"], each["name"], each["step"], each["known"]) for each in found["snapshots"]
    ]
    assert ("tests", "present", "1970-01-01T00:00:00.001001+00:00") == tuple(
        found["snapshots"][0][name] for name in ("project", "status", "created_at")
    )


def test_takes_and_restores_make_it(catalog: Catalog, take: Take) -> None:
    """A take's parent is what was taken or restored before."""
    first = take(catalog, "one", name="one")
    take(catalog, "two", name="two")
    first.restore({"model": StateDict(weight=torch.zeros(4), value=0.0)})
    take(catalog, "three", name="three")

    assert ["one", "two", "three"] == [relative.name for relative in catalog.lineage("one")]
    assert ["one", "three"] == [relative.name for relative in catalog.lineage("three")]


def test_a_parent_that_is_gone_is_there_by_its_id(any_catalog: Catalog) -> None:
    """Nothing else is known of it."""
    family(any_catalog, (2, 1), (3, 2))
    lineage = any_catalog.lineage("n3")

    assert [(1, False), (2, True), (3, True)] == list(zip(numbers(lineage), [relative.known for relative in lineage], strict=True))
    assert "00000001 (not in the catalog)" in str(lineage)
    assert [None] * 6 == [lineage.to_dict()["snapshots"][0][name] for name in ("parent", "name", "step", "project", "status", "created_at")]


def test_a_snapshot_alone_is_its_lineage(any_catalog: Catalog) -> None:
    """And one that does not exist has none."""
    family(any_catalog, (1, None))

    assert [1] == numbers(any_catalog.lineage("n1"))
    with pytest.raises(RefNotFoundError):
        any_catalog.lineage("n2")


@pytest.mark.parametrize("pairs", [((1, 1),), ((1, 2), (2, 1)), ((1, 3), (2, 1), (3, 2), (4, 2))])
def test_a_circle_is_cut_open(any_catalog: Catalog, pairs: tuple[tuple[int, int], ...]) -> None:
    """Each other snapshot of it is an ancestor, once."""
    family(any_catalog, *pairs)
    circle = {number for number, _ in pairs} - {4}
    for number in circle:
        assert sorted(circle - {number}) == sorted(numbers(any_catalog.lineage(f"n{number}").ancestors))


def test_names_are_escaped(catalog: Catalog) -> None:
    """For terminals and for HTML, and so is an id that no manifest has."""
    enter(catalog, id=an_id(1), name="<img src=x onerror=alert(1)>\x1b[31m", parent="\x1b]0;<b>")
    lineage = catalog.lineage(an_id(1))

    assert "\x1b" not in str(lineage)
    assert "<img" not in lineage._repr_html_()
    assert "&lt;img" in lineage._repr_html_()


def test_a_long_chain_with_branches_is_neither_deep_nor_wide(any_catalog: Catalog) -> None:
    """Nothing in it recurses, and the way that goes on stays in its column."""
    count = 500
    chain = [data(id=an_id(number), parent=an_id(number - 1), created_at=number) for number in range(1, count)]
    sides = [data(id=an_id(count + number), parent=an_id(number), created_at=count + number) for number in range(1, count)]
    enter(any_catalog, *chain, *sides)
    lineage = any_catalog.lineage(an_id(1))

    assert 2 * count - 1 == len(lineage)
    assert max(map(len, str(lineage).splitlines())) < 40
    assert count == len(any_catalog.lineage(an_id(count - 1)).ancestors) + 1
