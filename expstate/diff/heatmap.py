"""Where two states differ, layer by layer: a heat-map as SVG.

Gets the rows of a comparison; hands on a picture of at most so many layers and cells, however many tensors there are. Layers are the
prefixes of names; a layer with too many tensors is drawn in cells of several each.
"""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING

from expstate.diff import show
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expstate.diff.report import EntryDiff

_MOST_LAYERS = 32
_MOST_CELLS = 32
_DEEPEST = 8
_LONGEST_NAME = 36
_LONGEST_TITLE = 200

_PITCH, _SIZE = 17, 15
_LEFT, _TOP, _RIGHT = 232, 26, 96
_TENSORS = {"tensor", "parameter", "numpy"}

_TEXT = "fill:var(--jp-ui-font-color1,currentColor)"
_FAINT = "fill:var(--jp-ui-font-color2,currentColor);fill-opacity:.75"
_HOT = "fill:var(--jp-warn-color1,#f57c00);fill-opacity:"
_STEPS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_OPACITIES = (".16", ".3", ".46", ".64", ".82", "1")
_STYLES = {
    "same": "fill:var(--jp-border-color1,#9e9e9e);fill-opacity:.28",
    **{f"step{number}": _HOT + opacity for number, opacity in enumerate(_OPACITIES)},
    "partly": f"{_HOT}.4",
    "changed": f"{_HOT}.9",
    "otherwise": "fill:var(--jp-brand-color1,#1976d2);fill-opacity:.75",
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
    "partly": "some changed",
    "changed": "changed",
    "otherwise": "other shape, dtype or kind",
    "added": "added",
    "removed": "removed",
}
_ORDER = list(_NAMES)


class _Layer:
    """A prefix of names: the tensors directly below it, all below it, and longer prefixes."""

    def __init__(self, prefix: str, parent: _Layer | None) -> None:
        self.prefix = prefix
        self.parent = parent
        self.children: dict[str, _Layer] = {}
        self.own: list[EntryDiff] = []
        self.rows: list[EntryDiff] = []

    def opened(self) -> list[_Layer]:
        """The layers to show instead of this one."""
        found = list(self.children.values())
        if self.own:
            rest = _Layer(self.prefix, self)
            rest.rows = self.own
            found.insert(0, rest)
        return found


def as_svg(rows: Sequence[EntryDiff], *, has_statistics: bool) -> str:
    """The heat-map of a comparison; empty if there are no tensors.

    Parameters
    ----------
    rows : sequence of EntryDiff
        All entries, in order; what is no tensor is left out.
    has_statistics : bool
        Whether changed tensors were read: then colours say how far they changed, else only whether.
    """
    tensors = [row for row in rows if row.kind in _TENSORS]
    if not tensors:
        return ""
    layers = _layers(tensors)
    cells = [list(_cells(layer.rows)) for layer in layers]
    columns = max(map(len, cells))
    legend = _legend({cell[0] for line in cells for cell in line}, _TOP + len(layers) * _PITCH + 20)
    width = _LEFT + max(columns * _PITCH, 17 * _PITCH) + _RIGHT
    height = _TOP + len(layers) * _PITCH + 34
    heading = "Relative change (L2) of each tensor, by layer" if has_statistics else "Tensors that differ, by layer"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{_escaped(_spoken(heading, layers))}" width="{width}"',
        f' height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%;height:auto;display:block;margin:6px 0;',
        'font:11px var(--jp-ui-font-family,sans-serif)">',
        f'<text x="0" y="13" style="{_TEXT};font-weight:600">{heading}</text>',
        *(_line(layer, number, columns) for number, layer in enumerate(layers)),
        *_drawn(cells),
        legend,
        "</svg>",
    ]
    return "".join(parts)


# Layers


def _layers(rows: Sequence[EntryDiff]) -> list[_Layer]:
    """As many layers as there is room for: siblings are opened together, those with most tensors first."""
    root = _Layer("", None)
    for row in rows:
        layer = root
        layer.rows.append(row)
        for end in _ends(row.entry):
            prefix = row.entry[:end]
            below = layer.children.get(prefix)
            if below is None:
                below = layer.children[prefix] = _Layer(prefix, layer)
            layer = below
            layer.rows.append(row)
        layer.own.append(row)
    shown = [root]
    while True:
        groups: dict[int, list[_Layer]] = {}
        for layer in shown:
            if layer.children:
                groups.setdefault(id(layer.parent), []).append(layer)
        fitting = [group for group in groups.values() if len(shown) + sum(len(layer.opened()) - 1 for layer in group) <= _MOST_LAYERS]
        if not fitting:
            return shown
        chosen = {id(layer) for layer in max(fitting, key=lambda group: sum(len(layer.rows) for layer in group))}
        shown = [other for layer in shown for other in (layer.opened() if id(layer) in chosen else [layer])]


def _ends(path: str) -> Iterator[int]:
    """Where the prefixes of a path end: before each ``/`` and ``.``, but not too many."""
    for number, found in enumerate(re.finditer("[./]", path)):
        if number == _DEEPEST:
            return
        yield found.start()


def _line(layer: _Layer, number: int, columns: int) -> str:
    y = _TOP + number * _PITCH + _SIZE - 4
    name = paths.printable(layer.prefix) or "all"
    shown = name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]
    right = _LEFT + columns * _PITCH + 6
    return (
        f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end" style="{_TEXT}">{_escaped(shown)}<title>{_escaped(name)}</title></text>'
        f'<text x="{right}" y="{y}" style="{_FAINT}">{_escaped(_sum(layer.rows))}</text>'
    )


def _sum(rows: Sequence[EntryDiff]) -> str:
    differing = sum(row.change != "same" for row in rows)
    largest = _largest(rows)
    if not differing:
        return "same"
    counted = f"{differing:,} of {len(rows):,}"
    return counted if largest is None else f"{counted}, {show.number(largest[0])}"


def _largest(rows: Sequence[EntryDiff]) -> tuple[float, str] | None:
    """The largest relative change and where it is."""
    found = [(row.statistics.relative, row.entry) for row in rows if row.statistics is not None and not math.isnan(row.statistics.relative)]
    return max(found, default=None)


# Cells


def _cells(rows: Sequence[EntryDiff]) -> Iterator[tuple[str, str]]:
    """Level and title of each cell of a layer."""
    count = min(len(rows), _MOST_CELLS)
    for number in range(count):
        group = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        yield _level(group), _title(group)


def _level(group: Sequence[EntryDiff]) -> str:
    largest = _largest(group)
    if largest is not None:
        return f"step{sum(largest[0] >= step for step in _STEPS)}"
    changes = [row.change for row in group]
    if any(row.change == "changed" and not _is_content_alone(row) for row in group):
        return "otherwise"
    if "changed" in changes:
        return "changed" if all(change == "changed" for change in changes) else "partly"
    return next((change for change in ("added", "removed") if change in changes), "same")


def _is_content_alone(row: EntryDiff) -> bool:
    return set(row.differs) <= {"content", "layout"} and row.statistics is None


def _title(group: Sequence[EntryDiff]) -> str:
    if len(group) == 1:
        return str(group[0])
    largest = _largest(group)
    where = f", largest {show.number(largest[0])} in {paths.printable(largest[1])}" if largest is not None else ""
    first, last = (paths.printable(row.entry) for row in (group[0], group[-1]))
    differing = sum(row.change != "same" for row in group)
    return f"{differing:,} of {len(group):,} differ{where}: {first} … {last}"


def _drawn(cells: Sequence[Sequence[tuple[str, str]]]) -> Iterator[str]:
    """The cells, those of one level together: so each style is there once."""
    by_level: dict[str, list[str]] = {}
    for row, line in enumerate(cells):
        for column, (level, title) in enumerate(line):
            by_level.setdefault(level, []).append(_cell(level, _LEFT + column * _PITCH, _TOP + row * _PITCH, title))
    for level, drawn in by_level.items():
        yield f'<g style="{_STYLES[level]}">{"".join(drawn)}</g>'


def _cell(level: str, x: int, y: int, title: str = "") -> str:
    named = f"<title>{_escaped(title[:_LONGEST_TITLE])}</title>" if title else ""
    inset = 1 if level == "removed" else 0  # its outline lies inside
    size = _SIZE - 2 * inset
    drawn = f'<rect x="{x + inset}" y="{y + inset}" width="{size}" height="{size}" rx="2">{named}</rect>'
    if level == "added":  # told by more than its colour
        drawn += f'<path d="M{x + 4} {y + 7.5}h7M{x + 7.5} {y + 4}v7" style="stroke:#fff;stroke-width:1.5;pointer-events:none"/>'
    return drawn


def _legend(levels: set[str], y: int) -> str:
    drawn = []
    x = 0
    for level in sorted(levels, key=_ORDER.index):
        drawn.append(f'<g style="{_STYLES[level]}">{_cell(level, x, y - 12)}</g>')
        drawn.append(f'<text x="{x + 20}" y="{y}" style="{_FAINT}">{_escaped(_NAMES[level])}</text>')
        x += 34 + 6 * len(_NAMES[level])
    return "".join(drawn)


def _spoken(heading: str, layers: Sequence[_Layer]) -> str:
    """The picture in a sentence, for those who do not see it."""
    rows = [row for layer in layers for row in layer.rows]
    largest = _largest(rows)
    differing = sum(row.change != "same" for row in rows)
    where = f"; the largest is {show.number(largest[0])}, of {paths.printable(largest[1])}" if largest is not None else ""
    return f"{heading}: {differing:,} of {len(rows):,} tensors differ, in {len(layers):,} layers{where}"


def _escaped(text: str) -> str:
    return html.escape(text)
