"""Kinds of value that are stored as parts: containers, and objects made of tensors, arrays and plain values.

A codec takes a value apart into plain metadata and named parts and puts it together again. ``find`` picks the codec of a value,
``by_name`` the one that an entry names. To add a kind, subclass ``Codec`` and ``register`` an instance.
"""

from __future__ import annotations

import collections
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar

from expstate.errors import ManifestError, UnknownClassError, UnsupportedValueError
from expstate.state import paths
from expstate.state.values import NotPlainError, decode, encode, find_class

if TYPE_CHECKING:
    from collections.abc import Iterable

Parts = dict[str, Any]
"""Path part to value, in order."""


class Codec(ABC):
    """How one kind of value is taken apart and put together.

    Attributes
    ----------
    name : str
        The ``type`` of its entries in the manifest.
    opaque : bool
        Whether the parts make one object, which live tensors fit only as a whole (a sparse tensor), rather than a container
        whose items stand for themselves (a dict).
    """

    name: ClassVar[str]
    opaque: ClassVar[bool] = True

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether this codec stores ``value``."""

    @abstractmethod
    def flatten(self, value: Any) -> tuple[Any, Parts]:
        """Metadata as plain JSON (``values.encode_tree`` makes it of other values), and the parts.

        ``UnsupportedValueError`` refuses the value; ``NotPlainError`` leaves it to ``torch.save``.
        """

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        """Metadata and parts of the live value with some of the snapshot's put over them; ``ValueError`` if they do not go together."""
        if meta != live_meta:
            msg = f"a {self.name} can be restored in part only over one of the same form"
            raise ValueError(msg)
        return meta, live_parts | parts

    def check(self, meta: Any) -> None:  # noqa: B027 - most need nothing but themselves
        """Raise what ``build`` would for lack of a class, a package or a device, before anything is read."""

    @abstractmethod
    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        """The value again. ``live`` is the object now in its place if it is of the same kind, to be refilled where that keeps identity.

        Any exception is reported as damage of the entry.
        """


_registered: dict[str, Codec] = {}
_by_type: dict[type, Codec] = {}
_by_test: list[Codec] = []


def register(codec: Codec, types: Iterable[type] = ()) -> None:
    """Make a codec known; values whose exact type is in ``types`` find it without asking ``accepts``."""
    _registered[codec.name] = codec
    exact = tuple(types)
    for kind in exact:
        _by_type[kind] = codec
    if not exact:
        _by_test.append(codec)


def find(value: Any) -> Codec | None:
    """The codec that stores ``value``, or None for a leaf."""
    codec = _by_type.get(type(value))
    if codec is not None:
        return codec
    return next((candidate for candidate in _by_test if candidate.accepts(value)), None)


def by_name(name: str) -> Codec:
    """The codec that an entry of the manifest names; ``ManifestError`` if there is none."""
    try:
        return _registered[name]
    except KeyError:
        msg = f"unknown container type {name!r}"
        raise ManifestError(msg) from None


# Containers of the language


def _key(keys: dict[str, Any], part: str) -> Any:
    """The encoded key behind a part of a path: kept beside it, or read off it."""
    return keys[part] if part in keys else encode(paths.unquote(part))


def _keys(meta: Any) -> Any:
    """The keys in the metadata of a dict, which may hold more than them."""
    return meta["keys"] if isinstance(meta, dict) else meta


def has_plain_keys(meta: Any) -> bool:
    """Whether the keys of a dict with this metadata are strings, which its items' paths are made of."""
    return (meta.get("keys") if isinstance(meta, dict) else meta) is None


class _Dict(Codec):
    name = "dict"
    opaque = False
    kind: ClassVar[type] = dict

    def accepts(self, value: Any) -> bool:
        return type(value) is self.kind

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        keys = list(value)
        parts = paths.key_parts(keys)
        # Strings can be read off the path again; other keys are kept beside it.
        named = all(type(key) is str for key in keys)
        try:
            meta = None if named else [[part, encode(key)] for part, key in zip(parts, keys, strict=True)]
        except NotPlainError as error:
            msg = f"has a key that cannot be stored: {error}"
            raise UnsupportedValueError(msg) from None
        return meta, dict(zip(parts, value.values(), strict=True))

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        keys, live_keys = dict(meta or ()), dict(live_meta or ())
        for part in parts:
            if part in live_parts and _key(keys, part) != _key(live_keys, part):
                msg = f"its key {part!r} is of another type in the snapshot than in the live {self.name}"
                raise ValueError(msg)
        merged = live_parts | parts
        if meta is None and live_meta is None:
            return None, merged
        return [[part, _key(keys if part in parts else live_keys, part)] for part in merged], merged

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - containers are rebuilt
        if meta is None:
            return self.kind((paths.unquote(part), value) for part, value in parts.items())
        keys = {part: decode(key) for part, key in meta}
        return self.kind((keys[part], value) for part, value in parts.items())


class _OrderedDict(_Dict):
    name = "OrderedDict"
    kind = OrderedDict

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        keys, parts = super().flatten(value)
        # nn.Module.state_dict() keeps the modules' versions in this attribute, and load_state_dict() upgrades by them.
        versions = getattr(value, "_metadata", None)
        if not isinstance(versions, dict):
            return keys, parts
        known = [[name, entry.get("version")] for name, entry in versions.items() if isinstance(entry, dict)]
        return {"keys": keys, "versions": known}, parts

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        keys, merged = super().merge(_keys(meta), parts, _keys(live_meta), live_parts)
        return {**live_meta, "keys": keys} if isinstance(live_meta, dict) else keys, merged

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        if not isinstance(meta, dict):
            return super().build(meta, parts, live)
        built = super().build(meta["keys"], parts, live)
        built._metadata = OrderedDict(  # noqa: SLF001 - PyTorch's own place for it
            (name, {} if version is None else {"version": int(version)}) for name, version in meta["versions"]
        )
        return built


_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}


class _DefaultDict(_Dict):
    name = "defaultdict"

    def accepts(self, value: Any) -> bool:
        return type(value) is collections.defaultdict

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        factory = value.default_factory
        if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
            msg = "defaultdict with a factory of its own"
            raise NotPlainError(msg)
        keys, parts = super().flatten(value)
        return {"keys": keys, "factory": factory and factory.__name__}, parts

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        keys, merged = super().merge(_keys(meta), parts, _keys(live_meta), live_parts)
        return {**live_meta, "keys": keys}, merged

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        factory = None if meta["factory"] is None else _FACTORIES[meta["factory"]]
        return collections.defaultdict(factory, super().build(meta["keys"], parts, live))


class _Counter(_Dict):
    name = "Counter"
    kind = collections.Counter

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:
        return collections.Counter(dict(_Dict.build(_dict, meta, parts, live)))


def _in_order(parts: Parts) -> list[Any]:
    if list(parts) != [str(index) for index in range(len(parts))]:
        msg = "items of a sequence are not numbered from 0"
        raise ManifestError(msg)
    return list(parts.values())


class _Sequence(Codec):
    opaque = False

    def __init__(self, name: str, kind: type) -> None:
        self.name = name  # type: ignore[misc]  # one class serves several names
        self.kind = kind

    def accepts(self, value: Any) -> bool:
        return type(value) is self.kind

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return None, {str(index): item for index, item in enumerate(value)}

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        meta, merged = super().merge(meta, parts, live_meta, live_parts)
        if issubclass(self.kind, (set, frozenset)):
            msg = f"the members of a {self.name} have no places, so it is restored as a whole"
            raise ValueError(msg)  # noqa: TRY004 - as where other parts do not go together
        missing = next((index for index in range(len(merged)) if str(index) not in merged), None)
        if missing is not None:
            msg = f"the live {self.name} has {len(live_parts)} items, so item {missing} would be missing"
            raise ValueError(msg)
        return meta, {str(index): merged[str(index)] for index in range(len(merged))}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - containers are rebuilt
        return self.kind(_in_order(parts))


class _Deque(_Sequence):
    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return value.maxlen, super().flatten(value)[1]

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - containers are rebuilt
        return collections.deque(_in_order(parts), maxlen=meta)


class _NamedTuple(Codec):
    name = "namedtuple"
    opaque = False

    def accepts(self, value: Any) -> bool:
        fields = getattr(type(value), "_fields", None)
        return isinstance(value, tuple) and isinstance(fields, tuple) and len(fields) == len(value)

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        cls = type(value)
        meta = {"module": cls.__module__, "class": cls.__qualname__, "fields": list(cls._fields)}
        return meta, dict(zip(cls._fields, value, strict=True))

    def merge(self, meta: Any, parts: Parts, live_meta: Any, live_parts: Parts) -> tuple[Any, Parts]:
        meta, merged = super().merge(meta, parts, live_meta, live_parts)
        missing = [field for field in meta["fields"] if field not in merged]
        if missing:
            msg = f"field {missing[0]!r} would be missing"
            raise ValueError(msg)
        return meta, merged

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - containers are rebuilt
        fields = tuple(meta["fields"])
        cls: Any
        try:
            cls = find_class(meta["module"], meta["class"], tuple)
        except UnknownClassError:
            cls = None
        if cls is None or getattr(cls, "_fields", None) != fields:
            # The same fields under the same name, without importing what the snapshot names.
            cls = collections.namedtuple(meta["class"].rpartition(".")[2], fields)  # type: ignore[misc,no-redef]  # noqa: PYI024 - made at run time
        # tuple.__new__ and not the class's own: no code of the class runs.
        return tuple.__new__(cls, [parts[field] for field in fields])


_dict = _Dict()
register(_dict, [dict])
register(_OrderedDict(), [OrderedDict])
register(_DefaultDict(), [collections.defaultdict])
register(_Counter(), [collections.Counter])
register(_Sequence("list", list), [list])
register(_Sequence("tuple", tuple), [tuple])
register(_Sequence("set", set), [set])
register(_Sequence("frozenset", frozenset), [frozenset])
register(_Deque("deque", collections.deque), [collections.deque])
register(_NamedTuple())
