"""What the pool counts, when templates are replaced although they live, and draining."""

import asyncio
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Pool, Result, files
from jaxrl.sandbox.bench.processes import descendants, is_alive, parent
from jaxrl.sandbox.metrics import Metrics
from tests.sandbox.driver import LIMITS, Driver, wait_until

OK = ToolStatus.OK
SLEEP = "import time; time.sleep({})"


def restarts(driver: Driver) -> dict[str, int]:
    return dict(driver.wait(driver.pool.metrics()).template_restarts)


def templates(driver: Driver) -> list[int]:
    _, *found = driver.resting()
    return found


# Starting


@pytest.mark.parametrize("turns", [1, 50])
def test_a_start_outlives_the_one_that_it_waited_for(turns: int) -> None:
    """The first is cancelled, sooner or later; whoever asked second has a pool all the same, and one alone."""

    async def start_twice() -> None:
        pool = Pool(LIMITS, workers=1, preload=())
        first, second = asyncio.create_task(pool.start()), asyncio.create_task(pool.start())
        for _ in range(turns):
            await asyncio.sleep(0.002)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await second
        assert (await pool.run("6 * 7")).stdout == "42\n"
        assert len(children(os.getpid()) - before) == 1
        await pool.close()

    before = children(os.getpid())
    asyncio.run(start_twice())


def test_a_start_that_waits_does_not_open_what_is_closed_meanwhile() -> None:
    async def start_and_close() -> None:
        pool = Pool(LIMITS, workers=1, preload=())
        starts = [asyncio.create_task(pool.start()) for _ in range(2)]
        await asyncio.sleep(0.05)
        await pool.close()
        _, second = await asyncio.gather(*starts, return_exceptions=True)
        assert isinstance(second, RuntimeError) and "closed" in str(second)
        assert pool.warden_pid == 0
        await pool.start()
        assert (await pool.run("6 * 7")).stdout == "42\n"
        await pool.close()

    asyncio.run(start_and_close())


def children(process: int) -> set[int]:
    return {pid for pid in descendants(process) if parent(pid) == process}


# Metrics


def test_metrics_count_every_result_once() -> None:
    with Driver(workers=1, slots=4, preload=()) as driver:
        results = driver.run_all(["1"] * 5 + ["1 / 0"] * 3 + ["while True: pass"])
        metrics = driver.wait(driver.pool.metrics())
    assert metrics.calls == {OK: 5, ToolStatus.ERROR: 3, ToolStatus.TIMEOUT: 1}
    assert metrics.latency.count == 9 == sum(metrics.latency.counts[: len(metrics.latency.bounds)])
    for name in ("cpu_seconds", "wall_seconds", "queue_seconds"):
        assert getattr(metrics, name) == pytest.approx(sum(getattr(result, name) for result in results))
    assert metrics.latency.total >= metrics.wall_seconds
    assert (metrics.waiting, metrics.running, metrics.oldest_waiting_seconds, metrics.cancelled) == (0, 0, 0.0, 0)
    assert metrics.warden_rss_kib > 5000 and len(metrics.template_rss_kib) == 1 and metrics.template_rss_kib[0] > 5000
    assert (metrics.warden_restarts, metrics.template_restarts, metrics.sessions) == (0, {}, 0)


def test_metrics_of_a_pool_at_work() -> None:
    """One call runs, one waits in the warden, two wait at the door; the oldest of those is known by its age."""
    with Driver(workers=1, slots=1, slow_slots=0, queue=1, preload=()) as driver:

        async def look() -> tuple[Metrics, Metrics]:
            tasks = [asyncio.create_task(driver.pool.run(SLEEP.format(0.8))) for _ in range(4)]
            await asyncio.sleep(0.4)
            during = await driver.pool.metrics()
            tasks.pop().cancel()
            await asyncio.gather(*tasks)
            return during, await driver.pool.metrics()

        during, after = driver.wait(look())
    assert (during.running, during.waiting) == (1, 3)
    assert 0.3 < during.oldest_waiting_seconds < 5.0
    assert (after.running, after.waiting, after.oldest_waiting_seconds) == (0, 0, 0.0)
    assert (after.calls, after.cancelled) == ({OK: 3}, 1)


def test_metrics_outlive_a_warden() -> None:
    with Driver(workers=1, preload=()) as driver:
        driver.run("1")
        os.kill(driver.pool.warden_pid, signal.SIGKILL)
        driver.run("2")
        metrics = driver.wait(driver.pool.metrics())
        assert (metrics.calls, metrics.warden_restarts, metrics.running) == ({OK: 2}, 1, 0)
        driver.wait(driver.pool.close())
        closed = driver.wait(driver.pool.metrics())
    assert (closed.calls, closed.warden_rss_kib, closed.template_rss_kib) == ({OK: 2}, 0, ())


# Recycling


def test_template_is_replaced_after_its_number_of_calls() -> None:
    with Driver(workers=1, slots=4, preload=(), recycle_calls=10) as driver:
        (first,) = templates(driver)
        results = driver.run_all([f"print({n})" for n in range(35)])
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(35)]
        assert {result.attempts for result in results} == {1}
        wait_until(lambda: len(templates(driver)) == 1)
        assert templates(driver) != [first]
        assert set(restarts(driver)) == {"calls"} and 1 <= restarts(driver)["calls"] <= 3


def test_a_call_that_runs_outlives_the_replacement_of_its_template() -> None:
    with Driver(workers=1, slots=4, preload=(), recycle_calls=3) as driver:
        (first,) = templates(driver)

        async def together() -> tuple[Result, list[int]]:
            long = asyncio.create_task(driver.pool.run(SLEEP.format(2.0), limits=Limits(wall_seconds=30)))
            await asyncio.sleep(0.1)
            for _ in range(4):
                await driver.pool.run("1")
            while len((await driver.pool.metrics()).template_rss_kib) < 2:
                await asyncio.sleep(0.02)
            later = [asyncio.create_task(driver.pool.run(SLEEP.format(0.4))) for _ in range(3)]
            await asyncio.sleep(0.3)
            assert len(descendants(first)) == 1  # the successor takes what comes, however busy
            meanwhile = descendants(driver.pool.warden_pid)
            await asyncio.gather(*later)
            return await long, meanwhile

        result, meanwhile = driver.wait(together())
        assert (result.status, result.attempts) == (OK, 1)
        assert first in meanwhile
        wait_until(lambda: first not in descendants(driver.pool.warden_pid))
        assert len(templates(driver)) == 1


_LEAKS = """
import os
kept, fork = [], os.fork
def fork_and_leak():
    pid = fork()
    kept.append(b"x" * (3 << 20))
    return pid
os.fork = fork_and_leak
"""


def test_template_that_grows_is_replaced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preloaded module leaks three MiB a fork, in the template that forks."""
    tmp_path.chmod(0o755)
    (tmp_path / "leaky_for_test.py").write_text(_LEAKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"workers": 1, "preload": ("leaky_for_test",), "heartbeat_seconds": 1.0, "recycle_growth_mib": 4}
    with Driver(**settings) as driver:
        before = set(driver.resting())
        assert driver.run("import leaky_for_test").status is OK
        time.sleep(1.0)  # some beats
        assert (set(driver.resting()), restarts(driver)) == (before, {})
        assert driver.run("import leaky_for_test").status is OK
        wait_until(lambda: restarts(driver) == {"growth": 1} and len(driver.resting()) == len(before))
        assert len(before - set(driver.resting())) == 1
        assert driver.run("import leaky_for_test; print(2)").stdout == "2\n"


def forbid_processes(pid: int) -> None:
    """Let a process fork no more; as its own user, who may do so without being allowed anything else."""
    owner = os.stat(f"/proc/{pid}")
    helper = os.fork()
    if not helper:
        if os.getuid() != owner.st_uid:
            os.setgroups([])
            os.setgid(owner.st_gid)
            os.setuid(owner.st_uid)
        resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0))
        os._exit(0)
    assert os.waitpid(helper, 0)[1] == 0


def test_template_that_starts_no_calls_fails_its_self_test() -> None:
    with Driver(workers=2, slots=4, preload=()) as driver:
        sick, healthy = templates(driver)
        forbid_processes(sick)
        results = driver.run_all(["print('done')"] * 12)
        assert [(result.status, result.stdout) for result in results] == [(OK, "done\n")] * 12
        wait_until(lambda: sick not in descendants(driver.pool.warden_pid))
        assert healthy in templates(driver) and len(templates(driver)) == 2
        assert restarts(driver) == {"failed its self-test": 1}


def test_a_template_is_not_blamed_for_a_call_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """More folders than its directory has room for, on whichever template."""
    monkeypatch.setattr(files, "check", lambda *_: None)  # which refuses such a call
    with Driver(workers=2, slots=4, preload=()) as driver:
        before = templates(driver)
        result = driver.run("1", files={f"{number}/a/b/c/d/file": b"" for number in range(1000)})
        assert (result.status, result.attempts) == (ToolStatus.INFRA_ERROR, 3)
        assert [driver.run("1").status for _ in range(4)] == [OK] * 4
        assert (templates(driver), restarts(driver)) == (before, {})


def test_a_call_that_saw_two_templates_die_runs_alone() -> None:
    """What runs when the second dies is waited for, and what waits then keeps waiting."""
    with Driver(workers=2, slots=8, preload=()) as driver:
        limits = Limits(wall_seconds=60)

        def running() -> dict[int, list[int]]:
            """Calls that run, by template."""
            _, *templates = descendants(driver.pool.warden_pid)
            return {template: calls for template in templates if (calls := descendants(template))}

        async def until(condition: Callable[[Metrics], bool]) -> Metrics:
            while not condition(metrics := await driver.pool.metrics()):
                await asyncio.sleep(0.02)
            return metrics

        async def home_of_only_call() -> int:
            while len(found := running()) != 1:
                await asyncio.sleep(0.02)
            return next(iter(found))

        async def watch() -> tuple[Result, list[Result]]:
            poison = asyncio.create_task(driver.pool.run(SLEEP.format(50), limits=limits))
            os.kill(await home_of_only_call(), signal.SIGKILL)
            await until(lambda metrics: metrics.template_restarts == {"died": 1} and metrics.running == 1)
            home = await home_of_only_call()
            others = [driver.pool.run(f"{SLEEP.format(1.5)}; print('fine')", limits=limits) for _ in range(6)]
            others = [asyncio.create_task(other) for other in others]
            await until(lambda metrics: metrics.running == 7)
            while sum(map(len, running().values())) < 7:
                await asyncio.sleep(0.02)
            left = 7 - len(running()[home])
            os.kill(home, signal.SIGKILL)
            seen = [await until(lambda metrics: metrics.template_restarts == {"died": 2})]
            seen.append(await until(lambda metrics: metrics.calls.get(OK, 0) == left and metrics.running > 0))
            await asyncio.sleep(0.3)
            seen.append(await driver.pool.metrics())
            assert [(metrics.running, metrics.waiting) for metrics in seen] == [(left, 7 - left), *[(1, 6 - left)] * 2]
            os.kill(await home_of_only_call(), signal.SIGKILL)
            return await poison, await asyncio.gather(*others)

        poison, others = driver.wait(watch())
    assert (poison.status, poison.attempts) == (ToolStatus.INFRA_ERROR, 3)
    assert [(other.status, other.stdout) for other in others] == [(OK, "fine\n")] * 6


# Draining


def test_drain_waits_for_what_runs_and_takes_nothing_new() -> None:
    async def use() -> None:
        async with Pool(LIMITS, workers=1, preload=()) as pool:
            running = [asyncio.create_task(pool.run(f"{SLEEP.format(0.5)}; print({n})")) for n in range(3)]
            await asyncio.sleep(0.1)
            draining = asyncio.create_task(pool.drain())
            await asyncio.sleep(0.1)
            assert not draining.done()
            with pytest.raises(RuntimeError, match="drained"):
                await pool.run("1")
            await draining
            assert [(await task).stdout for task in running] == ["0\n", "1\n", "2\n"]
            assert all(task.done() for task in running)
            await pool.drain()  # nothing left to wait for
            await pool.start()
            assert (await pool.run("4")).stdout == "4\n"

    asyncio.run(asyncio.wait_for(use(), 60))


def test_sessions_of_retiring_templates_end_when_they_are_closed() -> None:
    """Their template may have nothing else left and is about to be dropped."""
    with Driver(workers=1, slots=4, preload=(), recycle_calls=1) as driver:

        async def use() -> None:
            for _ in range(12):
                session = driver.pool.session()
                assert (await session.run("x = 1")).status is OK
                calls = [asyncio.create_task(driver.pool.run("1")) for _ in range(3)]
                await session.close()
                assert [result.status for result in await asyncio.gather(*calls)] == [OK] * 3

        driver.wait(use(), 60)
        assert driver.wait(driver.pool.metrics()).sessions == 0


_OWNER = """
import asyncio
from jaxrl.sandbox import Pool

async def main():
    async with Pool(workers=1, slots=2, preload=(), unsafe=True) as pool:
        await asyncio.gather(*(pool.run("open('f', 'w'); 'end'", wanted=["f"]) for _ in range(4)))
        print(pool.warden_pid, flush=True)
        await pool.run("print(open('g', 'w')); import time; time.sleep(600)")

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_owner_of_an_unjailed_pool_leaves_no_files(tmp_path: pathlib.Path, number: int) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], env=environment, stdout=subprocess.PIPE)
    try:
        warden = int(owner.stdout.readline())
        (scratch,) = tmp_path.iterdir()
        wait_until(lambda: len(list(scratch.glob("*/g"))) == 1)
    finally:
        owner.send_signal(number)
        owner.wait()
        owner.stdout.close()
    wait_until(lambda: not is_alive(warden))
    assert list(tmp_path.iterdir()) == []
