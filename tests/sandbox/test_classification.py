"""Statuses are right, and the same, at every load: queues and busy cores never turn one into another."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings

from jaxrl.sandbox import Result
from tests.sandbox.driver import Driver
from tests.sandbox.programs import ENDS, Program, batch, programs


def misjudged(sandbox: Driver, programs: Sequence[Program], outstanding: int) -> str:
    """What is wrong with the results of these programs, with so many of them outstanding; "" where nothing is."""
    gate = asyncio.Semaphore(outstanding)

    async def one(program: Program) -> Result:
        async with gate:
            return await sandbox.pool.run(program.code, limits=program.limits)

    async def together() -> list[Result]:
        return await asyncio.gather(*map(one, programs))

    results = sandbox.wait(together(), seconds=280.0)
    return "\n".join(filter(None, map(Program.misjudged, programs, results)))


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """So many processes that want a core all the time."""
    hogs = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@settings(max_examples=25, deadline=None)
@given(programs())
def test_random_programs_end_as_is_known(sandbox: Driver, program: Program) -> None:
    assert not misjudged(sandbox, [program], outstanding=1)


def test_statuses_do_not_depend_on_load(sandbox: Driver) -> None:
    each = batch(len(ENDS), seed=1)
    assert not misjudged(sandbox, each, outstanding=64)
    with busy_cores(4):
        assert not misjudged(sandbox, each, outstanding=16)
    assert not misjudged(sandbox, batch(3 * len(ENDS), seed=2), outstanding=1024)


@pytest.mark.slow
def test_statuses_do_not_depend_on_load_at_length(sandbox: Driver) -> None:
    each = batch(3 * len(ENDS), seed=3)
    assert not misjudged(sandbox, each, outstanding=1)
    assert not misjudged(sandbox, each, outstanding=64)
    assert not misjudged(sandbox, batch(1100, seed=4), outstanding=1024)
    with busy_cores(4):
        assert not misjudged(sandbox, each, outstanding=64)
