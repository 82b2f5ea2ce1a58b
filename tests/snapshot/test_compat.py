"""Other tools read the data files, and later versions read the snapshots of earlier ones."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from blake3 import blake3

from expstate import RNGState, Snapshot, StateDict, settings
from expstate.errors import NeedsTrustWarning, PickleNotAllowedError
from expstate.format import manifest as manifests
from expstate.state.objects import safe_mode_holds
from tests.campaign import Campaign
from tests.state.conftest import assert_same

from .conftest import KEPT, TiedModel, is_equal, mlp
from .data import make_format_1

NATIVE = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
]
OTHER = ["complex32", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def _file(place: Path, key: str) -> Path:
    (file,) = place.glob(f"{key}-00001-*.safetensors")
    return file


# safetensors


def test_a_model_loads_with_safetensors(place: Path) -> None:
    """The data file of a key is a safetensors file with the names and values of the state dict."""
    model = mlp(1)
    Snapshot.take(place, {"model": model})
    found = safetensors.torch.load_file(_file(place, "model"))
    live = mlp(2)
    live.load_state_dict(found)

    assert_same(dict(model.state_dict()), {name: found[name] for name in model.state_dict()})
    assert is_equal(model, live)


def test_a_tied_model_loads_with_safetensors(place: Path) -> None:
    """``load_model`` fills both names of a tied weight; ``load_file`` has the one that is kept."""
    model, live = TiedModel(), TiedModel()
    Snapshot.take(place, {"model": model})
    safetensors.torch.load_model(live, _file(place, "model"))

    assert ["embedding.weight"] == list(safetensors.torch.load_file(_file(place, "model")))
    assert is_equal(model, live)
    assert live.head.weight is live.embedding.weight


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtypes_are_those_of_safetensors_where_it_has_them(place: Path) -> None:
    """What it has not is stored as bytes, which are the same."""
    tensors = {name: make_format_1._of_dtype(name) for name in NATIVE + OTHER}
    Snapshot.take(place, {"state": StateDict(tensors)})
    found = safetensors.torch.load_file(_file(place, "state"))

    assert_same({name: tensors[name] for name in NATIVE}, {name: found[name] for name in NATIVE})
    assert_same({name: tensors[name].view(-1).view(torch.uint8) for name in OTHER}, {name: found[name] for name in OTHER})


def test_shapes_and_strides_of_every_kind(place: Path) -> None:
    """Empty, 0-d, transposed and expanded tensors and arrays: row-major values of the shape."""
    tensors = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "transposed": torch.arange(6).view(2, 3).t(),
        "expanded": torch.arange(3).expand(2, 3),
        "strided": torch.arange(20)[::3],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    Snapshot.take(place, {"state": StateDict(tensors)})
    found = safetensors.torch.load_file(_file(place, "state"))

    assert_same({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, {name: found[name] for name in tensors})


def test_names_are_paths_below_the_key(place: Path) -> None:
    """Nested values by their paths, names of the top as they are."""
    nested = {"x": [torch.ones(3)], "y/z": torch.ones(4)}
    state = {"a/b": torch.ones(1), "100%": torch.ones(2), "nested": nested, 5: torch.ones(5), "5": torch.ones(6), "größe ∇": torch.ones(7)}
    Snapshot.take(place, {"state": StateDict(state)})
    found = safetensors.torch.load_file(_file(place, "state"))
    expected = {"a/b": 1, "100%": 2, "nested/x/0": 3, "nested/y%2Fz": 4, "5%int": 5, "5": 6, "größe ∇": 7}

    assert expected == {name: len(tensor) for name, tensor in found.items()}


def test_a_cut_tensor_is_named_by_its_first_row(place: Path) -> None:
    """Parts of a tensor larger than a file are tensors of their own, which make the whole."""
    tensor = torch.randn(4000, 100)
    with settings.override(data_file_bytes=2**20):
        Snapshot.take(place, {"state": StateDict(big=tensor, small=torch.ones(2))})
    found: dict[str, torch.Tensor] = {}
    for file in place.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    parts = sorted((int(name.partition("#")[2]), part) for name, part in found.items() if "#" in name)

    assert torch.equal(tensor, torch.cat([part for _, part in parts]))
    assert torch.equal(torch.ones(2), found["small"])


def test_every_file_of_a_snapshot_is_valid(place: Path) -> None:
    """Of objects and long digests too: safetensors, which checks that the bytes are tiled, opens each."""
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(place, make_format_1.app_state())
    files = sorted(place.glob("*.safetensors"))

    assert 6 == len(files)
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            assert len(list(opened.keys())) > 0
        assert 0 == (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 4096


# The first format


def _bytes_in(storage: Any) -> list[int]:
    # torch.load makes a storage of another class of it, which warns of itself.
    return getattr(storage, "_untyped_storage", storage).tolist()


@pytest.fixture(scope="module")
def kept() -> Snapshot:
    """The committed snapshot."""
    return Snapshot(make_format_1.FOLDER)


@KEPT
def test_the_first_format_is_read(kept: Snapshot, campaign: Campaign) -> None:
    """Format, metadata and keys of the committed snapshot, and all of its bytes."""
    data = json.loads((make_format_1.FOLDER / "snapshot.json").read_bytes())
    found = kept.metadata

    assert 1 == data["format"]
    assert sum(file.stat().st_size for file in make_format_1.FOLDER.iterdir()) < 100 * 1024
    assert kept.verify().ok
    assert ("model", "optimizer", "tensors", "arrays", "values/100%", "rng") == kept.keys()
    for name, expected in make_format_1.METADATA.items():
        assert_same(tuple(expected) if name == "tags" else expected, getattr(found, name))
    campaign.tried()


@KEPT
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("key", ["tensors", "arrays", "values/100%"])
def test_values_of_the_first_format(kept: Snapshot, key: str, campaign: Campaign) -> None:
    """Each of them, of the same type and the same bits, new and over live ones."""
    make = {"tensors": make_format_1.tensors, "arrays": make_format_1.arrays, "values/100%": make_format_1.values}[key]
    found = kept.get_state_dict_for_key(key, trust=True)
    fresh, live = StateDict(), StateDict(make())
    for state in (fresh, live):
        kept.restore({key: state}, trust=True)

    for name, expected in make().items():
        for state in (found, fresh, live):
            if isinstance(expected, torch.UntypedStorage):
                assert expected.tolist() == _bytes_in(state[name])
            elif isinstance(expected, np.random.Generator):
                assert expected.bit_generator.state == state[name].bit_generator.state
            else:
                assert_same(expected, state[name])
    campaign.tried()


def test_objects_of_the_first_format_need_trust(kept: Snapshot) -> None:
    """And the rest does not."""
    with pytest.raises(PickleNotAllowedError, match="SimpleNamespace"):
        kept.read_object("values%2F100%25/object")

    assert [1, 2, 3] == _bytes_in(kept.read_object("values%2F100%25/safe object", trust=not safe_mode_holds()))
    assert make_format_1.values()["object"] == kept.read_object("values%2F100%25/object", trust=True)
    assert -(2**200) == kept.read_object("values%2F100%25/ints")[3]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_ties_of_the_first_format(kept: Snapshot) -> None:
    """One tensor under several names."""
    first, second = kept.get_state_dict_for_key("tensors")["tied"]

    assert first is second["again"]


@KEPT
def test_a_training_of_the_first_format_goes_on(kept: Snapshot, campaign: Campaign) -> None:
    """Model, optimizer and random generators, as they were when it was taken."""
    model, optimizer = make_format_1.model_and_optimizer()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = make_format_1.Model()
    momentum = torch.optim.SGD(fresh.parameters(), lr=0.1)
    kept.restore({"model": fresh, "optimizer": momentum, "rng": RNGState()})
    numbers = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)

    assert_same((random.random(), np.random.rand(), torch.rand(1)), numbers)
    assert_same(expected, dict(fresh.state_dict()))
    assert_same(optimizer.state_dict(), momentum.state_dict())
    assert fresh.head.weight is fresh.embedding.weight
    assert [[-0.5, 0.5, 1.5]] == fresh.embedding.weight[:1].tolist()
    campaign.tried()


def test_a_take_today_has_the_form_of_the_first_format(kept: Snapshot, place: Path) -> None:
    """As long as the format's number is the same, the entries of the same state are written the same way, byte for byte."""
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(place, make_format_1.app_state(), **make_format_1.METADATA)

    def form(snapshot: Snapshot) -> list[Any]:
        found = msgspec.to_builtins(snapshot.manifest.entries)
        # Where a box lies and what pickle makes of an object may change with the versions of others.
        return [entry for entry in found if not (entry[0] == "object" or "frame" in entry[1] or "series" in entry[1])]

    assert manifests.FORMAT == 1
    assert form(kept) == form(Snapshot(place))


def test_long_values_and_digests_have_a_fixed_form(place: Path) -> None:
    """What is too large for the committed snapshot: long texts and lists, tensors of several and of many blocks."""
    state = StateDict(text="x" * 70_000, ints=[5] * 10_001, blocks=torch.zeros(3 * 2**18), many=torch.zeros(66 * 2**20, dtype=torch.uint8))
    Snapshot.take(place, {"state": state})
    opened = Snapshot(place)
    found = {entry.path: msgspec.to_builtins(entry) for entry in opened.entries("state/*")}
    zeros = blake3(bytes(2**20)).digest() * 3

    assert ["container", "state/text", "packed", {"kind": "str", "length": 70_000}, None] == found["state/text"]
    assert ["tensor", "state/text/data", "uint8", (70_000,)] == found["state/text/data"][:4]
    assert ["container", "state/ints", "packed", {"kind": "list", "items": "int", "length": 10_001}, None] == found["state/ints"]
    assert ["tensor", "state/ints/data", "int64", (10_001,)] == found["state/ints/data"][:4]
    ((_, _, digest, blocks, starts, sizes, fingerprint),) = found["state/blocks"][4]
    assert [blake3(zeros).digest(), zeros] == [base64.b64decode(digest), base64.b64decode(blocks)]
    assert (None, None, None) == (starts, sizes, fingerprint)
    ((_, _, _, (file, offset), *_),) = found["state/many"][4]
    assert opened.manifest.files[file].name.startswith("digests-00001-")
    assert 66 * 32 == (place / opened.manifest.files[file].name).stat().st_size - offset
