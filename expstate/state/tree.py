"""State dicts as lists of leaves, and leaves as state dicts.

``flatten`` walks nested containers in order and gives containers, plain values, arrays (tensors and NumPy arrays as tensors), aliases of
tied tensors and opaque objects, each with its path. ``build`` puts a value together again from the same kinds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from expstate.errors import ExpstateError, ManifestError, UnsupportedValueError
from expstate.state import codecs, numpy_arrays, packed, paths, sharding
from expstate.state.tensors import NAMES, is_plain_memory, is_same_memory
from expstate.state.values import NotPlainError, encode, is_long

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Container(msgspec.Struct, frozen=True, gc=False):
    """A value stored as parts: the name of its codec, the codec's metadata, and the value itself."""

    path: str
    type: str
    meta: Any
    value: Any


class Value(msgspec.Struct, frozen=True, gc=False):
    """A plain value and its JSON form."""

    path: str
    value: Any
    encoded: Any


class Array(msgspec.Struct, frozen=True, gc=False):
    """A tensor, or a NumPy array seen as one.

    ``tensor`` is strided and holds the bytes; ``dtype`` and ``shape`` are those of ``value``, the object in the state (equal to
    the tensor's but for NumPy dtypes that torch has not, which are bytes to torch). ``kind`` is ``tensor``, ``parameter`` or
    ``numpy``. ``address`` is where the bytes lie one after the other in host memory, or None if they do not.
    """

    path: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    value: Any
    requires_grad: bool = False
    address: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(self.tensor.nbytes)


class Sharded(msgspec.Struct, frozen=True, gc=False):
    """A tensor that several ranks hold together: ``parts`` are those of the whole (of ``shape``) that are here, as ``sharding`` gives them.

    ``holders`` are the global ranks that have the same parts, ``mesh`` the sizes of the mesh, ``device`` where parts are. ``value`` is the
    object in the state.
    """

    path: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[sharding.Part, ...]
    holders: tuple[int, ...]
    value: Any
    requires_grad: bool = False
    mesh: tuple[int, ...] = ()
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that are here."""
        return sum(part.tensor.nbytes for part in self.parts)

    @property
    def tensor(self) -> torch.Tensor:
        """The first part, or one without elements."""
        return self.parts[0].tensor if self.parts else torch.empty(0, device="cpu")

    @property
    def address(self) -> None:
        """None: the bytes of the whole do not lie here."""


class Alias(msgspec.Struct, frozen=True, gc=False):
    """A tensor tied to one that came before: the same memory, shape and strides."""

    path: str
    target: str
    value: Any


class Object(msgspec.Struct, frozen=True, gc=False):
    """A value that only ``torch.save`` can store."""

    path: str
    value: Any


Leaf = Container | Value | Array | Sharded | Alias | Object

_DENSE_TYPES = {torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor)}


class _Flattener:
    def __init__(self, *, allow_meta: bool) -> None:
        self.leaves: list[Leaf] = []
        self._allow_meta = allow_meta
        self._at: dict[int, list[Array]] = {}
        self._sharded_at: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()

    def add(self, path: str, value: Any) -> None:
        kind = type(value)
        if kind in _DENSE_TYPES:
            if value.layout is torch.strided and value.dtype in NAMES and not value.is_nested:
                self._add_tensor(path, value)
                return
        elif kind is not dict:
            try:
                self.leaves.append(Value(path, value, encode(value)))
            except NotPlainError:
                pass
            except RecursionError:
                self._fail(path, "is nested too deeply, or holds itself")
            else:
                return
        if sharding.is_sharded(value):
            self._add_sharded(path, value)
            return
        if self._add_parts(path, value):
            return
        if (array := numpy_arrays.as_tensor(value)) is not None:
            at = array.data_ptr() if is_plain_memory(array) else None
            self.leaves.append(Array(path, "numpy", value.dtype.str, tuple(value.shape), array, value, address=at))
        else:
            self._check_tensor(path, value)
            self.leaves.append(Object(path, value))

    def _add_tensor(self, path: str, tensor: torch.Tensor) -> None:
        if tensor.is_meta and not self._allow_meta:
            self._fail(path, "is on the meta device and has no values; materialise the module before the take")
        shape = tuple(tensor.shape)
        address = tensor.data_ptr()
        before = self._at.setdefault(address, []) if address else []
        for other in before:
            if other.shape == shape and is_same_memory(other.tensor, tensor):
                self.leaves.append(Alias(path, other.path, tensor))
                return
        kind = "parameter" if type(tensor) is torch.nn.Parameter else "tensor"
        bare = tensor.detach() if tensor.requires_grad else tensor
        at = address if is_plain_memory(tensor) else None
        array = Array(path, kind, NAMES[tensor.dtype], shape, bare, tensor, tensor.requires_grad, at)
        before.append(array)
        self.leaves.append(array)

    def _add_sharded(self, path: str, value: Any) -> None:
        if value.dtype not in NAMES:
            self._fail(path, f"has dtype {value.dtype}, which cannot be stored in shards")
        try:
            found = sharding.sharding_of(value)
        except UnsupportedValueError as error:
            self._fail(path, str(error))
        if found.device.type == "meta":
            self._fail(path, "is a sharded tensor on the meta device and has no values; give the module memory with to_empty() first")
        place = (found.shape, *((part.starts, part.sizes, part.tensor.data_ptr()) for part in found.parts))
        if found.parts and all(part.tensor.numel() for part in found.parts):
            before = self._sharded_at.setdefault(place, path)
            if before != path:
                self.leaves.append(Alias(path, before, value))
                return
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
        requires_grad = bool(getattr(value, "requires_grad", False))
        device = "cpu" if found.device.type == "cpu" else str(found.device)
        self.leaves.append(
            Sharded(path, kind, NAMES[value.dtype], found.shape, found.parts, found.holders, value, requires_grad, found.mesh, device)
        )

    def _add_parts(self, path: str, value: Any) -> bool:
        codec = packed.CODEC if is_long(value) else codecs.find(value)
        if codec is None:
            return False
        if id(value) in self._open:
            self._fail(path, "holds itself, which cannot be stored")
        try:
            meta, parts = codec.flatten(value)
        except NotPlainError:
            return False
        except UnsupportedValueError as error:
            self._fail(path, str(error))
        self.leaves.append(Container(path, codec.name, meta, value))
        self._open.add(id(value))
        for part, child in parts.items():
            self.add(f"{path}/{part}", child)
        self._open.discard(id(value))
        return True

    def _check_tensor(self, path: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        if value.device.type == "meta":
            self._fail(path, "is on the meta device and has no values; materialise the module before the take")
        if isinstance(value, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
            self._fail(path, "is a lazy parameter without a shape; run the module once before the take")

    @staticmethod
    def _fail(path: str, reason: str) -> None:
        msg = f"entry {path!r} {reason}"
        raise UnsupportedValueError(msg)


def flatten(key: str, state: Any, *, allow_meta: bool = False) -> list[Leaf]:
    """The leaves of a key's state, in order, each container before its parts.

    Parameters
    ----------
    key : str
        The key in the app state.
    state : Any
        What its ``state_dict()`` gave.
    allow_meta : bool, default False
        Whether dense tensors may be on the meta device: to restore over, not to take.

    Raises
    ------
    UnsupportedValueError
        If something in it cannot be stored at all; the message names its path.

    Examples
    --------
    >>> [leaf.path for leaf in flatten("model", {"layers": {"0.weight": torch.zeros(2)}, "epoch": 3})]
    ['model', 'model/layers', 'model/layers/0.weight', 'model/epoch']
    """
    flattener = _Flattener(allow_meta=allow_meta)
    try:
        flattener.add(paths.quote(key), state)
    except RecursionError:
        msg = f"the state of {key!r} is nested too deeply"
        raise UnsupportedValueError(msg) from None
    return flattener.leaves


def flatten_items(items: Iterable[tuple[str, Any]]) -> list[Leaf]:
    """The leaves of several values, each at a path of its own; what is tied among them is an alias.

    Raises
    ------
    UnsupportedValueError
        As for ``flatten``.

    Examples
    --------
    >>> weight = torch.zeros(2)
    >>> [type(leaf).__name__ for leaf in flatten_items([("model/encoder", weight), ("model/decoder", weight), ("model/epoch", 3)])]
    ['Array', 'Alias', 'Value']
    """
    flattener = _Flattener(allow_meta=False)
    for path, value in items:
        try:
            flattener.add(path, value)
        except RecursionError:
            msg = f"entry {path!r} is nested too deeply"
            raise UnsupportedValueError(msg) from None
    return flattener.leaves


class Part(NamedTuple):
    """What ``build`` is given for a path: a container's codec and metadata, or with no ``type`` the finished value."""

    path: str
    type: str | None
    meta: Any
    value: Any


def build(parts: Sequence[Part], live: Mapping[str, Any], kept: Mapping[str, Part] | None = None) -> Any:
    """Put a value together from its parts.

    Parameters
    ----------
    parts : sequence of Part
        Each container before what is in it; the first is the whole.
    live : mapping of str to Any
        The objects now at these paths. An opaque object all of whose parts are the live ones is kept as it is.
    kept : mapping of str to Part, optional
        Live containers that are restored only in part: what the snapshot does not bring stays.

    Returns
    -------
    Any
        The value of the first path.

    Raises
    ------
    ManifestError
        If the parts do not make a value.
    """
    children: dict[str, list[tuple[str, Any]]] = {}
    result: Any = None
    for path, kind, meta, value in reversed(parts):
        if kind is not None:
            found = dict(reversed(children.pop(path, [])))
            value = _build_container(path, codecs.by_name(kind), meta, found, live, kept)  # noqa: PLW2901 - the value of this path
        above, _, name = path.rpartition("/")
        children.setdefault(above, []).append((name, value))
        result = value
    return result


def _build_container(
    path: str, codec: codecs.Codec, meta: Any, parts: codecs.Parts, live: Mapping[str, Any], kept: Mapping[str, Part] | None
) -> Any:
    now = live.get(path)
    try:
        if kept is not None and path in kept:
            meta, parts = codec.merge(meta, parts, *codec.flatten(now))
        return codec.build(meta, parts, now if codec.accepts(now) else None)
    except ExpstateError as error:
        msg = f"entry {path!r}: {error}"
        raise type(error)(msg) from error
    except Exception as error:
        # Codecs are fed by files: whatever they trip over means that the entry is not what they wrote.
        msg = f"entry {path!r} cannot be rebuilt as {codec.name}: {error}"
        raise ManifestError(msg) from error
