"""Names that differ by a prefix: wrappers are looked through, renames are asked for, and an error says which would help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import RestoreMismatchError
from tests.state.conftest import assert_same

from .conftest import Watched, digest_of, is_equal, mlp, train


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _inner(model: torch.nn.Sequential) -> torch.nn.Sequential:
    """The model with one of its layers compiled."""
    model[0] = _compiled(model[0])
    return model


def _parallel(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Any] = {
    "bare": lambda model: model,
    "DataParallel": torch.nn.DataParallel,
    "DDP": _parallel,
    "compiled": _compiled,
    "compiled inside": _inner,
    "compiled DDP": lambda model: _compiled(_parallel(model)),
    "DDP of compiled": lambda model: _parallel(_compiled(model)),
    "DDP of compiled inside": lambda model: _parallel(_inner(model)),
}


@pytest.mark.parametrize("live", WRAPPERS)
@pytest.mark.parametrize("stored", WRAPPERS)
def test_wrappers_are_looked_through(place: Path, process_group: None, stored: str, live: str) -> None:
    """From each wrapping into each other, without a rename, in place."""
    Snapshot.take(place, {"model": WRAPPERS[stored](mlp(1))})
    inner = mlp(2)
    wrapped = WRAPPERS[live](inner)
    memory = [tensor.data_ptr() for tensor in wrapped.state_dict().values()]
    report = Snapshot(place).restore({"model": wrapped})

    assert_same(list(mlp(1).state_dict().values()), list(wrapped.state_dict().values()))
    assert memory == [tensor.data_ptr() for tensor in wrapped.state_dict().values()]
    assert ((), ()) == (report.missing, report.unexpected)


def test_parts_go_through_wrappers_too(place: Path) -> None:
    """Globs are on the snapshot's paths; what they choose finds its place in the bare module."""
    Snapshot.take(place, {"model": torch.nn.DataParallel(_compiled(mlp(1)))})
    model = mlp(2)
    Snapshot(place).restore({"model": model}, include="model/module._orig_mod.3.*")

    assert torch.equal(mlp(1)[3].weight, model[3].weight)
    assert torch.equal(mlp(2)[0].weight, model[0].weight)


def test_a_module_that_is_called_module_is_no_wrapper(place: Path) -> None:
    """Names that match as they are stay, whatever they look like."""

    class Holder(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = mlp(seed)

    live = Holder(2)
    Snapshot.take(place, {"model": Holder(1)})
    Snapshot(place).restore({"model": live})

    assert is_equal(mlp(1), live.module)


def test_an_averaged_model_comes_back_into_its_like(place: Path) -> None:
    """Its ``module.`` and ``n_averaged`` are its own."""
    model = mlp(1)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(mlp(2))
    Snapshot.take(place, {"ema": averaged})
    fresh = torch.optim.swa_utils.AveragedModel(mlp(3))
    Snapshot(place).restore({"ema": fresh})

    assert is_equal(averaged, fresh)
    assert 1 == int(fresh.n_averaged)


# Renames


def test_a_prefix_is_renamed(place: Path) -> None:
    """The weights of one module into a part of a larger one, and back out of it."""
    whole, bare = torch.nn.ModuleDict({"encoder": mlp(1), "head": torch.nn.Linear(3, 2)}), mlp(2)
    Snapshot.take(place, {"model": whole})
    Snapshot(place).restore({"model": bare}, include="model/encoder.*", rename={"encoder.": ""})
    assert is_equal(mlp(1), bare)

    Snapshot.take(place, {"model": mlp(3)}, overwrite=True)
    Snapshot(place).restore({"model": whole}, rename={"": "encoder."}, strict=False)
    assert is_equal(mlp(3), whole["encoder"])


def test_the_longest_prefix_counts(place: Path) -> None:
    """Of several prefixes that fit, and in whatever order they are given."""
    Snapshot.take(place, {"state": StateDict({"a.b.x": 1, "a.c": 2, "d": 3})})
    live = StateDict()
    Snapshot(place).restore({"state": live}, rename={"a.": "z.", "a.b.": "y."})

    assert {"y.x": 1, "z.c": 2, "d": 3} == live.state_dict()


def test_a_prefix_with_a_key_is_for_that_key_alone(place: Path) -> None:
    """Others with the same names keep them."""
    Snapshot.take(place, {"one": StateDict({"a.x": 1}), "two": StateDict({"a.x": 2})})
    one, two = StateDict(), StateDict()
    Snapshot(place).restore({"one": one, "two": two}, rename={"one/a.": "one/b."})

    assert ({"b.x": 1}, {"a.x": 2}) == (one.state_dict(), two.state_dict())


@pytest.mark.parametrize("prefix", [{"old": "new"}, {"old/": "new/"}, {"state/old/": "state/new/"}])
def test_a_nested_dict_is_renamed_with_what_is_in_it(taken: Any, prefix: dict[str, str]) -> None:
    """The container goes along with its items, and live tensors under the new name are read in place."""
    live = StateDict(new={"x": torch.zeros(2)})
    kept = live["new"]["x"]
    taken(old={"x": torch.ones(2), "y": [1]}, other=1).restore({"state": live}, rename=prefix)

    assert_same({"new": {"x": torch.ones(2), "y": [1]}, "other": 1}, live.state_dict())
    assert kept is live["new"]["x"]


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"a": "b"}, "a name that another has already"),
        ({"": "inner/"}, "nothing of the snapshot is above that"),
        ({"numbers/1": "numbers/2"}, "the items of 'state/numbers' have no names"),
        ({"items/1": "items/7"}, "the items of 'state/items' have no names"),
        ({"state/": "elsewhere/"}, "nothing of the snapshot is above that"),
    ],
)
def test_renames_that_lead_nowhere_are_refused(taken: Any, rename: dict[str, str], words: str) -> None:
    """Clashes, places that do not exist, items without names: nothing is lost without a word, and nothing changes."""
    live = Watched(a=torch.zeros(1))
    before = digest_of(live.state)
    snapshot = taken(a=torch.ones(1), b=2, numbers={1: {}, 3: 4}, items=[{}, torch.ones(1)])
    with pytest.raises(RestoreMismatchError, match=words):
        snapshot.restore({"state": live}, rename=rename)

    assert before == digest_of(live.state)
    assert [] == live.loads


# Suggestions


class _Wrapper(torch.nn.Module):
    def __init__(self, **parts: torch.nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


SUGGESTIONS: list[tuple[Any, Any, dict[str, str]]] = [
    (lambda seed: _Wrapper(net=mlp(seed)), mlp, {"net.": ""}),
    (mlp, lambda seed: _Wrapper(net=mlp(seed)), {"model/": "model/net."}),
    (lambda seed: _Wrapper(old=mlp(seed)), lambda seed: _Wrapper(new=mlp(seed)), {"old.": "new."}),
    (lambda seed: _Wrapper(a=_Wrapper(b=mlp(seed))), lambda seed: _Wrapper(c=mlp(seed)), {"a.b.": "c."}),
    (lambda seed: _Wrapper(x1=mlp(seed)), lambda seed: _Wrapper(y1=mlp(seed)), {"x1.": "y1."}),
    (
        lambda seed: _Wrapper(head=torch.nn.Linear(2, 2), old=mlp(seed)),
        lambda seed: _Wrapper(head=torch.nn.Linear(2, 2), new=mlp(seed)),
        {"old.": "new."},
    ),
]


@pytest.mark.parametrize(("stored", "live", "expected"), SUGGESTIONS)
def test_a_rename_that_would_help_is_suggested(place: Path, stored: Any, live: Any, expected: dict[str, str]) -> None:
    """Where only a prefix differs the error gives the rename to pass, and that does it, beside an optimizer too."""
    source = stored(1)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    Snapshot.take(place, {"model": source, "optimizer": optimizer})
    model = live(2)
    app_state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.2)}
    with pytest.raises(RestoreMismatchError) as found:
        Snapshot(place).restore(app_state)

    assert f"pass rename={expected!r}" in found.value.problems[-1]
    Snapshot(place).restore(app_state, rename=expected)
    assert_same(list(source.state_dict().values()), list(model.state_dict().values()))


def test_no_rename_is_suggested_where_none_would_help(place: Path) -> None:
    """Names that differ in more than a prefix."""
    Snapshot.take(place, {"model": _Wrapper(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 2))})
    with pytest.raises(RestoreMismatchError) as found:
        Snapshot(place).restore({"model": _Wrapper(c=torch.nn.Linear(2, 2), d=torch.nn.BatchNorm1d(2))})

    assert "rename" not in str(found.value)


def test_optimizers_of_wrapped_models_come_back(place: Path) -> None:
    """Their state goes by number and knows no prefixes."""
    model, other = torch.nn.DataParallel(mlp(1)), mlp(2)
    optimizer, fresh = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    train(model, optimizer)
    Snapshot.take(place, {"model": model, "optimizer": optimizer})
    Snapshot(place).restore({"model": other, "optimizer": fresh})

    assert_same(optimizer.state_dict(), fresh.state_dict())
