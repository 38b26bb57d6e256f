"""The pool: statuses, clocks, admission, cancelling, faults of ours, and leaving nothing behind."""

import asyncio
import dataclasses
import gc
import math
import os
import pathlib
import signal
import tempfile
import time

import pytest

from jaxrl.config import ConfigError, SandboxConfig
from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Pool, Result, SandboxUnavailable, pool_from_config
from jaxrl.sandbox.bench.processes import descendants, is_alive
from tests.sandbox.driver import LIMITS, Driver, wait_until

OK, INFRA = ToolStatus.OK, ToolStatus.INFRA_ERROR


def test_result_names_everything(sandbox: Driver) -> None:
    result = sandbox.run("sum(range(10**5))")
    assert (result.status, result.stdout, result.exit_code, result.signal) == (OK, "4999950000\n", 0, None)
    assert 0 < result.cpu_seconds < 0.6 and 0 < result.wall_seconds < 5 and 0 < result.queue_seconds < 5
    assert result.peak_rss_kib > 1000 and result.attempts == 1
    assert not result.stdout_truncated and not result.stderr_truncated
    assert result.isolation.removesuffix(", landlock") == "jail: namespaces, seccomp, rlimits, ordinary user"


def test_many_calls_each_answered_once_with_its_own_answer(sandbox: Driver) -> None:
    results = sandbox.run_all([f"print({n})" for n in range(400)])
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(400)]
    assert {result.status for result in results} == {OK}


def test_queue_time_is_no_part_of_a_limit() -> None:
    limits = dataclasses.replace(LIMITS, wall_seconds=0.6)
    with Driver(workers=1, slots=1, slow_slots=0, preload=(), limits=limits) as driver:
        results = driver.run_all(["import time; time.sleep(0.3)"] * 5)
    assert [result.status for result in results] == [OK] * 5
    assert max(result.queue_seconds for result in results) > 1.0
    assert all(0.3 <= result.wall_seconds < 0.6 + result.queue_seconds for result in results)


def test_long_calls_leave_the_fast_lane() -> None:
    with Driver(workers=1, slots=1, slow_slots=1, preload=()) as driver:
        code = "import os, time; time.sleep(0.6); print(os.getpriority(os.PRIO_PROCESS, 0))"

        async def overtake() -> tuple[Result, Result, bool]:
            long = asyncio.create_task(driver.pool.run(code))
            await asyncio.sleep(0.05)
            short = await driver.pool.run("1")
            overtook = not long.done()
            return await long, short, overtook

        long, short, overtook = driver.wait(overtake())
    assert overtook and short.status is OK
    assert (long.status, int(long.stdout)) == (OK, min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19))


def test_output_is_cut_in_the_middle(sandbox: Driver) -> None:
    result = sandbox.run("print('a' + 'x' * (5 << 20) + 'z')")
    assert result.status is OK and result.stdout_truncated and not result.stderr_truncated
    assert result.stdout.startswith("axx") and result.stdout.endswith("xxz\n")
    assert "bytes left out" in result.stdout and len(result.stdout) < 9000
    exact = sandbox.run("print('y' * 8000)")
    assert exact.stdout == "y" * 8000 + "\n" and not exact.stdout_truncated


def test_endless_output_ends_before_its_time(sandbox: Driver) -> None:
    limits = dataclasses.replace(LIMITS, cpu_seconds=5, wall_seconds=30, output_hard_mib=1)
    result = sandbox.run("print('first')\nwhile True: print('x' * 1000)", limits=limits)
    assert (result.status, result.signal) == (ToolStatus.OUTPUT_LIMIT, signal.SIGKILL)
    assert result.cpu_seconds < 3 and result.stdout.startswith("first\n")


def test_limits_of_one_call(sandbox: Driver) -> None:
    limits = Limits(cpu_seconds=0.1, wall_seconds=5, memory_mib=64)
    busy = sandbox.run("while True: pass", limits=limits)
    assert busy.status is ToolStatus.TIMEOUT and 0.1 <= busy.cpu_seconds < 0.5
    assert sandbox.run("x = bytearray(80 << 20)", limits=limits).status is ToolStatus.OUT_OF_MEMORY
    assert sandbox.run("x = bytearray(40 << 20)", limits=limits).status is OK


def test_cancelling_kills_the_call(sandbox: Driver) -> None:
    resting = sandbox.resting()

    async def cancel() -> float:
        task = asyncio.create_task(sandbox.pool.run("import time; time.sleep(60)", limits=Limits(wall_seconds=100)))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic()

    cancelled = sandbox.wait(cancel())
    wait_until(lambda: descendants(sandbox.pool.warden_pid) == resting)
    assert time.monotonic() - cancelled < 2.0
    assert sandbox.run("1").stdout == "1\n"


def test_cancelling_a_waiting_call() -> None:
    with Driver(workers=1, slots=1, slow_slots=0, preload=()) as driver:

        async def cancel_second() -> tuple[Result, Result]:
            first = asyncio.create_task(driver.pool.run("import time; time.sleep(0.4)"))
            second = asyncio.create_task(driver.pool.run("open('/dev/null')"))
            third = asyncio.create_task(driver.pool.run("3"))
            await asyncio.sleep(0.1)
            second.cancel()
            return await first, await third

        first, third = driver.wait(cancel_second())
    assert (first.status, third.stdout) == (OK, "3\n")


def test_admission_is_bounded_and_everything_gets_through() -> None:
    with Driver(workers=1, slots=1, slow_slots=0, queue=2, preload=()) as driver:

        async def flood() -> tuple[int, list[Result]]:
            tasks = [asyncio.create_task(driver.pool.run(f"{n}")) for n in range(20)]
            most = 0
            while not all(task.done() for task in tasks):
                most = max(most, len(driver.pool._link._pending))
                await asyncio.sleep(0.001)
            return most, [task.result() for task in tasks]

        most, results = driver.wait(flood())
    assert most <= 3
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]


# Faults of ours


@pytest.fixture
def fragile() -> Driver:
    with Driver(workers=2, slots=4, preload=(), heartbeat_seconds=1.0) as driver:
        yield driver


def members(driver: Driver) -> tuple[int, list[int]]:
    """(the jail's first process, its templates)."""
    first, *templates = driver.resting()
    return first, templates


SLEEPS = ["import time; time.sleep(0.5); print('done')"] * 4


def run_while(driver: Driver, act: object, codes: list[str]) -> list[Result]:
    """Results of the calls, during which ``act`` is done once, after 0.2 s."""

    async def together() -> list[Result]:
        tasks = [asyncio.create_task(driver.pool.run(code)) for code in codes]
        await asyncio.sleep(0.2)
        act()
        return await asyncio.gather(*tasks)

    return driver.wait(together())


def test_killed_template_loses_no_call(fragile: Driver) -> None:
    _, templates = members(fragile)
    results = run_while(fragile, lambda: os.kill(templates[0], signal.SIGKILL), SLEEPS)
    assert [(result.status, result.stdout) for result in results] == [(OK, "done\n")] * 4
    assert sorted(result.attempts for result in results) == [1, 1, 2, 2]
    _, now = members(fragile)
    assert len(now) == 2 and templates[0] not in now


def test_halted_template_is_noticed(fragile: Driver) -> None:
    _, templates = members(fragile)
    os.kill(templates[0], signal.SIGSTOP)
    results = fragile.run_all(["print('done')"] * 8)
    assert [(result.status, result.stdout) for result in results] == [(OK, "done\n")] * 8
    assert not is_alive(templates[0])


def test_halted_stem_is_noticed(fragile: Driver) -> None:
    first, templates = members(fragile)
    os.kill(first, signal.SIGSTOP)
    for template in templates:
        os.kill(template, signal.SIGKILL)
    assert fragile.run("6 * 7").stdout == "42\n"
    assert not is_alive(first)


def test_killed_jail_is_built_anew(fragile: Driver) -> None:
    first, templates = members(fragile)
    results = run_while(fragile, lambda: os.kill(first, signal.SIGKILL), SLEEPS)
    assert [(result.status, result.stdout) for result in results] == [(OK, "done\n")] * 4
    assert not any(is_alive(pid) for pid in (first, *templates))


def test_killed_warden_is_replaced_and_takes_its_jail_along(fragile: Driver) -> None:
    warden = fragile.pool.warden_pid
    first, templates = members(fragile)
    results = run_while(fragile, lambda: os.kill(warden, signal.SIGKILL), SLEEPS)
    assert [(result.status, result.stdout) for result in results] == [(OK, "done\n")] * 4
    assert {result.attempts for result in results} == {2}
    wait_until(lambda: not any(is_alive(pid) for pid in (first, *templates)))


def test_call_that_is_always_there_when_templates_die(fragile: Driver) -> None:
    """Tried three times, the last time alone, then given up as our fault; the others are not harmed."""

    async def kill_whoever_runs_it() -> tuple[Result, list[Result]]:
        limits = Limits(wall_seconds=60)
        poison = asyncio.create_task(fragile.pool.run("import time; time.sleep(50)", limits=limits))
        others = []
        seen: set[int] = set()
        while not poison.done():
            others.append(asyncio.create_task(fragile.pool.run("print('fine')", limits=limits)))
            await asyncio.sleep(0.3)
            _, *below = descendants(fragile.pool.warden_pid)
            for template in below:
                calls = set(descendants(template))
                if calls & seen:  # older than any short call gets
                    os.kill(template, signal.SIGKILL)
                seen |= calls
        return await poison, await asyncio.gather(*others)

    poison, others = fragile.wait(kill_whoever_runs_it())
    assert (poison.status, poison.attempts) == (INFRA, 3)
    assert "template" in poison.stderr
    assert {(result.status, result.stdout) for result in others} == {(OK, "fine\n")}
    assert fragile.run("5").stdout == "5\n"


# Beginning and end


def footprint() -> tuple[int, str, set[str], int]:
    """(own descriptors, mounts, files in the temporary folder, child processes)."""
    descriptors = len(os.listdir("/proc/self/fd"))
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    files = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("jaxrl")}
    return descriptors, mounts, files, len(descendants(os.getpid()))


@pytest.mark.parametrize("unsafe", [False, True])
def test_close_leaves_nothing(unsafe: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other processes come and go in the common one

    async def use() -> list[int]:
        pool = Pool(LIMITS, workers=2, slots=4, preload=(), unsafe=unsafe)
        async with pool:
            below = [pool.warden_pid]
            await asyncio.gather(*(pool.run("open('f', 'w').write('x')") for _ in range(20)))
            running = asyncio.create_task(pool.run("import time; time.sleep(60)", limits=Limits()))
            await asyncio.sleep(0.3)
            below += descendants(pool.warden_pid)
        with pytest.raises(RuntimeError, match="was closed"):
            await running
        with pytest.raises(RuntimeError, match="not open"):
            await pool.run("1")
        return below

    asyncio.run(use())  # whatever a first use loads
    before = footprint()
    below = asyncio.run(use())
    assert len(below) >= 5
    assert footprint() == before
    assert not any(is_alive(pid) for pid in below)


def test_what_is_under_way_when_the_pool_is_closed_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> list[object]:
        async with Pool(LIMITS, workers=1, slots=1, slow_slots=0, queue=2, preload=()) as pool:
            session = pool.session()
            await session.run("1")
            long = "import time; time.sleep(60)"
            tasks = [asyncio.create_task(pool.run(long, limits=Limits())) for _ in range(5)]  # two before the door
            tasks += [asyncio.create_task(work) for work in (session.run("2"), session.fork(2))]
            await asyncio.sleep(0.2)
            given_up = asyncio.create_task(pool.run(long))
            await asyncio.sleep(0)
            given_up.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(use())
    gc.collect()  # a future whose error nobody has seen complains when it goes
    assert [type(end) for end in ends] == [RuntimeError] * 7
    assert {str(end) for end in ends} == {"the sandbox pool was closed before this call had ended"}
    assert caplog.text == ""


@pytest.mark.parametrize("turns", [1, 2, 3, 20])
def test_a_start_that_is_cancelled_leaves_nothing(turns: int, caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        starting = asyncio.create_task(Pool(LIMITS, workers=1, preload=()).start())
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = descendants(os.getpid())
    asyncio.run(use())
    gc.collect()
    assert descendants(os.getpid()) == before
    assert caplog.text == ""


def test_a_pool_belongs_to_the_event_loop_that_started_it(fragile: Driver) -> None:
    """Elsewhere it would wait for ever: its answers come to the other loop."""
    session = fragile.pool.session()
    for use in (
        lambda: fragile.pool.run("1"),
        lambda: session.run("1"),
        lambda: session.fork(1),
        fragile.pool.metrics,
        fragile.pool.drain,
        fragile.pool.start,
        fragile.pool.close,
    ):
        with pytest.raises(RuntimeError, match="started in another event loop"):
            asyncio.run(asyncio.wait_for(use(), 10))
    assert fragile.run("6 * 7").stdout == "42\n"


def test_a_closed_pool_may_be_started_in_another_event_loop() -> None:
    pool = Pool(LIMITS, workers=1, slots=2, preload=())

    async def use() -> list[str]:
        async with pool:
            results = await asyncio.gather(*(pool.run(f"{n}") for n in range(8)))
            await pool.drain()
        return [result.stdout for result in results]

    for _ in range(2):
        assert asyncio.run(use()) == [f"{n}\n" for n in range(8)]


def test_helpers_never_load_jax(sandbox: Driver) -> None:
    for pid in (sandbox.pool.warden_pid, *sandbox.resting()):
        assert "jaxlib" not in pathlib.Path(f"/proc/{pid}/maps").read_text()


def test_missing_preload_is_named() -> None:
    with pytest.raises(ValueError, match="preload names 'no_such_module_here'.*install it"):
        Pool(preload=("no_such_module_here",))


def test_preload_that_fails_to_import(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "broken_for_test.py").write_text("raise ImportError('no luck today')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="could not load its modules"):
        with Driver(workers=1, preload=("broken_for_test",)):
            pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", 0),
        ("slots", 0),
        ("queue", 0),
        ("session_memory_mib", 0),
        ("slow_slots", -1),
        ("heartbeat_seconds", 0.0),
        ("heartbeat_seconds", math.nan),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        Pool(preload=(), **{name: value})


def test_pool_from_config() -> None:
    pool = pool_from_config(
        SandboxConfig(cpu_seconds=3, wall_seconds=5, memory_mib=99, output_kib=7, preload=("numpy",))
    )
    assert pool.limits == Limits(cpu_seconds=3, wall_seconds=5, memory_mib=99, output_kib=7)
    with pytest.raises(ConfigError, match="slow_slots=-1 must not be negative"):
        pool_from_config(SandboxConfig(slow_slots=-1, preload=()))
    with pytest.raises(ConfigError, match=r"Limits.wall_seconds=inf must be .* below 2\*\*32"):
        pool_from_config(SandboxConfig(wall_seconds=math.inf, preload=()))
    for limit in dataclasses.fields(Limits):
        most = 77.0 if limit.type == "float" or limit.type is float else 77
        assert getattr(pool_from_config(SandboxConfig(preload=(), **{limit.name: most})).limits, limit.name) == most
        assert getattr(SandboxConfig(), limit.name) == limit.default, "the defaults of a run are those of the library"
    with pytest.raises(ConfigError, match="program_folders names '/etc', which would show"):
        pool_from_config(SandboxConfig(preload=(), program_folders=("/etc",)))
    assert pool_from_config(SandboxConfig(unsafe=True, preload=())).isolation == "unsafe: none"
