"""What the taker says of a snapshot: checked and put into the manifest's form before anything is written."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import InvalidMetadataError
from expstate.format import names
from expstate.format.manifest import Metadata
from expstate.state.values import NotPlainError, encode, encode_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NOTE_BYTES = 1024 * 1024
_DEPTH = 300
"""Most levels of lists and objects in the manifest's form of a param; a dict makes three."""


def make_metadata(
    *,
    name: str | None,
    tags: Iterable[str],
    params: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    note: str | None,
    step: int | None,
) -> Metadata:
    """Check what was given to a take.

    Parameters
    ----------
    name, note : str, optional
        A name, which refs can use, and a free text.
    tags : iterable of str
        Labels; repeated ones count once.
    params : mapping of str to plain values, optional
        Settings of the experiment.
    metrics : mapping of str to numbers, optional
        Measured values: numbers, 0-d tensors, NumPy scalars.
    step : int, optional
        Step of the training.

    Raises
    ------
    InvalidNameError
        If the name or a tag has characters that refs cannot carry.
    InvalidMetadataError
        If another value cannot be recorded.
    """
    if isinstance(tags, str) or not hasattr(tags, "__iter__"):
        msg = f"tags must be a list of texts, got {'the text ' if isinstance(tags, str) else ''}{tags!r}"
        raise InvalidMetadataError(msg)
    return Metadata(
        name=None if name is None else names.check_label(name, "name"),
        tags=tuple(dict.fromkeys(names.check_label(tag, "tag") for tag in tags)),
        params=_named(params, "param", _plain),
        metrics=_named(metrics, "metric", number),
        note=None if note is None else _note(note),
        step=None if step is None else _step(step),
    )


def _note(note: object) -> str:
    if not isinstance(note, str) or len(note.encode("utf-8", "surrogatepass")) > _NOTE_BYTES:
        msg = "a note must be a text of at most 1 MiB"
        raise InvalidMetadataError(msg)
    if names.has_lone_surrogates(note):
        msg = "a note must not hold lone surrogates"
        raise InvalidMetadataError(msg)
    return str.__str__(note)


def _named(values: Mapping[str, Any] | None, what: str, convert: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not hasattr(values, "items"):
        msg = f"{what}s must be a dict, got {type(values).__name__}"
        raise InvalidMetadataError(msg)
    found = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key or names.has_lone_surrogates(key):
            msg = f"a {what} needs a name, got {key!r}"
            raise InvalidMetadataError(msg)
        found[str.__str__(key)] = convert(f"{what} {key!r}", value)
    return found


def _plain(what: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = _item(what, value)
    try:
        encoded = encode_tree(value)
    except (NotPlainError, RecursionError) as error:
        msg = f"{what} cannot be recorded: {error}; give a number, a text, or a list or dict of these"
        raise InvalidMetadataError(msg) from None
    if _is_deeper(encoded, _DEPTH):
        msg = f"{what} cannot be recorded: it is nested too deeply to be read again"
        raise InvalidMetadataError(msg)
    return encoded


def _is_deeper(encoded: Any, levels: int) -> bool:
    parts = encoded.values() if isinstance(encoded, dict) else encoded if isinstance(encoded, list) else ()
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _item(what: str, tensor: torch.Tensor) -> Any:
    """The value of a 0-d tensor."""
    if tensor.is_meta:
        msg = f"{what} is a tensor on the meta device, which has no value"
        raise InvalidMetadataError(msg)
    return tensor.item()


def number(what: str, value: Any) -> Any:
    """A metric in the manifest's form; ``InvalidMetadataError`` if it is no number."""
    np = sys.modules.get("numpy")
    found = value
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        found = _item(what, value)
    elif np is not None and isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        # Not by its item: a float longer than Python's has none, and that of a time may be a number.
        found = float(value) if value.dtype.kind == "f" else int(value) if value.dtype.kind in "biu" else value
    if isinstance(found, (int, float)):
        return encode(float(found) if isinstance(found, float) else int(found))
    msg = f"{what} must be a number, got {type(found).__name__}"
    raise InvalidMetadataError(msg)


def _step(value: Any) -> int:
    step = value
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        step = _item("step", value)
    try:
        found = None if isinstance(step, (bool, torch.Tensor)) else operator.index(step)
    except TypeError:
        found = None
    if found is None or not -(2**63) <= found < 2**63:
        # Python writes no number of thousands of digits out.
        msg = f"step must be an int of 64 bits, got {repr(value) if found is None else hex(found)[:80]}"
        raise InvalidMetadataError(msg)
    return found
