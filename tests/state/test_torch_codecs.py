"""Tensors beyond dense ones, and generators: kept exactly, refilled in place, and never trusted."""

from __future__ import annotations

import contextlib
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from expstate.errors import ManifestError, RestoreMismatchError, UnknownClassError, UnsupportedValueError
from expstate.state import codecs, tree

from .conftest import through_json

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


class Scaled(torch.Tensor):
    """A wrapper subclass with an inner tensor and a context."""

    inner: torch.Tensor
    factor: Any

    @staticmethod
    def __new__(cls, inner, factor, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=torch.float32, device=inner.device, requires_grad=requires_grad
        )

    def __init__(self, inner, factor, requires_grad=False):
        self.inner, self.factor = inner, factor

    def __tensor_flatten__(self):
        return ["inner"], {"factor": self.factor}

    @classmethod
    def __tensor_unflatten__(cls, inner_tensors, context, outer_size, outer_stride):
        assert (inner_tensors["inner"].shape, inner_tensors["inner"].stride()) == (outer_size, outer_stride)
        return cls(inner_tensors["inner"], context["factor"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].factor)
        if func in {torch.ops.aten.alias.default, torch.ops.aten.view.default}:
            return cls(args[0].inner, args[0].factor)
        raise NotImplementedError(func)


class Tagged(torch.Tensor):
    """A subclass that cannot be taken apart."""


def _sparse(shape=(4, 5), seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)


def _uncoalesced() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1, 1, 0], [2, 2, 0]]), torch.tensor([1.0, 2.0, 3.0]), (3, 4))


def _quantized(dtype=torch.qint8, seed=0) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)), 0.1, 3, dtype)


def _per_channel(dtype=torch.qint8, axis=1) -> torch.Tensor:
    return torch.quantize_per_channel(torch.randn(3, 5), torch.rand([3, 5][axis]).double() + 0.1, torch.arange([3, 5][axis]), axis, dtype)


def _sub_byte(dtype, shape=(3, 5)) -> torch.Tensor:
    return torch.quantize_per_channel(torch.rand(shape), torch.rand(shape[0]) + 0.1, torch.rand(shape[0]), 0, dtype)


def _jagged(lengths=(2, 0, 4), seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nested.nested_tensor([torch.randn(length, 3, generator=generator) for length in lengths], layout=torch.jagged)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    values = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "coo": _sparse().to_sparse(),
            "coo not coalesced": _uncoalesced(),
            "coo hybrid": torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.randn(2, 3), (4, 3)),
            "coo empty": torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (3, 0)),
            "coo scalar": torch.tensor(2.0).to_sparse(),
            "coo bfloat16": _sparse().bfloat16().to_sparse(),
            "coo gradient": _sparse().to_sparse().requires_grad_(),
            "coo parameter": torch.nn.Parameter(_sparse().to_sparse()),
            "coo frozen": torch.nn.Parameter(_sparse().to_sparse(), requires_grad=False),
            "csr": _sparse().to_sparse_csr(),
            "csr int32": torch.sparse_csr_tensor(
                torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), [1.0], (1, 3)
            ),
            "csr batch": torch.stack([torch.eye(3), torch.eye(3)]).to_sparse_csr(),
            "csr parameter": torch.nn.Parameter(_sparse().to_sparse_csr()),
            "csc": _sparse().to_sparse_csc(),
            "bsr": _sparse((4, 6)).to_sparse_bsr((2, 3)),
            "bsc": _sparse((4, 6)).to_sparse_bsc((2, 3)),
            "csr empty": torch.zeros(3, 4).to_sparse_csr(),
            "nested": torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
            "nested empty": torch.nested.nested_tensor([]),
            "jagged": _jagged(),
            "jagged gradient": torch.nested.nested_tensor([torch.randn(2, 3)], layout=torch.jagged, requires_grad=True),
            "jagged with holes": torch.nested.nested_tensor_from_jagged(
                torch.randn(6, 5), torch.tensor([0, 2, 3, 6]), torch.tensor([1, 1, 2]), min_seqlen=1, max_seqlen=2
            ),
            "qint8": _quantized(),
            "quint8 permuted": _quantized(torch.quint8).t(),
            "qint32 slice": _quantized(torch.qint32)[1:, ::2],
            "qint8 scalar": torch.quantize_per_tensor(torch.tensor(1.0), 0.5, 0, torch.qint8),
            "qint8 empty": torch.quantize_per_tensor(torch.zeros(0, 3), 0.5, 0, torch.qint8),
            "qint8 per channel": _per_channel(),
            "quint8 per row": _per_channel(torch.quint8, 0),
            "quint8 float": _sub_byte(torch.quint8),
            "quint4x2": _sub_byte(torch.quint4x2),
            "quint2x4": _sub_byte(torch.quint2x4, (2, 9)),
            "qint8 parameter": torch.nn.Parameter(_quantized(), requires_grad=False),
            "mkldnn": values.to_mkldnn(),
            "subclass": Scaled(values, 3),
            "subclass with strides": Scaled(values.t(), (1, {"x": torch.float32})),
            "subclass with gaps": Scaled(torch.arange(24.0).reshape(4, 6)[:, ::2], 1),
            "subclass gradient": Scaled(values, None, requires_grad=True),
            "subclass parameter": torch.nn.Parameter(Scaled(values, 1.5)),
            "subclass frozen": torch.nn.Parameter(Scaled(values, 1.5), requires_grad=False),
            "two tensors": TwoTensor(torch.randn(2, 3), torch.randn(2, 3)),
            "two of two": TwoTensor(TwoTensor(torch.ones(2), torch.zeros(2)), TwoTensor(torch.ones(2), torch.ones(2))),
        }


NAMES = [
    *("coo", "coo not coalesced", "coo hybrid", "coo empty", "coo scalar", "coo bfloat16", "coo gradient", "coo parameter", "coo frozen"),
    *("csr", "csr int32", "csr batch", "csr parameter", "csc", "bsr", "bsc", "csr empty"),
    *("nested", "nested empty", "jagged", "jagged gradient", "jagged with holes"),
    *("qint8", "quint8 permuted", "qint32 slice", "qint8 scalar", "qint8 empty", "qint8 per channel", "quint8 per row", "quint8 float"),
    *("quint4x2", "quint2x4", "qint8 parameter", "mkldnn"),
    *(
        "subclass",
        "subclass with strides",
        "subclass with gaps",
        "subclass gradient",
        "subclass parameter",
        "subclass frozen",
        "two tensors",
        "two of two",
    ),
]


def test_the_names_are_those_of_the_tensors(tensors) -> None:
    """Each tensor made for these tests is tested."""
    assert sorted(tensors) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back_without_pickle(name, tensors, roundtrip, same) -> None:
    """Layout, values, quantisers, class, gradient flag and whether it is a ``Parameter`` are kept, and nothing is left to pickle."""
    tensor = tensors[name]
    assert not any(isinstance(leaf, tree.Object) for leaf in tree.flatten("key", {"a": tensor}))
    restored = roundtrip({"a": tensor})["a"]
    if name != "mkldnn":
        same(tensor, restored)
    assert tensor.layout == restored.layout
    assert isinstance(tensor, torch.nn.Parameter) == isinstance(restored, torch.nn.Parameter)
    assert tensor.requires_grad == restored.requires_grad
    assert restored.is_leaf


def test_mkldnn_values_are_kept(tensors, roundtrip) -> None:
    """A tensor in MKLDNN's layout is so again, with its values."""
    assert torch.equal(tensors["mkldnn"].to_dense(), roundtrip(tensors["mkldnn"]).to_dense())


def test_coalesced_flags_are_kept(roundtrip) -> None:
    """Whether a COO tensor is coalesced does not change, nor do its duplicate entries."""
    restored = roundtrip([_uncoalesced(), _uncoalesced().coalesce()])
    assert [False, True] == [tensor.is_coalesced() for tensor in restored]
    assert [3, 2] == [tensor._nnz() for tensor in restored]


def test_strides_of_quantised_tensors_do_not_matter(roundtrip) -> None:
    """A permuted quantised tensor has its values in its order."""
    tensor = _quantized().t()
    assert torch.equal(tensor.int_repr(), roundtrip(tensor).int_repr())


def test_quantised_modules_come_back(roundtrip) -> None:
    """The state of a quantised layer, packed weights and all, loads into a fresh one."""
    layer = torch.nn.quantized.Linear(4, 3)
    layer.set_weight_bias(_quantized(torch.qint8)[:, :4].contiguous(), torch.randn(3))
    fresh = torch.nn.quantized.Linear(4, 3)
    fresh.load_state_dict(roundtrip(layer.state_dict()))
    probe = torch.quantize_per_tensor(torch.randn(2, 4), 0.1, 0, torch.quint8)
    assert torch.equal(layer(probe).int_repr(), fresh(probe).int_repr())


def _with_values(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    (tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()).mul_(factor)
    return tensor


def _rows(data: list[int]) -> torch.Tensor:
    return torch.quantize_per_channel(
        torch.tensor([data, data]) / 10, torch.tensor([0.1, 0.2]).double(), torch.tensor([0, 1]), 0, torch.qint8
    )


PAIRS = {
    "coo": lambda: (_sparse().to_sparse(), _with_values(_sparse().to_sparse(), 0)),
    "coo parameter": lambda: tuple(torch.nn.Parameter(_with_values(_sparse().to_sparse(), factor)) for factor in (1, 0)),
    "csr": lambda: (_sparse().to_sparse_csr(), _with_values(_sparse().to_sparse_csr(), 0)),
    "quantised": lambda: (_quantized(seed=1), _quantized(seed=2)),
    "per channel": lambda: (_rows([1, 2, 3]), _rows([4, 5, 6])),
    "sub-byte": lambda: tuple(
        torch.quantize_per_channel(torch.tensor([data]), *[torch.ones(1)] * 2, 0, torch.quint4x2) for data in ([1.0], [2.0])
    ),
    "nested": lambda: tuple(torch.nested.nested_tensor([torch.full((2,), value), torch.full((3,), value)]) for value in (1.0, 2.0)),
    "jagged": lambda: (_jagged(), _jagged(seed=1)),
    "subclass": lambda: (Scaled(torch.ones(3, 4), 2), Scaled(torch.zeros(3, 4), 2)),
    "subclass parameter": lambda: (torch.nn.Parameter(Scaled(torch.ones(3), 2)), torch.nn.Parameter(Scaled(torch.zeros(3), 2))),
    "two tensors": lambda: (TwoTensor(torch.ones(2), torch.zeros(2)), TwoTensor(torch.zeros(2), torch.ones(2))),
    "two of two": lambda: tuple(
        TwoTensor(*[TwoTensor(torch.full((2,), x), torch.full((2,), x)) for x in pair]) for pair in ((1.0, 2.0), (3.0, 4.0))
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_live_tensors_of_equal_form_are_read_in_place(name, refill, same) -> None:
    """Where the parts fit, the live object itself holds the values, and stays the object it is."""
    value, live = PAIRS[name]()
    assert live is refill({"a": value}, {"a": live})["a"]
    same(value, live)


@pytest.mark.parametrize(
    ("value", "live"),
    [
        (lambda: _sparse(seed=1).to_sparse(), lambda: _sparse(seed=2).to_sparse()),
        (lambda: _sparse().to_sparse(), lambda: _sparse().to_sparse().requires_grad_()),
        (lambda: _sparse().to_sparse_csr(), lambda: _sparse().to_sparse_csc()),
        (_quantized, lambda: torch.quantize_per_tensor(torch.zeros(3, 5), 0.2, 3, torch.qint8)),
        (lambda: _jagged((1, 2)), lambda: _jagged((2, 2))),
        (lambda: Scaled(torch.ones(2), 1), lambda: Scaled(torch.zeros(2), 2)),
        (lambda: TwoTensor(torch.ones(2), torch.ones(2)), lambda: torch.zeros(2)),
        (lambda: torch.ones(2), lambda: TwoTensor(torch.zeros(2), torch.zeros(2))),
    ],
)
def test_live_tensors_of_another_form_are_replaced(value, live, refill, same) -> None:
    """Where metadata differs, a new object is made and holds the snapshot's values."""
    value, live = value(), live()
    restored = refill(value, live)
    assert restored is not live
    same(value, restored)


@pytest.mark.parametrize("name", PAIRS)
def test_parts_that_were_not_read_in_place_make_a_new_tensor(name, same) -> None:
    """A live object of equal form is not taken for restored when its own parts hold other values still."""
    value, live = PAIRS[name]()
    codec = codecs.find(value)
    meta, parts = codec.flatten(value)
    pieces = [tree.Part("key", codec.name, through_json(meta), None)]
    pieces += [tree.Part(f"key/{part}", None, None, tensor.clone()) for part, tensor in parts.items()]
    restored = tree.build(pieces, {"key": live})
    assert restored is not live
    same(value, restored)


def test_metadata_tells_the_shapes_of_all_parts() -> None:
    """Tensors whose parts differ in shape have different metadata, so that a live one is refilled as a whole or not at all."""
    for one, other in (
        (torch.eye(3).to_sparse_csr(), (torch.eye(3) * torch.tensor([1, 0, 1])).to_sparse_csr()),
        (_jagged((1, 3)), _jagged((2, 3))),
        (torch.nested.nested_tensor([torch.ones(2)]), torch.nested.nested_tensor([torch.ones(3)])),
    ):
        codec = codecs.find(one)
        assert codec is not None
        assert codec.flatten(one)[0] != codec.flatten(other)[0]


# What is not taken


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(2, 3, layout=torch.sparse_coo, device="meta"),
        TwoTensor(torch.empty(2, device="meta"), torch.empty(2, device="meta")),
    ],
    ids=["sparse", "subclass"],
)
def test_meta_tensors_are_reported(value) -> None:
    """A tensor on ``meta`` is no codec's; flatten names its path."""
    assert codecs.find(value) is None
    with pytest.raises(UnsupportedValueError, match="'key/a' is on the meta device"):
        tree.flatten("key", {"a": value})


def test_subclasses_without_parts_are_left_to_pickle() -> None:
    """A subclass that does not say of what it is made, or says it in something that is not plain, is an object."""
    for value in (torch.ones(2).as_subclass(Tagged), Scaled(torch.ones(2), object())):
        (leaf,) = tree.flatten("key", value)
        assert isinstance(leaf, tree.Object)


def test_views_of_sub_byte_tensors_are_left_to_pickle() -> None:
    """Integers that share their bytes with others are not taken apart."""
    whole = torch._empty_affine_quantized((4, 4), scale=0.1, zero_point=0, dtype=torch.quint4x2)
    views = [whole[:1], _sub_byte(torch.quint4x2).view(15)]
    with contextlib.suppress(RuntimeError):  # which some versions of torch count as longer than their storage
        views += [whole[1:], whole.t()]
    for view in views:
        (leaf,) = tree.flatten("key", view)
        assert isinstance(leaf, tree.Object)


def test_distributed_tensors_are_not_taken_apart(monkeypatch) -> None:
    """A DTensor is known by its class where ``torch.distributed.tensor`` is loaded, and that module is never imported for it."""
    assert codecs.find(TwoTensor(torch.ones(1), torch.ones(1))) is not None
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=TwoTensor))
    value = TwoTensor(torch.ones(1), torch.ones(1))
    assert codecs.find(value) is None


# Hostile parts

_FLAGS = {"parameter": False, "requires_grad": False}


@pytest.mark.parametrize(
    ("indices", "shape", "coalesced"),
    [
        (torch.tensor([[0, 5]]), [3], False),
        (torch.tensor([[0, -1]]), [3], False),
        (torch.tensor([[2**62, 1]]), [3], False),
        (torch.tensor([[1, 0]]), [3], True),
        (torch.tensor([[0, 0]]), [3], True),
        (torch.tensor([[0, 1]]), [-3], False),
        (torch.tensor([[0, 1]]), [3, 3], False),
        (torch.tensor([[0, 1], [0, 1]]), [2**40, 2**40], False),
        (torch.tensor([[0.0, 1.0]]), [3], False),
        (torch.tensor([0, 1]), [3], False),
        (torch.tensor([[0, 1, 2]]), [3], False),
        (torch.eye(2).to_sparse(), [3], False),
        ([[0, 1]], [3], False),
    ],
)
def test_hostile_indices_of_coo_tensors_are_refused(indices, shape, coalesced, hostile) -> None:
    """Indices outside the shape, in disorder or of another form never make a tensor."""
    meta = {"shape": shape, "coalesced": coalesced, **_FLAGS}
    hostile("torch.sparse_coo", meta, {"indices": indices, "values": torch.ones(2)})


@pytest.mark.parametrize(
    ("layout", "compressed", "plain", "values", "shape"),
    [
        ("csr", [0, 1, 2], [0, 9], torch.ones(2), [2, 2]),
        ("csr", [0, 1, 2], [0, -1], torch.ones(2), [2, 2]),
        ("csr", [0, 9, 2], [0, 1], torch.ones(2), [2, 2]),
        ("csr", [0, 1, 9], [0, 1], torch.ones(2), [2, 2]),
        ("csr", [1, 1, 2], [0, 1], torch.ones(2), [2, 2]),
        ("csr", [0, 1], [0, 1], torch.ones(2), [2, 2]),
        ("csr", [0, 1, 2], [0, 1], torch.ones(3), [2, 2]),
        ("csr", [0, 1, 2], [0, 1], torch.ones(2), [2, 2, 2]),
        ("csr", [0, 2, 2], [1, 0], torch.ones(2), [2, 2]),
        ("bsr", [0, 1, 2], [0, 1], torch.ones(2, 2, 3), [4, 4]),
        ("bsr", [0, 1, 2], [0, 7], torch.ones(2, 2, 2), [4, 4]),
        ("load", [0, 1, 2], [0, 1], torch.ones(2), [2, 2]),
        ("csr", [0.0, 1.0, 2.0], [0.0, 1.0], torch.ones(2), [2, 2]),
    ],
)
def test_hostile_indices_of_compressed_tensors_are_refused(layout, compressed, plain, values, shape, hostile) -> None:
    """Compressed indices that do not fit their shape never make a tensor."""
    parts = {"crow_indices": torch.tensor(compressed), "col_indices": torch.tensor(plain), "values": values}
    hostile("torch.sparse_compressed", {"layout": layout, "shape": shape, **_FLAGS}, parts)


def test_hostile_indices_read_in_place_are_made_harmless(hostile) -> None:
    """Where indices were read into a live tensor before they could be checked, they are reset, and the tensor can be used."""
    live = torch.eye(3).to_sparse()
    meta, parts = codecs.find(live).flatten(live)
    parts["indices"].fill_(10**9)
    hostile("torch.sparse_coo", through_json(meta), parts, live)
    assert 0 == int(live._indices().max())
    live.to_dense()

    rows = torch.eye(3).to_sparse_csr()
    meta, parts = codecs.find(rows).flatten(rows)
    parts["crow_indices"].fill_(10**9)
    parts["col_indices"].fill_(10**9)
    hostile("torch.sparse_compressed", through_json(meta), parts, rows)
    assert [0, 0] == [int(rows.crow_indices().max()), int(rows.col_indices().max())]
    rows.to_dense()

    jagged = _jagged((1, 2))
    meta, parts = codecs.find(jagged).flatten(jagged)
    parts["_offsets"].fill_(10**9)
    hostile("torch.subclass", through_json(meta), parts, jagged)
    assert [0, 0, 0] == jagged.offsets().tolist()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"shape": [3, 6]}, {}),
        ({"shape": [2**31, 2**31]}, {}),
        ({"dtype": "float32"}, {}),
        ({"dtype": "quint4x2"}, {}),
        ({"scheme": "per_tensor_symmetric"}, {}),
        ({"scheme": "load"}, {}),
        ({"axis": 2}, {}),
        ({"axis": -1}, {}),
        ({"axis": True}, {}),
        ({}, {"scales": torch.ones(2).double()}),
        ({}, {"scales": torch.ones(5, dtype=torch.int64)}),
        ({}, {"zero_points": torch.zeros(1, dtype=torch.int64)}),
        ({}, {"zero_points": torch.zeros(5)}),
        ({}, {"scales": torch.ones(2).double(), "zero_points": torch.zeros(2, dtype=torch.int64)}),
        ({}, {"scales": torch.ones(0).double(), "zero_points": torch.zeros(0, dtype=torch.int64)}),
        ({}, {"data": torch.zeros(3, 5)}),
        ({}, {"data": torch.zeros(15, dtype=torch.int8)}),
        ({}, {"data": None}),
    ],
)
def test_hostile_quantisers_are_refused(change, parts, hostile) -> None:
    """Scales that do not match the rows they scale, or integers of another form, never make a tensor: kernels would read past them."""
    meta, good = codecs.find(_per_channel()).flatten(_per_channel())
    hostile("torch.quantized", through_json({**meta, **change}), {**good, **parts})


@pytest.mark.parametrize("shape", [[3, 6], [3, 5, 1], [], [2**31, 2**31]])
def test_hostile_shapes_of_sub_byte_tensors_are_refused(shape, hostile) -> None:
    """A shape needs exactly the bytes that there are."""
    meta, parts = codecs.find(_sub_byte(torch.quint4x2)).flatten(_sub_byte(torch.quint4x2))
    parts["data"] = parts["data"][:-1]
    hostile("torch.quantized", through_json({**meta, "shape": shape}), parts)


@pytest.mark.parametrize(
    ("parts", "context"),
    [
        ({"_offsets": torch.tensor([0, 2, 9])}, {}),
        ({"_offsets": torch.tensor([0, 2, -1])}, {}),
        ({"_offsets": torch.tensor([-2, 0, 3])}, {}),
        ({"_offsets": torch.tensor([0, 3, 1])}, {}),
        ({"_offsets": torch.tensor([[0, 1, 3]])}, {}),
        ({"_offsets": torch.tensor([0.0, 1.0, 3.0])}, {}),
        ({"_offsets": torch.zeros(0, dtype=torch.int64)}, {}),
        ({"_lengths": torch.tensor([1, 9])}, {}),
        ({"_lengths": torch.tensor([1, -1])}, {}),
        ({"_lengths": torch.tensor([1])}, {}),
        ({"_min_seqlen_tensor": torch.zeros(3, 0)}, {}),
        ({"_max_seqlen_tensor": torch.zeros(1, 0)}, {}),
        ({"_max_seqlen_tensor": torch.zeros(10**9, 0)}, {}),
        ({}, {"ragged_idx": 7}),
        ({}, {"ragged_idx": 0}),
        ({}, {"ragged_idx": "x"}),
    ],
)
def test_hostile_offsets_of_jagged_tensors_are_refused(parts, context, hostile) -> None:
    """Offsets, lengths and extremes that point outside the values never make a tensor: PyTorch does not look at them."""
    codec = codecs.find(_jagged((1, 2)))
    meta, good = codec.flatten(_jagged((1, 2)))
    meta = through_json(meta)
    pairs = dict(meta["context"]["value"]) | context
    meta["context"]["value"] = [list(pair) for pair in pairs.items()]
    hostile("torch.subclass", meta, {**good, **parts})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"module": "os", "class": "system"}, UnknownClassError),
        ({"module": "torch", "class": "Tensor"}, UnknownClassError),
        ({"module": "not.imported", "class": "X"}, UnknownClassError),
        ({"module": __name__, "class": "Tagged"}, UnknownClassError),
        ({"module": "antigravity", "class": "X"}, UnknownClassError),
        ({"size": [7]}, ManifestError),
        ({"size": "x"}, ManifestError),
        ({"stride": [-1]}, ManifestError),
        ({"context": {"type": "dict", "value": []}}, ManifestError),
        ({"context": {"type": "enum", "value": ["os", "x", "y", None]}}, UnknownClassError),
    ],
)
def test_hostile_subclasses_are_refused(change, error) -> None:
    """Only classes of tensors in memory that can be taken apart are made, and only of the size that was stored."""
    before = set(sys.modules)
    value = Scaled(torch.ones(2), 1)
    meta, parts = codecs.find(value).flatten(value)
    pieces = [tree.Part("key", "torch.subclass", through_json({**meta, **change}), None)]
    pieces += [tree.Part(f"key/{name}", None, None, part) for name, part in parts.items()]
    with pytest.raises(error):
        tree.build(pieces, {})
    assert before == set(sys.modules)


class Labelled(Scaled):
    """A subclass one of whose parts is no tensor."""

    def __tensor_flatten__(self):
        return ["inner", "factor"], None

    @classmethod
    def __tensor_unflatten__(cls, inner_tensors, context, outer_size, outer_stride):
        return cls(inner_tensors["inner"], inner_tensors["factor"])


def test_subclasses_of_another_size_are_refused(hostile) -> None:
    """What a class makes of its parts has to have the size that was stored, even if the class does not look."""
    value = Labelled(torch.ones(2), 3)
    meta, parts = codecs.find(value).flatten(value)
    hostile("torch.subclass", through_json({**meta, "size": [7], "stride": [1]}), parts)


def test_parts_need_not_be_tensors(roundtrip, refill) -> None:
    """A part may be any value; the live tensor is then replaced unless it holds that very one."""
    value = Labelled(torch.ones(2), {"a": [1, 2]})
    for restored in (roundtrip(value), refill(value, Labelled(torch.zeros(2), {"a": [3, 4]}))):
        assert {"a": [1, 2]} == restored.factor
        assert torch.equal(torch.ones(2), restored.inner)


# Generators


def test_generators_go_on_where_they_were(roundtrip) -> None:
    """A restored generator draws the same numbers next."""
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    restored = roundtrip({"g": generator})["g"]
    assert torch.equal(torch.randn(9, generator=generator), torch.randn(9, generator=restored))


def test_live_generators_are_refilled(refill) -> None:
    """The generator that a data loader holds stays the object it is."""
    generator, live = torch.Generator().manual_seed(5), torch.Generator()
    assert live is refill([generator], [live])[0]
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=live))


def test_generators_of_absent_devices_say_so() -> None:
    """A generator of a device that is not here is an error that names the device."""
    pieces = [
        tree.Part("key", "torch.Generator", {"device": "xla:7"}, None),
        tree.Part("key/state", None, None, torch.zeros(16, dtype=torch.uint8)),
    ]
    with pytest.raises(RestoreMismatchError, match=r"'key'.*'xla:7'"):
        tree.build(pieces, {})


def _state_with(left: int, position: int) -> torch.Tensor:
    state = torch.Generator().get_state()
    state[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
    state[16:24] = torch.tensor([position]).view(torch.uint8)
    return state


@pytest.mark.parametrize(
    "state",
    [
        _state_with(624, 624),
        _state_with(2, 624),
        _state_with(0, 1),
        _state_with(-5, 1),
        _state_with(1, -1),
        torch.zeros(10, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(5056, dtype=torch.uint8),
        torch.zeros(5056),
        None,
    ],
)
def test_hostile_states_of_generators_are_refused(state, hostile) -> None:
    """A position beyond the generator's words would read past its memory."""
    hostile("torch.Generator", {"device": "cpu"}, {"state": state}, torch.Generator())


def test_every_position_of_a_generator_is_sound(roundtrip) -> None:
    """Whatever has been drawn, the state passes the check."""
    generator = torch.Generator().manual_seed(1)
    for count in (0, 1, 622, 1, 1, 623, 5):
        torch.rand(count, generator=generator)
        torch.randn(count % 17, generator=generator)
        restored = roundtrip(generator)
        assert torch.equal(generator.get_state(), restored.get_state())


@pytest.mark.parametrize("name", NAMES)
def test_a_default_device_does_not_matter(name, roundtrip, tensors) -> None:
    """Tensors are rebuilt where their parts are, whatever ``torch.set_default_device`` says."""
    with torch.device("meta"):
        assert torch.device("cpu") == roundtrip(tensors[name]).device
