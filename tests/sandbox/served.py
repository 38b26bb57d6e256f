"""A server process for tests, on a free port of loopback."""

import asyncio
import os
import pathlib
import select
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Self

from jaxrl.sandbox import SandboxClient

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "jaxrl.cli", "sandbox", "serve"]
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0


class Served:
    """``jaxrl sandbox serve`` with these options, bare templates and small limits unless they say otherwise."""

    def __init__(self, *options: str, port: int = 0, **environment: str) -> None:
        small = ["--workers", "1", "--preload", "", "--cpu-seconds", "0.6", "--disk-mib", "8", "--output-kib", "8"]
        self.process = subprocess.Popen(
            [*SERVE, "--port", str(port), *small, *options],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = ""

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], _START_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            raise AssertionError(f"the server did not start: {self.process.wait()}")
        self.url = line.split()[-1]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()
            self.process.communicate()

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        return self.process.wait(_STOP_SECONDS)

    def use(self, work: Callable[[SandboxClient], Awaitable[Any]], **settings: Any) -> Any:
        """What a client's work gives."""

        async def together() -> Any:
            async with SandboxClient(self.url, **settings) as client:
                return await work(client)

        return asyncio.run(asyncio.wait_for(together(), 60))
