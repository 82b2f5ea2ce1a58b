"""Snapshots and what others write and read: distributed checkpoints of PyTorch, in and out.

``import_dcp`` makes a snapshot of a checkpoint folder. ``expstate.interop.dcp`` lets ``torch.distributed.checkpoint`` itself write and read
snapshots; it imports that package, which takes a second, and is therefore imported by name.
"""

from expstate.interop.importing import import_dcp

__all__ = ["import_dcp"]
