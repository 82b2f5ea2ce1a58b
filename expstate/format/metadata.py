"""What the taker says of a snapshot: checked and put into the manifest's form before anything is written."""

from __future__ import annotations

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
    if note is not None and (not isinstance(note, str) or len(note.encode("utf-8", "surrogatepass")) > _NOTE_BYTES):
        msg = "a note must be a text of at most 1 MiB"
        raise InvalidMetadataError(msg)
    if note is not None and encode(note) != note:
        msg = "a note must not hold lone surrogates"
        raise InvalidMetadataError(msg)
    return Metadata(
        name=None if name is None else names.check_label(name, "name"),
        tags=tuple(dict.fromkeys(names.check_label(tag, "tag") for tag in tags)),
        params=_named(params, "param", _plain),
        metrics=_named(metrics, "metric", number),
        note=note,
        step=None if step is None else _step(step),
    )


def _named(values: Mapping[str, Any] | None, what: str, convert: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not hasattr(values, "items"):
        msg = f"{what}s must be a dict, got {type(values).__name__}"
        raise InvalidMetadataError(msg)
    found = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key or encode(key) != key:
            msg = f"a {what} needs a name, got {key!r}"
            raise InvalidMetadataError(msg)
        found[key] = convert(f"{what} {key!r}", value)
    return found


def _plain(what: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.item()
    try:
        return encode_tree(value)
    except (NotPlainError, RecursionError) as error:
        msg = f"{what} cannot be recorded: {error}; give a number, a text, or a list or dict of these"
        raise InvalidMetadataError(msg) from None


def number(what: str, value: Any) -> Any:
    """A metric in the manifest's form; ``InvalidMetadataError`` if it is no number."""
    np = sys.modules.get("numpy")
    if (isinstance(value, torch.Tensor) and value.dim() == 0) or (
        np is not None and isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0
    ):
        value = value.item()
    if isinstance(value, (int, float)):
        return encode(float(value) if isinstance(value, float) else int(value))
    msg = f"{what} must be a number, got {type(value).__name__}"
    raise InvalidMetadataError(msg)


def _step(value: Any) -> int:
    step = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    if isinstance(step, bool) or not hasattr(step, "__index__") or not -(2**63) <= int(step) < 2**63:
        msg = f"step must be an int of 64 bits, got {value!r}"
        raise InvalidMetadataError(msg)
    return int(step)
