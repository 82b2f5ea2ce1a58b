"""Where two states differ, layer by layer: a heat-map as SVG.

Gets the rows of a comparison; hands on a picture of at most so many layers and cells, however many tensors there are. Layers are the
prefixes of names; a layer with too many tensors is drawn in cells of several each.
Colours are those of JupyterLab's theme where it gives them; others are seen on light and dark ground.
"""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING

import msgspec

from expstate.diff import show
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expstate.diff.report import EntryDiff
    from expstate.diff.stats import Statistics

_MODULE = re.compile("[./][^./]*$")
"""What stands behind the name of a module."""

_FEW_LINES = 16
_MOST_LINES = 56
_MOST_CELLS = 32
_LEAST_TENSORS = 4
"""Of a layer on average, where there are more lines than a few."""

_DEEPEST = 8
_LONGEST_NAME = 48
_LONGEST_TITLE = 240

_PITCH, _SIZE = 17, 15
_TOP = 26
_LINE_BELOW = 18
_LETTER, _WIDE_LETTER = 6.2, 12
_FIRST_WIDE = 0x2E80

_TEXT = "fill:var(--jp-ui-font-color1,currentColor)"
_FAINT = "fill:var(--jp-ui-font-color2,currentColor)"
_HOT = "fill:var(--jp-warn-color1,#f57c00);fill-opacity:"
_STEPS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_OPACITIES = (".2", ".34", ".5", ".66", ".82", "1")
_STYLES = {
    "same": "fill:var(--jp-border-color1,#9e9e9e);fill-opacity:.36",
    **{f"step{number}": _HOT + opacity for number, opacity in enumerate(_OPACITIES)},
    "zero": f"{_HOT}.34;stroke:var(--jp-warn-color1,#f57c00);stroke-width:1.5",
    "odd": "fill:var(--jp-error-color1,#d32f2f)",
    "partly": f"{_HOT}.4",
    "changed": f"{_HOT}.9",
    "layout": "fill:none;stroke:var(--jp-ui-font-color2,#9e9e9e);stroke-width:1.5;stroke-dasharray:3 2",
    "otherwise": "fill:var(--jp-brand-color1,#1976d2);fill-opacity:.75",
    "renamed": "fill:none;stroke:var(--jp-brand-color1,#1976d2);stroke-width:1.5",
    "added": "fill:var(--jp-success-color1,#388e3c);fill-opacity:.75",
    "removed": "fill:none;stroke:var(--jp-error-color1,#d32f2f);stroke-width:1.5",
}
_NAMES = {
    "same": "same",
    "step0": "< 0.0001",
    "step1": "< 0.001",
    "step2": "< 0.01",
    "step3": "< 0.1",
    "step4": "< 1",
    "step5": "≥ 1",
    "zero": "was zero",
    "odd": "NaN or inf came",
    "partly": "some changed",
    "changed": "changed",
    "layout": "layout differs",
    "otherwise": "other dtype, shape or kind",
    "renamed": "renamed",
    "added": "added",
    "removed": "removed",
}
_ORDER = list(_NAMES)
_SIGNS = {"added": "M4 7.5h7M7.5 4v7", "odd": "M4.5 4.5l6 6M10.5 4.5l-6 6"}
"""What is told by more than its colour."""


class Line(msgspec.Struct, frozen=True):
    """A line of the heat-map.

    Attributes
    ----------
    prefix : str
        What the names of its tensors begin with.
    name, summary : str
        What stands before and behind its cells.
    cells : tuple of (str, str)
        Level and title of each.
    heads : tuple of str
        What is left of the names of the tensors in each cell, if those of one module are in one.
    """

    prefix: str
    name: str
    summary: str
    cells: tuple[tuple[str, str], ...]
    heads: tuple[str, ...] = ()


class _Layer:
    """A prefix of names: the tensors directly below it, all below it, and longer prefixes."""

    def __init__(self, prefix: str, depth: int) -> None:
        self.prefix = prefix
        self.depth = depth
        self.children: dict[str, _Layer] = {}
        self.own: list[EntryDiff] = []
        self.rows: list[EntryDiff] = []

    def opened(self, step: int) -> list[_Layer]:
        """The layers to show instead of this one, ``step`` neighbours together."""
        below = list(self.children.values())
        found = below if step == 1 else [_joined(below[at : at + step]) for at in range(0, len(below), step)]
        if self.own:
            rest = _Layer(self.prefix, self.depth)
            rest.rows = self.own
            found = [rest, *found]
        return found


def _joined(layers: Sequence[_Layer]) -> _Layer:
    """Neighbours as one: ``model/h.0 … 2``."""
    first, last = layers[0].prefix, layers[-1].prefix
    parent = max(first.rfind("."), first.rfind("/")) + 1
    joined = _Layer(first if len(layers) == 1 else f"{first} … {last[parent:]}", layers[0].depth)
    joined.rows = [row for layer in layers for row in layer.rows]
    return joined


def as_svg(rows: Sequence[EntryDiff], *, has_statistics: bool) -> str:
    """The heat-map of a comparison; empty if there are no tensors.

    Parameters
    ----------
    rows : sequence of EntryDiff
        All entries, in order; what is no tensor is left out, and what was renamed is there once, by its new name.
    has_statistics : bool
        Whether changed tensors were read: then colours say how far they changed, else only whether.
    """
    layers = _layers(_shown(rows))
    if not layers:
        return ""
    cells = [list(_cells(layer.rows)) for layer in layers]
    names, sums = [_name(layer) for layer in layers], [_sum(layer.rows) for layer in layers]
    left = math.ceil(max(map(_width, names))) + 8
    right = max(len(line) * _PITCH + _width(text) for line, text in zip(cells, sums, strict=True))
    width = left + max(math.ceil(right) + 16, _MOST_CELLS * _PITCH)
    legend, height = _legend({level for line in cells for level, _ in line}, width, _TOP + len(layers) * _PITCH + 20)
    heading = "Relative change (L2) of each tensor, by layer" if has_statistics else "Tensors that differ, by layer"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{_escaped(_spoken(heading, layers))}" width="{width}"',
        f' height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%;height:auto;display:block;margin:6px 0;',
        'font:11px var(--jp-ui-font-family,sans-serif)">',
        f'<text x="0" y="13" style="{_TEXT};font-weight:600">{heading}</text>',
    ]
    for number, (layer, name, text, line) in enumerate(zip(layers, names, sums, cells, strict=True)):
        y = _TOP + number * _PITCH + _SIZE - 4
        title = f"<title>{_escaped(paths.printable(layer.prefix))}</title>"
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end" style="{_TEXT}">{_escaped(name)}{title}</text>')
        parts.append(f'<text x="{left + len(line) * _PITCH + 6}" y="{y}" style="{_FAINT}">{_escaped(text)}</text>')
    return "".join([*parts, *_drawn(cells, left), legend, "</svg>"])


def lines(rows: Sequence[EntryDiff]) -> list[Line]:
    """The heat-map as plain data, for who draws it otherwise: levels and titles are those of ``as_svg``, but a module has one cell."""
    return [_line(layer) for layer in _layers(_shown(rows))]


def _line(layer: _Layer) -> Line:
    modules: dict[str, list[EntryDiff]] = {}
    for row in layer.rows:
        ending = row.entry[len(layer.prefix) :].lstrip("./")
        modules.setdefault(_MODULE.sub("", ending) or ending, []).append(row)
    if len(modules) > _MOST_CELLS:
        return Line(layer.prefix, _name(layer), _sum(layer.rows), tuple(_cells(layer.rows)))
    cells = tuple((_level(group), _title(group)) for group in modules.values())
    return Line(layer.prefix, _name(layer), _sum(layer.rows), cells, tuple(modules))


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """The levels that are in some lines, and what they mean."""
    found = {level for line in lines for level, _ in line.cells}
    return [(level, _NAMES[level]) for level in _ORDER if level in found]


# Layers


def _shown(rows: Sequence[EntryDiff]) -> list[EntryDiff]:
    return [row for row in rows if row.is_tensor and row.renamed_to is None]


def _layers(rows: Sequence[EntryDiff]) -> list[_Layer]:
    """The lines to draw: layers are opened level by level, the cheapest level first, as long as there is room and something to see.

    A level is all layers of one key at the same depth, so that what is alike is shown alike. Beyond a few lines it is opened only if some
    layer has too many tensors for one line and those below have some; of too many layers neighbours are joined.
    """
    if not rows:
        return []
    shown = [_tree(rows)]
    while True:
        levels: dict[tuple[str, int], list[_Layer]] = {}
        for layer in shown:
            if layer.children:
                levels.setdefault((layer.prefix.partition("/")[0], layer.depth), []).append(layer)
        steps = {place: _step(level, len(shown) - len(level)) for place, level in levels.items()}
        openable = [place for place, step in steps.items() if step]
        if not openable:
            return shown
        chosen = min(openable, key=lambda place: (steps[place], sum(len(layer.children) for layer in levels[place])))
        those = {id(layer) for layer in levels[chosen]}
        shown = [other for layer in shown for other in (layer.opened(steps[chosen]) if id(layer) in those else [layer])]


def _step(level: Sequence[_Layer], others: int) -> int:
    """How many neighbours to join if a level is opened beside so many other lines; 0 if it is not to be opened."""

    def lines(step: int) -> int:
        return others + sum(bool(layer.own) - (-len(layer.children) // step) for layer in level)

    if lines(1) <= _FEW_LINES:
        return 1
    most = max(len(layer.rows) for layer in level)
    if most <= _MOST_CELLS or sum(len(layer.rows) for layer in level) < _LEAST_TENSORS * sum(len(layer.children) for layer in level):
        return 0
    return next((step for step in range(1, most + 1) if lines(step) <= _MOST_LINES), 0)


def _tree(rows: Sequence[EntryDiff]) -> _Layer:
    root = _Layer("", 0)
    for row in rows:
        layer = root
        layer.rows.append(row)
        for depth, end in enumerate(_ends(row.entry), 1):
            prefix = row.entry[:end]
            below = layer.children.get(prefix)
            if below is None:
                below = layer.children[prefix] = _Layer(prefix, depth)
            layer = below
            layer.rows.append(row)
        layer.own.append(row)
    return root


def _ends(path: str) -> Iterator[int]:
    """Where the prefixes of a path end: before each ``/`` and ``.``, but not too many."""
    for number, found in enumerate(re.finditer("[./]", path)):
        if number == _DEEPEST:
            return
        yield found.start()


def _name(layer: _Layer) -> str:
    name = paths.printable(layer.prefix) or "all"
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]


def _width(text: str) -> float:
    """About how wide a text is, in pixels."""
    return sum(_LETTER if ord(letter) < _FIRST_WIDE else _WIDE_LETTER for letter in text)


def _sum(rows: Sequence[EntryDiff]) -> str:
    differing = sum(row.change != "same" for row in rows)
    if not differing:
        return "same"
    most = _most_changed(rows)
    if most is None or most.statistics is None:
        return f"{differing:,} of {len(rows):,}"
    if most.statistics.has_new_odd:
        found = "NaN or inf came"
    elif math.isinf(most.statistics.relative):
        found = "was zero"
    else:
        found = f"up to {show.number(most.statistics.relative)}"
    return f"{differing:,} of {len(rows):,}, {found}"


def _most_changed(rows: Sequence[EntryDiff]) -> EntryDiff | None:
    """The tensor that tells most of how far these changed, of those that were measured and did."""
    return min((row for row in rows if row.statistics is not None and _tells(row.statistics)), key=show.by_change, default=None)


def _tells(found: Statistics) -> bool:
    return found.has_new_odd or (found.changed_elements > 0 and not math.isnan(found.relative))


# Cells


def _cells(rows: Sequence[EntryDiff]) -> Iterator[tuple[str, str]]:
    """Level and title of each cell of a layer."""
    count = min(len(rows), _MOST_CELLS)
    for number in range(count):
        group = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        yield _level(group), _title(group)


def _level(group: Sequence[EntryDiff]) -> str:
    most = _most_changed(group)
    if most is not None and most.statistics is not None:
        return _measured_level(most.statistics)
    changed = [row for row in group if row.change == "changed"]
    if not changed:
        return _level_of_others([row for row in group if row.change != "same"])
    if any(not set(row.differs) <= {"content", "layout"} for row in changed):
        return "otherwise"
    if not any("content" in row.differs for row in changed):
        return "layout"
    return "changed" if len(changed) == len(group) else "partly"


def _measured_level(found: Statistics) -> str:
    if found.has_new_odd:
        return "odd"
    return "zero" if math.isinf(found.relative) else f"step{sum(found.relative >= step for step in _STEPS)}"


def _level_of_others(differing: Sequence[EntryDiff]) -> str:
    """Of what was added or removed, or of nothing."""
    if differing and all(row.renamed_from is not None for row in differing):
        return "renamed"
    return differing[0].change if differing else "same"


def _title(group: Sequence[EntryDiff]) -> str:
    if len(group) == 1:
        return str(group[0])
    first, last = (paths.printable(row.entry) for row in (group[0], group[-1]))
    differing = sum(row.change != "same" for row in group)
    most = _most_changed(group)
    where = f"; most {most}" if most is not None else ""
    return f"{differing:,} of {len(group):,} differ, {first} … {last}{where}"


def _drawn(cells: Sequence[Sequence[tuple[str, str]]], left: int) -> Iterator[str]:
    """The cells, those of one level together: so each style is there once."""
    by_level: dict[str, list[str]] = {}
    for row, line in enumerate(cells):
        for column, (level, title) in enumerate(line):
            by_level.setdefault(level, []).append(_cell(level, left + column * _PITCH, _TOP + row * _PITCH, title))
    for level, drawn in by_level.items():
        yield f'<g style="{_STYLES[level]}">{"".join(drawn)}</g>'


def _cell(level: str, x: int, y: int, title: str = "") -> str:
    named = f"<title>{_escaped(_cut(title))}</title>" if title else ""
    inset = 1 if "stroke" in _STYLES[level] else 0  # its outline lies inside
    size = _SIZE - 2 * inset
    drawn = f'<rect x="{x + inset}" y="{y + inset}" width="{size}" height="{size}" rx="2">{named}</rect>'
    if level in _SIGNS:
        drawn += f'<path transform="translate({x} {y})" d="{_SIGNS[level]}" style="stroke:#fff;stroke-width:1.5;pointer-events:none"/>'
    return drawn


def _cut(title: str) -> str:
    return title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"


def _legend(levels: set[str], width: int, y: int) -> tuple[str, int]:
    """What the colours mean, on as many lines as that takes; and where it ends."""
    drawn = []
    x = 0
    for level in sorted(levels, key=_ORDER.index):
        room = 36 + math.ceil(_width(_NAMES[level]))
        if x and x + room > width:
            x, y = 0, y + _LINE_BELOW
        drawn.append(f'<g style="{_STYLES[level]}">{_cell(level, x, y - 12)}</g>')
        drawn.append(f'<text x="{x + 20}" y="{y}" style="{_FAINT}">{_escaped(_NAMES[level])}</text>')
        x += room
    return "".join(drawn), y + 14


def _spoken(heading: str, layers: Sequence[_Layer]) -> str:
    """The picture in a sentence, for those who do not see it."""
    rows = [row for layer in layers for row in layer.rows]
    most = _most_changed(rows)
    differing = sum(row.change != "same" for row in rows)
    where = f"; most {most}" if most is not None else ""
    return f"{heading}: {differing:,} of {len(rows):,} tensors differ, on {len(layers):,} lines{where}"


def _escaped(text: str) -> str:
    return html.escape(text)
