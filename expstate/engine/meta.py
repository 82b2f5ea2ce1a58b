"""Modules on the meta device: tensors without values, for which a restore makes real ones on a device with memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expstate.state import paths

if TYPE_CHECKING:
    from expstate.engine.plan import KeyPlan


def on_meta(stateful: object, root: str) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module that are on the meta device, by the path that their entries have."""
    if not isinstance(stateful, torch.nn.Module):
        return {}
    found = [*stateful.named_parameters(remove_duplicate=False), *stateful.named_buffers(remove_duplicate=False)]
    return {f"{root}/{paths.quote(name)}": tensor for name, tensor in found if tensor.is_meta}


def left_out(plan: KeyPlan) -> list[str]:
    """Names of those that the restore does not bring; all names of one tensor stay or come together."""
    coming = {id(plan.on_meta[placement.path]) for placement in plan.placements if placement.path in plan.on_meta}
    return [paths.unquote(path.partition("/")[2]) for path, tensor in plan.on_meta.items() if id(tensor) not in coming]


def materialise(plan: KeyPlan) -> None:
    """Put the new tensors in place of those on the meta device; what was one parameter stays one."""
    module = plan.stateful
    if not isinstance(module, torch.nn.Module):
        return
    made = {plan.sharing(placement): placement.tensor for placement in plan.placements if placement.path in plan.on_meta}
    new: dict[int, torch.Tensor] = {}
    for path, old in plan.on_meta.items():
        tensor = made.get(("live", id(old)))
        if tensor is None:
            continue
        if id(old) not in new:
            is_parameter = isinstance(old, torch.nn.Parameter)
            new[id(old)] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
        owner, _, name = paths.unquote(path.partition("/")[2]).rpartition(".")
        setattr(module.get_submodule(owner), name, new[id(old)])
