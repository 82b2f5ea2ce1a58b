"""For tests of what uses expstate: storages that forget (``null://``) or fail on demand, and the tests that every storage must pass.

``expstate.testing.storage`` holds those tests. It needs pytest, so it is imported by name and not from here.
"""

from expstate.testing.faulty import Call, FaultyStorage
from expstate.testing.null import NullStorage

__all__ = ["Call", "FaultyStorage", "NullStorage"]
