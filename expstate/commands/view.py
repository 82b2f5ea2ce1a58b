"""What a person sees: lines, pairs and tables, on a terminal with rich, elsewhere as plain text.

Every text goes through ``clean``: names and notes come from files that anybody may have written. Nothing is cut off: a terminal that is too
narrow folds a cell, or shows a row as pairs; what is not a terminal gets lines as long as they are.
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_NARROW = 12
"""Columns no wider than this are not folded."""
_GAP = 2
"""Between columns."""


def clean(text: str) -> str:
    r"""A text of one line that a terminal can be given.

    >>> clean("a\x1b[31m"), clean("exp\u202eres")
    ('a%1B[31m', 'exp%E2%80%AEres')
    """
    return paths.printable(text)


def clean_lines(text: str) -> str:
    """A text of any number of lines, each as ``clean`` has it; tabs become spaces."""
    return "\n".join(clean(line.expandtabs()) for line in text.replace("\r\n", "\n").split("\n"))


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal.

    >>> width_of("abc"), width_of("実験")
    (3, 4)
    """
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: what stands above it, and whether it holds numbers."""

    title: str
    is_number: bool = False


class View:
    """A place to show results in.

    Parameters
    ----------
    stream : text file
        Where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = _console(stream) if stream.isatty() else None

    def line(self, text: str = "") -> None:
        """A line of text."""
        self.text(clean(text))

    def text(self, text: str) -> None:
        """Text of several lines, as it is but for control characters."""
        self._stream.write(f"{clean_lines(text)}\n")

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values, a line each; a value may have several lines."""
        found = [(clean(name), clean_lines(value)) for name, value in rows]
        width = max((width_of(name) for name, _ in found), default=0)
        for name, value in found:
            gap = " " * (width - width_of(name) + 2)
            first, *others = value.split("\n")
            name_shown = name
            if self._console is not None:
                self._console.print(_text(name, "dim"), end="")
                name_shown = ""
            self._stream.write("\n".join([f"{name_shown}{gap}{first}", *(" " * (width + 2) + other for other in others)]) + "\n")

    def fits(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> bool:
        """Whether this can be shown as a table; what is not a terminal has room for everything."""
        if self._console is None:
            return True
        needed: int = sum(min(width, _NARROW) for width in _widths(columns, rows)) + _GAP * (len(columns) - 1)
        return needed <= int(self._console.width)

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
        """A table."""
        columns = [Column(clean(column.title), column.is_number) for column in columns]
        cells = [[clean(cell) for cell in row] for row in rows]
        if self._console is None:
            self._stream.write(_plain_table(columns, cells))
        elif self.fits(columns, cells):
            self._console.print(_rich_table(columns, cells))
        else:
            titles = [column.title for column in columns]
            for number, row in enumerate(cells):
                if number:
                    self.line()
                self.pairs((title, cell) for title, cell in zip(titles, row, strict=True) if cell)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(width_of(cell) for cell in (column.title, *(row[number] for row in rows))) for number, column in enumerate(columns)]


def _plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    lines = [[column.title for column in columns], *rows]
    widths = _widths(columns, rows)
    text = ""
    for line in lines:
        shown = []
        for cell, width, column in zip(line, widths, columns, strict=True):
            gap = " " * (width - width_of(cell))
            shown.append(gap + cell if column.is_number else cell + gap)
        text += (" " * _GAP).join(shown).rstrip() + "\n"
    return text


def _console(stream: TextIO) -> Any:
    """A console of rich, or None where it is not installed."""
    try:
        from rich.console import Console  # noqa: PLC0415 - takes 0.1 s, and is not needed for plain text
    except ImportError:
        return None
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) else None
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def _text(text: str, style: str) -> Any:
    from rich.text import Text  # noqa: PLC0415 - as above

    return Text(clean(text), style=style)


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    # Each column has a space before the border, which is another.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for column, width in zip(columns, _widths(columns, rows), strict=True):
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(Text(column.title), justify=justify, overflow="fold", min_width=min(width, _NARROW))
    for row in rows:
        table.add_row(*map(Text, row))
    return table
