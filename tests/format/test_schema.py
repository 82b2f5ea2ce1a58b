"""The published schema of the manifest: real manifests follow it, broken ones do not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expstate import Snapshot, StateDict
from expstate.errors import ExpstateError, NeedsTrustWarning
from expstate.format.manifest import Metadata, decode, encode
from expstate.format.validate import validate
from tests.format.forging import Forged, body_of, seal
from tests.format.mutations import mutations
from tests.format.records import small

SCHEMA = json.loads(resources.files("expstate.format").joinpath("manifest.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def is_valid(manifest: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(manifest))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of a snapshot with entries of all kinds, boxes of one block and of many."""
    weight = torch.randn(3, 4)
    state = {
        "model": torch.nn.Linear(2, 2),
        "extra": StateDict(
            weight=weight,
            tied=weight,
            blocks=torch.zeros(3 * 2**18),
            many=torch.zeros(70 * 2**18),
            array=np.arange(3),
            frame=pd.DataFrame({"a": [1, 2]}),
            object=Path.exists,
            values=[1, 2.5, (None, float("nan")), {1, 2}],
            odd={1: "a", (2, "b"): 2**70},
            sparse=torch.eye(3).to_sparse(),
        ),
    }
    folder = tmp_path_factory.mktemp("schema") / "s"
    given: dict[str, Any] = {"name": "n", "tags": ["a", "b"], "params": {"lr": 1e-3, "layers": [1, 2]}, "metrics": {"loss": float("inf")}}
    with pytest.warns(NeedsTrustWarning):
        Snapshot.take(folder, state, step=3, **given)
    return json.loads((folder / "snapshot.json").read_bytes())


def test_the_schema_is_one() -> None:
    """It is a JSON Schema of the draft that it names."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_real_manifest_follows_the_schema(manifest: Any) -> None:
    """Entries of every kind are in it, and nothing is amiss."""
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert {"tensor", "value", "alias", "container", "object"} == {entry[0] for entry in manifest["entries"]}
    boxes = [box for entry in manifest["entries"] if entry[0] == "tensor" for box in entry[4]]
    assert {type(None), str, list} == {type(box[3]) for box in boxes}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["format"], 2),
        (["id"], "3F9A"),
        (["world_size"], 0),
        (["blake3"], "00"),
        (["files", 0, 0], "../evil"),
        (["files", 0, 1], -1),
        (["files", 0, 3], "short"),
        (["entries", 0, 0], "folder"),
        (["entries", 0, 1], ""),
        (["entries", 0], ["tensor", "a"]),
        (["metadata", "tags"], [""]),
        (["keys", 0], ["model"]),
    ],
)
def test_a_broken_manifest_does_not(manifest: Any, place: list[Any], value: Any) -> None:
    """Each of these would be refused by the reader too."""
    broken = copy.deepcopy(manifest)
    at = broken
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    assert is_valid(manifest)
    assert not is_valid(broken)


@pytest.mark.parametrize("field", ["format", "id", "files", "entries", "keys", "blake3", "requires"])
def test_a_field_that_is_missing_is_noticed(manifest: Any, field: str) -> None:
    """All fields of the first level are there in every manifest."""
    assert not is_valid({name: value for name, value in manifest.items() if name != field})


def test_a_small_manifest_is_what_the_schema_says() -> None:
    """With everything that may be left out left out, and with all metadata that there is."""
    given_metadata = Metadata("a", ("b",), {"c": {"type": "tuple", "value": [1]}}, {"d": 0.5}, "e", 3)
    for manifest in (small(), small(keys=(), files=(), entries=()), small(metadata=given_metadata, provenance={"x": [1]})):
        assert [] == [error.message for error in CHECK.iter_errors(json.loads(encode(manifest)))]


def _remove(field: str) -> Callable[[Any], None]:
    return lambda document: document.pop(field)


def _set(*place: Any, to: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for step in place[:-1]:
            document = document[step]
        document[place[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(
            _remove,
            [
                "format",
                "id",
                "created_at",
                "writer",
                "requires",
                "world_size",
                "metadata",
                "provenance",
                "keys",
                "files",
                "entries",
                "blake3",
            ],
        ),
        _set("format", to=2),
        _set("format", to="1"),
        _set("id", to="x"),
        _set("world_size", to=0),
        _set("world_size", to=1.5),
        _set("requires", to=[5]),
        _set("blake3", to=""),
        _set("keys", to=[["a"]]),
        _set("metadata", to=[]),
        _set("metadata", to={"tags": [1]}),
        _set("metadata", to={"params": {"a": {"type": "tuple"}}}),
        _set("files", 0, 0, to="../x-00001-01234567.safetensors"),
        _set("files", 0, 0, to="/etc/passwd"),
        _set("files", 0, 1, to=-1),
        _set("files", 0, 3, to="short"),
        _set("files", 0, to=["a-00001-01234567.safetensors"]),
        _set("entries", to={}),
        _set("entries", 0, to=[]),
        _set("entries", 0, 0, to="what"),
        _set("entries", 0, 1, to=""),
        _set("entries", 0, 1, to="a//b"),
        _set("entries", 0, 1, to="a\nb"),
        _set("entries", 1, 2, to=4),
        _set("entries", 1, 3, to=[-1]),
        _set("entries", 1, 3, to=[1.5]),
        _set("entries", 1, 3, to=[1] * 65),
        _set("entries", 1, 4, to=None),
        _set("entries", 1, 4, 0, to=[0, 4096]),
        _set("entries", 1, 4, 0, 0, to=-1),
        _set("entries", 1, 4, 0, 2, to="A" * 44),
        _set("entries", 1, 4, 0, 3, to=[1, 2, 3]),
        _set("entries", 1, 4, 0, 4, to="0"),
        _set("entries", 1, 5, to="what"),
        _set("entries", 1, 6, to=1),
        _set("entries", 1, 7, to=0),
        _set("entries", 2, 2, to={"value": 1}),
        _set("entries", 2, 3, to="0"),
    ],
)
def test_a_broken_manifest_is_not_what_the_schema_says(change: Callable[[Any], None]) -> None:
    """The schema refuses what readers refuse."""
    document = json.loads(encode(small()))
    change(document)

    assert [] != list(CHECK.iter_errors(document))


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_what_readers_believe_the_schema_does(genuine: Path, data: st.DataObject) -> None:
    """No manifest that is read is against the schema, but in what readers only show, or look at when the entry is read."""
    document = data.draw(mutations(Forged(genuine).document))
    sealed = seal(body_of(document))
    try:
        validate(decode(sealed))
    except ExpstateError:
        return
    found = json.loads(sealed)
    shown = ["$.metadata", "$.keys", "$.format"]
    shown += [f"$.entries[{number}]" for number, entry in enumerate(found["entries"]) if entry[0] == "value" or entry[-1] is not None]

    assert [] == [error.json_path for error in CHECK.iter_errors(found) if not error.json_path.startswith(tuple(shown))]


def test_every_part_of_the_schema_is_explained() -> None:
    """Each field and each record has a title and a description."""
    schema = SCHEMA
    parts = [schema, *schema["properties"].values(), *schema["$defs"].values(), *schema["$defs"]["metadata"]["properties"].values()]
    parts += [item for record in schema["$defs"].values() for item in record.get("prefixItems", ())]
    for part in parts:
        assert "$ref" in part or "const" in part or {"title", "description"} <= set(part)
