"""Names are looked up when they are needed, and what they stand for is captured and put back by the kind of value that it is."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from expstate import StateDict
from expstate.errors import InvalidArgumentError, NameNotFoundError
from expstate.notebook import names
from expstate.notebook.names import MISSING, Plain, Registry, bind, candidates, check_name, is_stateful, look_up, refill


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "1a", "a b", "a/b", "class", "a.def", "x=1", "rng_state", "f()"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_name(name)


@pytest.mark.parametrize("name", ["model", "trainer.model", "_x", "größe", "a.b.c"])
def test_names_and_dotted_paths_are_names(name: str) -> None:
    assert name == check_name(name)


def test_a_dotted_path_is_looked_up_and_bound() -> None:
    trainer = SimpleNamespace(model=1)
    namespace: dict[str, Any] = {"trainer": trainer}

    assert 1 == look_up(namespace, "trainer.model")
    assert MISSING is look_up(namespace, "trainer.other")
    assert MISSING is look_up(namespace, "nobody.model")
    bind(namespace, "trainer.model", 2)
    bind(namespace, "count", 3)
    assert (2, 3) == (trainer.model, namespace["count"])
    bind(namespace, "trainer.model", MISSING)
    bind(namespace, "count", MISSING)
    assert not hasattr(trainer, "model")
    assert "count" not in namespace
    with pytest.raises(NameNotFoundError, match="'nobody' stands for nothing"):
        bind(namespace, "nobody.model", 1)


def test_classes_are_no_statefuls() -> None:
    assert is_stateful(torch.nn.Linear(1, 1))
    assert is_stateful(StateDict())
    assert not is_stateful(torch.nn.Linear)
    assert not is_stateful({})


def test_candidates_are_the_users_own_objects_with_a_state() -> None:
    model, weights, array = torch.nn.Linear(1, 1), torch.ones(2), np.ones(2)
    namespace = {"lr": 0.1, "weights": weights, "array": array, "model": model, "_model": model, "theirs": model, "torch": torch}

    assert ("model", "weights", "array") == candidates(namespace, {"theirs": model})


def test_lists_dicts_and_sets_are_refilled_in_place() -> None:
    inner, tensor = [1], torch.ones(2)
    live: dict[str, Any] = {"gone": 1, "list": inner, "tensor": tensor, "set": {1}}
    members = live["set"]
    found = refill(live, {"list": [2, 3], "tensor": tensor, "set": {4}, "new": None})

    assert found is live
    assert {"list": [2, 3], "tensor": tensor, "set": {4}, "new": None} == live
    assert ["list", "tensor", "set", "new"] == list(live)
    assert live["list"] is inner
    assert live["set"] is members


@pytest.mark.parametrize(("live", "new"), [(1, 2), ("a", "b"), ((1,), (2,)), ([1], (1,)), ({"a": 1}, [1]), (None, [1]), (1, 1.0)])
def test_what_cannot_be_changed_in_place_is_given_anew(live: Any, new: Any) -> None:
    assert new is refill(live, new)


def test_data_frames_are_given_anew() -> None:
    new = pd.DataFrame({"a": [1]})

    assert new is refill(pd.DataFrame({"a": [0]}), new)


def test_a_name_that_stands_for_nothing_has_an_empty_state() -> None:
    plain = Plain(MISSING)

    assert {} == plain.state_dict()
    plain.load_state_dict({"value": 3})
    assert 3 == plain.value


def test_a_registered_name_that_is_another_object_now_is_told_once() -> None:
    registry = Registry()
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    namespace: dict[str, Any] = {"model": first}
    registry.add(namespace, {"model": first})

    assert (first, None) == registry.look_up(namespace, "model")
    namespace["model"] = second
    assert (second, "'model' is another object than the one that was registered") == registry.look_up(namespace, "model")
    assert (second, None) == registry.look_up(namespace, "model")


def test_an_object_without_a_name_is_held_weakly() -> None:
    registry = Registry()
    nobodys = torch.nn.Linear(1, 1)
    registry.add({}, {"model": nobodys})

    assert ("model",) == registry.names
    assert nobodys is registry.look_up({}, "model")[0]
    del nobodys
    gc.collect()
    value, said = registry.look_up({}, "model")
    assert MISSING is value
    assert said is not None


def test_a_miss_lists_what_is_there() -> None:
    message = str(names.not_found("modle", {"model": torch.nn.Linear(1, 1)}))

    assert "'modle' stands for nothing" in message
    assert "model" in message
