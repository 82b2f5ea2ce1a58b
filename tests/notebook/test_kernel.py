"""What a notebook takes is what its names stand for, and a restore puts it back into the same objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from expstate import Catalog, PendingSnapshot, ProgressUpdate, Snapshot, StateDict, settings
from expstate.engine import ancestry
from expstate.engine.take import Take
from expstate.errors import (
    AppStateError,
    EntryNotFoundError,
    InvalidArgumentError,
    InvalidNameError,
    NameNotFoundError,
    NoUndoRoomError,
    RefNotFoundError,
    RestoreInterruptedError,
    RestoreMismatchError,
    StorageError,
    StoragePermissionError,
    UndoError,
)
from expstate.notebook.kernel import Kernel

from .shells import Shell


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None) -> Iterator[None]:
    """A folder, catalog and project of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    monkeypatch.setenv("EXPSTATE_PROJECT", "tests")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ancestry.forget()
    yield
    ancestry.forget()


def make(**more: Any) -> Kernel:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Kernel(Shell(**({"model": model, "optimizer": optimizer, "losses": [1.0], "lr": 0.1} | more)))


def train(kernel: Kernel) -> None:
    """One step of everything."""
    names = kernel.namespace
    names["model"](torch.ones(1, 3)).sum().backward()
    names["optimizer"].step()
    names["losses"].append(0.5)
    names["lr"] = names["lr"] / 2


def bits(kernel: Kernel) -> tuple[Any, ...]:
    names = kernel.namespace
    return names["model"].weight.tolist(), names["losses"][:], names["lr"]


def taken(kernel: Kernel, *names: str, **options: Any) -> Snapshot:
    found = kernel.take(names or ("model", "optimizer", "losses", "lr"), wait=True, **options)
    assert isinstance(found, Snapshot)
    return found


# Taking


def test_a_take_goes_on_in_the_background_and_every_ref_waits_for_it() -> None:
    kernel = make()
    pending = kernel.take(["model"], name="first", alias="best", metrics={"loss": 0.5}, step=3)

    assert isinstance(pending, PendingSnapshot)
    assert pending.id == kernel.find("latest").id
    assert ("first", 3, {"loss": 0.5}) == (
        kernel.find("best").metadata.name,
        kernel.find("best").metadata.step,
        kernel.find("best").metadata.metrics,
    )
    assert {"model", "rng_state"} == set(kernel.find("first").keys())


def test_where_nobody_drives_the_kernel_it_is_waited_for() -> None:
    kernel = Kernel(Shell(is_driven=False, model=torch.nn.Linear(1, 1)))

    assert isinstance(kernel.take(["model"]), Snapshot)


def test_without_names_the_last_ones_are_meant_and_the_first_time_none() -> None:
    kernel = make()
    with pytest.raises(InvalidArgumentError, match=r"model, optimizer"):
        kernel.take()
    taken(kernel, "model", "lr")

    assert ("model", "lr", "rng_state") == kernel.take(wait=True).keys()  # type: ignore[union-attr]


def test_what_was_registered_is_meant_at_first() -> None:
    kernel = make()
    kernel.registry.add(kernel.namespace, {"model": kernel.namespace["model"]})

    assert ("model", "rng_state") == kernel.take(wait=True).keys()  # type: ignore[union-attr]


def test_a_name_means_what_it_stands_for_at_that_moment() -> None:
    kernel = make()
    taken(kernel)
    kernel.namespace["model"] = torch.nn.Linear(5, 1)

    assert (1, 5) == tuple(taken(kernel).read_object("model/weight").shape)


def test_dotted_paths_are_keys() -> None:
    kernel = make(trainer=SimpleNamespace(model=torch.nn.Linear(2, 1), step=3))
    snapshot = taken(kernel, "trainer.model", "trainer.step")
    kernel.namespace["trainer"].step = 9
    kernel.restore(snapshot)

    assert ("trainer.model", "trainer.step", "rng_state") == snapshot.keys()
    assert 3 == kernel.namespace["trainer"].step


def test_an_unknown_name_lists_those_that_are_there() -> None:
    with pytest.raises(NameNotFoundError, match="'modle' stands for nothing in this notebook; there are model, optimizer"):
        taken(make(), "modle")


def test_snapshots_go_beside_the_notebook_and_stay_out_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    snapshot = taken(kernel, "lr")

    assert tmp_path / "expstate-snapshots" == Path(snapshot.path).parent
    assert "*\n" == (tmp_path / "expstate-snapshots" / ".gitignore").read_text()


def test_another_place_may_be_used(tmp_path: Path) -> None:
    kernel = make()
    kernel.place.use("runs", {})
    snapshot = taken(kernel, "lr")
    with settings.override(root=str(tmp_path / "root")):
        assert tmp_path / "runs" == Path(snapshot.path).parent
        assert tmp_path / "root" == Path(taken(make(), "lr").path).parent


@pytest.mark.parametrize("name", ["secret", "api_key", "AUTH_TOKEN", "password"])
def test_secrets_have_no_place_in_a_notebook(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="secret"):
        make().place.use("runs", {name: "x"})


def test_a_place_that_cannot_be_written_names_use(tmp_path: Path) -> None:
    (tmp_path / "expstate-snapshots").touch()
    with pytest.raises(StoragePermissionError, match="%snapshot use"):
        taken(make(), "lr")


def test_a_take_that_fails_in_the_background_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        msg = "the disk is gone"
        raise StorageError(msg)

    kernel = make()
    good = kernel.take(["model"], wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(Take, "commit", fail)
        begun = kernel.take(["model", "losses"])
        assert isinstance(begun, PendingSnapshot)
        assert isinstance(begun.exception(), StorageError)
        begun._thread.join()
        with pytest.raises(StorageError):
            kernel.take(["model"], wait=True)  # told where it was waited for, and not again

    status = kernel.status()
    assert "the disk is gone" in str(status)
    assert status.base is not None
    assert (good.id, ("model",), ()) == (status.base.id, status.names, status.changed)
    (told,) = kernel.take_failures()
    assert "the disk is gone" in told
    assert () == kernel.take_failures()


def test_what_is_wrong_with_an_alias_is_known_before_the_take(tmp_path: Path) -> None:
    with pytest.raises(InvalidNameError):
        make().take(["model"], alias="a/b")

    assert not (tmp_path / "expstate-snapshots").exists()


# Restoring


def test_a_restore_puts_everything_back_into_the_same_objects() -> None:
    kernel = make()
    snapshot, before = taken(kernel), bits(kernel)
    objects = [kernel.namespace[name] for name in ("model", "optimizer", "losses")]
    weight = kernel.namespace["model"].weight
    train(kernel)
    assert before != bits(kernel)
    done = kernel.restore(snapshot)

    assert before == bits(kernel)
    assert objects == [kernel.namespace[name] for name in ("model", "optimizer", "losses")]
    assert weight is kernel.namespace["model"].weight
    assert (("lr",), ()) == (done.bound, done.created)


def test_plain_values_of_every_kind_come_back() -> None:
    tensor, array, frame = torch.ones(3), np.arange(4), pd.DataFrame({"a": [1, 2]})
    kernel = Kernel(Shell(tensor=tensor, array=array, frame=frame, text="a", pair=(1, 2), table={"x": [1]}, members={1, 2}))
    chosen = ("tensor", "array", "frame", "text", "pair", "table", "members")
    snapshot = taken(kernel, *chosen)
    names = kernel.namespace
    table, members = names["table"], names["members"]
    tensor.zero_()
    array[:] = 0
    table["x"].append(2)
    members.add(3)
    names |= {"frame": pd.DataFrame(), "text": "b", "pair": ()}
    done = kernel.restore(snapshot)

    assert [1, 1, 1] == tensor.tolist()
    assert names["tensor"] is tensor
    assert [0, 1, 2, 3] == array.tolist()
    assert names["array"] is array
    assert ({"x": [1]}, True) == (table, names["table"] is table)
    assert ({1, 2}, True) == (members, names["members"] is members)
    assert ("a", (1, 2), [1, 2]) == (names["text"], names["pair"], names["frame"]["a"].tolist())
    assert {"frame", "text", "pair"} == set(done.bound)


def test_a_tensor_of_another_shape_is_bound_anew() -> None:
    kernel = Kernel(Shell(tensor=torch.ones(3)))
    snapshot = taken(kernel, "tensor")
    kernel.namespace["tensor"] = torch.zeros(5)
    done = kernel.restore(snapshot)

    assert ([1, 1, 1], ("tensor",)) == (kernel.namespace["tensor"].tolist(), done.bound)


def test_a_missing_plain_name_is_created_and_a_missing_stateful_is_an_error() -> None:
    kernel = make()
    snapshot = taken(kernel)
    del kernel.namespace["lr"], kernel.namespace["model"]
    with pytest.raises(NameNotFoundError, match=r"'model' has a state of its own .* create it first"):
        kernel.restore(snapshot)
    done = kernel.restore(snapshot, ["lr"])

    assert (("lr",), 0.1) == (done.created, kernel.namespace["lr"])


@pytest.mark.parametrize(("name", "value"), [("model", 3), ("lr", StateDict())])
def test_a_name_of_another_kind_is_an_error(name: str, value: Any) -> None:
    kernel = make()
    snapshot = taken(kernel)
    kernel.namespace[name] = value
    with pytest.raises(AppStateError, match=f"'{name}' is a"):
        kernel.restore(snapshot)


def test_what_does_not_fit_changes_nothing() -> None:
    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    kernel.namespace["model"] = torch.nn.Linear(4, 2)
    before = bits(kernel)
    with pytest.raises(RestoreMismatchError):
        kernel.restore(snapshot)

    assert before == bits(kernel)
    assert not kernel.can_undo


def test_a_name_that_is_not_in_the_snapshot_is_an_error() -> None:
    kernel = make()
    with pytest.raises(EntryNotFoundError, match="the snapshot has no 'lr'; it has 'model'"):
        kernel.restore(taken(kernel, "model"), ["lr"])
    with pytest.raises(RefNotFoundError):
        kernel.restore("nosuch")


def test_random_generators_come_back_unless_names_are_given() -> None:
    kernel = make()
    snapshot = taken(kernel)
    first = torch.rand(3).tolist()
    kernel.restore(snapshot, ["lr"])
    other = torch.rand(3).tolist()
    kernel.restore(snapshot, ["lr"], rng=True)
    again = torch.rand(3).tolist()
    kernel.restore(snapshot)

    assert first == again == torch.rand(3).tolist()
    assert first != other


def test_a_dry_run_changes_nothing_and_tells_what_would_be() -> None:
    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    before = bits(kernel)
    plan = kernel.restore(snapshot, dry_run=True)

    assert before == bits(kernel)
    assert plan.dry_run
    assert "would restore" in str(plan)
    assert not kernel.can_undo


def test_parts_are_chosen_by_globs() -> None:
    kernel = make()
    snapshot = taken(kernel, "model")
    with torch.no_grad():
        kernel.namespace["model"].weight.zero_()
        kernel.namespace["model"].bias.zero_()
    kernel.restore(snapshot, include=["model/bias"])

    assert not kernel.namespace["model"].weight.any()
    assert kernel.namespace["model"].bias.any()


# Undo


def test_an_undo_brings_every_bit_back_and_a_redo_too() -> None:
    kernel = make()
    snapshot, first = taken(kernel), bits(kernel)
    train(kernel)
    second = bits(kernel)
    kernel.restore(snapshot)
    assert first == bits(kernel)
    kernel.undo()
    assert second == bits(kernel)
    kernel.redo()
    assert first == bits(kernel)
    kernel.undo()

    assert second == bits(kernel)
    assert (False, True) == (kernel.can_undo, kernel.can_redo)


def test_random_numbers_are_taken_back_too() -> None:
    kernel = make()
    snapshot = taken(kernel)
    torch.rand(5)
    here = torch.get_rng_state()
    kernel.restore(snapshot)
    assert not torch.equal(here, torch.get_rng_state())
    kernel.undo()

    assert torch.equal(here, torch.get_rng_state())


def test_a_name_that_was_created_is_taken_away_and_comes_back() -> None:
    kernel = make()
    snapshot = taken(kernel, "lr", "losses")
    del kernel.namespace["lr"]
    kernel.restore(snapshot)
    kernel.undo()
    assert "lr" not in kernel.namespace
    done = kernel.redo()

    assert (("lr",), 0.1) == (done.created, kernel.namespace["lr"])
    kernel.undo()
    assert "lr" not in kernel.namespace


def test_names_that_were_all_created_are_taken_away() -> None:
    kernel = make()
    snapshot = taken(kernel, "lr")
    del kernel.namespace["lr"]
    kernel.restore(snapshot, ["lr"])
    kernel.undo()

    assert "lr" not in kernel.namespace


def test_training_since_is_not_thrown_away_unasked() -> None:
    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    second = bits(kernel)
    kernel.restore(snapshot)
    train(kernel)
    now = bits(kernel)
    with pytest.raises(UndoError, match=r"changed since .* -y"):
        kernel.undo()

    assert now == bits(kernel)
    kernel.undo(force=True)
    assert second == bits(kernel)


def test_there_is_one_undo() -> None:
    kernel = make()
    with pytest.raises(UndoError, match="nothing to undo"):
        kernel.undo()
    snapshot = taken(kernel)
    kernel.restore(snapshot)
    kernel.undo()
    with pytest.raises(UndoError, match="nothing to undo"):
        kernel.undo()


def test_an_undo_of_a_part_leaves_the_rest_alone() -> None:
    kernel = make()
    snapshot = taken(kernel, "model")
    model = kernel.namespace["model"]
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(1)
    kernel.restore(snapshot, include=["model/bias"])
    with torch.no_grad():
        model.weight.fill_(2)
    kernel.undo()

    assert ([1, 1], 2) == (model.bias.tolist(), model.weight[0, 0].item())


def test_without_room_for_an_undo_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from expstate.notebook import restoring

    def full(*_: object) -> None:
        raise NoUndoRoomError

    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    before = bits(kernel)
    monkeypatch.setattr(restoring, "keep", full)
    with pytest.raises(NoUndoRoomError):
        kernel.restore(snapshot)

    assert before == bits(kernel)
    kernel.restore(snapshot, undo=False)
    assert before != bits(kernel)
    assert not kernel.can_undo


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError])
def test_a_restore_that_is_interrupted_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    kernel = make(big=torch.zeros(3_000_000))
    snapshot = taken(kernel, "model", "optimizer", "losses", "lr", "big")
    train(kernel)
    kernel.namespace["big"].fill_(1)
    before, rng = bits(kernel), torch.get_rng_state()
    moved: list[int] = []

    def stop(update: ProgressUpdate) -> None:
        moved.append(update.done_bytes)
        if update.done_bytes >= update.total_bytes:
            raise error

    with pytest.raises(RestoreInterruptedError):
        kernel.restore(snapshot, progress=stop)

    assert moved
    assert before == bits(kernel)
    assert kernel.namespace["big"].min() == kernel.namespace["big"].max() == 1
    assert torch.equal(rng, torch.get_rng_state())
    assert not kernel.can_undo


def test_an_interrupted_restore_without_an_undo_has_changed_something() -> None:
    """What the copy is good for."""
    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    before = bits(kernel)

    def stop(_: ProgressUpdate) -> None:
        raise KeyboardInterrupt

    with pytest.raises(RestoreInterruptedError):
        kernel.restore(snapshot, progress=stop, undo=False)

    assert before != bits(kernel)


def test_undo_and_redo_hold_one_copy_each_time() -> None:
    from expstate.storage import memory

    kernel = make()
    snapshot = taken(kernel)
    train(kernel)
    kernel.restore(snapshot)
    kernel.undo()
    kernel.redo()
    kernel.undo()

    assert 1 == len(memory._folders)


# Guarded


def test_a_guarded_block_that_fails_leaves_everything_as_it_was() -> None:
    kernel = make()
    before, model, state = bits(kernel), kernel.namespace["model"], torch.get_rng_state()

    def fail() -> None:
        with kernel.guarded(["model", "optimizer", "losses", "lr"]):
            train(kernel)
            kernel.namespace["model"] = torch.nn.Linear(7, 7)
            torch.rand(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert before == bits(kernel)
    assert model is kernel.namespace["model"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_guarded_block_that_succeeds_keeps_what_it_did() -> None:
    kernel = make()
    before = bits(kernel)
    with kernel.guarded(["model", "optimizer", "losses", "lr"]):
        train(kernel)

    assert before != bits(kernel)
    assert not kernel.can_undo


# Comparing


def test_status_tells_what_has_changed_since_the_last_take() -> None:
    kernel = make()
    assert "nothing was taken here yet" in str(kernel.status())
    taken(kernel, name="first")
    assert () == kernel.status().changed
    kernel.namespace["lr"] = 1
    torch.rand(1)
    status = kernel.status()

    assert ("lr", "rng_state") == status.changed
    assert "last take first of model, optimizer, losses, lr; changed since: lr\nrandom numbers were drawn since" in str(status)


def test_a_diff_is_with_what_is_live_or_of_two() -> None:
    kernel = make()
    first = taken(kernel, name="first")
    train(kernel)
    taken(kernel, name="second")
    kernel.namespace["lr"] = 5

    assert {"lr/value"} == set(kernel.diff("second").changed)
    assert {"model/weight", "model/bias"} == set(kernel.diff(first, "live", ["model"]).changed)
    assert {"model/weight", "model/bias"} == set(kernel.diff("first", "second", ["model"]).changed)
    assert {"lr/value"} < set(kernel.diff("first", "second").changed)
    with pytest.raises(InvalidArgumentError, match="put the snapshot first"):
        kernel.diff("live", "first")


def test_who_listens_is_told_of_changes() -> None:
    kernel = make()
    told: list[int] = []
    stop: Callable[[], None] = kernel.on_change(lambda: told.append(1))
    snapshot = taken(kernel)
    count = len(told)
    kernel.restore(snapshot)

    assert 0 < count < len(told)
    stop()
    count = len(told)
    kernel.undo()
    assert count == len(told)


def test_without_a_catalog_paths_are_refs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_CATALOG", "off")
    kernel = make()
    snapshot = taken(kernel)

    assert snapshot.id == kernel.find(snapshot.path).id
    with pytest.raises(Exception, match="switched off"):
        kernel.take(["model"], alias="best")


def test_the_catalog_of_the_kernel_is_the_users() -> None:
    kernel = make()
    snapshot = taken(kernel)

    assert [snapshot.id] == [record.id for record in Catalog().search()]
