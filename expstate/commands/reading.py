"""The verbs that read what is in snapshots, compare it, and bring it elsewhere or here: read, diff, copy, export, import."""

from __future__ import annotations

import pprint
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from expstate.commands.plain import plain
from expstate.commands.verb import EXPECT_DIGEST, REF, Verb, argument
from expstate.commands.view import Column
from expstate.diff import show
from expstate.engine.report import bytes_text, counted
from expstate.errors import InvalidArgumentError
from expstate.interop import import_dcp
from expstate.state.paths import matcher, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from expstate.commands.verb import Session
    from expstate.commands.view import View
    from expstate.diff.report import EntryDiff, SnapshotDiff
    from expstate.engine.export import ExportReport
    from expstate.snapshot import Snapshot

_WHOLE = 1000
"""Tensors of more elements are shown by their statistics."""
_WHOLE_JSON = 10_000
_NAMED = 3
_ROWS = 100


# read


@dataclass(frozen=True, slots=True)
class Value:
    """What was read: the entry's path and its value; where it was written to, if it was."""

    path: str
    value: Any
    file: str | None = None


def _rows(text: str) -> slice:
    first, colon, last = text.partition(":")
    try:
        return slice(int(first) if first else None, int(last) if last else None) if colon else slice(int(first), int(first) + 1 or None)
    except ValueError:
        msg = f"rows must be FIRST:LAST, got {printable(text)!r}"
        raise InvalidArgumentError(msg) from None


def _read(session: Session, arguments: argparse.Namespace) -> Value:
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None:
        if out.suffix != ".npy":
            msg = f"the file must end in .npy, got {arguments.out!r}; `expstate export` writes safetensors"
            raise InvalidArgumentError(msg)
        if out.exists():
            msg = f"a file {arguments.out!r} is there already, and nothing is overwritten"
            raise InvalidArgumentError(msg)
    rows = None if arguments.rows is None else _rows(arguments.rows)
    snapshot = session.snapshot(arguments.ref, arguments.expect_digest)
    value = snapshot.read_object(arguments.entry, rows=rows, device="cpu", trust=arguments.trust)
    if out is not None:
        _write_array(out, arguments.entry, value)
    return Value(arguments.entry, value, arguments.out)


def _write_array(out: Path, entry: str, value: Any) -> None:
    import numpy as np  # noqa: PLC0415 - NumPy is optional

    try:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    except (TypeError, RuntimeError) as error:
        msg = f"NumPy has no form for entry {entry!r}: {error}; `expstate export` writes safetensors"
        raise InvalidArgumentError(msg) from None
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        msg = f"entry {entry!r} is no tensor or array, but {type(value).__name__}"
        raise InvalidArgumentError(msg)
    with out.open("xb") as file:
        np.save(file, array, allow_pickle=False)


def _is_array(value: Any) -> bool:
    return (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray)


def _show_value(found: Value, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    value = found.value
    if isinstance(value, torch.Tensor):
        view.line(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}, {bytes_text(value.numel() * value.element_size())}")
        statistics = _statistics(value)
        if value.numel() > _WHOLE and statistics:
            view.pairs((name, f"{number:.6g}" if isinstance(number, float) else f"{number:,}") for name, number in statistics.items())
        view.text(_text_of(value.detach()))
    else:
        view.text(str(value) if isinstance(value, str) else _text_of(value))
    if found.file is not None:
        view.line(f"written to {found.file}")


def _text_of(value: Any) -> str:
    return repr(value) if isinstance(value, torch.Tensor) or _is_array(value) else pprint.pformat(value, sort_dicts=False)


def _statistics(tensor: torch.Tensor) -> dict[str, float | int]:
    """What can be said of many numbers; nothing of those that have no order."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or not tensor.numel():
        return {}
    try:
        numbers = tensor.detach().to(torch.float64)
    except (RuntimeError, NotImplementedError):
        return {}
    finite = numbers[numbers.isfinite()]
    found: dict[str, float | int] = {}
    if finite.numel():
        found = {name: getattr(finite, name)().item() for name in ("min", "max", "mean")}
        found["std"] = finite.std(correction=0).item()
    return found | {"zero": int((numbers == 0).sum()), "nan": int(numbers.isnan().sum()), "inf": int(numbers.isinf().sum())}


def _value_data(found: Value, arguments: argparse.Namespace) -> Any:
    del arguments
    return {"path": found.path, **_form(found.value), **({} if found.file is None else {"file": found.file})}


def _form(value: Any) -> dict[str, Any]:
    """A tensor or array as dtype, shape and values, or without values if it is large; any other value as it is."""
    if not isinstance(value, torch.Tensor) and not _is_array(value):
        return {"type": type(value).__name__, "value": _nested(value)}
    count = value.numel() if isinstance(value, torch.Tensor) else value.size
    form: dict[str, Any] = {
        "type": "tensor" if isinstance(value, torch.Tensor) else "array",
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
    }
    if count <= _WHOLE_JSON:
        return form | {"value": _listed(value)}
    return form | (_statistics(value) if isinstance(value, torch.Tensor) else {}) | {"value": None}


def _listed(value: Any) -> Any:
    try:
        return plain(value.tolist())
    except (RuntimeError, NotImplementedError, TypeError):
        pass
    try:
        return plain(value.to(torch.float64).tolist())  # an exotic float; all its values are values of this
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return repr(value)


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _nested(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nested(item) for item in value]
    return _form(value) if isinstance(value, torch.Tensor) or _is_array(value) else plain(value)


# diff


def _diff(session: Session, arguments: argparse.Namespace) -> SnapshotDiff:
    old, new = session.snapshot(arguments.ref), session.snapshot(arguments.other)
    difference = old.diff(new, stats=arguments.stats, content=arguments.content)
    return difference if arguments.top is None else difference.showing(arguments.top)


def _differing(difference: SnapshotDiff, arguments: argparse.Namespace) -> list[EntryDiff]:
    """The entries that differ, those that changed most first where that is known; only those that were asked for."""
    rows = [row for change in ("changed", "added", "removed") for row in difference.entries(change)]
    if arguments.only:
        matches = matcher(arguments.only)
        rows = [row for row in rows if matches(row.entry)]
    return sorted(rows, key=show.by_change) if difference.has_statistics else rows


def _show_diff(difference: SnapshotDiff, view: View, arguments: argparse.Namespace) -> None:
    view.line(difference.summary().partition("\n")[0])
    for fact in difference.metadata:
        view.line(f"  {show.fact_text(fact)}")
    rows = _differing(difference, arguments)
    most = _ROWS if difference.top is None else difference.top
    if rows:
        view.line()
        _show_rows(rows[:most], view, with_statistics=difference.has_statistics)
    if len(rows) > most:
        view.line(f"and {len(rows) - most:,} more, listed by --json")


def _diff_data(difference: SnapshotDiff, arguments: argparse.Namespace) -> Any:
    found = difference.to_dict()
    wanted = {row.entry for row in _differing(difference, arguments)}
    return found | {"entries": [row for row in found["entries"] if row["entry"] in wanted]}


def _show_rows(rows: Sequence[EntryDiff], view: View, *, with_statistics: bool) -> None:
    titles = [Column("entry"), Column("change"), Column("what")]
    if with_statistics:
        titles += [Column(name, is_number=True) for name in ("relative", "max", "cosine", "share")]
    cells = []
    for row in rows:
        # The statistics have columns of their own.
        bare = msgspec.structs.replace(row, statistics=None)
        text = show.row_text(bare)
        found = row.statistics
        if found is not None:
            texts = [*([text] if text != "content differs" else []), *show.odd_texts(found)]
            text = ", ".join(texts)
        if not with_statistics:
            numbers: list[str] = []
        elif found is None:
            numbers = [""] * 4
        else:
            numbers = [*map(show.number, (found.relative, found.max_abs, found.cosine)), f"{found.changed:.3g}"]
        cells.append([row.entry, row.change, text, *numbers])
    view.table(titles, cells)


# copy and export


def _copy(session: Session, arguments: argparse.Namespace) -> Snapshot:
    snapshot = session.snapshot(arguments.ref, arguments.expect_digest)
    return snapshot.copy(arguments.dest, provenance=not arguments.no_provenance, catalog=arguments.catalog)


def _show_copy(copied: Snapshot, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.line(f"copied {copied.id[:8]} ({bytes_text(copied.nbytes)}) to {copied.path}")


def _export(session: Session, arguments: argparse.Namespace) -> ExportReport:
    snapshot = session.snapshot(arguments.ref, arguments.expect_digest)
    return snapshot.export(arguments.path, include=arguments.include or None, exclude=arguments.exclude or None)


def _show_export(report: ExportReport, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    tied = f" and {counted(report.tied, 'tied name')}" if report.tied else ""
    view.line(f"exported {counted(report.tensors, 'tensor')}{tied} ({bytes_text(report.nbytes)})")
    for file in report.files:
        view.line(f"  {file}")
    if report.left_out:
        more = len(report.left_out) - _NAMED
        others = f" and {more:,} more, listed by --json" if more > 0 else ""
        view.line(f"left out, as no tensors: {', '.join(report.left_out[:_NAMED])}{others}")


# import


def _import(session: Session, arguments: argparse.Namespace) -> Snapshot:
    del session  # the place of the catalog is all that is needed
    return import_dcp(
        arguments.source,
        arguments.dest,
        key=arguments.key,
        trust=arguments.trust,
        name=arguments.name,
        tags=arguments.tag or (),
        note=arguments.note,
        step=arguments.step,
        overwrite=arguments.overwrite,
        catalog=arguments.catalog,
    )


def _show_import(imported: Snapshot, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    keys = ", ".join(map(printable, imported.keys()))
    view.line(f"imported {imported.id[:8]} ({keys}; {bytes_text(imported.nbytes)}) to {imported.path}")


VERBS = (
    Verb(
        name="read",
        library="snapshot.read_object",
        help="Print an entry: a value, a tensor, or its statistics.",
        details="A tensor of more than 1,000 elements is shown by its statistics; with --json one of more than 10,000.",
        example="expstate read best model/0.bias --rows 0:4",
        arguments=(
            REF,
            argument("entry", metavar="ENTRY", help="the path of an entry, such as model/0.weight; `expstate show REF '*'` lists them"),
            argument("--rows", metavar="FIRST:LAST", help="only these rows of a tensor"),
            argument("--out", metavar="FILE.npy", help="write the tensor to a new file, as NumPy has it"),
            argument(
                "--trust", action="store_true", help="let an object that needs pickle run code: only if you trust who took the snapshot"
            ),
            EXPECT_DIGEST,
        ),
        call=_read,
        show=_show_value,
        data=_value_data,
        widens=True,
    ),
    Verb(
        name="diff",
        library="snapshot.diff",
        help="Compare two snapshots, entry by entry.",
        details="Digests say what is the same: no tensor is read, unless statistics are asked for.",
        example="expstate diff first best --stats",
        arguments=(
            REF,
            argument("other", nargs="?", default="latest", metavar="REF2", help="the newer snapshot (default: latest)"),
            argument("--stats", action="store_true", help="read the changed tensors: how far are they apart"),
            argument(
                "--content", action="store_true", help="read tensors that are cut into other shards, to see whether they are the same"
            ),
            argument("--top", type=int, metavar="N", help=f"show up to so many entries (default: {_ROWS})"),
            argument("--only", action="append", metavar="GLOB", help="show only entries that this matches; may be given several times"),
            argument("--exit-code", action="store_true", help="exit with 1 if an entry differs"),
        ),
        call=_diff,
        show=_show_diff,
        data=_diff_data,
        status=lambda difference, arguments: int(bool(difference) and arguments.exit_code),
        widens=True,
    ),
    Verb(
        name="copy",
        library="snapshot.copy",
        help="Copy a snapshot, verified on the way.",
        details="The copy is the same snapshot, with the same id.",
        example="expstate copy best archive/best",
        arguments=(
            REF,
            argument("dest", metavar="DEST", help="a folder to make, or one without a snapshot: a path or URL"),
            argument("--no-provenance", action="store_true", help="leave out where it came from; its manifest is then another"),
            EXPECT_DIGEST,
        ),
        call=_copy,
        show=_show_copy,
        data=lambda copied, _: {"id": copied.id, "url": copied.path, "nbytes": copied.nbytes},
        widens=True,
    ),
    Verb(
        name="export",
        library="snapshot.export",
        help="Write tensors as plain safetensors files for other tools.",
        details="Nothing else is in the files: no provenance, no values. What is left out is said.",
        example="expstate export best weights/model.safetensors --include 'model/*'",
        arguments=(
            REF,
            argument("path", metavar="PATH", help="a folder, for one file a key; or the one file, a name ending in .safetensors"),
            argument("--include", action="append", metavar="GLOB", help="only entries that this matches; may be given several times"),
            argument("--exclude", action="append", metavar="GLOB", help="not the entries that this matches"),
            EXPECT_DIGEST,
        ),
        call=_export,
        show=_show_export,
        widens=True,
    ),
    Verb(
        name="import",
        library="interop.import_dcp",
        help="Make a snapshot of a checkpoint folder of PyTorch's DCP.",
        details="The folder has a file .metadata and files .distcp. Nothing that is in them is run, unless you say --trust.",
        example="expstate import checkpoint imported/run-7 --name run-7",
        arguments=(
            argument("source", metavar="SOURCE", help="the checkpoint's folder"),
            argument("dest", metavar="DEST", help="a folder to make, or one without a snapshot: a path or URL"),
            argument("--name", metavar="NAME", help="what the snapshot is to be called"),
            argument("--tag", action="append", metavar="TAG", help="a label; may be given several times"),
            argument("--note", metavar="TEXT", help="a text about it"),
            argument("--step", type=int, metavar="N", help="the step of the training"),
            argument("--key", default="state", metavar="KEY", help="the key for what stands at the top of the checkpoint (default: state)"),
            argument("--overwrite", action="store_true", help="replace a snapshot that is there"),
            argument("--trust", action="store_true", help="let pickles in it run code: only if you trust who wrote the checkpoint"),
        ),
        call=_import,
        show=_show_import,
        data=lambda imported, _: {"id": imported.id, "url": imported.path, "keys": imported.keys(), "nbytes": imported.nbytes},
    ),
)
