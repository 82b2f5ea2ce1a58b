"""The state in ``incremental``, ``shared-boxes`` and ``fingerprints``, and the script that took them: other forms of the first format.

The first has data files of an earlier snapshot in ``base``, the second has several entries at one place, and the third was taken as if the
tensors lay on an accelerator. The committed snapshots are never taken anew.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from typing import Any

import torch

from expstate import Snapshot, StateDict, settings
from expstate.engine.unchanged import LiveBox

HERE = pathlib.Path(__file__).parent
INCREMENTAL, SHARED_BOXES, FINGERPRINTS = FOLDERS = HERE / "incremental", HERE / "shared-boxes", HERE / "fingerprints"


def state(step: int = 2) -> dict[str, dict[str, Any]]:
    """What is in each of the snapshots, which were taken at the second step; ``average`` is equal to the model, but another."""
    embedding, head = torch.arange(1500.0).view(100, 15), torch.arange(15, dtype=torch.bfloat16)
    return {
        "model": {"embedding": embedding, "head": head, "bias": torch.full((5,), step / 2), "empty": torch.zeros(0, 3)},
        "average": {"embedding": embedding.clone(), "bytes": head.view(torch.uint8).clone()},
        "progress": {"moments": torch.full((20, 3), step / 4), "step": step},
    }


def app_state(step: int = 2) -> dict[str, StateDict]:
    """The same, to be taken or restored."""
    return {key: StateDict(values) for key, values in state(step).items()}


def _take() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = Snapshot.take(f"{folder}/first", app_state(1))
        Snapshot.take(INCREMENTAL, app_state(), base=first, dedup=False, name="incremental")
    Snapshot.take(SHARED_BOXES, app_state(), dedup=True, name="shared boxes")
    LiveBox.is_on_device = property(lambda _: True)  # type: ignore[method-assign,assignment]
    Snapshot.take(FINGERPRINTS, app_state(), name="fingerprints")


if __name__ == "__main__":
    if any(folder.exists() for folder in FOLDERS):
        sys.exit("there are snapshots already, and they are kept as they are")
    with settings.override(catalog="off", provenance="off"):
        _take()
