"""The tests of storages are shipped with the package: pytest explains their asserts as it does those of the tests here."""

import pytest

pytest.register_assert_rewrite("expstate.testing")
