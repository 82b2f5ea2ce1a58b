"""The helpers of these tests assert too, and pytest explains their asserts as it does those of the tests."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.engine.crashes", "tests.engine.processes")
