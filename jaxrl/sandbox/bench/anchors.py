"""What the pool is compared with: a fresh process per call, a bare fork per call, a code-judge-like server."""

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from jaxrl.sandbox.bench.accounting import IMPORTING, SLOTS, cpu_of
from jaxrl.sandbox.bench.processes import cpu_seconds, family
from jaxrl.sandbox.fleet import ENVIRONMENT
from jaxrl.sandbox.link import HOME

_BOOT = "import sys; sys.path.append(sys.argv[1]); from jaxrl.sandbox.bench.{module} import main; main(sys.argv[2:])"


def fresh(code: str) -> None:
    """One call in a new isolated interpreter."""
    prologue = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n" if code == IMPORTING else ""
    subprocess.run([sys.executable, "-I", "-S", "-c", prologue + code], check=True, stdout=subprocess.DEVNULL)


async def fresh_cost(code: str, calls: int, at_once: int) -> float:
    """CPU seconds per call of a fresh process each, with that of starting it from here."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(at_once) as threads:
            await asyncio.gather(*(loop.run_in_executor(threads, fresh, code) for _ in range(calls)))

    return await cpu_of(work, list) / calls


class Helper:
    """A process that a line of text sets to work, and that answers with a line when it is done."""

    def __init__(self, module: str, *arguments: str) -> None:
        boot = _BOOT.format(module=module)
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-c", boot, HOME, *arguments],
            env=ENVIRONMENT | {"PATH": os.environ.get("PATH", "")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, line: str = "") -> str:
        """Raises RuntimeError if the helper has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if line:
            print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a helper process of the benchmark ended early")
        return answer

    def family(self) -> list[int]:
        return family(self._process.pid)


class ForkLimit(Helper):
    """The least that a fork per call can cost: fork, run the snippet, a pipe, exit, in a template's image."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        super().__init__("forking", sysconfig.get_path("purelib"), *modules)

    def cost(self, code: str, calls: int) -> float:
        """CPU seconds per fork."""
        return float(self.ask(json.dumps([code, calls])))


class Judge(Helper):
    """A server as rStar2's: HTTP, a queue, a fresh process per call."""

    def __init__(self) -> None:
        super().__init__("judge", str(SLOTS), sysconfig.get_path("purelib"))
        self._port = int(self.ask())

    async def cost(self, code: str, calls: int, outstanding: int) -> float:
        """CPU seconds per call of the server; what it costs to ask it is left out."""

        before = cpu_seconds(self.family())
        gate = asyncio.Semaphore(outstanding)
        await asyncio.gather(*(self._call(gate, code) for _ in range(calls)))
        await asyncio.sleep(0.05)
        return (cpu_seconds(self.family()) - before) / calls

    async def _call(self, gate: asyncio.Semaphore, code: str) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            body = json.dumps({"code": code}).encode()
            writer.write(b"POST /run HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            answer = await reader.read()
            writer.close()
        if not json.loads(answer.partition(b"\r\n\r\n")[2])["success"]:
            raise RuntimeError("a call of the benchmark's judge went wrong")
