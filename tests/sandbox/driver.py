"""A sandbox pool for synchronous tests, driven from an event loop in a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

from jaxrl.sandbox import Limits, Pool, Result
from jaxrl.sandbox.bench.processes import descendants, parent

LIMITS = Limits(cpu_seconds=0.6, wall_seconds=1.0, memory_mib=256, output_kib=8, output_hard_mib=8, disk_mib=8)


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Return once the condition holds, or fail the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Driver:
    """A pool that synchronous tests can call."""

    def __init__(self, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._settings = settings

    def wait(self, work: Awaitable[Any], seconds: float = 60.0) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work, seconds)

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        self.pool = Pool(self._settings.pop("limits", LIMITS), **self._settings)
        self.wait(self.pool.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def run(self, code: str, **options: Any) -> Result:
        return self.wait(self.pool.run(code, **options))

    def run_all(self, codes: list[str]) -> list[Result]:
        async def together() -> list[Result]:
            return await asyncio.gather(*(self.pool.run(code) for code in codes))

        return self.wait(together())

    def family(self) -> tuple[int, list[int]]:
        """(stem, templates) of a pool that preloads nothing, calls or no calls; the stem is 0 while there is none."""
        warden = self.pool.warden_pid
        below = descendants(warden)
        stem = next((pid for pid in below if parent(pid) == warden), 0)
        return stem, [pid for pid in below if stem and parent(pid) == stem]

    def resting(self) -> list[int]:
        """Processes below the warden once every call is gone: stems and templates."""
        before = None
        for _ in range(100):
            now = descendants(self.pool.warden_pid)
            if now == before:
                return now
            before = now
            time.sleep(0.01)
        raise AssertionError("processes keep coming and going in an idle pool")
