"""Hostile cells: a call's walls hold in a session, no process copies itself unasked, no copy reaches another."""

import asyncio
import contextlib
import os
import signal
import time

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox.bench.processes import parent
from tests.sandbox.cells import PATIENT, session
from tests.sandbox.driver import LIMITS, Driver, wait_until
from tests.sandbox.test_attacks import ATTACKS

OK, ERROR, TIMEOUT, OUTPUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.OUTPUT_LIMIT
X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the system calls are x86-64's")

# What differs from a call: signals are denied, oneself included, and a session has a keeper above it; a cell's end is
# not the end of its process, so that nothing waits for threads and exit functions.
IN_SESSIONS: dict[str, tuple[tuple[ToolStatus, ...], str]] = {
    "kill everybody": ((OK,), "held 1"),
    "kill my process group": ((ERROR,), ""),
    "kill the first process": ((ERROR,), ""),
    "parent is out of sight": ((OK,), "1 2"),
    "signal by guessed number": ((ERROR,), ""),
    "stop itself": ((ERROR,), ""),
    "hang at exit": ((OK,), ""),
    "thread that outlives main": ((OK,), ""),
    "storm of signals": ((ERROR,), ""),
}
ENDS_ITSELF = ("exit code of a failed set-up", "exit 0 with a forged report")
# What a cell did to its own interpreter stays done: status and output of the next ``print(6 * 7)``.
SPOILT = {
    "closed descriptors": (ERROR, ""),
    "hook on everything": (ERROR, ""),  # it breaks our loop too, and the session is rebuilt after that
    "no standard streams": (OK, ""),
    "replace print and exit": (ERROR, ""),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_promise_6_attack_in_a_session(sandbox: Driver, name: str) -> None:
    statuses, text, code = ATTACKS[name]
    statuses, text = IN_SESSIONS.get(name, (statuses, text))
    before = sandbox.resting()
    with session(sandbox, limits=LIMITS if TIMEOUT in statuses else PATIENT) as cells:
        result = cells.run(code)
        assert result.status in statuses, result
        assert "GOT THROUGH" not in result.stdout, result
        assert text in result.stdout, result
        assert result.attempts == 1, "a snippet must not look like a fault of ours"
        loses_process = result.status in (TIMEOUT, OUTPUT) or result.signal is not None or name in ENDS_ITSELF
        after = cells.run("print(6 * 7)")
        assert (after.status, after.stdout) == SPOILT.get(name, (OK, "42\n")), after
        assert after.rebuilt is loses_process
    healthy = sandbox.run("print(6 * 7)")
    assert (healthy.status, healthy.stdout, healthy.attempts) == (OK, "42\n", 1)
    assert sandbox.resting() == before, "a process survived, or a template was lost"


@X86
def test_no_process_copies_itself_unasked(sandbox: Driver) -> None:
    """Every pair and triple of clone's flags, with the one that is allowed on order, and with bits above it."""
    code = """
import ctypes, itertools, os
libc = ctypes.CDLL(None, use_errno=True)
flags = [1 << bit for bit in range(8, 32)] + [1 << 32, 1 << 33]
tried = made = 0
for exit_signal in (0, 17, 9):
    for count in (0, 1, 2, 3):
        for some in itertools.combinations(flags, count):
            if 0x100 in some:
                continue  # perhaps a thread, which is allowed, and would run on this very stack
            for more in (0, 0x28000):
                answer = libc.syscall(56, ctypes.c_long(sum(some) | more | exit_signal), 0, 0, 0, 0)
                if answer == 0: os._exit(0)
                tried += 1; made += answer > 0
answer = libc.syscall(435, ctypes.create_string_buffer(88), 88)
tried, made, answer, ctypes.get_errno()"""
    before = sandbox.resting()
    with session(sandbox, limits=PATIENT) as cells:
        assert cells.out(code) == "(15756, 0, -1, 38)\n"
        assert len(sandbox.resting()) == len(before) + 2
    assert sandbox.run("import ctypes\nctypes.CDLL(None).syscall(56, 0x28011, 0, 0, 0, 0)").stdout == "-1\n", (
        "in a call"
    )


THREADS_ELSEWHERE = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
stack = ctypes.create_string_buffer(1 << 16)
found = set()
for space in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    answer = libc.syscall(56, ctypes.c_long(0x10d00 | space), ctypes.c_long(ctypes.addressof(stack) + 65520), 0, 0, 0)
    found.add((answer, ctypes.get_errno()))
found"""


@X86
def test_no_thread_gets_a_namespace_of_its_own(sandbox: Driver) -> None:
    """A session's process owns its user namespace, so that the kernel by itself would allow it."""
    with session(sandbox) as cells:
        assert cells.out(THREADS_ELSEWHERE) == "{(-1, 1)}\n"


REACH = """
import ctypes, errno, fcntl, os, resource, signal, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return ctypes.get_errno() if libc.syscall(number, *converted) == -1 else 'GOT THROUGH'
buffer = ctypes.create_string_buffer(128)
reader, writer = os.pipe()
answers = {}
for pid in [p for p in range(1, 6) if p != os.getpid()]:
    answers |= {
        (pid, 'kill'): call(62, pid, 9), (pid, 'nothing'): call(62, pid, 0), (pid, 'tkill'): call(200, pid, 9),
        (pid, 'tgkill'): call(234, pid, pid, 9), (pid, 'queue'): call(129, pid, 9, buffer),
        (pid, 'queue thread'): call(297, pid, pid, 9, buffer), (pid, 'pidfd'): call(434, pid, 0),
        (pid, 'limit'): call(302, pid, 0, buffer, 0), (pid, 'limits read'): call(302, pid, 7, 0, buffer),
        (pid, 'affinity'): call(203, pid, 8, buffer), (pid, 'scheduler'): call(144, pid, 3, buffer),
        (pid, 'attributes'): call(314, pid, buffer, 0), (pid, 'nice'): call(141, 0, pid, 19),
        (pid, 'io'): call(251, 1, pid, 0), (pid, 'robust list'): call(274, pid, buffer, buffer),
        (pid, 'read memory'): call(310, pid, buffer, 1, buffer, 1, 0), (pid, 'trace'): call(101, 16, pid, 0, 0),
        (pid, 'owner'): call(72, reader, 8, pid), (pid, 'owner, extended'): call(72, reader, 15, buffer),
        (pid, 'which signal'): call(72, reader, 10, 9), (pid, 'owner by ioctl'): call(16, reader, 0x8901, buffer),
        (pid, 'core scheduling'): call(157, 62, 1, pid, 0, 0),
    }
answers |= {'group': call(62, 0, 9), 'everybody': call(62, -1, 9), 'niceness of all': call(141, 2, 0, 19),
            'niceness of the group': call(141, 1, 0, 19), 'threads of all': call(302, 0, 6, struct.pack('QQ', 1, 1), 0),
            'threads, old way': call(160, 6, struct.pack('QQ', 1, 1)), 'timer': call(222, 0, buffer, buffer)}
os.close(reader); os.close(writer)
{name: answer for name, answer in answers.items() if answer not in (1,)}"""


@X86
def test_no_copy_reaches_another_by_its_number(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("x = 1")
        left, right = original.fork(2)
        for cells in (left, original, right):
            assert cells.out(REACH) == "{}\n"
        results = [cells.run("x") for cells in (original, left, right)]
        assert [(result.stdout, result.rebuilt) for result in results] == [("1\n", False)] * 3
        for copy in (left, right):
            copy.close()


def test_copies_are_out_of_each_others_sight(sandbox: Driver) -> None:
    with session(sandbox) as original:
        original.out("import os\nopen('secret', 'w').write('original')")
        (copy,) = original.fork(1)
        original.out("open('later', 'w').write('original'); here = os.stat('.').st_dev")
        copy.out("open('secret', 'w').write('copy')")
        look = (
            "seen = [os.path.exists(p) for p in ('/proc', 'later', '/tmp/later', '../tmp/later')]\n"
            "seen, os.stat('/tmp').st_dev == os.stat('.').st_dev, os.stat('.').st_dev"
        )
        seen, own, device = eval(copy.out(look))
        assert (seen, own) == ([False] * 4, True)
        assert device != int(original.out("here"))
        assert original.out("open('secret').read()") == "'original'\n"
        copy.close()


def test_a_copy_may_fill_its_own_directory_and_no_other(sandbox: Driver) -> None:
    fill = (
        "try:\n    open('x', 'wb').write(bytes(7 << 20)); open('y', 'wb').write(bytes(7 << 20))\n"
        "except OSError: print('full')"
    )
    with session(sandbox) as original:
        original.out("x = 1")
        (copy,) = original.fork(1)
        assert [copy.out(fill), original.out(fill)] == ["full\n"] * 2
        copy.close()


# What a process does to our code in it, so as to gain something from the next copy.
OURS = (
    "import os, sys, ctypes\nleaf, calls = sys.modules['jaxrl.sandbox.leaf'], sys.modules['jaxrl.sandbox.syscalls']\n"
)
TRICKS = {
    "keep the copy's descriptors": "os.close = lambda fd: None",
    "keep one under another number": "real = os.close\ndef close(fd): os.dup(fd); real(fd)\nos.close = close",
    "the copy keeps the original's": "leaf._take_descriptors = lambda fds: [os.dup2(fds[0], 9), os.dup2(9, 3)]",
    "the copy stays where it was": "os.chdir = lambda path: None",
    "the copy maps the original's file": (
        "libc = ctypes.CDLL(None)\nopen('/tmp/m', 'w').write('x' * 4096)\nenter = leaf._enter\ndef entered(*a):\n"
        "    with open('/tmp/m', 'r+') as f:\n"
        "        libc.mmap(ctypes.c_void_p(), ctypes.c_size_t(4096), 3, 1, f.fileno(), ctypes.c_long(0))\n"
        "    enter(*a)\nleaf._enter = entered"
    ),
    "the copy starts a thread": (
        "import threading, time\nenter = leaf._enter\n"
        "def entered(*a): threading.Thread(target=time.sleep, args=(9e5,), daemon=True).start(); enter(*a)\n"
        "leaf._enter = entered"
    ),
    "no copy, and a lie": "calls.copy_process = lambda: 7",
    "no answer": "leaf._copy = lambda *a: None",
    "an answer out of turn": "leaf._copy = lambda control, *a: [control.send(b'O\\0') for _ in range(3)]",
    "an empty answer": "leaf._copy = lambda control, *a: control.send(b'F')",
    "die in place of a copy": "leaf._copy = lambda *a: os._exit(0)",
    "the copy dies": "once = calls.copy_process\ncalls.copy_process = lambda: once() or os._exit(0)",
    "the copy says nothing": "def mute(*a):\n    while True: pass\nleaf._enter = mute",
}


SLOW = ("the copy starts a thread", "no answer", "the copy says nothing")  # noticed by their silence


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRICKS])
def test_no_trick_makes_a_copy_that_is_not_apart(sandbox: Driver, name: str) -> None:
    """The copy is given up, and replay, which has no such trick in it, makes one that is in order."""
    before = sandbox.resting()
    with session(sandbox, limits=LIMITS) as original:
        original.out(OURS + TRICKS[name])
        original.session._history.clear()  # so that the trick is played by this process alone
        original.out("y = 2")
        (copy,) = original.fork(1)
        deadline = time.monotonic() + 5
        allowed = len(before) + 2
        while len(sandbox.resting()) > allowed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(sandbox.resting()) <= allowed, "no process of the copy's"
        result = copy.run("y")
        assert (result.status, result.stdout, result.rebuilt) == (OK, "2\n", True)
        again = original.run("y")
        assert (again.status, again.stdout) == (OK, "2\n")
        copy.close()
    assert sandbox.resting() == before
    assert sandbox.run("1 + 1").stdout == "2\n"


def test_an_order_is_good_for_one_copy(sandbox: Driver) -> None:
    before = sandbox.resting()
    with session(sandbox) as original:
        original.out(
            OURS + "once = calls.copy_process\nrefused = 0\ndef often():\n    global refused\n    answer = once()\n"
            "    for _ in range(20 if answer else 0):\n        try: os._exit(0) if once() == 0 else None\n"
            "        except OSError: refused += 1\n    return answer\ncalls.copy_process = often"
        )
        (copy,) = original.fork(1)
        assert len(sandbox.resting()) == len(before) + 3
        results = copy.run("refused"), original.run("refused")
        assert [(result.stdout, result.rebuilt) for result in results] == [("0\n", False), ("20\n", False)]
        copy.close()


def test_words_out_of_turn_end_the_process_and_tell_nothing(sandbox: Driver) -> None:
    """A cell that writes to the control socket can only say early that it is over, or be ended."""
    speak = "import os, time\nos.write(3, {!r})\ntime.sleep(9)"
    for word in (b"O\0", b"O\0\0", b"O", b"F\1", b"H", b"E", b"\0", b"O" * 60, b"x" * 5000):
        with session(sandbox, limits=PATIENT) as cells:
            assert cells.run(speak.format(word)).status is (OK if word == b"O\0" else ERROR), word
    with session(sandbox) as cells:
        cells.out("x = 1")
        assert cells.run("import os\nos.close(3)").status is ERROR
        result = cells.run("x")
        assert (result.stdout, result.rebuilt) == ("1\n", True)


def test_a_session_cannot_wake_itself_between_cells(sandbox: Driver) -> None:
    with session(sandbox) as cells:
        cells.out("import signal, time, threading\nn = 0\ndef tick(*_):\n    global n\n    n += 1")
        cells.out("signal.signal(signal.SIGALRM, tick)\nsignal.signal(signal.SIGCONT, tick)\nnothing = None")
        cells.out("signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01);")
        before = int(cells.out("n"))
        time.sleep(1.0)
        assert int(cells.out("n")) - before < 50, "a hundred alarms passed while it stood still"


def test_leaves_are_what_the_kernel_shows_of_a_session(sandbox: Driver) -> None:
    """No rights but the one to ask for a mount namespace, none to be gained; no descriptor but four."""
    before = set(sandbox.resting())
    with session(sandbox) as original:
        assert original.out("import os\nos.listdir('/')") != ""
        (copy,) = original.fork(1)
        leaves = [pid for pid in set(sandbox.resting()) - before if parent(pid) not in before]
        assert len(leaves) == 2
        for pid in leaves:
            with open(f"/proc/{pid}/status") as file:
                lines = dict(line.rstrip().split(":\t") for line in file if ":\t" in line.rstrip())
            rights = [int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
            assert rights == [0, 1 << 21, 1 << 21, 0]
            assert (lines["NoNewPrivs"], lines["Seccomp"], lines["State"][0]) == ("1", "2", "T")
            assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3"]
        copy.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a session of the slow lane its priority back")
def test_a_process_that_speaks_and_dies_takes_no_warden_along(sandbox: Driver) -> None:
    """A cell of the slow lane says that it is over, and nothing is left of it when the warden comes to hear that."""
    code = (
        "import ctypes, os, signal, time\nopen('f', 'w').write('text')\nlibc = ctypes.PyDLL(None)\n"
        "def leave(*_): libc.write(3, b'O\\0', 2); libc._exit(0)\n"
        "nice = lambda: os.getpriority(os.PRIO_PROCESS, 0)\nbefore = nice()\nwhile nice() == before: time.sleep(0.01)\n"
        "signal.signal(signal.SIGCONT, leave)\nwhile True: time.sleep(1)"
    )
    warden, before = sandbox.pool.warden_pid, set(sandbox.resting())
    with session(sandbox, limits=PATIENT) as attacker:
        attacker.out("x = 1")
        (leaf,) = (pid for pid in set(sandbox.resting()) - before if parent(pid) not in before)
        niceness = os.getpriority(os.PRIO_PROCESS, leaf)
        cell = asyncio.run_coroutine_threadsafe(attacker.session.run(code, wanted=("*",)), sandbox.loop)
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, leaf) != niceness, seconds=30.0)
        os.kill(warden, signal.SIGSTOP)
        try:
            wait_until(lambda: woken_and_gone(leaf))
        finally:
            os.kill(warden, signal.SIGCONT)
        result = cell.result(60)
        assert (result.status, result.files) == (OK, {"f": b"text"})
    assert sandbox.run("6 * 7").stdout == "42\n"
    assert sandbox.pool.warden_pid == warden


def woken_and_gone(process: int) -> bool:
    """Let a halted process go on; whether its keeper has collected it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)
    return not parent(process)


@pytest.mark.slow
def test_a_copy_that_hides_costs_its_siblings_nothing(sandbox: Driver) -> None:
    with session(sandbox, limits=LIMITS) as original:
        original.out("x = 1")
        evil, good = original.fork(2)
        evil.out(OURS + TRICKS["the copy says nothing"])
        evil.session._history.clear()
        good.out("y = 2")
        for copy in evil.fork(1):
            copy.close()
        for other in (original, good):
            result = other.run("x")
            assert (result.stdout, result.rebuilt) == ("1\n", False)
        for copy in (evil, good):
            copy.close()
