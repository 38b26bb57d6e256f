"""One warm pool for all tests of a worker, and a cluster for each file that asks for one."""

from collections.abc import Iterator

import pytest

from tests.sandbox.driver import Driver
from tests.sandbox.ray_nodes import ClusterProcess


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Driver]:
    """Bare and numpy templates, one of each."""
    with Driver(workers=1, slots=4, preload=("numpy",)) as driver:
        yield driver


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    """A Ray cluster in a process of its own, of which nothing is left at the end."""
    process = ClusterProcess()
    try:
        yield process
    finally:
        assert process.close() == {"processes": []}
