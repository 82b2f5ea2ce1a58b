"""Accelerators: copies on a stream of their own, in order with what the caller has queued, without stopping the device.

``SideStreams`` serves every accelerator that torch has a device module for; those without streams copy in place and wait.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class SideStreams:
    """One side stream for each device, behind what its current stream has queued by now.

    Parameters
    ----------
    devices : iterable of torch.device
        Those of the tensors to copy; the CPU is left out.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams: dict[torch.device, Any] = {}
        for device in {device for device in devices if device.type not in {"cpu", "meta"}}:
            module: Any = torch.get_device_module(device)
            if not hasattr(module, "Stream") or not hasattr(module, "current_stream"):
                self._streams[device] = None
                continue
            stream = module.Stream(device=device)
            # The copies see what the caller's kernels will have written, and the host does not wait for it.
            stream.wait_stream(module.current_stream(device))
            self._streams[device] = stream

    @contextlib.contextmanager
    def entered(self) -> Iterator[list[Any]]:
        """Copies inside this ``with`` block go on the side streams; afterwards the list holds an event of each to wait for."""
        events: list[Any] = []
        if not self._streams:
            yield events
            return
        with contextlib.ExitStack() as stack:
            for device, stream in self._streams.items():
                module: Any = torch.get_device_module(device)
                if stream is not None:
                    stack.enter_context(module.stream(stream))
            try:
                yield events
            except BaseException:
                # What was begun still reads or writes the buffer, which someone else gets next. On a device that has failed nothing moves.
                with contextlib.suppress(RuntimeError):
                    self._synchronize()
                raise
            for device, stream in self._streams.items():
                module = torch.get_device_module(device)
                if stream is not None:
                    events.append(module.Event())
                    events[-1].record(stream)
                else:
                    module.synchronize()

    def _synchronize(self) -> None:
        for device, stream in self._streams.items():
            (torch.get_device_module(device) if stream is None else stream).synchronize()

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread of the engine works in.

        A new thread begins on device 0 whatever its starter's is, and the first thing it asked of the driver would make a context
        there: memory that a rank on another device has no use for.
        """
        for device in self._streams:
            module: Any = torch.get_device_module(device)
            if hasattr(module, "device"):
                return module.device(device)  # type: ignore[no-any-return]
        return contextlib.nullcontext()

    def join(self) -> None:
        """What the caller queues from here on comes after the copies."""
        for device, stream in self._streams.items():
            if stream is not None:
                module: Any = torch.get_device_module(device)
                module.current_stream(device).wait_stream(stream)
