"""Attacks on what calls share with each other, with the template and with the host, and on what no limit counts."""

import asyncio
import os
import pathlib

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Result
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox.attacks import PATIENT, refused, withstand
from tests.sandbox.driver import LIMITS, Driver

OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
MEMORY, OUTPUT = ToolStatus.OUT_OF_MEMORY, ToolStatus.OUTPUT_LIMIT

FILL = (
    "import os, socket\ntotal, kept = 0, []\ntry:\n    while True:\n        reader, writer = {pair}\n"
    "        kept += reader, writer\n        os.set_blocking({number}, False)\n"
    "        try:\n            while True: total += os.write({number}, bytes(65536))\n"
    "        except BlockingIOError: pass\nexcept OSError as error: print('held', error.errno, total < 32 << 20)"
)

# name: (statuses that are right, text that stdout must hold, snippet)
ATTACKS: dict[str, tuple[tuple[ToolStatus, ...], str, str]] = {
    # memory that the address space does not show
    "full pipes": ((OK,), "held 24 True", FILL.format(pair="os.pipe()", number="writer")),
    "full socket pairs": ((OK,), "held 24 True", FILL.format(pair="socket.socketpair()", number="writer.fileno()")),
    "attributes of a file": (
        (OK,),
        "held",
        refused("open('f', 'w'); [os.setxattr('f', f'user.{n}', bytes(60000)) for n in range(10**5)]"),
    ),
    "move the break": (
        (OK,),
        "held",
        "import ctypes\nsbrk = ctypes.CDLL(None).sbrk\nsbrk.restype, sbrk.argtypes = ctypes.c_long, [ctypes.c_long]\n"
        "print('held' if sbrk(10**10) == -1 else 'GOT THROUGH')",
    ),
    "map without reserve": ((OK,), "held", refused("mmap.mmap(-1, 10**10, flags=0x4022)", ", mmap")),
    "grow a map": ((OK,), "held", refused("m = mmap.mmap(-1, 4096); m.resize(10**10)", ", mmap")),
    "one enormous stack": (
        (OK,),
        "held",
        "import threading\nthreading.stack_size(1 << 30)\n"
        "try: threading.Thread(target=print, args=('GOT THROUGH',)).start()\nexcept RuntimeError: print('held')",
    ),
    # time in C, without a bytecode at which Python could be interrupted
    "loop in C": ((TIMEOUT,), "", "import itertools\nsum(itertools.repeat(0))"),
    "busy threads without the interpreter's lock": (
        (TIMEOUT,),
        "",
        "import hashlib, threading\nfor _ in range(8):\n"
        "    threading.Thread(target=hashlib.pbkdf2_hmac, args=('sha256', b'x' * 99, b'y', 10**9)).start()",
    ),
    "many sleeping threads, one busy": (
        (TIMEOUT,),
        "",
        "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(1e6,)).start()\n"
        "while True: pass",
    ),
    # output
    "endless on both streams": (
        (OUTPUT,),
        "",
        "import os\nwhile True: os.write(1, b'x' * 4096); os.write(2, b'y' * 4096)",
    ),
    "endless in small pieces": ((OUTPUT,), "", "import os\nwhile True: os.write(1, b'x' * 99)"),
    "endless, and deaf to what happens": (
        (OUTPUT,),
        "",
        "import os, signal\nfor s in range(1, 32):\n    try: signal.signal(s, 1)\n    except OSError: pass\n"
        "while True: os.write(1, bytes(65536))",
    ),
    # the interpreter itself
    "recursion in C": ((ERROR,), "", "x = []\nfor _ in range(10**5): x = [x]\nrepr(x)"),
    "overflow of the stack in C": (
        (ERROR, MEMORY),
        "",
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    ),
    "write to nowhere": ((ERROR,), "", "import ctypes\nctypes.memset(8, 1, 8)"),
    "illegal instruction": (
        (ERROR,),
        "",
        "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(b'\\x0f\\x0b\\x00\\x00' * 9)\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
    ),
    # limits and rights
    "raise every limit": (
        (OK,),
        "[]",
        "import resource\nraised = []\nfor name in dir(resource):\n    if name.startswith('RLIMIT_'):\n"
        "        number = getattr(resource, name)\n        soft, hard = resource.getrlimit(number)\n"
        "        if hard == -1: continue\n"
        "        try: resource.setrlimit(number, (hard + 1, hard + 1)); raised.append(name)\n"
        "        except (ValueError, OSError): pass\nprint(raised)",
    ),
    "set the clock": ((OK,), "held 1", refused("time.clock_settime(0, 0.0)", ", time")),
    "another host name": ((OK,), "held 1", refused("socket.sethostname('x')", ", socket")),
    "name of the host": ((OK,), "sandbox", "import os\nprint(os.uname().nodename)"),
    "become a member of a group": ((OK,), "held", refused("os.setgroups([0])")),
    "give a file away": ((OK,), "held", refused("open('f', 'w'); os.chown('f', 0, 0)")),
    "a program with its owner's rights": (
        (OK,),
        "held",
        refused("open('p', 'w'); os.chmod('p', 0o4755); os.execv('p', ['p'])"),
    ),
    # what lies in memory from the template
    "sockets of the template": (
        (OK,),
        "held True",
        "import gc, _socket\ngc.unfreeze()\nfound = [o for o in gc.get_objects() if isinstance(o, _socket.socket)]\n"
        "shut = 0\nfor s in found:\n    try: s.send(b'C' * 99); print('GOT THROUGH')\n    except OSError: shut += 1\n"
        "print('held', len(found) == shut >= 2)",
    ),
    "files of the kernel": (
        (OK,),
        "held",
        "import os\npaths = ['/proc/1/mem', '/proc/1/environ', '/proc/self/exe', '/proc/kcore', '/proc/kallsyms', "
        "'/proc/sysrq-trigger', '/proc/sys/kernel/pid_max', '/proc/mounts', '/proc/cmdline', '/sys/kernel', "
        "'/sys/fs/cgroup', '/dev/mem', '/dev/kmsg', '/dev/tty', '/dev/pts', '/dev/fuse', '/dev/net/tun', '/dev/kvm']\n"
        "seen = [path for path in paths if os.path.lexists(path)]\nprint(seen or 'held')",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_promise_6_attack(sandbox: Driver, name: str) -> None:
    withstand(sandbox, *ATTACKS[name])


def test_busy_threads_share_one_budget_of_cpu(sandbox: Driver) -> None:
    result = sandbox.run(ATTACKS["busy threads without the interpreter's lock"][2])
    assert result.cpu_seconds < LIMITS.cpu_seconds + 2.5, "the kernel's own limit ends it two seconds later at most"


def run_beside(sandbox: Driver, hogs: int, hog: str, other: str) -> Result:
    """The other call, made while so many hogs have printed and are holding on to what they took."""

    async def beside() -> Result:
        holding = [asyncio.create_task(sandbox.pool.run(hog, limits=PATIENT)) for _ in range(hogs)]
        await asyncio.sleep(0.8)
        result = await sandbox.pool.run(other, limits=PATIENT)
        for task in holding:
            assert (await task).status is OK
        return result

    return sandbox.wait(beside())


TIMERS = """
import ctypes, time
libc, event, timer, made = ctypes.CDLL(None), (ctypes.c_int * 16)(0, 0, 10), ctypes.c_long(), 0
while made < {most} and libc.timer_create(0, event, ctypes.byref(timer)) == 0: made += 1
print(made, flush=True)
time.sleep({seconds})"""


def test_timers_of_one_call_leave_others_theirs(sandbox: Driver) -> None:
    """The kernel counts timers and queued signals per user, over all calls at once."""
    other = run_beside(sandbox, 3, TIMERS.format(most=10**6, seconds=2), TIMERS.format(most=50, seconds=0))
    assert other.stdout == "50\n"
    alone = sandbox.run(TIMERS.format(most=10**6, seconds=0), limits=PATIENT)
    assert 50 < int(alone.stdout) < 1000


DESCRIPTORS = """
import array, socket, time
left, right = socket.socketpair()
number = array.array("i", [1] * 200)
try: left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number)]); print("GOT THROUGH")
except OSError as error: print("held", error.errno)"""


def test_descriptors_in_flight_are_out_of_reach(sandbox: Driver) -> None:
    """They are counted per user: one call's would keep the template, which is the same user, from sending its own."""
    assert sandbox.run(DESCRIPTORS).stdout == "held 1\n"


def test_priorities_of_everybody_else_stay(sandbox: Driver) -> None:
    """All processes of a user can be given another priority by one call; a pid namespace bounds who "all" is."""
    family = sandbox.resting()
    before = [os.getpriority(os.PRIO_PROCESS, pid) for pid in family]
    code = (
        "import ctypes, os\nfor which in (os.PRIO_USER, os.PRIO_PGRP, os.PRIO_PROCESS): os.setpriority(which, 0, 19)\n"
        "print([ctypes.CDLL(None).syscall(251, which, 0, 3 << 13) for which in (1, 2, 3)])"
    )
    assert sandbox.run(code).status is OK
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in family] == before
    assert sandbox.run("import os\nos.getpriority(0, 0)").stdout == f"{before[-1]}\n"


def test_a_poisoned_interpreter_dies_with_its_call(sandbox: Driver) -> None:
    """Memory is shared with the template until it is written, and never in that direction."""
    poison = """
import builtins, gc, json, os, sys, traceback
gc.unfreeze()
cell, child, protocol = (sys.modules["jaxrl.sandbox." + name] for name in ("cell", "child", "protocol"))
cell.run = cell.execute = lambda *_: 0
child.Child.become = lambda *_: os._exit(0)
protocol.unpack_for_child = None
builtins.len, builtins.repr, json.dumps, traceback.print_exception, sys.modules["math"] = (None,) * 5
for thing in gc.get_objects():
    if isinstance(thing, dict) and thing is not globals():
        try: thing.clear()
        except Exception: pass
os._exit(0)"""
    assert sandbox.run(poison, limits=PATIENT).attempts == 1
    result = sandbox.run("import json, math\nprint(json.dumps([math.floor(2.5)]))\nlen(repr('x'))")
    assert (result.status, result.stdout, result.attempts) == (OK, "[2]\n3\n", 1)


def test_last_words_are_heard(sandbox: Driver) -> None:
    """What was written just before a sudden end is there to the last byte."""
    code = "import os\nos.write(1, b'x' * 7000 + b'out'); os.write(2, b'y' * 7000 + b'err'); os._exit(3)"
    for result in sandbox.run_all([code] * 20):
        assert (result.status, result.exit_code) == (ERROR, 3)
        assert (result.stdout, result.stderr) == ("x" * 7000 + "out", "y" * 7000 + "err")


def test_disk_is_given_back(sandbox: Driver) -> None:
    """Each call finds the whole of its directory free, however full the calls before left theirs."""
    code = "open('x', 'wb').write(bytes(7 << 20))\nimport os\nos.listdir('.')"
    assert [result.stdout for result in sandbox.run_all([code] * 12)] == ["['x']\n"] * 12


def test_network_namespace_is_empty(sandbox: Driver) -> None:
    """The second wall behind the refused socket: nothing but a loopback that is down, no route."""
    for pid in sandbox.resting():
        _, _, *devices = pathlib.Path(f"/proc/{pid}/net/dev").read_text().splitlines()
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        assert pathlib.Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:] == []
        assert not pathlib.Path(f"/proc/{pid}/net/if_inet6").read_text(), "a device is up"


def test_namespaces_are_none_of_the_hosts(sandbox: Driver) -> None:
    before = set(sandbox.resting())
    call = asyncio.run_coroutine_threadsafe(sandbox.pool.run("import time; time.sleep(0.6)"), sandbox.loop)
    child: set[int] = set()
    while not child and not call.done():
        child = set(descendants(sandbox.pool.warden_pid)) - before

    def namespace(pid: int | str, name: str) -> str:
        return os.readlink(f"/proc/{pid}/ns/{name}")

    (pid,) = child
    try:
        while namespace(pid, "user") == namespace(min(before), "user"):
            assert not call.done(), "the call never got a user namespace of its own"
        for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
            assert namespace(pid, name) != namespace("self", name)
        for name in ("user", "mnt", "pid"):
            assert namespace(pid, name) != namespace(min(before), name), f"calls share their {name} namespace"
    finally:
        assert call.result().status is OK
