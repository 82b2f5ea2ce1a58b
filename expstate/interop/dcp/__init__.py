"""``torch.distributed.checkpoint`` on snapshots: ``Writer`` for ``dcp.save`` and ``dcp.async_save``, ``Reader`` for ``dcp.load``."""

from expstate.interop.dcp.reader import Reader
from expstate.interop.dcp.writer import Writer

__all__ = ["Reader", "Writer"]
