"""What is known of two snapshots besides their state: metadata, classes of the keys, provenance; only what differs.

Gets two manifests; hands on named facts with both values. Nothing here belongs to live state, of which nothing of the kind is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from expstate.diff.compare import is_same_json
from expstate.diff.show import decoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from expstate.format.manifest import Manifest

_FIRST = ("project", "git", "python", "torch", "accelerator", "host", "packages")
"""Parts of the provenance in the order in which people ask for them; others follow."""

_DEEPEST = 6


class FactDiff(msgspec.Struct, frozen=True):
    """Something known of a snapshot that is different in the other.

    Attributes
    ----------
    name : str
        Such as ``step``, ``param.lr``, ``metric.loss``, ``class.model``, ``git.commit`` or ``packages.torch``.
    change : str
        ``added``, ``removed`` or ``changed``.
    old, new : Any
        The values; None where there is none.
    """

    name: str
    change: str
    old: Any
    new: Any


def compare_facts(old: Manifest, new: Manifest) -> tuple[FactDiff, ...]:
    """What was said of two snapshots at their takes and differs; what always differs (id, time, duration, digest) is left out."""
    return tuple(_differing(dict(_facts(old)), dict(_facts(new))))


def compare_classes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[FactDiff, ...]:
    """The classes of keys that both have and that differ."""
    return tuple(FactDiff(f"class.{key}", "changed", old[key], name) for key, name in new.items() if old.get(key, name) != name)


def _facts(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    given = manifest.metadata
    yield from ((name, value) for name in ("name", "step", "note") if (value := getattr(given, name)) is not None)
    if given.tags:
        yield "tags", sorted(given.tags)
    yield from ((f"param.{name}", value) for name, value in given.params.items())
    yield from ((f"metric.{name}", value) for name, value in given.metrics.items())
    yield from ((f"class.{record.key}", record.type) for record in manifest.keys)
    yield "world_size", manifest.world_size
    yield "writer", manifest.writer
    provenance = manifest.provenance
    for name in (*(name for name in _FIRST if name in provenance), *(name for name in provenance if name not in _FIRST)):
        yield from _flat(name, provenance[name], _DEEPEST)


def _flat(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value or depth == 0:
        yield name, value
        return
    for part, item in value.items():
        yield from _flat(f"{name}.{part}", item, depth - 1)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[FactDiff]:
    for name in _merged(old, new):
        if name in old and name in new:
            if not is_same_json(old[name], new[name]):
                yield FactDiff(name, "changed", _value(name, old[name]), _value(name, new[name]))
        elif not name.startswith("class."):  # keys that only one side has are told by its entries
            yield FactDiff(name, "added" if name in new else "removed", _value(name, old.get(name)), _value(name, new.get(name)))


def _merged(old: Iterable[str], new: Mapping[str, Any]) -> list[str]:
    """The names of both, those that only the older has before the next that both have."""
    result: list[str] = []
    waiting = iter(new)
    for name in old:
        if name in new:
            for other in waiting:
                result.append(other)
                if other == name:
                    break
        result.append(name)
    return list(dict.fromkeys([*result, *waiting]))


def _value(name: str, value: Any) -> Any:
    return decoded(value) if name.startswith(("param.", "metric.")) else value
