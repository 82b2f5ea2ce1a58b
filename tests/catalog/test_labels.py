"""Names, tags and aliases are held to one rule wherever they come in, and found again however they were typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Snapshot
from expstate.errors import InvalidNameError
from expstate.format.names import ANNOTATIONS

Take = Callable[..., Snapshot]
Door = Callable[[Catalog, Take, Any], object]

DOORS: dict[str, Door] = {
    "name": lambda catalog, take, label: take(catalog, "new", name=label),
    "tags": lambda catalog, take, label: take(catalog, "new", tags=["good", label]),
    "tag": lambda catalog, take, label: catalog.tag("one", "good", label),
    "untag": lambda catalog, take, label: catalog.untag("one", label),
    "alias": lambda catalog, take, label: catalog.alias("one", label),
    "unalias": lambda catalog, take, label: catalog.unalias(label),
}
BAD = {
    "reserved": ["latest", "latest~1", "live", ".", ".."],
    "empty": ["", " ", " a", "a\u3000"],
    "cut": ["a@b", "a:b", "a=b", "a/b", "/", "../x", "s3://b/x"],
    "control": ["a\nb", "a\x00", "a\x1b[31m", "\x1b]0;t\x07", "a\x85"],
    "direction": ["a\u202eb", "a\u2066b\u2069", "a\u200f"],
    "invisible": ["a\u200bb", "\u2060", "\ufeffa", "a\u00adb", "\u3164"],
    "no text": ["\ud800", "a\udfff", "\ue000"],
    "long": ["a" * 300, "\u00e9" * 128, "日" * 100],
    "other": [None, 3, b"a", ["a"], Path("a")],
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("door", [door for door in DOORS if door != "name"])
def test_what_refs_cannot_carry_comes_in_nowhere(catalog: Catalog, take: Take, tmp_path: Path, door: str, kind: str) -> None:
    """Nothing is written, in the folder or in the catalog, and the message can be shown."""
    one = take(catalog, "one", name="one", tags=["given"])
    before = catalog["one"]
    for label in BAD[kind]:
        with pytest.raises(InvalidNameError) as caught:
            DOORS[door](catalog, take, label)
        assert str(caught.value).isprintable()

    assert before == catalog["one"]
    assert (1, ["one"]) == (len(catalog), [path.name for path in (tmp_path / "runs").iterdir()])
    assert not Path(one.path, ANNOTATIONS).exists()


def test_a_name_that_refs_cannot_carry_is_not_taken(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Except none, which is no name."""
    for label in [label for kind in BAD.values() for label in kind if label is not None]:
        with pytest.raises(InvalidNameError) as caught:
            DOORS["name"](catalog, take, label)
        assert str(caught.value).isprintable()

    assert (0, False) == (len(catalog), (tmp_path / "runs").exists())


@pytest.mark.parametrize(
    "label", ["con", "nul", "größe", "日本", "a" * 255, "v1.0 rc", "-rf", "%41", "LATEST", "' OR 1 --", "<b>", "🎉", "*", "~"]
)
def test_what_refs_can_carry_comes_in_and_is_found(catalog: Catalog, take: Take, label: str) -> None:
    """By each of its ways; names of devices and characters of shells too, since no file is called so."""
    take(catalog, "one", name=label, tags=[label])
    take(catalog, "two", name="two")
    catalog.alias("two", label)
    catalog.tag("two", label)
    quoted = '"{}"'.format(label.replace('"', '\\"'))

    assert "two" == catalog[label].name
    catalog.unalias(label)
    assert label == catalog[label].name
    assert [label] == [record.name for record in catalog.search(f"name = {quoted}")]
    assert ["two", label] == [record.name for record in catalog.search(f"tag = {quoted}")]
    catalog.untag("two", label)
    assert [label] == [record.name for record in catalog.search(f"tag ~ {quoted}")]


def test_labels_that_are_typed_in_two_ways_are_one(any_catalog: Catalog, take: Take) -> None:
    """With an accent of its own, or in one character."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    take(any_catalog, "one", name=decomposed, tags=[composed, decomposed])
    record = any_catalog.alias(composed, f"{decomposed} 2")

    assert (composed, (composed,), (f"{composed} 2",)) == (record.name, record.tags, record.aliases)
    for ref in (composed, decomposed, f"{composed} 2", f"{decomposed} 2"):
        assert record == any_catalog[ref]
    for typed in (composed, decomposed):
        assert [record] == list(any_catalog.search(f"name = '{typed}' and tag = '{typed}' and alias = '{typed} 2' and tag ~ '{typed[2:]}'"))
    assert () == any_catalog.untag("latest", decomposed).tags
    assert () == any_catalog.unalias(f"{decomposed} 2").aliases


def test_names_and_tags_may_differ_by_case_alone(any_catalog: Catalog, take: Take) -> None:
    """They are nothing that has to be unique, and are told apart."""
    take(any_catalog, "one", name="Run", tags=["A"])
    take(any_catalog, "two", name="run", tags=["a"])

    assert ["Run", "run"] == [any_catalog[name].name for name in ("Run", "run")]
    assert [["Run"], ["run"]] == [[record.name for record in any_catalog.search(f"tag = {tag}")] for tag in "Aa"]
