"""Our own processes die or halt at random moments under load: each call is answered once, as on a calm day."""

import asyncio
import collections
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable, Sequence

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Result
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox.driver import LIMITS, Driver

INFRA = ToolStatus.INFRA_ERROR
LOSSES = 3  # of templates or wardens while a call runs, until it is given up
LONG = dataclasses.replace(LIMITS, cpu_seconds=2.0, wall_seconds=8.0)

# Programs that tell their number, so that an answer that went astray or came twice would show.
KINDS = (
    "print({n})",
    "print({n})\nimport time; time.sleep(0.1)",
    "print({n})\nraise SystemExit({n} % 200 + 1)",
    "print({n})\nundefined",
    "print({n})\nx = [0] * 10**10",
    "print({n})\nsum(range(2 * 10**5))",
)


def codes(count: int) -> list[str]:
    return [KINDS[n % len(KINDS)].format(n=n) for n in range(count)]


def hit(pid: int, number: int) -> None:
    if pid > 0:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def strike(driver: Driver, draw: random.Random, targets: Sequence[str]) -> None:
    """Do one thing to one of ours."""
    target, number = draw.choice(targets).split()
    stem, templates = driver.family()
    victim = {
        "template": draw.choice(templates) if templates else 0,
        "stem": stem,
        "warden": driver.pool.warden_pid,
    }[target]
    hit(victim, getattr(signal, number))


def under(driver: Driver, programs: Sequence[str], act: Callable[[], None], pause: Callable[[], float]) -> list[Result]:
    """Results of the programs, all submitted at once, with ``act`` done after every pause until they are there."""

    async def together() -> list[Result]:
        calls = asyncio.gather(*(driver.pool.run(code, limits=LONG) for code in programs))
        while not calls.done():
            await asyncio.wait([calls], timeout=pause())
            if not calls.done():
                await asyncio.to_thread(act)
        return calls.result()

    return driver.wait(together(), seconds=280.0)


def assert_as_on_a_calm_day(calm: Sequence[Result], stormy: Sequence[Result]) -> None:
    given_up = 0
    for expected, found in zip(calm, stormy, strict=True):
        if found.status is INFRA:
            assert found.attempts == LOSSES, f"given up too early: {found}"
            given_up += 1
            continue
        assert (found.status, found.exit_code, found.stdout) == (expected.status, expected.exit_code, expected.stdout)
    assert given_up <= len(calm) // 10, f"{given_up} of {len(calm)} calls had no chance"


STORMS = {
    "templates": ("template SIGKILL", "template SIGKILL", "template SIGSTOP"),
    "stems": ("template SIGKILL", "stem SIGKILL", "stem SIGSTOP"),
    "wardens": ("warden SIGKILL",),
    "halted wardens": ("warden SIGSTOP",),
    "everything": ("template SIGKILL", "template SIGSTOP", "stem SIGKILL", "stem SIGSTOP", "warden SIGKILL"),
}


@pytest.mark.parametrize("storm", ["templates", "wardens", "everything"])
def test_nobody_notices_a_storm(storm: str) -> None:
    ride_out(storm, calls=120, seed=1, shortest=0.2, longest=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("storm", STORMS)
def test_nobody_notices_a_long_storm(storm: str) -> None:
    ride_out(storm, calls=600, seed=2, shortest=0.2, longest=1.2)


def test_waiting_is_no_try() -> None:
    """A call that runs when three wardens die is given up; those that waited behind it have lost nothing."""
    patient = dataclasses.replace(LIMITS, wall_seconds=200.0)
    with Driver(workers=1, slots=1, slow_slots=0, preload=()) as driver:

        async def lose_wardens() -> tuple[Result, list[Result]]:
            first = asyncio.create_task(driver.pool.run("import time; time.sleep(99)", limits=patient))
            await asyncio.sleep(0)
            others = asyncio.gather(*(driver.pool.run(f"print({n})") for n in range(20)))
            for _ in range(LOSSES):
                warden = driver.pool.warden_pid
                while len(descendants(warden)) < 3:  # stem, template, call
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.3)
                os.kill(warden, signal.SIGKILL)
                while driver.pool.warden_pid == warden and not first.done():
                    await asyncio.sleep(0.05)
            return await first, await others

        first, others = driver.wait(lose_wardens())
    assert (first.status, first.attempts) == (INFRA, LOSSES)
    assert [(r.status, r.stdout, r.attempts) for r in others] == [(ToolStatus.OK, f"{n}\n", 1) for n in range(20)]


def test_a_halted_warden_is_replaced() -> None:
    with Driver(workers=1, slots=2, preload=(), heartbeat_seconds=0.5) as driver:
        warden = driver.pool.warden_pid
        os.kill(warden, signal.SIGSTOP)
        assert [result.stdout for result in driver.run_all(["6 * 7"] * 9)] == ["42\n"] * 9
        assert driver.pool.warden_pid != warden and not os.path.exists(f"/proc/{warden}")


def test_a_warden_that_only_paused_goes_on() -> None:
    """Half a heartbeat of silence costs nobody anything, nor does a caller who held up the event loop for long."""
    with Driver(workers=1, slots=2, preload=(), heartbeat_seconds=2.0) as driver:
        warden = driver.pool.warden_pid

        async def pause_both() -> list[Result]:
            calls = asyncio.gather(*(driver.pool.run("import time; time.sleep(0.1); print(1)") for _ in range(30)))
            await asyncio.sleep(0.3)
            os.kill(warden, signal.SIGSTOP)
            await asyncio.sleep(1.0)
            os.kill(warden, signal.SIGCONT)
            await asyncio.sleep(0.5)
            driver.pool._link._beat()  # asks; the answer comes while the loop is held up, and a second look before it
            time.sleep(3.0)
            driver.pool._link._beat()
            return await calls

        results = driver.wait(pause_both())
        assert [(result.status, result.attempts) for result in results] == [(ToolStatus.OK, 1)] * 30
        assert driver.run("6 * 7").stdout == "42\n"
        assert driver.pool.warden_pid == warden


def test_a_halted_template_that_can_be_sent_no_more_keeps_nobody_waiting() -> None:
    """Two of these calls fill its socket. The warden goes on meanwhile, and the calls run where somebody listens."""
    with Driver(workers=1, slots=8, preload=(), heartbeat_seconds=2.0) as driver:
        warden, (template,) = driver.pool.warden_pid, driver.family()[1]
        os.kill(template, signal.SIGSTOP)

        async def fill() -> list[Result]:
            calls = asyncio.gather(*(driver.pool.run(f"{n}  # {'.' * 80_000}", limits=LONG) for n in range(16)))
            await asyncio.sleep(0.3)
            assert (await driver.pool.metrics()).running == 8
            assert os.path.exists(f"/proc/{template}"), "still there, and halted"
            return await calls

        results = driver.wait(fill())
        restarts = driver.wait(driver.pool.metrics())
        assert [(result.status, result.stdout) for result in results] == [(ToolStatus.OK, f"{n}\n") for n in range(16)]
        assert driver.pool.warden_pid == warden and restarts.template_restarts == {"silent": 1}
        assert driver.run("6 * 7").stdout == "42\n"


def test_a_call_dies_with_its_template_though_nobody_kills_it() -> None:
    """The warden would; it is halted here. A call cannot untie itself from its template."""
    code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(60)"
    with Driver(workers=1, slots=1, preload=()) as driver:
        call = asyncio.run_coroutine_threadsafe(driver.pool.run(code, limits=LONG), driver.loop)
        _, (template,) = driver.family()
        while not (children := descendants(template)):
            time.sleep(0.02)
        time.sleep(0.3)
        warden = driver.pool.warden_pid
        os.kill(warden, signal.SIGSTOP)
        try:
            os.kill(template, signal.SIGKILL)
            deadline = time.monotonic() + 10.0
            while os.path.exists(f"/proc/{children[0]}/exe") and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not os.path.exists(f"/proc/{children[0]}/exe")
        finally:
            os.kill(warden, signal.SIGCONT)
            call.cancel()


def ride_out(storm: str, *, calls: int, seed: int, shortest: float, longest: float) -> None:
    draw = random.Random(seed)
    programs = codes(calls)
    with Driver(workers=2, slots=4, preload=(), heartbeat_seconds=0.6) as driver:
        calm = driver.run_all(programs)
        assert len({result.stdout for result in calm}) == calls
        strikes: collections.Counter[str] = collections.Counter()

        def act() -> None:
            strike(driver, draw, STORMS[storm])
            strikes["all"] += 1

        stormy = under(driver, programs, act, lambda: draw.uniform(shortest, longest))
        assert strikes["all"] >= 1, "there was no storm"
        assert_as_on_a_calm_day(calm, stormy)
        assert driver.run("print(6 * 7)", limits=LONG).stdout == "42\n"


def test_a_template_that_dies_unheard_while_fresh_cells_wait() -> None:
    """Its sessions' sockets are closed and the waiting cells' opened while the same round's news is being heard."""
    patient = dataclasses.replace(LIMITS, cpu_seconds=9.0, wall_seconds=60.0)
    with Driver(workers=2, slots=2, slow_slots=0, preload=()) as driver:
        resting, running, fresh = ([driver.pool.session(limits=patient) for _ in range(count)] for count in (8, 2, 6))

        async def lose_a_template() -> list[Result]:
            await asyncio.gather(*(session.run("x = 1") for session in resting))
            cells = [session.run("import time; time.sleep(1.5)\n6 * 7") for session in running]
            cells += [session.run("6 * 7") for session in fresh]
            answers = asyncio.gather(*cells)
            await asyncio.sleep(0.5)
            os.kill(warden, signal.SIGSTOP)
            os.kill(template, signal.SIGKILL)
            await asyncio.sleep(0.3)
            os.kill(warden, signal.SIGCONT)
            found = await answers
            return found + await asyncio.gather(*(session.run("x + 41") for session in resting))

        warden, (template, _) = driver.pool.warden_pid, driver.family()[1]
        results = driver.wait(lose_a_template())
        assert driver.pool.warden_pid == warden, "it came through"
        for session in (*resting, *running, *fresh):
            driver.wait(session.close())
    assert [(result.status, result.stdout) for result in results] == [(ToolStatus.OK, "42\n")] * 16
