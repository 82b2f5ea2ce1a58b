"""Codecs of NumPy's random generators, and their states as plain values.

``encode_state`` and ``decode_state`` serve the generators of a state dict and NumPy's global one alike. A state that came from a file is
checked first: NumPy believes positions that it is told.
"""

from __future__ import annotations

import sys
from typing import Any

from expstate.errors import ManifestError
from expstate.state.codecs import Codec, Parts, register
from expstate.state.values import NotPlainError, decode, encode_tree

_ARRAYS: dict[str, dict[str, tuple[str, int]]] = {
    "MT19937": {"key": ("<u4", 624)},
    "PCG64": {},
    "PCG64DXSM": {},
    "Philox": {"counter": ("<u8", 4), "key": ("<u8", 2), "buffer": ("<u8", 4)},
    "SFC64": {"state": ("<u8", 4)},
}
"""Bit generators, and which fields of their states are arrays: dtype and length."""

_POSITIONS = {"pos": 624, "buffer_pos": 4, "has_uint32": 1, "has_gauss": 1}
_MOST_SPAWNED = 1_000_000


def _random() -> Any:
    import numpy.random  # noqa: PLC0415 - NumPy is optional

    return numpy.random


def encode_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a bit generator as a dict of ints, floats, strings and bytes; undone by ``decode_state``.

    >>> import numpy as np
    >>> encode_state(np.random.PCG64(1).state)["bit_generator"]
    'PCG64'
    """
    arrays = _ARRAYS.get(state["bit_generator"])
    if arrays is None:
        msg = f"the bit generator {state['bit_generator']}"
        raise NotPlainError(msg)

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(key, item) for key, item in value.items()}
        return value.astype(arrays[name][0]).tobytes() if name in arrays and not isinstance(value, int) else value

    return {name: plain(name, value) for name, value in state.items()}


def decode_state(state: Any) -> dict[str, Any]:
    """The state of a bit generator again; ``ManifestError`` if it cannot be one."""
    import numpy as np  # noqa: PLC0415 - NumPy is optional

    arrays = _ARRAYS.get(str(state.get("bit_generator"))) if isinstance(state, dict) else None
    if arrays is None:
        msg = f"unknown bit generator in the state {str(state)[:80]}"
        raise ManifestError(msg)

    def restored(name: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restored(key, item) for key, item in value.items()}
        if name in _POSITIONS and not (type(value) is int and 0 <= value <= _POSITIONS[name]):
            msg = f"{name} of a bit generator is {str(value)[:80]}"
            raise ManifestError(msg)
        if name in arrays:
            dtype, length = arrays[name]
            array = np.frombuffer(value, dtype) if isinstance(value, bytes) else np.empty(0)
            if array.size != length:
                msg = f"{name} of a bit generator has {array.size} words, not {length}"
                raise ManifestError(msg)
            return array.astype(array.dtype.newbyteorder("="))
        return value

    return {name: restored(name, value) for name, value in state.items()}


def new_bit_generator(name: Any, sequence: Any = None) -> Any:
    """A bit generator of one of NumPy's own kinds."""
    if name not in _ARRAYS:
        msg = f"unknown bit generator {name!r}"
        raise ManifestError(msg)
    return getattr(_random(), name)(0 if sequence is None else sequence)


def _encode_sequence(sequence: Any) -> Any:
    """What ``Generator.spawn`` derives generators from, if it is NumPy's own."""
    if type(sequence) is not _random().SeedSequence:
        return None
    entropy = sequence.entropy
    entropy = entropy.tolist() if hasattr(entropy, "tolist") else entropy
    return encode_tree((entropy, list(sequence.spawn_key), sequence.pool_size, sequence.n_children_spawned))


def _decode_sequence(encoded: Any) -> Any:
    if encoded is None:
        return None
    entropy, key, pool_size, spawned = decode(encoded)
    if not (type(pool_size) is int and pool_size <= 2**16):
        msg = f"a seed sequence with a pool of {pool_size}"
        raise ManifestError(msg)
    return _random().SeedSequence(entropy, spawn_key=tuple(key), pool_size=pool_size, n_children_spawned=spawned)


class _Generator(Codec):
    name = "numpy.Generator"

    def accepts(self, value: Any) -> bool:
        random = sys.modules.get("numpy.random")
        return random is not None and type(value) is random.Generator

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        bits = value.bit_generator
        sequence = getattr(bits, "seed_seq", None)
        return {"state": encode_tree(encode_state(bits.state)), "sequence": _encode_sequence(sequence)}, {}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - a generator has no parts
        state, sequence = decode_state(decode(meta["state"])), _decode_sequence(meta["sequence"])
        if live is None or type(live.bit_generator).__name__ != state["bit_generator"]:
            live = _random().Generator(new_bit_generator(state["bit_generator"], sequence))
        else:
            _spawn_as_often(live, sequence)
        live.bit_generator.state = state
        return live


def _spawn_as_often(generator: Any, sequence: Any) -> None:
    """Let a live generator that was seeded alike go on spawning where the stored one would."""
    own: Any = getattr(generator.bit_generator, "seed_seq", None)
    if sequence is None or type(own) is not type(sequence):
        return
    missing = sequence.n_children_spawned - own.n_children_spawned
    if own.entropy == sequence.entropy and own.spawn_key == sequence.spawn_key and 0 < missing <= _MOST_SPAWNED:
        own.spawn(missing)


class _RandomState(Codec):
    name = "numpy.RandomState"

    def accepts(self, value: Any) -> bool:
        random = sys.modules.get("numpy.random")
        return random is not None and type(value) is random.RandomState

    def flatten(self, value: Any) -> tuple[Any, Parts]:
        return {"state": encode_tree(encode_state(value.get_state(legacy=False)))}, {}

    def build(self, meta: Any, parts: Parts, live: Any) -> Any:  # noqa: ARG002 - a generator has no parts
        state = decode_state(decode(meta["state"]))
        if live is None or live.get_state(legacy=False)["bit_generator"] != state["bit_generator"]:
            live = _random().RandomState(new_bit_generator(state["bit_generator"]))
        live.set_state(state)
        return live


register(_Generator())
register(_RandomState())
