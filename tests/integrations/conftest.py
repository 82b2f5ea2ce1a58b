"""What every test of the integrations gets: trainings that end with the same bits in each process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The last bits of a sum depend on how many threads share it, and the math library may use fewer than it is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
