"""More sessions than there is room for, in memory or in descriptors: some are put out, and no cell is lost by that."""

import asyncio
import subprocess
import sys
import textwrap
from collections import Counter

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, descriptors
from jaxrl.sandbox.link import HOME
from tests.sandbox.cells import session
from tests.sandbox.driver import Driver

ROOMY = Limits(memory_mib=100, disk_mib=4, cpu_seconds=20.0, wall_seconds=60.0, open_files=20)
LARGE = "import time\nkept = bytearray(40 << 20)\nfor i in range(0, len(kept), 4096): kept[i] = 1\ntime.sleep(0.05)"


def test_sessions_that_are_all_wanted_at_once_are_rebuilt_no_faster_than_they_are_used() -> None:
    with Driver(limits=ROOMY, workers=1, slots=4, preload=(), session_memory_mib=150) as driver:
        sessions = [driver.pool.session() for _ in range(40)]

        async def run_all(code: str) -> Counter[tuple[ToolStatus, str]]:
            results = await asyncio.gather(*(session.run(code) for session in sessions))
            return Counter((result.status, result.stderr) for result in results)

        driver.wait(run_all(LARGE))
        for _ in range(2):
            assert driver.wait(run_all("len(kept)")) == {(ToolStatus.OK, ""): 40}
            assert driver.wait(driver.pool.metrics()).sessions < 30
        for session in sessions:
            driver.wait(session.close())


def test_of_files_that_do_not_fit_nothing_is_left(sandbox: Driver) -> None:
    with session(sandbox) as cells:
        cells.out("import os\nopen('mine', 'wb').write(bytes(5 << 20));")
        result = cells.run("1", files={"a": b"x", "b": bytes(4 << 20)})
        assert result.status is ToolStatus.ERROR and "No space left on device" in result.stderr
        assert cells.out("os.listdir()") == "['mine']\n"


USE = f"""
import asyncio
from collections import Counter
from jaxrl.sandbox import Limits, Pool

async def use(checkpoint):
    async with Pool({ROOMY!r}, workers=1, slots=4, slow_slots=0, preload=()) as pool:
        warden = pool.warden_pid
        sessions = [pool.session(checkpoint=checkpoint) for _ in range(80)]
        await asyncio.gather(*(session.run("x = 41") for session in sessions))
        sessions += await sessions[0].fork(80)
        cells = (session.run("x + 1") for session in sessions)
        calls = (pool.run("6 * 7") for _ in range(40))
        results = await asyncio.gather(*cells, *calls)
        print(dict(Counter((result.status.value, result.stdout, result.stderr) for result in results)))
        print(pool.warden_pid == warden, sum(result.rebuilt for result in results) > 80)

asyncio.run(use(False))
asyncio.run(use(True))
"""


def with_descriptors(most: int, code: str) -> subprocess.CompletedProcess[str]:
    """A program's end under a limit that it cannot raise."""
    command = ["sh", "-c", f'ulimit -n {most} && exec "$0" -c "$1"', sys.executable, textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": HOME})


def test_more_sessions_than_there_are_descriptors_for() -> None:
    ended = with_descriptors(220, USE)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["{('ok', '42\\n', ''): 200}", "True True"] * 2


def test_fewer_descriptors_than_the_slots_need_are_refused_with_their_number() -> None:
    for most, slots in ((30, 4), (256, 16)):
        make = f"from jaxrl.sandbox import Limits, Pool; Pool(Limits(open_files=20), slots={slots}, slow_slots={slots})"
        error = with_descriptors(most, make).stderr.splitlines()[-1]
        assert error.startswith(f"ValueError: slots + slow_slots = {2 * slots} with workers=2 need "), error
        needed = int(error.split(" need ")[1].split()[0])
        assert f"this process may have {most}; lower them, or raise that (ulimit -Hn)" in error
        assert with_descriptors(needed, make).stderr == ""


def test_a_warden_at_work_keeps_to_the_number_of_descriptors_that_is_demanded() -> None:
    """At the least limit under which the pool starts: calls of every kind in every slot, and copies that stand by."""
    code = f"""
    import asyncio
    from jaxrl.sandbox import Limits, Pool

    async def use():
        async with Pool({ROOMY!r}, workers=1, slots=4, slow_slots=4, processes_without_cgroup=True) as pool:
            warden = pool.warden_pid
            sessions = [pool.session(checkpoint=True) for _ in range(20)]
            cells = [session.run("import time; time.sleep(0.2)", wanted=["*"]) for session in sessions]
            calls = [
                pool.run("import time; time.sleep(0.2)", stdin="x", wanted=["*"], processes=processes)
                for processes in (False, True) for _ in range(20)
            ]
            results = await asyncio.gather(*cells, *calls)
            print({{(result.status.value, result.stderr) for result in results}}, pool.warden_pid == warden)

    asyncio.run(use())
    """
    ended = with_descriptors(descriptors.needed(1, 8), code)
    assert (ended.stderr, ended.stdout) == ("", "{('ok', '')} True\n")
