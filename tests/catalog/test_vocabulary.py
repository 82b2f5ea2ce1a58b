"""The words that completion offers are those of the project, each once."""

from __future__ import annotations

from collections.abc import Callable

from expstate import Catalog, Snapshot
from expstate.catalog.vocabulary import vocabulary

from .made import enter

FIELDS = (
    "id",
    "name",
    "project",
    "user",
    "host",
    "url",
    "step",
    "created",
    "age",
    "duration",
    "size",
    "written",
    "world_size",
    "tag",
    "alias",
    "pinned",
    "note",
    "parent",
    "digest",
    "status",
    "commit",
    "branch",
)
EMPTY = {"id": (), "name": (), "alias": (), "tag": (), "metric": (), "param": (), "field": FIELDS}


def test_words_are_those_of_the_project(any_catalog: Catalog, take: Callable[..., Snapshot]) -> None:
    first = take(any_catalog, "1", name="one", tags=["b", "a"], metrics={"loss": 0.5}, params={"width": 3})
    second = take(any_catalog, "2", name="one", tags=["a"], metrics={"loss": 0.4, "accuracy": 0.9})
    any_catalog.alias(first.id, "best")
    enter(any_catalog, project="another", name="other", tags=("theirs",), metrics={"theirs": 1.0}, params={"theirs": 1})

    expected = {
        "id": (second.id[:8], first.id[:8]),
        "name": ("one",),
        "alias": ("best",),
        "tag": ("a", "b"),
        "metric": ("accuracy", "loss"),
        "param": ("width",),
        "field": FIELDS,
    }
    assert expected == vocabulary(any_catalog)


def test_an_empty_catalog_has_none(any_catalog: Catalog) -> None:
    assert EMPTY == vocabulary(any_catalog)


def test_of_many_snapshots_the_newest_are_offered(catalog: Catalog) -> None:
    for number in range(250):
        enter(catalog, id=f"{number:08x}" + "0" * 24, created_at=number)
    found = vocabulary(catalog)["id"]

    assert (200, f"{249:08x}", f"{50:08x}") == (len(found), found[0], found[-1])


def test_every_field_that_is_offered_can_be_asked_for(catalog: Catalog) -> None:
    """An error would say that there is no such field."""
    for field in vocabulary(catalog)["field"]:
        assert 0 == len(catalog.search(f"{field} = none"))
