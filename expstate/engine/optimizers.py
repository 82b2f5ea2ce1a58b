"""What is special about optimizers: their state belongs to parameters, by number.

Gives the device on which new state is made, and the problems that ``Optimizer.load_state_dict`` would find too late, or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from expstate.engine.devices import usable_device
from expstate.errors import ExpstateError
from expstate.format.manifest import ContainerEntry, Entry, TensorEntry, ValueEntry
from expstate.state import paths
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# State that has its parameter's shape, in the optimizers of torch.
_PARAMETER_SHAPED = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "prev",
        "step_size",
        "ax",
    }
)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _place(path: str, root: str) -> tuple[int, str] | None:
    """The number of the parameter that a path below ``root`` is state of, and the name of the state."""
    parts = path.removeprefix(f"{root}/state/").split("/")
    return (int(parts[0]), parts[1]) if path.startswith(f"{root}/state/") and parts[0].isdigit() and len(parts) > 1 else None


def state_devices(optimizer: torch.optim.Optimizer, root: str) -> Callable[[str, str | None], torch.device]:
    """The rule for new state: on its parameter's device, but for what was on the host when it was taken (step counts)."""
    parameters = _parameters(optimizer)

    def device_of(path: str, recorded: str | None) -> torch.device:
        place = _place(path, root)
        if place is None or place[0] >= len(parameters):
            return usable_device(recorded)
        if place[1] == "step" and (recorded or "cpu") == "cpu":
            return torch.device("cpu")
        return parameters[place[0]].device

    return device_of


def parameter_of(optimizer: torch.optim.Optimizer, path: str, root: str) -> torch.Tensor | None:
    """The parameter that what lies at a path is state of."""
    parameters = _parameters(optimizer)
    place = _place(path, root)
    return parameters[place[0]] if place is not None and place[0] < len(parameters) else None


def must_fit(stateful: object, path: str) -> bool:
    """Whether state at this path must have the live state's shape."""
    return isinstance(stateful, torch.optim.Optimizer) and path.rpartition("/")[2] in _PARAMETER_SHAPED


def check(optimizer: torch.optim.Optimizer, live_state: Any, entries: Sequence[Entry], root: str) -> list[str]:
    """Problems with groups, counts of parameters and shapes of state."""
    groups = sum(1 for entry in entries if isinstance(entry, ContainerEntry) and paths.parent(entry.path) == f"{root}/param_groups")
    live_groups = live_state.get("param_groups", []) if isinstance(live_state, dict) else []
    problems = []
    if groups != len(live_groups):
        problems.append(f"key {root!r}: the snapshot has {groups} parameter groups and the live optimizer {len(live_groups)}")
    parameters = _parameters(optimizer)
    for entry in entries:
        if entry.path.startswith(f"{root}/param_groups/") and entry.path.endswith("/params"):
            problems += _check_group(entry, root, live_groups)
        place = _place(entry.path, root)
        if isinstance(entry, TensorEntry) and place is not None and place[1] in _PARAMETER_SHAPED and place[0] < len(parameters):
            shape = tuple(parameters[place[0]].shape)
            if entry.shape != shape:
                problems.append(f"entry {entry.path!r} has shape {entry.shape}, and its parameter {shape}")
    return problems


def _check_group(entry: Entry, root: str, live_groups: list[dict[str, Any]]) -> list[str]:
    number = entry.path.removeprefix(f"{root}/param_groups/").partition("/")[0]
    if not number.isdigit() or int(number) >= len(live_groups):
        return []
    try:
        # A long list is stored as a tensor and says its length itself.
        stored = len(decode(entry.value)) if isinstance(entry, ValueEntry) else int(entry.meta["length"])  # type: ignore[union-attr]
    except (ExpstateError, AttributeError, LookupError, TypeError, ValueError):
        return [f"entry {entry.path!r} is not a list of parameters"]
    live = len(live_groups[int(number)]["params"])
    if stored == live:
        return []
    return [f"key {root!r}: group {number} has {stored} parameters in the snapshot and {live} live"]
