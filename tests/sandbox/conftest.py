"""One warm pool for all tests of a worker."""

from collections.abc import Iterator

import pytest

from tests.sandbox.driver import Driver


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Driver]:
    """Bare and numpy templates, one of each."""
    with Driver(workers=1, slots=4, preload=("numpy",)) as driver:
        yield driver
