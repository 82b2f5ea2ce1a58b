"""State on an accelerator: every value, in order with what the caller has queued, within the budget, in the memory where it lives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import expstate.testing  # noqa: F401 - brings null://
from expstate import RNGState, Snapshot, StateDict
from expstate.engine import memory
from expstate.errors import RestoreInterruptedError, SnapshotCorruptError
from expstate.format.manifest import AliasEntry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Failed to initialize NumPy"),  # PyTorch without NumPy says so once, wherever that happens to be
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]

MIB = 2**20
DEVICE = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
MODULE: Any = torch.get_device_module(DEVICE)
IS_CUDA = DEVICE.type == "cuda"
IS_HOST = DEVICE.type == "cpu"
ELEMENTS = MIB if IS_HOST else 16 * MIB

BUDGETS = [None, 2 * MIB, 20 * MIB]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a snapshot can be taken to."""
    return tmp_path / "snapshot"


def plain(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor, in row-major order, on the host."""
    values = tensor.detach().resolve_conj().resolve_neg()
    kind = _INTEGERS.get(values.element_size())
    values = values if kind is None else values.view(kind)
    return values.cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def made_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor on the device, of random bytes: no arithmetic is needed, which some dtypes have not."""
    count = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return values.to(DEVICE).view(dtype).reshape(shape)


def busy() -> None:
    """Queue work for some tenths of a second on the current stream: a copy that does not wait for it comes far too early."""
    size = 64 if IS_HOST else 4096
    work = torch.ones(size, size, device=DEVICE)
    for _ in range(2 if IS_HOST else 100):
        work = (work @ work) / size


def late(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Give a tensor values some time from now."""
    busy()
    return tensor.fill_(value)


def only(tensor: torch.Tensor) -> float:
    """The one value that all elements have."""
    least, most = (float(value) for value in tensor.detach().aminmax())
    assert least == most
    return most


@contextlib.contextmanager
def another_stream() -> Iterator[None]:
    """A current stream that is not the default one; what was queued before comes first."""
    stream = MODULE.Stream()
    stream.wait_stream(MODULE.current_stream())
    with MODULE.stream(stream):
        yield
    MODULE.current_stream().wait_stream(stream)


STREAMS = [contextlib.nullcontext, another_stream]


def mlp(seed: int = 0, device: Any = DEVICE) -> torch.nn.Sequential:
    """A small network with parameters and buffers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3)).to(device)


class TiedModel(torch.nn.Module):
    """An embedding and an output layer that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 6, device=DEVICE)
        self.head = torch.nn.Linear(6, 12, bias=False, device=DEVICE)
        self.head.weight = self.embedding.weight


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same names with the same values, wherever they are."""
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(plain(left[name]) == plain(right[name]) for name in left)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(place: Path, dtype: torch.dtype) -> None:
    """Into new memory and in place, without dimensions, empty, and with strides."""
    tensors = {
        "plain": made_of(dtype, 5, 7),
        "scalar": made_of(dtype, 1)[0],
        "empty": made_of(dtype, 0, 3),
        "steps": made_of(dtype, 40, 3)[1::3],
        "transposed": made_of(dtype, 6, 5).t(),
    }
    state = StateDict(tensors)
    Snapshot.take(place, {"state": state})
    expected = {name: plain(tensor) for name, tensor in tensors.items()}
    found = Snapshot(place).get_state_dict_for_key("state")
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        if tensor.numel():
            tensor.view(_INTEGERS.get(dtype.itemsize, dtype)).zero_()
    Snapshot(place).restore({"state": state})

    assert expected == {name: plain(tensor) for name, tensor in found.items()}
    assert expected == {name: plain(tensor) for name, tensor in state.items()}
    assert addresses == {name: tensor.data_ptr() for name, tensor in state.items()}
    assert {DEVICE.type} == {tensor.device.type for tensor in (*found.values(), *state.values())}
    assert {dtype} == {tensor.dtype for tensor in (*found.values(), *state.values())}
    assert [tensor.shape for tensor in tensors.values()] == [tensor.shape for tensor in found.values()]


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: made_of(torch.int32, 1500, 1100),
    "transposed": lambda: made_of(torch.int32, 1500, 1100).t(),
    "permuted": lambda: made_of(torch.int16, 60, 50, 70, 3).permute(2, 0, 3, 1),
    "channels last": lambda: made_of(torch.int32, 8, 16, 64, 64).to(memory_format=torch.channels_last),
    "columns": lambda: made_of(torch.int32, 3000, 700)[:, 3:401:2],
    "every other": lambda: made_of(torch.int64, 500_000)[::2],
    "rows with an offset": lambda: made_of(torch.uint8, 3000, 1001)[7:],
    "two long columns": lambda: made_of(torch.int32, 2, 600_000).t(),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(place: Path, layout: str, budget: int | None) -> None:
    """Large tensors with strides are gathered and scattered, and nothing around them is touched."""
    tensor = LAYOUTS[layout]()
    Snapshot.take(place, {"state": StateDict(x=tensor)}, memory_budget_bytes=budget)
    expected = tensor.clone()
    around = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
    outside = around.clone()
    tensor.zero_()
    Snapshot(place).restore({"state": StateDict(x=tensor)}, memory_budget_bytes=budget)

    assert torch.equal(expected, tensor)
    assert torch.equal(outside, around)
    assert torch.equal(expected, Snapshot(place).read_object("state/x", memory_budget_bytes=budget))


@pytest.mark.parametrize("shape", [(40,), (300, 2000)])
@pytest.mark.parametrize("view", [torch.conj, torch._neg_view, lambda tensor: torch._neg_view(tensor.conj())])
def test_conjugate_and_negative_views(place: Path, view: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> None:
    """Their values are stored, and are theirs again."""
    real = torch.arange(float(torch.Size(shape).numel()), device=DEVICE).reshape(shape)
    tensor = view(torch.complex(real, real + 0.5))
    expected = tensor.clone()
    Snapshot.take(place, {"state": StateDict(x=tensor)})
    tensor.zero_()
    Snapshot(place).restore({"state": StateDict(x=tensor)})

    assert torch.equal(expected, tensor)
    assert torch.equal(expected, Snapshot(place).read_object("state/x"))


def test_sparse_tensors(place: Path) -> None:
    """Their parts are on the device, before and after, and checked there."""
    dense = torch.tensor([[0.0, 1.5], [2.5, 0.0]], device=DEVICE)
    state = StateDict(coo=dense.to_sparse())
    Snapshot.take(place, {"state": state})
    found = Snapshot(place).get_state_dict_for_key("state")["coo"]
    state["coo"]._values().zero_()
    Snapshot(place).restore({"state": state})

    assert DEVICE.type == found.device.type
    assert torch.equal(dense, found.to_dense())
    assert torch.equal(dense, state["coo"].to_dense())


def test_states_on_host_and_device(place: Path) -> None:
    """Tensors on the host and on the device and plain values come back to where they were."""
    state = StateDict(host=torch.arange(5.0), device=torch.arange(6.0, device=DEVICE))
    state["nested"] = [{"step": 3, "x": torch.ones(2, device=DEVICE)}, torch.ones(3)]
    addresses = state["host"].data_ptr(), state["device"].data_ptr()
    Snapshot.take(place, {"state": state})
    state["host"].zero_(), state["device"].zero_(), state["nested"][0]["x"].zero_(), state["nested"][1].zero_()
    state["nested"][0]["step"] = 0
    Snapshot(place).restore({"state": state})

    assert torch.arange(5.0).tolist() == state["host"].tolist()
    assert torch.arange(6.0).tolist() == state["device"].tolist()
    assert [1.0, 1.0, 3] == [only(state["nested"][0]["x"]), only(state["nested"][1]), state["nested"][0]["step"]]
    assert addresses == (state["host"].data_ptr(), state["device"].data_ptr())


def test_ten_thousand_small_tensors(place: Path) -> None:
    """They share windows, at take and at restore."""
    state = StateDict({f"{number}": torch.full((number % 50,), float(number), device=DEVICE) for number in range(10_000)})
    expected = torch.cat([*state.values()])
    Snapshot.async_take(place, {"state": state}).wait()
    for tensor in state.values():
        tensor.zero_()
    Snapshot(place).restore({"state": state})

    assert torch.equal(expected, torch.cat([*state.values()]))
    assert 1 == len(Snapshot(place).manifest.files)


@pytest.mark.parametrize("verify", [True, False])
def test_a_model_in_place(place: Path, verify: bool) -> None:
    """The same parameters in the same memory, checked or not."""
    source, model = mlp(1), mlp(2)
    Snapshot.take(place, {"model": source})
    before = [parameter.data_ptr() for parameter in model.parameters()]
    Snapshot(place).restore({"model": model}, verify=verify)

    assert same_state(source, model)
    assert before == [parameter.data_ptr() for parameter in model.parameters()]


def test_tied_weights(place: Path) -> None:
    """Stored once, tied after."""
    source, model = TiedModel(), TiedModel()
    snapshot = Snapshot.take(place, {"model": source})
    address = model.head.weight.data_ptr()
    snapshot.restore({"model": model})

    assert ["model/head.weight"] == [entry.path for entry in snapshot.entries() if isinstance(entry, AliasEntry)]
    assert model.head.weight is model.embedding.weight
    assert address == model.head.weight.data_ptr()
    assert same_state(source, model)


# Order


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_take_waits_for_what_is_queued(place: Path, budget: int | None, stream: Callable[[], Any]) -> None:
    """Values that a kernel will have written are those that are taken."""
    tensor, columns = torch.zeros(ELEMENTS, device=DEVICE), torch.zeros(1000, 3000, device=DEVICE)[:, ::2]
    with stream():
        late(tensor, 3), columns.fill_(4)
        Snapshot.take(place, {"state": StateDict(x=tensor, y=columns)}, memory_budget_bytes=budget)

    assert 3.0 == only(Snapshot(place).read_object("state/x", device="cpu"))
    assert 4.0 == only(Snapshot(place).read_object("state/y", device="cpu"))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_take_in_the_background_is_of_its_moment(place: Path, budget: int | None, stream: Callable[[], Any]) -> None:
    """Kernels queued before it are in, those queued right after it are not."""
    tensor, columns = torch.zeros(ELEMENTS, device=DEVICE), torch.zeros(1000, 3000, device=DEVICE)[:, ::2]
    with stream():
        late(tensor, 3), columns.fill_(4)
        taken = Snapshot.async_take(place, {"state": StateDict(x=tensor, y=columns)}, memory_budget_bytes=budget)
        tensor.fill_(-1), columns.fill_(-1)
    taken.wait()

    assert 3.0 == only(Snapshot(place).read_object("state/x", device="cpu"))
    assert 4.0 == only(Snapshot(place).read_object("state/y", device="cpu"))


def test_memory_that_is_freed_after_a_take(place: Path) -> None:
    """What ``async_take`` has copied may be given to other tensors at once."""
    state = {"x": torch.full((ELEMENTS,), 3.0, device=DEVICE), "y": torch.full((3000, 1000), 4.0, device=DEVICE).t()}
    taken = Snapshot.async_take(place, {"state": StateDict(state)})
    del state
    others = [torch.full((ELEMENTS,), -1.0, device=DEVICE), torch.full((3000, 1000), -1.0, device=DEVICE)]
    taken.wait()

    assert 3.0 == only(Snapshot(place).read_object("state/x", device="cpu"))
    assert 4.0 == only(Snapshot(place).read_object("state/y", device="cpu"))
    assert [-1.0, -1.0] == [only(other) for other in others]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_restore_comes_between_what_is_queued(place: Path, budget: int | None, stream: Callable[[], Any], atomic: bool) -> None:
    """After the kernels queued before it, and before those queued right after it."""
    tensor, columns = torch.full((ELEMENTS,), 3.0, device=DEVICE), torch.full((1000, 3000), 4.0, device=DEVICE)[:, ::2]
    state = StateDict(x=tensor, y=columns)
    Snapshot.take(place, {"state": state})
    with stream():
        late(tensor, -1), columns.fill_(-1)
        Snapshot(place).restore({"state": state}, memory_budget_bytes=budget, atomic=atomic)
        seen = tensor.clone(), columns.clone()
        tensor.fill_(7)

    assert (3.0, 4.0) == (only(seen[0]), only(seen[1]))
    assert (7.0, 4.0) == (only(tensor), only(columns))
    assert state["x"] is tensor


@pytest.mark.parametrize("stream", STREAMS)
def test_new_memory_that_is_still_in_use(place: Path, stream: Callable[[], Any]) -> None:
    """A tensor that is read anew may get memory that queued kernels have yet to read."""
    Snapshot.take(place, {"state": StateDict(x=torch.full((ELEMENTS,), 3.0))})
    with stream():
        old = torch.full((ELEMENTS,), 5.0, device=DEVICE)
        busy()
        copy = old.clone()
        old.fill_(-1)
        del old
        found = Snapshot(place).read_object("state/x", device=DEVICE)
        seen = found + 1

    assert (5.0, 3.0, 4.0) == (only(copy), only(found), only(seen))


def test_many_takes_in_a_training(tmp_path: Path) -> None:
    """A snapshot per step, in the background, of tensors that change all the time: buffers go from one take to the next."""
    tensor = torch.zeros(ELEMENTS // 4, device=DEVICE)
    taken = []
    for number in range(8):
        tensor.fill_(number)
        taken.append(Snapshot.async_take(tmp_path / str(number), {"state": StateDict(x=tensor)}, memory_budget_bytes=64 * MIB))
        tensor.fill_(-1)

    assert list(range(8)) == [only(one.wait().read_object("state/x", device="cpu")) for one in taken]


# Optimizers and random numbers


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step with given gradients: element by element, so that equal states give equal bits."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True, amsgrad=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}
if IS_CUDA:
    OPTIMIZERS["Adam capturable"] = lambda parameters: torch.optim.Adam(parameters, lr=0.01, capturable=True)


def _places(optimizer: torch.optim.Optimizer) -> list[tuple[str, str]]:
    tensors = [(name, value) for state in optimizer.state.values() for name, value in state.items() if isinstance(value, torch.Tensor)]
    return [(name, value.device.type) for name, value in tensors]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fresh", [True, False])
def test_an_optimizer_goes_on(place: Path, name: str, fresh: bool) -> None:
    """State made anew is where the old one was, step counts too, and the next steps are the same to the bit."""
    model = mlp(1)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(optimizer, 1)
    Snapshot.take(place, {"model": model, "optimizer": optimizer})
    places = _places(optimizer)
    step(optimizer, 2)
    expected = [plain(parameter) for parameter in model.parameters()]
    if fresh:
        model = mlp(2)
        optimizer = OPTIMIZERS[name](model.parameters())
    Snapshot(place).restore({"model": model, "optimizer": optimizer})
    restored_places = _places(optimizer)
    step(optimizer, 2)

    assert places == restored_places
    assert expected == [plain(parameter) for parameter in model.parameters()]


def test_random_numbers_go_on(place: Path) -> None:
    """The device's generator and one of its own, which stays the object it was; a take draws nothing."""
    torch.manual_seed(5)
    torch.rand(3, device=DEVICE)
    own = torch.Generator(DEVICE).manual_seed(6)
    state = StateDict(own=own)
    untouched = torch.get_rng_state(), MODULE.get_rng_state()
    Snapshot.take(place, {"rng": RNGState(), "state": state})

    assert all(torch.equal(before, now) for before, now in zip(untouched, (torch.get_rng_state(), MODULE.get_rng_state()), strict=True))
    expected = [torch.rand(9, device=DEVICE), torch.rand(9), torch.rand(9, generator=own, device=DEVICE)]
    torch.manual_seed(7), own.manual_seed(8)
    rng = RNGState()
    Snapshot(place).restore({"rng": rng, "state": state})
    found = [torch.rand(9, device=DEVICE), torch.rand(9), torch.rand(9, generator=own, device=DEVICE)]

    assert [values.tolist() for values in expected] == [values.tolist() for values in found]
    assert state["own"] is own
    assert () == rng.skipped


# Where to


def test_devices_are_chosen(place: Path) -> None:
    """Back to the device by default, or where the caller says."""
    values = torch.arange(3.0 * MIB).reshape(3, MIB)
    Snapshot.take(place, {"device": StateDict(x=values.to(DEVICE)), "host": StateDict(x=values)})
    snapshot = Snapshot(place)
    out, row = torch.zeros(3, MIB, device=DEVICE), torch.zeros(1, MIB, device=DEVICE)
    found = {
        "default": snapshot.read_object("device/x"),
        "to host": snapshot.read_object("device/x", device="cpu"),
        "to device": snapshot.read_object("host/x", device=DEVICE),
        "all": snapshot.get_state_dict_for_key("host", device=DEVICE)["x"],
        "all to host": snapshot.get_state_dict_for_key("device", device="cpu")["x"],
        "out": snapshot.read_object("host/x", out),
        "host to host": snapshot.read_object("host/x"),
    }
    rows = snapshot.read_object("device/x", row, rows=slice(1, 2)), snapshot.read_object("host/x", rows=slice(1, 3), device=DEVICE)

    assert all(torch.equal(values, tensor.cpu()) for tensor in found.values())
    assert IS_HOST or {"to host", "all to host", "host to host"} == {name for name, tensor in found.items() if tensor.is_cpu}
    assert found["out"] is out
    assert rows[0] is row
    assert torch.equal(values[1:2], row.cpu())
    assert torch.equal(values[1:3], rows[1].cpu())
    assert DEVICE.type == rows[1].device.type


@pytest.mark.parametrize("atomic", [False, True])
def test_a_module_on_meta_is_materialised(place: Path, atomic: bool) -> None:
    """On the device that is asked for."""
    source = mlp(1, "cpu")
    Snapshot.take(place, {"model": source})
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3))
    Snapshot(place).restore({"model": model}, device=DEVICE, atomic=atomic)

    assert same_state(source, model)
    assert {DEVICE.type} == {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("atomic", [False, True])
def test_models_move_between_host_and_device(tmp_path: Path, atomic: bool) -> None:
    """A live model stays where it is, wherever the snapshot's was."""
    host, device = mlp(1, "cpu"), mlp(2)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (host, device)]
    step(optimizers[0], 1)
    Snapshot.take(tmp_path / "host", {"model": host, "optimizer": optimizers[0]})
    Snapshot(tmp_path / "host").restore({"model": device, "optimizer": optimizers[1]}, atomic=atomic)
    step(optimizers[1], 2)
    Snapshot.take(tmp_path / "device", {"model": device, "optimizer": optimizers[1]})
    Snapshot(tmp_path / "device").restore({"model": host, "optimizer": optimizers[0]}, atomic=atomic)

    assert same_state(device, host)
    assert {DEVICE.type} == {tensor.device.type for tensor in device.state_dict().values()}
    assert {"cpu"} == {tensor.device.type for tensor in host.state_dict().values()}
    assert {"cpu"} == {place for _, place in _places(optimizers[0])}
    assert {("exp_avg", DEVICE.type), ("exp_avg_sq", DEVICE.type), ("step", "cpu")} == set(_places(optimizers[1]))


CASTS = [(torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.int64, torch.float32)]


@pytest.mark.parametrize(("stored", "live"), CASTS, ids=str)
@pytest.mark.parametrize("atomic", [False, True])
def test_values_are_converted(place: Path, stored: torch.dtype, live: torch.dtype, atomic: bool) -> None:
    """With ``cast=True``, for tensors with and without strides, in their memory."""
    values = (torch.randn(700, 900) * 100).to(stored)
    Snapshot.take(place, {"state": StateDict(x=values.to(DEVICE), y=values.to(DEVICE), z=values)})
    state = StateDict(
        x=torch.zeros(700, 900, dtype=live, device=DEVICE),
        y=torch.zeros(900, 700, dtype=live, device=DEVICE).t(),
        z=torch.zeros(700, 900, dtype=live, device=DEVICE),
    )
    addresses = [tensor.data_ptr() for tensor in state.values()]
    report = Snapshot(place).restore({"state": state}, cast=True, atomic=atomic)

    assert all(torch.equal(values.to(live), tensor.cpu()) for tensor in state.values())
    assert addresses == [tensor.data_ptr() for tensor in state.values()]
    assert ("state/x", "state/y", "state/z") == report.cast


@pytest.mark.parametrize("atomic", [False, True])
def test_a_default_device_does_not_matter(place: Path, atomic: bool) -> None:
    """``torch.set_default_device`` decides where users' tensors are made, not where bytes are staged."""
    state = StateDict(host=torch.full((300, 5), 3.0).t(), device=torch.full((300, 5), 4.0, device=DEVICE).t(), many=[1.5] * 20_000)
    with DEVICE:
        Snapshot.take(place, {"state": state, "rng": RNGState()})
        state["host"].zero_(), state["device"].zero_()
        Snapshot(place).restore({"state": state, "rng": RNGState()}, atomic=atomic)
        found = Snapshot(place).get_state_dict_for_key("state")

    assert (3.0, 4.0) == (only(state["host"]), only(state["device"]))
    assert ["cpu", DEVICE.type] == [found["host"].device.type, found["device"].device.type]
    assert [1.5] * 20_000 == state["many"] == found["many"]


@pytest.mark.skipif(MODULE.device_count() < 2, reason="needs two accelerators")
def test_another_device_than_the_current_one(place: Path) -> None:
    """Copies go over streams of the tensor's own device, and of several at once; the current device stays what it was."""
    first, second = (torch.full((ELEMENTS,), float(index), device=f"{DEVICE.type}:{index}") for index in range(2))
    state = StateDict(first=first, second=second)
    Snapshot.async_take(place, {"state": state}).wait()
    first.fill_(-1), second.fill_(-1)
    Snapshot(place).restore({"state": state})

    assert (0.0, 1.0) == (only(first), only(second))
    assert 0 == MODULE.current_device()


# Staging


def test_a_storage_that_takes_everything(place: Path) -> None:
    """Digests are those of a real take: everything but the writes is done."""
    state = StateDict(x=torch.arange(5.0 * MIB, device=DEVICE), y=torch.arange(3.0 * MIB, device=DEVICE).reshape(3, MIB).t())

    def digests(snapshot: Snapshot) -> list[bytes]:
        return [box.digest for entry in snapshot.entries("state/*") for box in entry.boxes]  # type: ignore[union-attr]

    expected = digests(Snapshot.take(place, {"state": state}))
    found = [Snapshot.take("null://gpu", {"state": state}), Snapshot.async_take("null://gpu-background", {"state": state}).wait()]

    assert [expected, expected] == [digests(snapshot) for snapshot in found]
    for snapshot in found:
        snapshot.delete()


def test_damage_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    """A restore that stops with copies under way does not disturb those that come after it in the same buffers."""
    tensors = {str(number): torch.full((MIB // 2,), float(number), device=DEVICE) for number in range(20)}
    Snapshot.take(place, {"state": StateDict(tensors)})
    Snapshot.take(tmp_path / "whole", {"state": StateDict(tensors)})
    (file,) = place.glob("*.safetensors")
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.seek(-3 * MIB, 2)
        opened.write(b"damage")
    for _ in range(3):
        with pytest.raises(RestoreInterruptedError, match="damaged") as caught:
            Snapshot(place).restore({"state": StateDict(tensors)}, memory_budget_bytes=20 * MIB)
        Snapshot(tmp_path / "whole").restore({"state": StateDict(tensors)}, memory_budget_bytes=20 * MIB)

        assert isinstance(caught.value.__cause__, SnapshotCorruptError)
        assert list(range(20)) == [only(tensor) for tensor in tensors.values()]


def test_a_cancelled_take_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its buffers are used again, by takes whose values are right."""
    tensor = torch.zeros(ELEMENTS, device=DEVICE)
    for number in range(5):
        late(tensor, -1)
        Snapshot.async_take(tmp_path / f"cancelled-{number}", {"state": StateDict(x=tensor)}).cancel()
        tensor.fill_(number)
        Snapshot.take(tmp_path / str(number), {"state": StateDict(x=tensor)})

    assert list(range(5)) == [only(Snapshot(tmp_path / str(number)).read_object("state/x", device="cpu")) for number in range(5)]


@pytest.mark.skipif(not IS_CUDA, reason="other accelerators pin memory themselves")
def test_staging_memory_is_pinned_and_given_back() -> None:
    """Registered with the driver as long as it is ours, in the same size again and again."""
    for _ in range(20):
        buffer = memory.Buffer(memory.WINDOW_BYTES + memory.SLACK_BYTES, "cuda")
        assert buffer._registered
        assert buffer.tensor.is_pinned()
        buffer.free()
        assert not buffer.tensor.is_pinned()


@pytest.mark.skipif(not IS_CUDA, reason="other accelerators pin memory themselves")
def test_memory_that_cannot_be_pinned(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that refuses makes copies slower, not wrong, and its refusal is not taken for a failure of what comes next."""
    driver: Any = torch.cuda.cudart()
    refused: list[int] = []

    class Refusing:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> Any:  # noqa: N802 - the driver's name
            refused.append(size)
            return driver.cudaHostRegister(address, 0, flags)

    memory.free_idle()
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    state = StateDict(x=torch.arange(5.0 * MIB, device=DEVICE).reshape(5, MIB).t())
    expected = state["x"].clone()
    Snapshot.async_take(place, {"state": state}).wait()
    state["x"].zero_()
    Snapshot(place).restore({"state": state})
    memory.free_idle()

    assert refused
    assert torch.equal(expected, state["x"])
