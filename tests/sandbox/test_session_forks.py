"""Forked sessions: the same past, futures apart, memory shared until written, and nobody left behind."""

import asyncio
import dataclasses
import os
import pathlib
import time

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox.bench.processes import descendants, parent, rollup_kib
from tests.sandbox.cells import PATIENT, Cells, session
from tests.sandbox.driver import Driver

OK = ToolStatus.OK


def leaves(driver: Driver) -> list[int]:
    """Processes of sessions: children of keepers."""
    everybody = driver.resting()
    depth = {driver.pool.warden_pid: 0}
    for pid in everybody:
        depth[pid] = depth.get(parent(pid), 0) + 1
    deepest = max(depth.values())
    return [pid for pid in everybody if depth[pid] == deepest]


def test_copies_have_the_same_past_and_futures_of_their_own(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("import os, random, numpy as np\nx, a = [1], np.arange(4)\nos.mkdir('d'); os.chdir('d')")
        original.out("open('f', 'w').write('old'); os.symlink('f', 'link')\nrandom.random()")
        left, right = original.fork(2)
        look = "x, a.tolist(), os.getcwd(), open('link').read(), os.listdir('/tmp')"
        assert original.out(look) == left.out(look) == right.out(look)
        draw = "random.random(), np.random.rand()"
        assert original.out(draw) == left.out(draw) == right.out(draw)
        left.out("x.append(2); a[0] = 9; open('f', 'w').write('left'); os.remove('link'); os.chdir('/')")
        right.out("x.append(3); open('g', 'w').write('right')")
        assert (
            original.out("x, int(a[0]), sorted(os.listdir()), open('f').read()") == "([1], 0, ['f', 'link'], 'old')\n"
        )
        assert left.out("x, int(a[0]), os.listdir('/tmp/d'), os.getcwd()") == "([1, 2], 9, ['f'], '/')\n"
        assert (
            right.out("x, int(a[0]), sorted(os.listdir()), open('f').read()")
            == "([1, 3], 0, ['f', 'g', 'link'], 'old')\n"
        )
        results = [cells.run("x") for cells in (original, left, right)]
        assert [(result.status, result.rebuilt) for result in results] == [(OK, False)] * 3
        for copy in (left, right):
            copy.close()


def test_copies_and_original_tell_of_a_rebuild_that_no_result_has_told(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("import os, time\nprint(time.time_ns())")
        original.run("os._exit(1)")
        (copy,) = original.fork(1)
        for cells in (original, copy):
            results = [cells.run("1") for _ in range(2)]
            assert [(result.rebuilt, result.replay_differs) for result in results] == [(True, True), (False, False)]
        copy.close()


def test_a_cancelled_fork_leaves_no_copies(sandbox: Driver) -> None:
    before = sandbox.resting()
    with session(sandbox) as original:
        original.out("x = 1")

        async def cancelled() -> None:
            fork = asyncio.create_task(original.session.fork(30))
            await asyncio.sleep(0.02)
            fork.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fork

        sandbox.wait(cancelled())
        deadline = time.monotonic() + 20
        while len(sandbox.resting()) != len(before) + 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(sandbox.resting()) == len(before) + 2, "its keeper and its process"
        assert original.out("x") == "1\n"
    assert sandbox.resting() == before


def test_the_copies_that_a_cancelled_fork_has_not_made_are_never_made(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("x = 1")

        async def cancelled() -> list[int]:
            fork = asyncio.create_task(original.session.fork(2000))
            while (before := (await sandbox.pool.metrics()).sessions) < 3:
                await asyncio.sleep(0.002)
            fork.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fork
            counts = [before]
            while counts[-1] > 1:
                counts.append((await sandbox.pool.metrics()).sessions)
                await asyncio.sleep(0.002)
            return counts

        counts = sandbox.wait(cancelled())
        assert max(counts) <= counts[0] + 16, "those that the warden had been asked for"
        assert original.out("x") == "1\n"


def test_a_session_is_closed_in_its_own_event_loop(sandbox: Driver) -> None:
    with session(sandbox) as cells:
        cells.out("x = 41")
        (copy,) = cells.fork(1)
        for one in (cells, copy):
            with pytest.raises(RuntimeError, match="another event loop: close it there"):
                asyncio.run(one.session.close())
            assert one.out("x") == "41\n"
        copy.close()


def test_copies_outlive_the_original_and_each_other(sandbox: Driver) -> None:
    before = sandbox.resting()
    with session(sandbox) as original:
        original.out("x = 1\nopen('f', 'w').write('text')")
        one, two = original.fork(2)
    assert one.out("x, open('f').read()") == "(1, 'text')\n"
    one.close()
    result = two.run("import os\nos.getpid(), x")
    assert (result.stdout, result.rebuilt) == ("(4, 1)\n", False)
    two.close()
    assert sandbox.resting() == before


def test_a_killed_copy_hurts_no_other(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("x = 1")
        left, right = original.fork(2)
        assert left.run("import os, ctypes\nx = 2\nctypes.string_at(0)").status is ToolStatus.ERROR
        results = [cells.run("x") for cells in (original, right, left)]
        assert [(r.stdout, r.rebuilt) for r in results] == [("1\n", False), ("1\n", False), ("1\n", True)]
        for copy in (left, right):
            copy.close()


def test_forks_of_forks_fifty_deep(sandbox: Driver) -> None:
    """Nothing nests: no namespace, no mount, no directory of an ancestor's."""
    before = sandbox.resting()
    current = Cells(sandbox, sandbox.pool.session(limits=PATIENT))
    current.out("import os\npath = ['root']\nopen('root', 'w').write('0')")
    for depth in range(50):
        (copy,) = current.fork(1)
        current.close()
        current = copy
        current.out(f"path.append({depth}); open('{depth}', 'w').write('x')")
    result = current.run("len(path), len(os.listdir())")
    assert (result.stdout, result.rebuilt) == ("(51, 51)\n", False)
    (leaf,) = leaves(sandbox)
    mounts = pathlib.Path(f"/proc/{leaf}/mountinfo").read_text().splitlines()
    assert sum(" /tmp " in line for line in mounts) == 1
    current.close()
    assert sandbox.resting() == before


def test_files_are_copied_with_holes_modes_and_times(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out(
            "import os\nos.makedirs('a/b/c')\n"
            "with open('a/b/sparse', 'wb') as f: f.seek(7 << 20); f.write(b'end')\n"
            "with open('s2', 'wb') as f: f.truncate(7 << 20)\n"
            "open('run', 'w').write('x'); os.chmod('run', 0o750); os.utime('run', (1, 2))\n"
            "os.symlink('/etc/passwd', 'out'); os.mkfifo('pipe')"
        )
        (copy,) = original.fork(1)
        copy.out("import stat")
        look = "s = os.stat('run')\noct(s.st_mode), s.st_mtime, os.readlink('out'), os.stat('a/b/sparse').st_size"
        result = copy.run(look)
        assert (result.stdout, result.rebuilt) == (f"('0o100750', 2.0, '/etc/passwd', {(7 << 20) + 3})\n", False)
        assert (
            copy.out("os.stat('a/b/sparse').st_blocks < 100, open('a/b/sparse', 'rb').read()[-3:]")
            == "(True, b'end')\n"
        )
        assert copy.out("os.path.exists('pipe'), sorted(os.listdir('a/b'))") == "(False, ['c', 'sparse'])\n"
        copy.close()


# By the C library, since the module mmap keeps a descriptor besides.
MAP_A_FILE = (
    "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
    "with open('m', 'wb+') as f:\n    f.truncate(4096)\n"
    "    kept = libc.mmap(ctypes.c_void_p(), ctypes.c_size_t(4096), 1, {}, f.fileno(), ctypes.c_long(0))"
)
# What makes a copy impossible: each of these is left in the session, and its copy is rebuilt by replay instead.
UNCOPYABLE = {
    "open file": "kept = open('f', 'w')",
    "open directory": "import os\nkept = os.open('/', os.O_RDONLY)",
    "pipe": "import os\nkept = os.pipe()",
    "pair of sockets": "import socket\nkept = socket.socketpair()",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9e5,), daemon=True).start()",
    "shared memory": "import mmap\nkept = mmap.mmap(-1, 4096)",
    "shared memory that may not be written now": (
        "import ctypes, mmap\nkept = mmap.mmap(-1, 4096)\nat = ctypes.addressof(ctypes.c_char.from_buffer(kept))\n"
        "ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), 4096, 1);"
    ),
    "mapped file": MAP_A_FILE.format(1),
    "privately mapped file": MAP_A_FILE.format(2),
    "closed standard input": "import os\nos.close(0)",
    "folders too deep": "import os\nos.makedirs('/'.join('d' * 40))",
}


@pytest.mark.parametrize("name", UNCOPYABLE)
def test_what_cannot_be_copied_is_rebuilt_and_says_so(sandbox: Driver, name: str) -> None:
    before = sandbox.resting()
    with session(sandbox) as original:
        original.out("x = 1")
        assert original.run(UNCOPYABLE[name]).status is OK
        (copy,) = original.fork(1)
        deadline = time.monotonic() + 10  # one that was made in vain may be dying still
        while len(sandbox.resting()) > len(before) + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(sandbox.resting()) == len(before) + 2, "no process for the copy yet"
        result = copy.run("x += 1; x")
        result = copy.run("x") if result.stdout == "" else result
        assert (result.status, result.stdout) == (OK, "2\n")
        live = original.run("x")
        assert (live.stdout, live.rebuilt) == ("1\n", False), "the original is not touched"
        copy.close()
    assert sandbox.resting() == before


def test_the_copy_that_was_rebuilt_is_flagged(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("kept = open('f', 'w'); x = 1")
        one, two = original.fork(2)
        flags = [(result.rebuilt, result.replay_differs) for result in (one.run("x"), two.run("x"), one.run("x"))]
        assert flags == [(True, False), (True, False), (False, False)]
        original.out("kept.close()")
        (three,) = original.fork(1)
        assert three.run("x").rebuilt is False
        for copy in (one, two, three):
            copy.close()


def test_forking_before_the_first_cell_and_after_a_loss(sandbox: Driver) -> None:
    with session(sandbox) as original:
        fresh, _ = original.fork(2)
        assert (fresh.run("x = 1").rebuilt, "NameError" in original.run("x").stderr) == (False, True)
        original.out("import os\nx = 5")
        original.run("os._exit(1)")
        (copy,) = original.fork(1)
        assert (copy.out("x"), original.out("x")) == ("5\n", "5\n")
        for one in (fresh, copy):
            one.close()
        with pytest.raises(ValueError, match="copies=0 must be at least 1"):
            original.fork(0)


def test_threads_of_many_copies_are_not_counted_together(sandbox: Driver) -> None:
    """The kernel counts threads by user, and copies have the same one; each may still have what the limit grants."""
    limits = dataclasses.replace(PATIENT, threads=8)
    with session(sandbox, limits=limits) as original:
        original.out("import threading, time\nthreading.stack_size(64 << 10);")
        copies = original.fork(12)
        start = "for _ in range(6): threading.Thread(target=time.sleep, args=(1e5,), daemon=True).start()"
        results = [copy.run(start) for copy in (original, *copies)]
        assert [(result.status, result.rebuilt) for result in results] == [(OK, False)] * 13
        for copy in copies:
            copy.close()
    with session(sandbox, limits=limits) as alone:
        alone.out("import threading, time\nthreading.stack_size(64 << 10);")
        assert "can't start new thread" in alone.run("for _ in range(9):" + start.partition(":")[2]).stderr


def test_two_hundred_copies_of_a_large_session_share_its_memory() -> None:
    with Driver(workers=1, slots=4, preload=(), limits=PATIENT, session_memory_mib=8192) as driver:
        before = driver.resting()
        with session(driver) as original:
            original.out(f"data = bytearray({100 << 20})\nfor i in range(0, len(data), 4096): data[i] = 1")
            copies = original.fork(200)
            processes = leaves(driver)
            assert len(processes) == 201
            total = sum(rollup_kib(pid, "Pss") for pid in processes) >> 10
            assert 100 <= total < 100 + 201 * 3, "MiB, where 201 apart would have 20,100"
            results = [copy.run("data[0] = 2; len(data) >> 20") for copy in copies[:5]]
            results = [copy.run("len(data) >> 20") for copy in copies[:5]]
            assert [(result.stdout, result.rebuilt) for result in results] == [("100\n", False)] * 5
            assert original.out("data[0]") == "1\n"
            for copy in copies:
                copy.close()
        deadline = time.monotonic() + 20
        while driver.resting() != before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert driver.resting() == before


def test_nothing_survives_a_pool_that_is_closed_with_sessions_open() -> None:
    with Driver(workers=1, slots=4, preload=(), limits=PATIENT) as driver:
        cells = Cells(driver, driver.pool.session())
        cells.out("import threading, time\nx = 1")
        cells.fork(3)
        everybody = descendants(driver.pool.warden_pid)
        assert len(everybody) >= 7
    assert not [pid for pid in everybody if os.path.exists(f"/proc/{pid}")]
