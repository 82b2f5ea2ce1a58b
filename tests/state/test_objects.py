"""Objects that only pickle can store: tried at once, and read without trust or not at all."""

from __future__ import annotations

import io
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch

from expstate.errors import ExpstateError, PickleNotAllowedError, SnapshotCorruptError, UnknownClassError, UnsupportedValueError
from expstate.state import objects
from expstate.state.objects import pickle_object, safe_mode_holds, unpickle_object

needs_safe_mode = pytest.mark.skipif(not safe_mode_holds(), reason="weights_only of this torch is not relied on")


class Own:
    """A class that ``weights_only`` does not know."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


class Stubborn:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        message = "not me\nnor anyone"
        raise ZeroDivisionError(message)


@needs_safe_mode
def test_safe_objects_come_back_without_trust(same) -> None:
    """What ``weights_only`` reads needs no trust, and the take knows."""
    value = OrderedDict(a=torch.arange(3), b={"c": [1, "x", None]}, d=torch.ones(2).as_subclass(torch.nn.Parameter))
    pickled = pickle_object(value)
    assert (False, "") == (pickled.needs_trust, pickled.reason)
    same(value, unpickle_object(pickled.data, trust=False))
    same(value, unpickle_object(pickled.data, trust=True))


@needs_safe_mode
def test_objects_that_need_trust_are_told_at_the_take() -> None:
    """The reason names the class; without trust the object is refused, with it it comes back."""
    pickled = pickle_object(Own(3))
    assert pickled.needs_trust
    assert f"{__name__}.Own" in pickled.reason
    with pytest.raises(PickleNotAllowedError, match=r"trust=True.*Own"):
        unpickle_object(pickled.data, trust=False)
    assert 3 == unpickle_object(pickled.data, trust=True).value


@needs_safe_mode
def test_classes_that_the_reader_allows_need_no_trust() -> None:
    """``torch.serialization.safe_globals`` decides at the time of reading."""
    data = pickle_object(Own(4)).data
    with torch.serialization.safe_globals([Own]):
        assert 4 == unpickle_object(data, trust=False).value


@pytest.mark.parametrize(
    "value", [lambda: 1, threading.Lock(), Stubborn(), (item for item in ())], ids=["lambda", "lock", "raises", "generator"]
)
def test_what_cannot_be_pickled_is_refused_with_the_reason(value) -> None:
    """The error names the class and the first line of the cause."""
    with pytest.raises(UnsupportedValueError, match=r"cannot be pickled: \w+: [^\n]+$"):
        pickle_object(value)


def test_code_runs_with_trust_alone(tmp_path, monkeypatch) -> None:
    """An object that runs code does so only if it is trusted; a failure to read it safely is never a reason to trust it."""
    monkeypatch.setattr(objects, "_read_trusting", lambda data: pytest.fail("fell back from safe to unsafe"))
    path = tmp_path / "ran"
    data = pickle_object(Evil(f"__import__('pathlib').Path({str(path)!r}).touch()")).data
    with pytest.raises(PickleNotAllowedError):
        unpickle_object(data, trust=False)
    assert not path.exists()
    monkeypatch.undo()
    unpickle_object(data, trust=True)
    assert path.exists()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.6.0", False),
        ("2.9.1+cu128", False),
        ("2.10.0", True),
        ("2.10.0a0+git1", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
        ("unknown", False),
    ],
)
def test_the_safe_mode_is_relied_on_since_2_10(version, expected) -> None:
    """Versions are compared as numbers, not as text."""
    assert expected is safe_mode_holds(version)


def test_without_a_safe_mode_everything_needs_trust(monkeypatch) -> None:
    """On an older torch the take says so at once, and nothing is read without trust."""
    monkeypatch.setattr(objects, "safe_mode_holds", lambda: False)
    pickled = pickle_object({"a": 1})
    assert pickled.needs_trust
    assert "2.10" in pickled.reason
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: pytest.fail("read without a safe mode") if kwargs["weights_only"] else {"a": 1}
    )
    with pytest.raises(PickleNotAllowedError, match=r"2\.10"):
        unpickle_object(pickled.data, trust=False)
    assert {"a": 1} == unpickle_object(pickled.data, trust=True)


def _archive(**changes: Any) -> bytes:
    """An archive of ``torch.save`` with members changed."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pickle_object({"a": torch.ones(100)}).data)) as archive, zipfile.ZipFile(result, "w") as other:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            data = changes.get("data", {}).get(name, archive.read(member))
            other.writestr(member.filename, data, changes.get("compression", zipfile.ZIP_STORED))
    return result.getvalue()


@needs_safe_mode
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        pickle.dumps({"a": 1}),
        pickle_object({"a": torch.ones(3)}).data[:-30],
        pickle_object({"a": torch.ones(3)}).data[40:],
        _archive(data={"data.pkl": b""}),
        _archive(data={"data.pkl": b"\x80\x02."}),
        _archive(data={"data.pkl": pickle.dumps(os.system)}),
        _archive(data={"data.pkl": b"c__builtin__\neval\n(S'1'\ntR."}),
        _archive(data={"0": b"short"}),
        _archive(compression=zipfile.ZIP_DEFLATED),
    ],
    ids=range(11),
)
def test_what_torch_never_wrote_is_refused(data) -> None:
    """Cut, packed, mixed up or plain pickles: each is an error of ours, and no code runs."""
    with pytest.raises(ExpstateError):
        unpickle_object(data, trust=False)


@needs_safe_mode
def test_archives_that_unpack_to_more_are_refused() -> None:
    """A packed archive could be a thousand times as large in memory as in its file."""
    data = _archive(data={"0": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 100_000
    with pytest.raises(SnapshotCorruptError, match="packed"):
        unpickle_object(data, trust=False)


@needs_safe_mode
def test_hostile_indices_in_objects_are_refused() -> None:
    """Sparse tensors inside an object are checked, which torch.load does not do by itself."""
    value = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (3,))
    value._indices().fill_(10**9)
    data = pickle_object([value]).data
    with pytest.raises(ExpstateError):
        unpickle_object(data, trust=False)
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()


def test_trusted_objects_of_absent_classes_say_which(monkeypatch) -> None:
    """The error names the class that is missing; other failures are damage."""
    data = pickle_object(Own(1)).data
    monkeypatch.delattr(f"{__name__}.Own")
    with pytest.raises(UnknownClassError, match="Own"):
        unpickle_object(data, trust=True)
    with pytest.raises(SnapshotCorruptError):
        unpickle_object(b"garbage", trust=True)


@pytest.mark.parametrize("location", ["cuda:7", "cuda", "mps", "xpu:0", "nonsense", "privateuseone:1"])
def test_tensors_of_absent_devices_come_to_the_cpu(location) -> None:
    """A location that is not here leaves the storage where it was read."""
    if torch.accelerator.is_available() and location.partition(":")[0] == torch.accelerator.current_accelerator().type:
        location = f"{torch.accelerator.current_accelerator().type}:99"
    storage = object()
    assert storage is objects._place(storage, location)


@pytest.mark.gpu
@needs_safe_mode
def test_tensors_of_present_devices_come_back_there() -> None:
    """On a machine with an accelerator a tensor in an object returns to it."""
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    value = OrderedDict(a=torch.ones(2, device=device))
    assert device == unpickle_object(pickle_object(value).data, trust=False)["a"].device
