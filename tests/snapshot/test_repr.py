"""What people see of snapshots in a terminal and in a notebook; nothing in it runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import torch

from expstate import Snapshot, StateDict

from .conftest import mlp

HOSTILE = '"><img src=x onerror=alert(1)></td><script>alert(1)</script>&amp;'
ALLOWED = {"b", "code", "br", "table", "tr", "th", "td", "pre"}


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_repr_names_the_path_alone_until_something_was_read(place: Path) -> None:
    """``repr`` never reads."""
    assert f"Snapshot({str(place)!r})" == repr(Snapshot(place))


def test_repr_of_a_read_snapshot_says_what_it_is(place: Path) -> None:
    """Name, id, step, keys and size."""
    snapshot = Snapshot.take(place, {"model": mlp(), "state": StateDict(a=torch.zeros(1024))}, name="best", step=7)

    assert f"Snapshot({str(place)!r}, 'best', id={snapshot.id[:8]}, step 7, model, state, 5.02 KiB)" == repr(snapshot)


def test_html_shows_each_key_with_its_size(place: Path) -> None:
    """A table of keys, classes, numbers of tensors and sizes."""
    Snapshot.take(place, {"model": mlp(), "progress": StateDict(epoch=1, best=0.5)}, name="best", step=7, metrics={"loss": 0.25})
    text = _Tags(Snapshot(place)._repr_html_()).text

    assert re.search(r"best .*snapshot", text)
    assert "step 7" in text
    assert "loss 0.25" in text
    assert "modelSequential9" in text
    assert "progressStateDict2 values" in text


def test_html_of_hostile_names_holds_no_tags_of_theirs(tmp_path: Path) -> None:
    """Keys, names of metrics, labels and paths are shown as text."""
    place = tmp_path / 'a"><script>b'
    snapshot = Snapshot.take(
        place,
        {HOSTILE: StateDict({HOSTILE: torch.ones(1)})},
        name=HOSTILE.replace("=", "-").replace("/", "|"),
        note=HOSTILE,
        metrics={HOSTILE: 1},
    )
    shown = [snapshot._repr_html_(), snapshot.verify()._repr_html_(), snapshot.restore({HOSTILE: StateDict()})._repr_html_()]
    found = [_Tags(html) for html in shown]

    assert [set()] * 3 == [page.tags - ALLOWED for page in found]
    assert {"style"} >= set().union(*(page.attributes for page in found))
    assert HOSTILE in found[0].text
    assert HOSTILE in found[2].text


def test_html_of_what_cannot_be_read_says_why(place: Path) -> None:
    """A missing or damaged snapshot does not break the cell that shows it, and its error is shown as text."""
    missing = Snapshot(place.parent / "<script>")
    Snapshot.take(place, {"state": StateDict(a=1)})
    (place / "snapshot.json").chmod(0o644)
    (place / "snapshot.json").write_bytes((place / "snapshot.json").read_bytes().replace(b"state", b"<img>"))

    assert "no snapshot at" in _Tags(missing._repr_html_()).text
    assert "damaged" in _Tags(Snapshot(place)._repr_html_()).text
    assert _Tags(missing._repr_html_()).tags <= ALLOWED


def test_reports_are_sentences(place: Path) -> None:
    """What was restored and what is damaged, in words and sizes."""
    model = mlp()
    snapshot = Snapshot.take(place, {"model": model})
    (file,) = place.glob("*.safetensors")

    assert "restored 9 entries (1.02 KiB) of model" in str(snapshot.restore({"model": model}))
    assert "would restore 9 entries" in str(snapshot.restore({"model": model}, dry_run=True))
    assert re.fullmatch(r"whole: 1.02 KiB read and verified", str(snapshot.verify()))
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert re.match(r"damaged: 1 places\n  entry 'model/\S+' is damaged: \d+ bytes at", str(snapshot.verify()))
