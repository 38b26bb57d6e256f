"""As many calls at once as a training step of rStar2-Agent makes: each answered once, none misjudged, none large."""

import asyncio
import collections
import tracemalloc

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result
from tests.sandbox.driver import Driver

AT_ONCE = 45_000
BYTES_OF_A_WAITING_CALL = 2048
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=8.0, memory_mib=64)


@pytest.mark.parametrize("queue", [64, 5000], ids=["at the pool's door", "in the warden's queue"])
def test_a_waiting_call_is_small(queue: int) -> None:
    """Of the caller's process, with what asyncio needs for the task that waits."""
    count = 4000
    with Driver(workers=1, slots=1, slow_slots=0, queue=queue, preload=()) as driver:

        async def hold() -> float:
            hog = asyncio.create_task(driver.pool.run("import time; time.sleep(9)", limits=Limits(wall_seconds=99)))
            await asyncio.sleep(0.1)
            codes = [f"print({n})" for n in range(count)]
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                waiting = [asyncio.create_task(driver.pool.run(code)) for code in codes]
                await asyncio.sleep(0.5)
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            for task in (hog, *waiting):
                task.cancel()
            await asyncio.gather(hog, *waiting, return_exceptions=True)
            return (after - before) / count

        assert driver.wait(hold()) < BYTES_OF_A_WAITING_CALL
        assert driver.run("6 * 7").stdout == "42\n"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_one_of_45000_calls_at_once_is_answered_once() -> None:
    """One in five fails by its own doing, so that a status that strayed to another call would show."""
    with Driver(workers=2, slots=4, queue=AT_ONCE, preload=(), limits=LIMITS) as driver:

        async def together() -> list[Result]:
            codes = (f"print({n})" + "\nraise SystemExit(7)" * (n % 5 == 0) for n in range(AT_ONCE))
            return await asyncio.gather(*map(driver.pool.run, codes))

        results = driver.wait(together(), seconds=1400.0)
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(AT_ONCE)]
    ends = collections.Counter((result.status, result.exit_code, result.attempts) for result in results)
    assert ends == {(ToolStatus.OK, 0, 1): AT_ONCE * 4 // 5, (ToolStatus.ERROR, 7, 1): AT_ONCE // 5}
