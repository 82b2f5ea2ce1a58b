"""Modules built on the meta device get memory from a restore, once, where they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot
from expstate.errors import RestoreInterruptedError, RestoreMismatchError
from tests.state.conftest import assert_same

from .conftest import TiedModel, is_equal, mlp


def _on_meta(make: Any) -> Any:
    with torch.device("meta"):
        return make()


class WithTable(torch.nn.Module):
    """A module with a buffer that is not in its state dict."""

    def __init__(self, table_device: str | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(3, device=table_device), persistent=False)


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_module_is_materialised(place: Path, device: Any, atomic: bool) -> None:
    """Parameters and buffers become real, of the same classes and flags, and it computes."""
    source = mlp(1)
    source[0].weight.requires_grad = False
    Snapshot.take(place, {"model": source})
    model = _on_meta(lambda: mlp(2))
    model[0].weight.requires_grad = False
    Snapshot(place).restore({"model": model}, device=device, atomic=atomic)

    assert is_equal(source, model)
    assert {"cpu"} == {tensor.device.type for tensor in model.state_dict().values()}
    assert [False, True] == [model[0].weight.requires_grad, model[0].bias.requires_grad]
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    assert torch.equal(source.eval()(torch.ones(2, 8)), model.eval()(torch.ones(2, 8)))


def test_a_recurrent_module_is_materialised(place: Path) -> None:
    """Modules that keep lists of their weights see the new ones."""
    source = torch.nn.LSTM(3, 4)
    Snapshot.take(place, {"model": source})
    model = _on_meta(lambda: torch.nn.LSTM(3, 4))
    Snapshot(place).restore({"model": model})

    assert torch.equal(source(torch.ones(5, 2, 3))[0], model(torch.ones(5, 2, 3))[0])


def test_wrapped_modules_are_materialised(place: Path) -> None:
    """Through the prefixes of wrappers, from a bare module's snapshot."""
    Snapshot.take(place, {"model": mlp(1)})
    inner = _on_meta(lambda: mlp(2))
    Snapshot(place).restore({"model": torch.compile(inner, backend="eager")})

    assert is_equal(mlp(1), inner)


def test_a_module_partly_on_meta(place: Path) -> None:
    """What has memory keeps it, what has none gets some."""
    model = mlp(2)
    model[3] = _on_meta(lambda: torch.nn.Linear(16, 3))
    kept = model[0].weight.data_ptr()
    Snapshot.take(place, {"model": mlp(1)})
    Snapshot(place).restore({"model": model})

    assert is_equal(mlp(1), model)
    assert kept == model[0].weight.data_ptr()


def test_values_are_converted_on_the_way(place: Path) -> None:
    """A bfloat16 module on meta from a float32 snapshot, with ``cast=True`` alone."""
    Snapshot.take(place, {"model": mlp(1)})
    model = _on_meta(lambda: mlp(2).to(torch.bfloat16))
    with pytest.raises(RestoreMismatchError, match="pass cast=True"):
        Snapshot(place).restore({"model": model})
    assert {"meta"} == {tensor.device.type for tensor in model.state_dict().values()}
    Snapshot(place).restore({"model": model}, cast=True)

    assert is_equal(mlp(1).to(torch.bfloat16), model)


def test_what_the_snapshot_has_not_is_named(place: Path) -> None:
    """Parameters that are missing and buffers that no state dict has would stay without values: an error with all names."""
    Snapshot.take(place, {"model": WithTable().layer})
    model = _on_meta(lambda: torch.nn.ModuleDict({"a": WithTable(), "b": WithTable()}))
    Snapshot.take(place, {"model": torch.nn.ModuleDict({"a": WithTable(), "b": WithTable()})}, overwrite=True)
    with pytest.raises(RestoreMismatchError, match=r"on the meta device and not among what is restored: 'a.table', 'b.table'"):
        Snapshot(place).restore({"model": model})
    assert model["a"].layer.weight.is_meta
    report = Snapshot(place).restore({"model": model}, strict=False)

    assert ("a.table", "b.table") == report.missing
    assert not model["a"].layer.weight.is_meta
    assert model["a"].table.is_meta


def test_tables_built_on_a_device_are_kept(place: Path) -> None:
    """The way out that the error names."""
    source = WithTable()
    Snapshot.take(place, {"model": source})
    model = _on_meta(lambda: WithTable("cpu"))
    Snapshot(place).restore({"model": model})

    assert is_equal(source, model)
    assert_same(torch.ones(3), model.table)


def test_parts_become_real_and_the_rest_stays(place: Path) -> None:
    """By ``include`` layer after layer is brought."""
    Snapshot.take(place, {"model": mlp(1)})
    model = _on_meta(lambda: mlp(2))
    Snapshot(place).restore({"model": model}, include="model/0.*")

    assert torch.equal(mlp(1)[0].weight, model[0].weight)
    assert model[3].weight.is_meta
    Snapshot(place).restore({"model": model}, exclude="model/0.*")
    assert is_equal(mlp(1), model)


def test_a_dry_run_makes_no_memory(place: Path) -> None:
    """And reports what would come."""
    Snapshot.take(place, {"model": mlp(1)})
    model = _on_meta(lambda: mlp(2))
    report = Snapshot(place).restore({"model": model}, dry_run=True)

    assert {"meta"} == {tensor.device.type for tensor in model.state_dict().values()}
    assert 9 == len(report.restored)


def test_one_name_of_a_tie_brings_both(place: Path) -> None:
    """A tied pair on meta of which one name is chosen is real under both."""
    Snapshot.take(place, {"model": TiedModel()})
    model = TiedModel(device="meta")
    Snapshot(place).restore({"model": model}, include="model/head.weight")

    assert model.head.weight is model.embedding.weight
    assert not model.embedding.weight.is_meta


def test_a_failing_read_leaves_a_module_that_says_so(place: Path) -> None:
    """Damage found while reading is an interruption; the parameters are not reported as applied."""
    Snapshot.take(place, {"model": mlp(1)})
    (file,) = place.glob("*.safetensors")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-40:] = bytes(40)
    file.write_bytes(data)
    model = _on_meta(lambda: mlp(2))
    with pytest.raises(RestoreInterruptedError) as found:
        Snapshot(place).restore({"model": model})

    assert () == found.value.applied
    assert 9 == len(found.value.unapplied)
