"""The published schema of the manifest: real manifests follow it, broken ones do not."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import NeedsTrustWarning

SCHEMA = json.loads(resources.files("expstate.format").joinpath("manifest.schema.json").read_text())


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
        (["metadata", "tags"], ["a", "a"]),
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
