"""A tensor's card: how its values are distributed, read on demand, slice by slice.

Gets a snapshot and an entry; hands on counts, moments and a histogram as plain JSON. A tensor that fits is read once and kept until the
histogram is made; a larger one is read twice, so that what is held never exceeds two slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expstate.engine.report import bytes_text
from expstate.errors import InvalidArgumentError
from expstate.notebook.browser import texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from expstate.format.manifest import TensorEntry
    from expstate.snapshot import Snapshot

SLICE_BYTES = 16 * 2**20
"""Bytes that are read at once."""
KEPT_BYTES = 64 * 2**20
"""Bytes of a tensor that is not read a second time."""
LONGEST_ROW_BYTES = 256 * 2**20
"""Bytes of one row of the first dimension, the least that can be read."""
BINS = 48
_CHUNK = 2**20
"""Elements that are turned into double precision at once."""


@dataclass
class _Moments:
    """What is known of the values so far; sums are of those that are finite."""

    count: int = 0
    finite: int = 0
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: torch.Tensor) -> None:
        """Count values of double precision, by Chan's way of joining two means."""
        self.count += values.numel()
        nan = int(values.isnan().sum())
        finite = values[values.isfinite()]
        self.nan += nan
        self.infinite += values.numel() - nan - finite.numel()
        if not finite.numel():
            return
        self.zeros += finite.numel() - int(torch.count_nonzero(finite))
        low, high = (float(bound) for bound in torch.aminmax(finite))
        self.low, self.high = min(self.low, low), max(self.high, high)
        mean = float(finite.mean())
        squares = float((finite - mean).square().sum())
        total = self.finite + finite.numel()
        apart = mean - self.mean
        self.mean += apart * finite.numel() / total
        self.squares += squares + apart * apart * self.finite * finite.numel() / total
        self.finite = total

    @property
    def std(self) -> float:
        """Of the values themselves, not estimated for more of them."""
        return math.sqrt(self.squares / self.finite) if self.finite else math.nan


def card(snapshot: Snapshot, entry: TensorEntry, progress: Callable[[int, int], object] | None = None) -> dict[str, Any]:
    """The values of a tensor.

    Parameters
    ----------
    snapshot : Snapshot
        Where it is.
    entry : TensorEntry
        The tensor or array.
    progress : callable, optional
        Told the bytes that were read and those that will be; what it raises ends the reading.

    Returns
    -------
    dict
        ``path``, ``form``, ``stats`` as pairs of name and text, ``bins`` as counts and their bounds ``low`` and ``high``; of a tensor whose
        values are no numbers only path and form, and ``note`` that says so.

    Raises
    ------
    SnapshotCorruptError
        If its bytes are damaged.
    InvalidArgumentError
        If one row of it is too large to be looked at.
    """
    begin = {"path": texts.clean(entry.path, 1000), "form": f"{texts.shape(entry.shape)} {texts.clean(entry.dtype)}"}
    if entry.kind == "numpy" and _numpy_kind(entry.dtype) not in "biufc":
        return begin | {"note": "its values are no numbers"}
    if 0 in entry.shape:
        return begin | {"note": "it has no elements"}
    reader = _Reader(snapshot, entry, progress)
    moments = _Moments()
    for values in reader.values():
        moments.add(values)
    bins = torch.zeros(BINS, dtype=torch.float64)
    if moments.finite and moments.high > moments.low:
        for values in reader.values():
            inside = values[values.isfinite()]
            # Halves, as the span of very large values would be infinite.
            scaled = ((inside / 2 - moments.low / 2) / (moments.high / 2 - moments.low / 2) * BINS).long().clamp_(0, BINS - 1)
            bins += torch.bincount(scaled, minlength=BINS)
    elif moments.finite:
        bins[BINS // 2] = moments.finite
    return begin | {
        "stats": _stats(moments),
        "bins": [int(count) for count in bins],
        "low": _number(moments.low) if moments.finite else "",
        "high": _number(moments.high) if moments.finite else "",
        "note": "of the absolute values" if reader.is_complex else "",
    }


class _Reader:
    """The values of one tensor in double precision, chunk by chunk, as often as they are wanted."""

    def __init__(self, snapshot: Snapshot, entry: TensorEntry, progress: Callable[[int, int], object] | None) -> None:
        self._snapshot = snapshot
        self._entry = entry
        self._progress = progress
        self._kept: list[torch.Tensor] | None = [] if entry.nbytes <= KEPT_BYTES else None
        self._has_all = False
        self._done = 0
        self._total = entry.nbytes if self._kept is not None else 2 * entry.nbytes
        self.is_complex = False

    def values(self) -> Iterator[torch.Tensor]:
        for piece in self._pieces():
            flat = piece.reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                part = flat[start : start + _CHUNK]
                if part.is_complex():
                    self.is_complex = True
                    part = part.to(torch.complex128).abs()
                yield part.to(torch.float64)

    def _pieces(self) -> Iterator[torch.Tensor]:
        if self._has_all and self._kept is not None:
            yield from self._kept
            return
        for rows in self._rows():
            found = self._snapshot.read_object(self._entry.path, rows=rows, device="cpu")
            piece = found if isinstance(found, torch.Tensor) else torch.from_numpy(found)
            if self._kept is not None:
                self._kept.append(piece)
            yield piece
            self._done += piece.numel() * piece.element_size()
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)
        self._has_all = True

    def _rows(self) -> Iterator[slice | None]:
        entry = self._entry
        if not entry.shape:
            yield None
            return
        row_bytes = entry.nbytes // entry.shape[0]
        if row_bytes > LONGEST_ROW_BYTES:
            msg = f"one row of {texts.clean(entry.path)!r} has {bytes_text(row_bytes)}, which is more than is read for a card"
            raise InvalidArgumentError(msg)
        step = max(1, SLICE_BYTES // max(1, row_bytes))
        for start in range(0, entry.shape[0], step):
            yield slice(start, min(start + step, entry.shape[0]))


def _numpy_kind(dtype: str) -> str:
    return dtype[1:2] if dtype[:1] in "<>|=" else "?"


def _stats(moments: _Moments) -> list[list[str]]:
    found = [
        ["mean", _number(moments.mean) if moments.finite else "-"],
        ["std", _number(moments.std) if moments.finite else "-"],
        ["min", _number(moments.low) if moments.finite else "-"],
        ["max", _number(moments.high) if moments.finite else "-"],
        ["zeros", _share(moments.zeros, moments.count)],
        ["NaN", _share(moments.nan, moments.count)],
    ]
    return [*found, ["inf", _share(moments.infinite, moments.count)]] if moments.infinite else found


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _share(count: int, total: int) -> str:
    return f"{count:,}" if count in {0, total} or count < 1000 else f"{count / total:.1%}"  # noqa: PLR2004 - more digits than are read at once
