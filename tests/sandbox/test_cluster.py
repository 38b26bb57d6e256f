"""The pool over Ray: every call answered once and rightly, whatever is killed."""

import asyncio
import importlib.util
import os
import signal
from collections.abc import Iterator

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import ClusterPool, Limits, Result
from tests.sandbox.driver import LIMITS, descendants
from tests.sandbox.ray_nodes import ClusterProcess, RayNodes, in_cluster

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "jaxrl[ray]"')

OK = ToolStatus.OK


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    process = ClusterProcess()
    try:
        yield process
    finally:
        assert process.close() == {"processes": []}


def pool_on(nodes: RayNodes, **settings: object) -> ClusterPool:
    return ClusterPool(nodes.address, **{"limits": LIMITS, "workers": 1, "slots": 2, "preload": ()} | settings)


async def run_all(pool: ClusterPool, codes: list[str]) -> list[Result]:
    return await asyncio.gather(*(pool.run(code) for code in codes))


@in_cluster
async def test_calm(nodes: RayNodes) -> None:
    nodes.have(2)
    async with pool_on(nodes) as pool:
        results = await run_all(pool, [f"print({n})" for n in range(400)])
        print(results[0])
        assert [(result.status, result.stdout) for result in results] == [(OK, f"{n}\n") for n in range(400)]
        assert {result.node for result in results} == set(pool.nodes) and len(pool.nodes) == 2
        assert {result.attempts for result in results} == {1}
