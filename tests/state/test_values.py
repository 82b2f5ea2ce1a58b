"""Plain values become JSON and come back exactly."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import fractions
import math
import pathlib
import subprocess
import sys
import uuid
import zoneinfo

import msgspec
import numpy as np
import pytest
import torch

from expstate.errors import ExpstateError, ManifestError, UnknownClassError
from expstate.state import values


class Colour(enum.Enum):
    """An enum whose values are no plain ones."""

    RED = object()
    CRIMSON = RED


class Rights(enum.Flag):
    """A flag, whose members combine."""

    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    """An enum that is an int, too."""

    LOW = 1


PLAIN = [
    None,
    True,
    0,
    -(2**63),
    2**63,
    -(2**200),
    10**5000,
    0.0,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    math.nan,
    1e22,
    complex(-0.0, math.nan),
    "",
    "ä€😀\x00\n",
    "\ud800 alone",
    b"",
    b"\xff\x00",
    bytearray(b"x"),
    [],
    [1, [2.5, None], "a"],
    (),
    (1,),
    ((), [()]),
    set(),
    {1, "a", (2, None)},
    frozenset({1.5}),
    torch.Size([2, 3]),
    torch.float8_e4m3fn,
    torch.quint4x2,
    torch.device("cuda", 3),
    torch.strided,
    torch.channels_last,
    dt.datetime(2026, 11, 24, 1, 2, 3, 4),  # noqa: DTZ001 - naive ones are values, too
    dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
    dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, seconds=1))),
    dt.date(1, 1, 1),
    dt.time(23, 59, tzinfo=dt.timezone.utc),
    dt.timedelta(days=-1, microseconds=1),
    dt.timezone.utc,
    zoneinfo.ZoneInfo("Asia/Tokyo"),
    range(0, 10**30, 7),
    slice(None, 3, "x"),
    ...,
    decimal.Decimal("1.10"),
    decimal.Decimal("NaN"),
    fractions.Fraction(-1, 10**40),
    uuid.UUID(int=7),
    pathlib.Path("/data/ü"),
    pathlib.PurePosixPath("a/b"),
    pathlib.PureWindowsPath("c:\\x"),
    Colour.RED,
    Rights.READ,
    Rights.READ | Rights.WRITE,
    Rights(0),
    Level.LOW,
    np.float32(-0.0),
    np.float16("nan"),
    np.longdouble("0.1"),
    np.uint64(2**64 - 1),
    np.bool_(1),
    np.complex64(1j),
    np.str_("ä"),
    np.str_(""),
    np.bytes_(b"a"),
    np.datetime64("2026-01-01", "D"),
    np.array([-(2**63)]).view("M8")[0],  # NaT of no unit, which newer NumPy makes under protest
    np.timedelta64(3, "ms"),
    np.void(b"\x00\x01"),
    np.array([1], ">i4")[0],
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_come_back_exactly(value, same) -> None:
    """The JSON form gives a value of the same type and bits."""
    encoded = msgspec.json.decode(msgspec.json.encode(values.encode(value)))
    same(value, values.decode(encoded))


def test_equal_sets_are_equal_bytes() -> None:
    """A set's JSON does not depend on the order of its items."""
    one, other = {"a", "b", 1, None}, {None, 1, "b", "a"}
    assert values.encode(one) == values.encode(other)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {},
        {"a": 1},
        [object()],
        ({1: 2},),
        torch.zeros(1),
        np.zeros(1),
        np.zeros(1, [("a", "i4")])[0],
        type("Text", (str,), {})("a"),
        type("Zone", (dt.tzinfo,), {})(),
        dt.datetime(2026, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()),
        b"x" * 65_537,
        bytearray(65_537),
        "x" * 65_537,
        [1] * 10_001,
        (0.5,) * 10_001,
        ["a", None] * 5_001,
        [[b"x" * 65_537]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused(value) -> None:
    """Neither a subclass of a plain type nor a mutable container with identity nor a long value is written inline."""
    with pytest.raises(values.NotPlainError):
        values.encode(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1] * 10_000, False),
        ([1] * 10_001, True),
        ([1] * 10_000 + [2**63], False),
        ([1] * 10_000 + [True], False),
        ([1] * 10_000 + [1.0], False),
        ([None] * 10_001, False),
        ([1.0] * 10_000 + [math.nan], True),
        ([None] * 10_000 + ["a"], True),
        ("x" * 65_536, False),
        ("x" * 65_537, True),
        ({1} | set(range(20_000)), False),
    ],
    ids=str,
)
def test_long_values_of_one_kind_are_told(value, expected) -> None:
    """Long is more than 64 KiB of bytes or text, or 10,000 ints of 64 bits, floats or strings."""
    assert expected is values.is_long(value)


def test_dicts_are_allowed_in_metadata(same) -> None:
    """``encode_tree`` keeps dicts of any plain keys, in order."""
    value = {"b": [1, {"x": (None, {2: 3})}], (1, 2): "t", None: {}}
    same(value, values.decode(msgspec.json.decode(msgspec.json.encode(values.encode_tree(value)))))


@pytest.mark.parametrize(
    "encoded",
    [
        {"type": "torch.dtype", "value": "load"},
        {"type": "torch.dtype", "value": "__class__"},
        {"type": "torch.dtype", "value": "hub.load"},
        {"type": "torch.dtype", "value": ["float32"]},
        {"type": "numpy", "dtype": "|O", "value": "AAAAAAAAAAA="},
        {"type": "numpy", "dtype": [["a", "|O"]], "value": "AAAAAAAAAAA="},
        {"type": "numpy", "dtype": "<f4", "value": "AAAAAAAAAAA="},
        {"type": "numpy", "dtype": "<f4", "value": "?"},
        {"type": "nothing", "value": 1},
        {"type": ["list"], "value": 1},
        {"value": 1},
        {},
        {"type": "tuple"},
        {"type": "int", "value": "zz"},
        {"type": "float", "value": "00"},
        {"type": "set", "value": [[]]},
        {"type": "dict", "value": [[1]]},
        {"type": "timezone", "value": "../../etc/passwd"},
        {"type": "timezone", "value": "/etc/passwd"},
        {"type": "datetime", "value": "2026", "zone": None, "fold": 9},
        {"type": "torch.Size", "value": ["a"]},
        {"type": "range", "value": [1, 2, 0]},
        {"type": "fraction", "value": [1, 0]},
        {"type": "path", "value": 3},
    ],
    ids=str,
)
def test_hostile_forms_are_errors_of_ours(encoded) -> None:
    """What ``encode`` never writes is refused as damage of the manifest."""
    with pytest.raises(ManifestError):
        values.decode(encoded)


def test_nesting_too_deep_is_an_error_of_ours() -> None:
    """A form nested beyond what Python can walk does not end in a RecursionError."""
    encoded: dict[str, object] = {"type": "tuple", "value": []}
    for _ in range(100_000):
        encoded = {"type": "tuple", "value": [encoded]}
    with pytest.raises(ManifestError):
        values.decode(encoded)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("a.module.nobody.has", "Class"),
        (__name__, "Colour.RED"),
        (__name__, "Missing"),
        ("os", "system"),
        ("builtins", "int"),
        ("antigravity", "x"),
        (None, "x"),
    ],
)
def test_classes_are_found_in_memory_only(module, name) -> None:
    """An enum comes from a module that is imported already and has to be an enum; nothing is imported for it."""
    before = set(sys.modules)
    with pytest.raises(UnknownClassError):
        values.decode({"type": "enum", "value": [module, name, "RED", None]})
    assert before == set(sys.modules)


def test_enum_members_that_are_gone_are_told() -> None:
    """A member that the enum no longer has is named."""
    with pytest.raises(ManifestError, match="GREEN"):
        values.decode({"type": "enum", "value": [__name__, "Colour", "GREEN", None]})


def test_numpy_is_not_imported_for_plain_values() -> None:
    """Without NumPy loaded, plain values are encoded and decoded without it."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from expstate.state import tree, values\n"
        "from expstate.state.stateful import RNGState\n"
        "assert values.decode(values.encode((1, {2.5}))) == (1, {2.5})\n"
        "tree.flatten('key', {'a': object(), 'b': [object()]})\n"
        "state = RNGState().state_dict()\n"
        "assert 'numpy' not in state\n"
        "RNGState().load_state_dict(state)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (0, "") == (done.returncode, done.stderr)


def test_garbage_is_never_a_crash() -> None:
    """Each decoder refuses each kind of garbage with an error of ours, or makes a value of it."""
    garbage = [None, 1, -1.5, "x", [], [1, 2, 3], {}, {"type": "int"}, True, "9" * 50]
    for kind in values._DECODERS:
        for value in garbage:
            with contextlib.suppress(ExpstateError):
                values.decode({"type": kind, "value": value, "dtype": "<f4", "zone": None, "fold": 0})
