"""``ram://`` keeps what a storage must keep, for as long as the process lives and nobody forgets it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import InvalidArgumentError, NoSpaceError
from expstate.storage import memory
from expstate.storage.base import Storage
from expstate.storage.memory import MemoryStorage
from expstate.storage.registry import open_storage
from expstate.testing.cases import DATA, SMALL, TOKEN, aligned, random_bytes
from expstate.testing.storage import StorageTests
from tests.engine.processes import in_child


class TestMemoryStorage(StorageTests):
    def open(self, place: Path) -> Storage:
        return open_storage(f"ram://{place}")

    def test_of_several_processes_that_create_a_file_one_wins(self, storage: Storage, place: Path) -> None:
        """Each has a memory of its own, so each wins in its own."""
        ended = in_child(functools.partial(storage.create, SMALL, b"the child's", token=TOKEN))
        storage.create(SMALL, b"the parent's", token=TOKEN)

        assert ended.error is None
        assert b"the parent's" == storage.read(SMALL)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"test/{request.node.name}"
    yield name
    memory.forget(name)


def perceptron() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(700, 500), torch.nn.ReLU(), torch.nn.BatchNorm1d(500), torch.nn.Linear(500, 3))


def test_a_model_and_its_optimizer_come_back_bit_by_bit(name: str) -> None:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 700)).sum().backward()
    optimizer.step()
    app_state = {"model": model, "optimizer": optimizer, "progress": StateDict(step=1)}
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    snapshot = Snapshot.take(f"ram://{name}", app_state)
    for _ in range(3):
        optimizer.step()
    app_state["progress"]["step"] = 4

    assert not torch.equal(expected["0.weight"], model[0].weight)
    snapshot.restore(app_state)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in expected.items())
    assert {1} == {int(state["step"]) for state in optimizer.state.values()}
    assert 1 == app_state["progress"]["step"]
    assert snapshot.verify().ok
    assert memory.nbytes(name) >= snapshot.nbytes


def test_a_take_in_the_background_is_there_too(name: str) -> None:
    weight = torch.randn(1000)
    expected = weight.clone()
    pending = Snapshot.async_take(f"ram://{name}", {"state": StateDict(weight=weight)})
    weight.zero_()

    assert torch.equal(expected, pending.wait().read_object("state/weight"))


def test_what_is_forgotten_is_gone(name: str) -> None:
    Snapshot.take(f"ram://{name}", {"state": StateDict(weight=torch.ones(1000))})

    assert memory.nbytes(name) > 4000
    memory.forget(name)
    memory.forget(name)
    assert 0 == memory.nbytes(name)
    assert open_storage(f"ram://{name}").prepare()


def test_a_deleted_snapshot_leaves_nothing(name: str) -> None:
    Snapshot.take(f"ram://{name}", {"state": StateDict(weight=torch.ones(1000))}).delete()

    assert open_storage(f"ram://{name}").prepare()


def test_what_is_read_stays_though_it_is_forgotten(name: str) -> None:
    storage = open_storage(f"ram://{name}")
    storage.prepare()
    data = random_bytes(5000)
    storage.create_file(DATA, 5000).write(0, aligned(data))
    reader = storage.open_file(DATA)
    memory.forget(name)
    target = aligned(bytes(5000))
    reader.read_into(0, target)

    assert data == bytes(target)


def test_a_folder_that_was_not_made_holds_nothing(name: str) -> None:
    storage = open_storage(f"ram://{name}")
    with pytest.raises(FileNotFoundError):
        storage.create(SMALL, b"x", token=TOKEN)
    with pytest.raises(FileNotFoundError):
        list(storage.list())
    storage.delete(SMALL)
    storage.remove_folder()

    assert storage.prepare()
    assert not storage.prepare()


def test_more_than_there_can_be_is_refused(name: str) -> None:
    storage = open_storage(f"ram://{name}")
    storage.prepare()
    for size in (2**60, 2**70):
        with pytest.raises(NoSpaceError, match="no memory"):
            storage.create_file(DATA, size)

    assert [] == list(storage.list())


def test_options_are_refused(name: str) -> None:
    assert isinstance(open_storage(f"ram://{name}"), MemoryStorage)
    with pytest.raises(InvalidArgumentError, match="endpoint"):
        open_storage(f"ram://{name}", {"endpoint": "x"})


def test_a_child_has_what_its_parent_has_kept_and_changes_nothing_of_it(name: str) -> None:
    state = StateDict(weight=torch.arange(1000.0))
    snapshot = Snapshot.take(f"ram://{name}", {"state": state})

    def restore_and_forget() -> list[float]:
        state["weight"].zero_()
        snapshot.restore({"state": state})
        memory.forget(name)
        return state["weight"][:3].tolist()

    assert [0.0, 1.0, 2.0] == in_child(restore_and_forget).result
    assert torch.equal(torch.arange(1000.0), snapshot.read_object("state/weight"))
