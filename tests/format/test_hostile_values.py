"""Values and metadata from a stranger: whatever codecs are told, they give a value or an error of ours."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expstate import StateDict
from expstate.errors import (
    ExpstateError,
)
from expstate.state import codecs
from tests.campaign import Campaign
from tests.format.forging import (
    Forged,
    digest_text,
    everything,
    guarded,
    little_memory,
    live,
)
from tests.format.mutations import mutations

WEIGHT = "model/first.weight"
pytestmark = pytest.mark.usefixtures("imported")


# What codecs are given

TENSORS = [
    "indices",
    "values",
    "crow_indices",
    "col_indices",
    "data",
    "state",
    "scales",
    "zero_points",
    "0",
    "_values",
    "_offsets",
    "dense",
]
METAS: list[Any] = [
    None,
    True,
    -1,
    10**18,
    1.5,
    "x",
    "../..",
    [],
    [1],
    [[]],
    [[1, 2, 3]],
    [["a", {"type": "set", "value": [[]]}]],
    {},
    {"type": "int", "value": "z"},
    {"keys": 5, "versions": 5, "factory": "eval"},
    {"keys": None, "versions": [["", "x"]], "factory": None},
    {"keys": [["a", {"type": "enum", "value": ["os", "system", "x", None]}]], "factory": "list", "versions": []},
    {
        "shape": [10**18],
        "parameter": False,
        "requires_grad": False,
        "coalesced": True,
        "layout": "csr",
        "dtype": "qint8",
        "scheme": "per_tensor_affine",
    },
    {"shape": [-1], "dtype": "|O", "scalar": True, "parameter": True, "requires_grad": True, "layout": "bsr"},
    {"shape": [2**61], "dtype": "|V0", "scalar": False},
    {"shape": [2], "dtype": {"base": "<f4", "shape": [2**40, 2**40]}, "scalar": False},
    {
        "shape": [2],
        "dtype": {"names": ["a"], "titles": [None], "formats": ["|O"], "offsets": [0], "itemsize": 8, "aligned": False, "record": False},
    },
    {"module": "os", "class": "system", "fields": ["a"], "context": None, "size": [1], "stride": [1], "strides": {}},
    {"module": "collections", "class": "a b; import os", "fields": ["__class__", "1x"], "context": None},
    {"module": "builtins", "class": "tuple", "fields": [], "context": {"type": "dict", "value": []}, "size": [2**62], "stride": [0]},
    {
        "module": "torch.nested._internal.nested_tensor",
        "class": "NestedTensor",
        "context": {"type": "dict", "value": []},
        "size": [],
        "stride": [],
    },
    {"device": "cuda:99"},
    {"device": "x"},
    {"kind": "str", "length": 10**18},
    {"kind": "list", "items": "str", "length": 10**18},
    {"kind": "eval", "parts": {}},
    {"kind": "Categorical", "ordered": True},
    {"kind": "PeriodArray", "freq": "x" * 1000},
    {"name": None, "range": [0, 10**30, 1]},
    {"name": None, "range": [0, 10**15, 1]},
    {"names": ["a"], "name": {"pandas": "Timestamp", "value": 10**30, "unit": "ns", "zone": "../../etc/passwd"}},
    {"pandas": "read_pickle", "value": 1, "unit": "ns", "zone": None},
    {"attrs": {"type": "dict", "value": 5}, "duplicates": False, "name": None},
    {
        "state": {
            "type": "dict",
            "value": [["bit_generator", "MT19937"], ["state", {"type": "dict", "value": [["key", 5], ["pos", 10**9]]}]],
        },
        "sequence": None,
    },
    {"state": {"type": "dict", "value": [["bit_generator", "eval"]]}, "sequence": {"type": "tuple", "value": [1, [], 10**12, 0]}},
    {"extension": "eval"},
    {"string": True, "missing": "none", "coerce": True},
    {"fill": True, "hard": True},
    {"class": "os"},
    "|O",
    "O",
    "x" * 100_000,
]
KINDS = sorted(codecs._registered)


@pytest.mark.campaign("Safe to open", "metadata that no codec writes, told to each codec")
@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_no_codec_writes_ends_in_our_error(forged: Forged, kind: str, campaign: Campaign) -> None:
    """Whatever a codec is told, it gives a value or an error that names the entry; it neither runs nor allocates anything."""
    metas = METAS if campaign.is_long else METAS[KINDS.index(kind) % 3 :: 3]
    others = [
        ["tensor", f"odd/c/{name}", "int64", [0], [[0, 4096, digest_text(b""), None, None, None]], "tensor", False, "cpu", None]
        for name in TENSORS
    ]
    others += [["value", "odd/c/items", [1, "x"], None], ["value", "odd/c/text", "x", None], ["value", "odd/c/%index", 3, None]]
    entries = list(forged.document["entries"])
    forged.document["keys"].append(["odd", "x"])
    unheard = []
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for meta in campaign.each(metas, short=len(metas)):
            for parts in ([], others):
                forged.document["entries"] = [
                    *entries,
                    ["container", "odd", "dict", None, None],
                    ["container", "odd/c", kind, meta, None],
                    *parts,
                ]
                snapshot = forged.write()
                for read in (
                    lambda: snapshot.get_state_dict_for_key("odd"),  # noqa: B023
                    lambda: snapshot.restore({"odd": StateDict(c=1)}),  # noqa: B023
                    lambda: snapshot.restore({"odd": StateDict(c=1)}, include="odd/c/items"),  # noqa: B023
                ):
                    try:
                        with guarded(forged.folder):
                            read()
                    except ExpstateError as error:
                        if "odd" not in str(error):
                            unheard.append(str(error))

    assert [] == unheard


VALUES: list[Any] = [
    {"type": "fraction", "value": ["1e1000000000", 1]},
    {"type": "fraction", "value": [1, 0]},
    {"type": "decimal", "value": "1e999999999"},
    {"type": "decimal", "value": 5},
    {"type": "int", "value": 5},
    {"type": "range", "value": [0, 10**18, 1]},
    {"type": "range", "value": []},
    {"type": "bytes", "value": "!"},
    {"type": "numpy", "value": "", "dtype": "O"},
    {"type": "numpy", "value": "", "dtype": "(1000000000000,)f8"},
    {"type": "numpy", "value": "AAAA", "dtype": "f4,f4"},
    {"type": "numpy", "value": "AAAAAAAAAAA=", "dtype": "|O"},
    {"type": "numpy", "value": "AAAA", "dtype": {"names": ["a"], "formats": ["O"]}},
    {"type": "numpy", "value": "AAAA", "dtype": [["a", "O"]]},
    {"type": "torch.dtype", "value": "load"},
    {"type": "torch.dtype", "value": "__class__"},
    {"type": "torch.layout", "value": "hub.load"},
    {"type": "torch.device", "value": "x"},
    {"type": "enum", "value": ["os", "system", "x", None]},
    {"type": "enum", "value": ["this_module_is_not_there", "x", "x", None]},
    {"type": "enum", "value": ["re", "RegexFlag", None, {"type": "fraction", "value": [1, 2]}]},
    {"type": "timezone", "value": "../../../etc/passwd"},
    {"type": "timezone", "value": "/etc/hostname"},
    {"type": "timezone", "value": "this_module/is/not/there"},
    {"type": "datetime", "value": "2026", "zone": [10**9, 0, 0], "fold": 7},
    {"type": "timedelta", "value": [10**18]},
    {"type": "set", "value": [[]]},
    {"type": "dict", "value": [[[], 1]]},
    {"type": "uuid", "value": "x"},
    {"type": "os.system", "value": "true"},
    {"type": "__class__", "value": None},
    {"type": [], "value": None},
    {"value": 1},
    {},
    [[{}]],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: json.dumps(value)[:50])
def test_a_value_that_no_take_writes_ends_in_our_error(forged: Forged, value: Any) -> None:
    """Forms of values are decoded by a table; what they trip over, run or allocate is nothing but an error of ours."""
    forged.entry("extra/none")[2] = value
    snapshot = forged.write()
    with little_memory():
        for read in (
            lambda: snapshot.read_object("extra/none"),
            lambda: snapshot.get_state_dict_for_key("extra"),
            lambda: snapshot.restore(live()),
        ):
            try:
                with guarded(forged.folder):
                    read()
            except ExpstateError:
                continue


# All of it at random


@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_manifests_changed_at_random_end_in_our_errors(
    genuine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is changed in a sealed manifest, reading gives values or an error of ours, runs nothing and stays in the folder."""
    place = tmp_path_factory.mktemp("mutated")
    folder = place / "snapshot"
    folder.mkdir()
    for path in genuine.iterdir():
        os.link(path, folder / path.name)
    forged = Forged(folder)
    forged.document = data.draw(mutations(forged.document))
    forged.write()
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.cache_clear()
        live()
        everything(folder, place)
    shutil.rmtree(place)
