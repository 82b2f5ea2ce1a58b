"""A snapshot for people: what is in it, as HTML that nothing from disk can turn into more than text."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from expstate.engine.report import bytes_text, size_text
from expstate.format.manifest import AliasEntry, ContainerEntry, Manifest, ObjectEntry, TensorEntry
from expstate.state import paths
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Sequence


def as_html(path: str, manifest: Manifest, nbytes: int, nbytes_written: int) -> str:
    """Name, facts and a table of the keys; everything is escaped."""
    given = manifest.metadata
    facts = [manifest.created_at[:19].replace("T", " ") + " UTC", size_text(nbytes, nbytes_written)]
    facts += [f"{name} {decode(value)}" for name, value in given.metrics.items()]
    if given.step is not None:
        facts.insert(0, f"step {given.step}")
    return (
        f"<b>{_text(given.name or manifest.id[:8])}</b> <code>{_text(path)}</code><br>{_text(' · '.join(facts))}"
        f"<table><tr><th>key</th><th>class</th><th>tensors</th><th>size</th></tr>{''.join(map(_row, _summary(manifest)))}</table>"
    )


def _text(found: str) -> str:
    return html.escape(paths.printable(found))


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<td style="text-align:left">{_text(cell)}</td>' for cell in cells) + "</tr>"


def _summary(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    rows = []
    for record in manifest.keys:
        root = paths.quote(record.key)
        entries = [entry for entry in manifest.entries if entry.path == root or entry.path.startswith(f"{root}/")]
        tensors = sum(isinstance(entry, TensorEntry) for entry in entries)
        others = sum(not isinstance(entry, (TensorEntry, ContainerEntry, AliasEntry)) for entry in entries)
        nbytes = sum(entry.nbytes for entry in entries if isinstance(entry, (TensorEntry, ObjectEntry)))
        count = f"{tensors:,}" if tensors or not others else f"{others:,} values"
        rows.append((record.key, record.type.rpartition(".")[2], count, bytes_text(nbytes)))
    return rows
