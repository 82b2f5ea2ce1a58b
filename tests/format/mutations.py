"""Random changes of JSON documents, of the kinds that hide in them: values swapped, doubled, missing, too large, of another type."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

_ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**40,
        2**62,
        2**63 - 1,
        2**64,
        -(2**63),
        0.5,
        1e300,
        "",
        "x",
        "0",
        "..",
        "../x",
        "/",
        "model",
        "%FF",
        "float32",
        "float64",
        "uint8",
        "complex64",
        "<f4",
        "<U2",
        "|V8",
        "numpy",
        "parameter",
        "dict",
        "list",
        "torch.sparse_coo",
        "torch.quantized",
        "packed",
        "A" * 43 + "=",
        [],
        [0],
        [0, 0],
        [[]],
        {},
        {"type": "int", "value": "0x1"},
        {"keys": None, "versions": []},
    ]
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a document: the keys and indices that lead there."""
    found = [path] if path else []
    if isinstance(node, dict):
        for key, value in node.items():
            found += places(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found += places(value, (*path, index))
    return found


def at(node: Any, path: tuple[Any, ...]) -> Any:
    """What is there."""
    for step in path:
        node = node[step]
    return node


@st.composite
def mutations(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """The document with one to four changes."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 4))):
        found = places(changed)
        path = draw(st.sampled_from(found))
        holder, last = at(changed, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["replace", "replace", "swap", "delete", "double", "number"]))
        if kind == "replace":
            holder[last] = copy.deepcopy(draw(_ODD))
        elif kind == "swap":
            holder[last] = copy.deepcopy(at(changed, draw(st.sampled_from(found))))
        elif kind == "delete":
            del holder[last]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif type(holder[last]) is int:
            holder[last] += draw(st.sampled_from([-1, 1, 2, 8, 4096, -4096, 2**20]))
    return changed
