"""Statuses are right, and the same, at every load: queues and busy cores never turn one into another."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import Phase, given, settings

from jaxrl.sandbox import Result
from tests.sandbox.driver import Driver
from tests.sandbox.programs import Program, programs


def drawn(count: int) -> list[Program]:
    """So many random programs. They are drawn first and run together, since it is their number that makes the load."""
    batch: list[Program] = []

    @settings(max_examples=count, phases=(Phase.generate,), database=None, deadline=None)
    @given(programs())
    def draw(program: Program) -> None:
        batch.append(program)

    draw()
    assert len(batch) == count
    return batch


def misjudged(sandbox: Driver, batch: Sequence[Program], outstanding: int) -> str:
    """What is wrong with the results of these programs, with so many of them outstanding; "" where nothing is."""
    gate = asyncio.Semaphore(outstanding)

    async def one(program: Program) -> Result:
        async with gate:
            return await sandbox.pool.run(program.code, limits=program.limits)

    async def together() -> list[Result]:
        return await asyncio.gather(*map(one, batch))

    results = sandbox.wait(together(), seconds=280.0)
    return "\n".join(filter(None, map(Program.misjudged, batch, results)))


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


def test_statuses_do_not_depend_on_load(sandbox: Driver) -> None:
    batch = drawn(60)
    assert not misjudged(sandbox, batch, outstanding=1)
    with busy_cores(4):
        assert not misjudged(sandbox, batch, outstanding=16)
    assert not misjudged(sandbox, repeated(batch, 200), outstanding=200)


@pytest.mark.slow
def test_statuses_do_not_depend_on_load_at_length(sandbox: Driver) -> None:
    batch = drawn(120)
    assert not misjudged(sandbox, batch, outstanding=1)
    assert not misjudged(sandbox, batch, outstanding=64)
    assert not misjudged(sandbox, repeated(batch, 1100), outstanding=1024)
    with busy_cores(4):
        assert not misjudged(sandbox, batch, outstanding=64)


def repeated(batch: list[Program], count: int) -> list[Program]:
    return list(itertools.islice(itertools.cycle(batch), count))


def test_grammar_reaches_every_status() -> None:
    """None of the ends goes untested by chance."""
    assert {str(program.status) for program in drawn(60)} == {
        "ok",
        "error",
        "timeout",
        "out_of_memory",
        "output_limit",
    }
