"""Objects that only pickle can store: through ``torch.save``, and back through ``torch.load`` as safely as it can be.

Without ``trust`` they are read by ``torch.load(weights_only=True)``, on versions of torch where that mode holds; nothing falls back from
it to running what a file says.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from expstate.errors import PickleNotAllowedError, SnapshotCorruptError, UnknownClassError, UnsupportedValueError

_SAFE_SINCE = (2, 10)
_NOT_SAFE = f"torch {torch.__version__} cannot read pickled objects safely, 2.10 can"


@dataclass(frozen=True, slots=True)
class PickledObject:
    """An object as ``torch.save`` writes it.

    Attributes
    ----------
    data : bytes
        What ``unpickle_object`` takes.
    needs_trust : bool
        Whether only ``trust=True`` will bring it back, as far as can be told here.
    reason : str
        Why; empty if it does not.
    """

    data: bytes
    needs_trust: bool
    reason: str


def _version(text: str) -> tuple[int, ...]:
    """The release in a version of torch.

    >>> _version("2.13.0a0+git1234"), _version("2.9.1+cu128")
    ((2, 13), (2, 9))
    """
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def safe_mode_holds(version: str = torch.__version__) -> bool:
    """Whether ``weights_only=True`` of this version of torch can be relied on.

    >>> safe_mode_holds("2.9.1"), safe_mode_holds("2.10.0"), safe_mode_holds("3.0")
    (False, True, True)
    """
    return _version(version) >= _SAFE_SINCE


def pickle_object(value: Any) -> PickledObject:
    """Store an object through ``torch.save``, and try at once whether it can be read without trust.

    Raises
    ------
    UnsupportedValueError
        If it cannot be pickled; the message says why.

    Examples
    --------
    >>> pickle_object(print).needs_trust
    True
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        # __reduce__ of anything runs here and may raise anything.
        msg = f"{type(value).__module__}.{type(value).__qualname__} cannot be pickled: {_first_line(error)}"
        raise UnsupportedValueError(msg) from error
    data = buffer.getvalue()
    if not safe_mode_holds():
        return PickledObject(data, needs_trust=True, reason=_NOT_SAFE)
    try:
        _read_safely(data, "cpu")
    except Exception as error:  # noqa: BLE001 - whatever it is, it will be so at restore
        return PickledObject(data, needs_trust=True, reason=_reason(error))
    return PickledObject(data, needs_trust=False, reason="")


def unpickle_object(data: bytes | bytearray | memoryview, *, trust: bool) -> Any:
    """The object again; its tensors on devices that are absent here come to the CPU.

    Parameters
    ----------
    data : bytes
        What ``pickle_object`` gave, or what claims to be it.
    trust : bool
        Whether to let the data run code.

    Raises
    ------
    PickleNotAllowedError
        If it needs trust and there is none.
    UnknownClassError
        If it is trusted and its class or module is not here.
    SnapshotCorruptError
        If it cannot be read at all.
    """
    if trust:
        return _read_trusting(data)
    if not safe_mode_holds():
        msg = f"a pickled object needs trust=True, which lets the snapshot's author run code: {_NOT_SAFE}"
        raise PickleNotAllowedError(msg)
    _check_archive(data)
    try:
        return _read_safely(data, _place)
    except pickle.UnpicklingError as error:
        msg = f"a pickled object needs trust=True, which lets the snapshot's author run code: {_reason(error)}"
        raise PickleNotAllowedError(msg) from error
    except Exception as error:
        raise SnapshotCorruptError(_unreadable(error)) from error


def _read_safely(data: bytes | bytearray | memoryview, place: Any) -> Any:
    # torch.load believes the indices of sparse tensors unless it is told not to.
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.load(io.BytesIO(data), map_location=place, weights_only=True)


def _read_trusting(data: bytes | bytearray | memoryview) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location=_place, weights_only=False)
    except (ImportError, AttributeError) as error:
        msg = f"a pickled object is of a class that is not here: {_first_line(error)}"
        raise UnknownClassError(msg) from error
    except Exception as error:
        raise SnapshotCorruptError(_unreadable(error)) from error


def _check_archive(data: bytes | bytearray | memoryview) -> None:
    """Refuse what ``torch.save`` does not write, among it archives that unpack to more than they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except Exception as error:
        raise SnapshotCorruptError(_unreadable(error)) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(member.file_size for member in members) > len(data):
        raise SnapshotCorruptError(_unreadable("its archive is packed"))


def _place(storage: Any, location: str) -> Any:
    try:
        device = torch.device(location)
        module = torch.get_device_module(device)
        here = module.is_available() and (device.index or 0) < module.device_count()
    except (RuntimeError, AttributeError):
        here = False
    # None lets torch.load move it to where it was.
    return None if here and device.type != "cpu" else storage


def _reason(error: BaseException) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return _first_line(error)
    return f"it holds {found[1]}, which is neither plain nor allowed by torch.serialization.add_safe_globals"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _unreadable(error: BaseException | str) -> str:
    return f"a pickled object cannot be read: {error if isinstance(error, str) else _first_line(error)}"
