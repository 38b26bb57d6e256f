"""math-verify in processes of its own, each answer under a hard deadline."""

import asyncio
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

from jaxrl.config import RewardConfig
from jaxrl.records import RewardStatus
from jaxrl.rewards.comparing import MATH, ComparingVerifier, comparison
from jaxrl.rewards.integers import same_integer

_SCRIPT = pathlib.Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0  # importing sympy on a busy machine; never part of an answer's deadline
_TRIES = 2  # a process that dies may have been killed from outside: once more, on a fresh one

_VERDICTS = {True: RewardStatus.CORRECT, False: RewardStatus.WRONG, None: RewardStatus.VERIFIER_CRASH}


class Verifier(Protocol):
    """What grades an answer."""

    async def grade(self, answer: str | None, gold: str) -> RewardStatus: ...


class VerifierStartError(RuntimeError):
    """A verifier process could not be started at all."""


class MathVerifier:
    """Grades answers by mathematical equality, in ``config.workers`` processes.

    ``async with MathVerifier(config) as verifier``; on leaving, no process is left. The processes are started by
    exec, never forked from a process that holds jax. As many answers are in flight as there are processes; others
    wait, and waiting is never part of the deadline.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._seats: asyncio.Queue[_Process] = asyncio.Queue()
        self._processes: list[_Process] = []

    async def __aenter__(self) -> Self:
        self._processes = [_Process(self._config.seconds) for _ in range(self._config.workers)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for process in self._processes:
                    tasks.create_task(process.start())
        except ExceptionGroup as failures:
            await self._close()
            raise failures.exceptions[0] from None
        except BaseException:
            await self._close()
            raise
        for process in self._processes:
            self._seats.put_nowait(process)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def grade(self, answer: str | None, gold: str) -> RewardStatus:
        """Compare an answer with the expected one.

        Equal texts and pairs of plain integers are decided here; everything else goes to a process. A process that
        is late or dies is replaced.

        Returns:
            ``CORRECT``, ``WRONG``, ``NO_ANSWER`` (None or blank), ``VERIFIER_TIMEOUT`` (over ``config.seconds``) or
            ``VERIFIER_CRASH`` (two processes died over it or at their start, or the expected answer cannot be read).
        """
        if not self._processes:
            raise RuntimeError("grade() outside of `async with MathVerifier(...)`")
        if answer is None or not answer.strip():
            return RewardStatus.NO_ANSWER
        if (equal := _decide_at_once(answer, gold)) is not None:
            return RewardStatus.CORRECT if equal else RewardStatus.WRONG
        process = await self._seats.get()
        try:
            return await self._ask(process, answer, gold)
        finally:
            self._seats.put_nowait(process)

    async def _ask(self, process: "_Process", answer: str, gold: str) -> RewardStatus:
        for _ in range(_TRIES):
            try:
                await process.start()
                verdict = await process.ask(answer, gold)
            except TimeoutError:
                return RewardStatus.VERIFIER_TIMEOUT
            except (EOFError, VerifierStartError):
                continue
            return _VERDICTS[verdict]
        return RewardStatus.VERIFIER_CRASH

    async def _close(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:
            await process.stop()


@contextlib.asynccontextmanager
async def open_verifier(config: RewardConfig) -> AsyncIterator[Verifier]:
    """The verifier that ``config.verifier`` names, started; on leaving, no process of it is left."""
    if config.verifier != MATH:
        yield ComparingVerifier(comparison(config.verifier))
        return
    async with MathVerifier(config) as verifier:
        yield verifier


def _decide_at_once(answer: str, gold: str) -> bool | None:
    if answer.strip() == gold.strip():
        return True
    return same_integer(answer, gold)


class _Process:
    """One verifier process, started when it is needed and none is alive."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Have a process that is ready.

        Raises:
            VerifierStartError: it could not be started, or was not ready in time.
        """
        if self._child is not None:
            return
        # The child must find the same packages however this process came by them (PYTHONPATH, Bazel runfiles). -P
        # keeps the script's own folder, whose file names are ours, off its path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        child = self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(_SCRIPT), str(self._seconds),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        ready = False
        try:
            async with asyncio.timeout(_START_SECONDS):
                reply = await child.stdout.readline()
            ready = b"ready" in reply
        except TimeoutError:
            reply = b"not ready after %d s" % _START_SECONDS
        finally:
            if not ready:
                await self.stop()
        if not ready:
            raise VerifierStartError(
                f"the verifier process did not start: {reply.decode().strip() or 'it ended at once'}"
            )

    async def ask(self, answer: str, gold: str) -> bool | None:
        """The verdict on one answer; None where the expected one cannot be read.

        Raises:
            TimeoutError: no verdict in time; the process was killed.
            EOFError: the process died.
        """
        child = self._child
        answered = False
        try:
            async with asyncio.timeout(self._seconds):
                child.stdin.write(json.dumps({"answer": answer, "gold": gold}).encode() + b"\n")
                await child.stdin.drain()
                reply = await child.stdout.readline()
            if not reply.endswith(b"\n"):
                raise EOFError("the verifier process died")
            answered = True
            return json.loads(reply)["correct"]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError("the verifier process died") from error
        finally:
            # Late, dead or cancelled: its next line would answer the wrong question.
            if not answered:
                await self.stop()

    async def stop(self) -> None:
        """Kill the process and wait for its end."""
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            child.kill()
        child.stdin.close()
        await asyncio.shield(child.wait())
