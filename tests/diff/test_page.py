"""A comparison as HTML: well-formed and harmless whatever the names are, to be seen on light and dark ground, and never long."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expstate import Snapshot, StateDict
from expstate.diff import heatmap, page
from expstate.diff.report import EntryDiff, EntryForm, SnapshotDiff
from expstate.format.manifest import Metadata
from tests.snapshot.boxes import write_boxes

from .conftest import Take, forged

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "javascript:alert(1)",
    "' onload='x",
    "]]>&lt;!--",
    "[x](javascript:x)",
]
ATTRIBUTES = {"class", "style", "role", "aria-label", "width", "height", "viewBox", "x", "y", "rx", "d", "transform", "text-anchor"}


class Browser(HTMLParser):
    """What a browser would make of it: tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - our own


def lines_of(text: str) -> list[str]:
    """The layers of the heat-map, with what is said of each."""
    texts = [element.text or "" for element in parsed(text).iter(f"{SVG}text")]
    names = [element for element in parsed(text).iter(f"{SVG}text") if element.get("text-anchor") == "end"]
    return [f"{name}: {said}" for name, said in zip(texts[1 : 1 + 2 * len(names) : 2], texts[2 : 2 + 2 * len(names) : 2], strict=True)]


def legend_of(text: str) -> list[str]:
    texts = [element.text or "" for element in parsed(text).iter(f"{SVG}text")]
    return texts[1 + 2 * len(lines_of(text)) :]


def cells_of(text: str) -> list[str]:
    """The titles of the cells."""
    return [title.text or "" for rect in parsed(text).iter(f"{SVG}rect") for title in rect.iter(f"{SVG}title")]


def row(path: str, change: str = "same", **fields: Any) -> EntryDiff:
    form = EntryForm("tensor", "float32", (2,), 8)
    return EntryDiff(path, change, None if change == "added" else form, None if change == "removed" else form, **fields)


@pytest.fixture
def tuned(tmp_path: Path) -> SnapshotDiff:
    """A network of which one part is frozen, and another is broken."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {name: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for name in ("frozen", "tuned", "broken")}
    )
    old = Snapshot.take(tmp_path / "old", {"model": model}, name="old")
    with torch.no_grad():
        for parameter in model["tuned"].parameters():
            parameter.mul_(1.5)
        model["broken"][1].bias[0] = math.nan
    return old.diff(Snapshot.take(tmp_path / "new", {"model": model}, name="new"), stats=True)


def test_the_page_is_well_formed(tuned: SnapshotDiff) -> None:
    html = tuned._repr_html_()

    assert "div" == parsed(html).tag
    assert 1 == len(list(parsed(html).iter(f"{SVG}svg")))
    assert Counter(element.tag.removeprefix(SVG) for element in parsed(html).iter()) == Counter(tag for tag, _ in Browser(html).found)


def test_the_heat_map_shows_layer_by_layer_how_far_it_changed(tuned: SnapshotDiff) -> None:
    assert [
        "model/frozen.0: same",
        "model/frozen.1: same",
        "model/tuned.0: 2 of 2, up to 0.5",
        "model/tuned.1: 2 of 2, up to 0.5",
        "model/broken.0: same",
        "model/broken.1: 1 of 2, NaN or inf came",
    ] == lines_of(tuned._repr_html_())
    assert ["same", "< 1", "NaN or inf came"] == legend_of(tuned._repr_html_())
    assert 12 == len(cells_of(tuned._repr_html_()))
    assert "model/tuned.0.weight: relative 0.5, max 0." in "\n".join(cells_of(tuned._repr_html_()))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_tensor_of_which_nothing_is_left_is_drawn_so(take: Take, odd: float) -> None:
    """Though nothing can be said of how far it changed; one that was lost before is only changed."""
    whole, lost = torch.ones(3), torch.full((3,), odd)
    old, new = take(w=whole), take(w=lost)
    html = old.diff(new, stats=True)._repr_html_()

    assert (["NaN or inf came"], ["state: 1 of 1, NaN or inf came"]) == (legend_of(html), lines_of(html))
    assert "no number on both sides, " in html
    html = new.diff(old, stats=True)._repr_html_()
    assert (["changed"], ["state: 1 of 1"]) == (legend_of(html), lines_of(html))


def test_the_picture_is_told_to_those_who_do_not_see_it(tuned: SnapshotDiff) -> None:
    (svg,) = parsed(tuned._repr_html_()).iter(f"{SVG}svg")

    assert "img" == svg.get("role")
    assert (svg.get("aria-label") or "").startswith(
        "Relative change (L2) of each tensor, by layer: 5 of 12 tensors differ, on 6 lines; most model/broken.1.bias"
    )


def test_without_statistics_it_shows_what_changed(take: Take) -> None:
    old = take(a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(2), d=torch.arange(7), e=torch.zeros(1))
    new = take(a=torch.ones(2), b=torch.zeros(3), c=torch.zeros(2), renamed=torch.arange(7), f=torch.zeros(3))
    html = old.diff(new)._repr_html_()

    assert ["same", "changed", "other dtype, shape or kind", "renamed", "added", "removed"] == legend_of(html)
    assert ["state: 5 of 6"] == lines_of(html)
    assert "Tensors that differ, by layer" in html


def test_what_only_is_cut_otherwise_is_not_drawn_as_changed(tmp_path: Path) -> None:
    value = torch.arange(4.0)
    write_boxes(tmp_path / "old", "state/w", value, [((0,), (4,))])
    write_boxes(tmp_path / "new", "state/w", value, [((0,), (1,)), ((1,), (3,))])
    old, new = Snapshot(tmp_path / "old"), Snapshot(tmp_path / "new")

    assert ["layout differs"] == legend_of(old.diff(new)._repr_html_())
    assert ["same"] == legend_of(old.diff(new, content=True)._repr_html_())
    assert "same, layout differs" in old.diff(new, content=True)._repr_html_()


def test_a_flag_alone_is_no_change_of_content(take: Take) -> None:
    html = take(x=torch.ones(2)).diff(take(x=torch.ones(2, requires_grad=True)), stats=True)._repr_html_()

    assert ["other dtype, shape or kind"] == legend_of(html)


def test_nothing_is_drawn_where_nothing_differs_or_is_a_tensor(take: Take) -> None:
    snapshot = take({"name": "one"}, x=torch.ones(2))

    assert '<div class="expstate-diff"><b>one → one</b>: all 1 entries are the same</div>' == snapshot.diff(snapshot)._repr_html_()
    assert "<svg" not in take(x=1).diff(take(x=2))._repr_html_()
    assert "all 0 entries" in Snapshot(take().path).diff(take())._repr_html_()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("stats", [False, True])
def test_hostile_names_are_only_text(take: Take, name: str, stats: bool) -> None:
    """In entries, values, types, metadata and provenance: no element, no attribute, no link comes of them."""
    many = {f"{name}.{number}.{name}": torch.zeros(2) for number in range(70)}
    old = take(**{name: torch.ones(2), "value": 1, f"old {name}": torch.arange(5)}, many=many, kept=torch.ones(1))
    new = take(
        **{name: torch.zeros(2), "value": name, f"new {name}": torch.arange(5)}, many=dict(many) | {"more": torch.ones(2)}, kept=[name]
    )
    old = forged(old, metadata=Metadata(name="old"))
    new = forged(new, metadata=Metadata(name=name, tags=(name,), params={name: name}, note=name), provenance={name: {name: name}})
    html = old.diff(new, stats=stats)._repr_html_()
    root = parsed(html)

    assert {"div", "b", "svg", "text", "title", "g", "rect", "path", "table", "thead", "tbody", "tr", "th", "td"} >= {
        tag for tag, _ in Browser(html).found
    }
    for _, attributes in Browser(html).found:
        assert {name.lower() for name in ATTRIBUTES | {"xmlns"}} >= attributes.keys()
    for element in root.iter():
        assert ATTRIBUTES >= element.attrib.keys()
        assert all(name not in value for key, value in element.attrib.items() if key != "aria-label")
    assert any(name in (cell.text or "") for cell in root.iter("td"))


def test_colours_are_seen_on_light_and_dark_ground(tuned: SnapshotDiff, take: Take) -> None:
    """Text takes the colour of the page; what is drawn takes the theme's, or one that is neither light nor dark."""
    other = take(a=torch.ones(1), b=torch.ones(2), c=torch.zeros(3)).diff(take(a=torch.ones(1).half(), d=torch.ones(4), c=torch.ones(3)))
    for html in (tuned._repr_html_(), other._repr_html_()):
        for element in parsed(html).iter(f"{SVG}text"):
            assert "currentColor" in (element.get("style") or "")
        styles = " ".join(element.get("style") or "" for element in parsed(html).iter() if element.tag != f"{SVG}path")
        assert "background" not in styles
        assert not re.search(r"(?<![-\w])color:", styles)
        for colour in re.findall("#[0-9a-f]+", styles):
            red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
            assert 0.1 < 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.5
    assert len(heatmap._STYLES) == len(set(heatmap._STYLES.values()))
    assert heatmap._STYLES.keys() == heatmap._NAMES.keys()


@pytest.mark.parametrize("stats", [False, True])
def test_a_long_report_is_cut_and_says_so(take: Take, stats: bool) -> None:
    """However many entries, values and facts differ."""

    def values(number: int) -> dict[str, Any]:
        return {f"t{place}": torch.full((1,), float(number)) for place in range(3000)} | {f"v{place}": number for place in range(30)}

    old = take({"params": {f"p{place}": 0 for place in range(40)}}, **values(0))
    new = take({"params": {f"p{place}": 1 for place in range(40)}}, **values(1))
    html = old.diff(new, stats=stats)._repr_html_()

    assert ["… and 10 more", "… and 2,980 more", "… and 10 more"] == re.findall("… and [0-9,]+ more", html)
    assert [20, 20, 30] == [len(body) for body in parsed(html).iter("tbody")]
    assert 32 == len(cells_of(html))
    assert len(html) < 40_000
    assert [7, 7, 30] == [len(body) for body in parsed(old.diff(new, stats=stats).showing(7)._repr_html_()).iter("tbody")]
    assert ["… and 10 more"] == re.findall(
        "… and [0-9,]+ more", take(**dict.fromkeys("abcdefghijklmnopqrstuvwxyz1234", 1)).diff(take())._repr_html_()
    )


def test_renamed_tensors_are_drawn_once(take: Take) -> None:
    old = take(**{f"a{number}": torch.tensor([number]) for number in range(5)})
    new = take(**{f"b{number}": torch.tensor([number]) for number in range(5)})
    html = old.diff(new)._repr_html_()

    assert (["renamed"], 5, 5) == (legend_of(html), len(cells_of(html)), len(list(parsed(html).iter("tr"))) - 1)
    assert "5 added (5 renamed), 5 removed" in html


# Which layers are drawn


def test_the_blocks_of_a_deep_network_have_a_line_each() -> None:
    parts = ("ln.weight", "ln.bias", "attn.qkv.weight", "attn.out.weight", "mlp.0.weight", "mlp.2.weight")
    rows = [row(f"model/h.{number}.{part}") for number in range(48) for part in parts]
    lines = lines_of(heatmap.as_svg([row("model/wte.weight"), *rows], has_statistics=False))

    assert ["model/wte: same", *(f"model/h.{number}: same" for number in range(48))] == lines


def test_of_more_blocks_than_lines_neighbours_are_joined() -> None:
    rows = [row(f"model/h.{number}.{part}") for number in range(126) for part in "abcdefghi"]
    lines = lines_of(heatmap.as_svg(rows, has_statistics=False))

    assert (42, "model/h.0 … 2: same", "model/h.123 … 125: same") == (len(lines), lines[0], lines[-1])


def test_an_optimizer_does_not_take_the_room_of_the_model() -> None:
    """Of its many small parts nobody knows the numbers."""
    rows = [row(f"model/h.{number}.{part}") for number in range(6) for part in "abcdef"]
    rows += [row(f"optimizer/state/{number}/{part}") for number in range(38) for part in ("step", "exp_avg", "exp_avg_sq")]

    assert [*(f"model/h.{number}: same" for number in range(6)), "optimizer/state: same"] == lines_of(
        heatmap.as_svg(rows, has_statistics=False)
    )


def test_a_single_tensor_has_a_line() -> None:
    assert ["state: 1 of 1"] == lines_of(heatmap.as_svg([row("state/w", "added")], has_statistics=False))


def test_long_and_wide_names_stay_in_the_picture() -> None:
    names = ["x" * 300, "層" * 40, "a", "é" * 40]
    svg = parsed(heatmap.as_svg([row(f"state/{name}.w") for name in names], has_statistics=False))
    name_ends = [float(text.get("x") or 0) for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]

    assert all(12 * 40 <= end < float(svg.get("width") or 0) for end in name_ends)


_names = st.lists(
    st.lists(st.sampled_from(["a", "b", "1", "2"]), min_size=1, max_size=7).map(lambda parts: f"k/{'.'.join(parts)}"),
    min_size=1,
    max_size=200,
    unique=True,
)


@given(names=_names, changes=st.lists(st.sampled_from(["same", "added", "removed", "changed"]), min_size=200, max_size=200))
@settings(max_examples=60, deadline=None)
def test_every_tensor_is_in_one_line_and_lines_are_few(names: list[str], changes: list[str]) -> None:
    rows = [row(name, change, differs=("content",) if change == "changed" else ()) for name, change in zip(names, changes, strict=False)]
    layers = heatmap._layers(rows)

    assert sorted(names) == sorted(found.entry for layer in layers for found in layer.rows)
    assert 1 <= len(layers) <= heatmap._MOST_LINES
    svg = heatmap.as_svg(rows, has_statistics=False)
    assert len(layers) == len(lines_of(svg))
    width, height = (float(parsed(svg).get(name) or 0) for name in ("width", "height"))
    for rect in parsed(svg).iter(f"{SVG}rect"):
        assert float(rect.get("x") or 0) + 15 <= width
        assert float(rect.get("y") or 0) + 15 <= height


def test_live_state_has_a_page_too(take: Take) -> None:
    html = take({"name": "<b>"[1]}, x=torch.ones(2)).diff({"state": StateDict(x=torch.zeros(2))}, stats=True)._repr_html_()

    assert "<b>b → live state</b>: 1 changed, 0 same" in html


def test_rows_of_a_page_are_as_many_as_it_promises() -> None:
    assert "… and 1 more" in page._table(("a",), ("",), [("x",)] * 3, 2)
    assert "more" not in page._table(("a",), ("",), [("x",)] * 2, 2)
    assert "" == page._table(("a",), ("",), [], 2)
