"""The state in ``format-1``, and the script that took it: a snapshot of the first format, which every later version must read.

The committed snapshot is never taken anew: a version that writes another format gets a folder and a script of its own.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import pathlib
import random
import sys
import types
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pandas as pd
import torch

from expstate import RNGState, Snapshot, StateDict

FOLDER = pathlib.Path(__file__).parent / "format-1"
DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]
METADATA: dict[str, Any] = {
    "name": "format-1",
    "tags": ["kept", "für immer"],
    "params": {"lr": 0.1, "layers": [4, (2, None)], "huge": 2**70, "nan": float("inf")},
    "metrics": {"loss": 0.25, "steps": 3},
    "note": "A snapshot of the first format.\nIt must be readable for ever.",
    "step": 7,
}


def _of_dtype(name: str) -> torch.Tensor:
    dtype = getattr(torch, name)
    raw = torch.arange(32, dtype=torch.uint8) % 2 if name == "bool" else torch.arange(32, dtype=torch.uint8)
    return raw.view(dtype).view(2, -1)


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors will go one day
        return torch.quantize_per_tensor(torch.tensor([0.0, 0.5, 1.0]), 0.5, 1, torch.qint8)


def tensors() -> dict[str, Any]:
    """Tensors of every dtype, layout and kind."""
    tied = torch.arange(6.0).view(2, 3)
    sparse = torch.tensor([[0.0, 1.5], [2.5, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these layouts are in beta
        layouts = {name: getattr(sparse, f"to_sparse_{name}")() for name in ("coo", "csr", "csc")}
        layouts["bsr"] = sparse.to_sparse_bsr((1, 1))
        layouts["nested"] = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
        layouts["jagged"] = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
    return {
        "dtypes": {name: _of_dtype(name) for name in DTYPES},
        "zero-dim": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6).view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "gradient": torch.ones(2, requires_grad=True),
        "tied": [tied, {"again": tied}],
        "layouts": layouts,
        "quantised": _quantised(),
        "generator": torch.Generator().manual_seed(11),
    }


def arrays() -> dict[str, Any]:
    """NumPy's and pandas' values; what each version of pandas would choose by itself is that of the one it was taken with."""
    texts = pd.StringDtype("python", na_value=np.nan)
    columns = {"x": [1.5, None, 3.0], "n": np.array([1, 2, 3], "int8"), "when": pd.date_range("2026-11-01", periods=3, unit="us")}
    return {
        "float": np.arange(6.0).reshape(2, 3),
        "big-endian": np.arange(4, dtype=">i4"),
        "text": np.array(["a", "bçd", ""]),
        "bytes": np.array([b"a", b"bc"]),
        "time": np.array(["2026-11-01T12:00", "NaT"], dtype="M8[ms]"),
        "records": np.array([(1, 2.5), (3, 4.5)], dtype=[("n", "<i4"), ("x", "<f8")]),
        "objects": np.array([1, "two", None], dtype=object),
        "masked": np.ma.MaskedArray([1, 2, 3], mask=[False, True, False], fill_value=9),
        "scalar": np.float32(1.25),
        "dtype": np.dtype("<U5"),
        "generator": np.random.Generator(np.random.PCG64(5)),
        "frame": pd.DataFrame(columns, index=[3, 4, 5]).set_axis(pd.Index(list(columns), dtype=texts), axis=1),
        "series": pd.Series(pd.Categorical(["a", "b", "a"], categories=pd.Index(["a", "b"], dtype=texts)), name="category"),
    }


def values() -> dict[str, Any]:
    """Plain values, containers and keys."""
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 2**63, -(2**200)],
        "floats": [0.1, -0.0, float("inf"), float("-inf")],
        "complex": 1 - 2j,
        "texts": ["", "a", "ü\n\0", "\ud800"],
        "bytes": [b"", b"\x00\xff", bytearray(b"x")],
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), torch.strided],
        "times": [
            dt.datetime(2026, 11, 1, 12, 30, tzinfo=dt.timezone.utc),
            dt.datetime(2026, 11, 1),  # noqa: DTZ001 - naive times are values too
            dt.date(2026, 11, 1),
            dt.time(1, 2, 3),
            dt.timedelta(-1, 5, 7),
        ],
        "path": pathlib.Path("a/b"),
        "others": [decimal.Decimal("1.10"), fractions.Fraction(1, 3), uuid.UUID(int=5), range(1, 9, 2), slice(1, None), ...],
        "sets": [{1, "a"}, frozenset({(1, 2)})],
        "tuple": (1, (2, [3])),
        "ordered": OrderedDict(b=1, a=torch.ones(1)),
        "default": defaultdict(list, x=[1]),
        "counter": Counter({"a": 2}),
        "deque": deque([1, {}], maxlen=4),
        "keys": {1: "int", "1": "text", True + 1: "two", (1, "x"): "tuple", None: "none", "a/b%": "slash", "": "empty", b"k": "bytes"},
        "object": types.SimpleNamespace(a=1, b=[2]),
        "safe object": torch.UntypedStorage([1, 2, 3]),
    }


class Model(torch.nn.Module):
    """A small network with an embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def model_and_optimizer() -> tuple[Model, torch.optim.Optimizer]:
    """With exact numbers, and moments of one step."""
    model = Model()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
            parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    optimizer.step()
    return model, optimizer


def app_state() -> dict[str, Any]:
    """All that is in the snapshot; the random generators are seeded with 3."""
    model, optimizer = model_and_optimizer()
    found = {
        "model": model,
        "optimizer": optimizer,
        "tensors": StateDict(tensors()),
        "arrays": StateDict(arrays()),
        "values/100%": StateDict(values()),
        "rng": RNGState(),
    }
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    return found


if __name__ == "__main__":
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists, and is kept as it is")
    warnings.simplefilter("ignore")  # the object will need trust=True
    Snapshot.take(FOLDER, app_state(), **METADATA)
