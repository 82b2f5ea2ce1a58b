"""Devices by name: whether one can be used here, asked without waking it up."""

from __future__ import annotations

import functools
from typing import Any

import torch

from expstate.errors import InvalidArgumentError


@functools.lru_cache(maxsize=64)
def usable_device(name: str | None) -> torch.device:
    """The device of this name if it is there, else the CPU."""
    try:
        device = torch.device(name or "cpu")
        if device.type in {"cpu", "meta"}:
            return torch.device("cpu")
        module: Any = torch.get_device_module(device)
        there = module.is_available() and (device.index or 0) < module.device_count()
    except (RuntimeError, AttributeError):
        return torch.device("cpu")
    return device if there else torch.device("cpu")


def check_device(device: object) -> torch.device | None:
    """What the caller gave as ``device=``, as a ``torch.device``.

    Raises
    ------
    InvalidArgumentError
        If it is no device, one that holds no values, or not there.
    """
    if device is None:
        return None
    try:
        parsed = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        msg = f"device {device!r} is not one that torch knows: {error}"
        raise InvalidArgumentError(msg) from None
    if parsed.type == "meta":
        msg = "device 'meta' holds no values, so nothing can be restored to it"
        raise InvalidArgumentError(msg)
    if usable_device(str(parsed)).type != parsed.type:
        msg = f"device {str(parsed)!r} is not there"
        raise InvalidArgumentError(msg)
    return parsed  # type: ignore[no-any-return]
