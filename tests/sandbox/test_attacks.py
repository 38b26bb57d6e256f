"""What hostile code tries, and what it gets: a typed status, nothing outside reached, the pool unharmed.

Each attack is a row. Unless a row says otherwise the snippet prints "held" when the wall did, so that a snippet
that dies early cannot pass for one that was stopped.
"""

import asyncio
import dataclasses
import os
import pathlib
import socket
import time

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import jail, landlock
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox.attacks import refused, system_call, withstand
from tests.sandbox.driver import LIMITS, Driver

OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
MEMORY, OUTPUT = ToolStatus.OUT_OF_MEMORY, ToolStatus.OUTPUT_LIMIT


X86_CALLS = {
    "ptrace": (101, "0", "0", "0", "0"),
    "process_vm_readv": (310, "1", "0", "0", "0", "0", "0"),
    "unshare": (272, "0x10000000"),
    "setns": (308, "0", "0"),
    "mount": (165, "b'none'", "b'/tmp'", "b'tmpfs'", "0", "0"),
    "umount": (166, "b'/tmp'", "2"),
    "pivot_root": (155, "b'.'", "b'.'"),
    "chroot": (161, "b'/tmp'"),
    "clone a process": (56, "17", "0", "0", "0", "0"),
    "clone into a user namespace": (56, "0x10000011", "0", "0", "0", "0"),
    "clone3": (435, "0", "0"),
    "bpf": (321, "0", "0", "0"),
    "io_uring_setup": (425, "8", "ctypes.create_string_buffer(200)"),
    "userfaultfd": (323, "0"),
    "perf_event_open": (298, "ctypes.create_string_buffer(200)", "0", "-1", "-1", "0"),
    "keyctl": (250, "0", "-3", "1"),
    "add_key": (248, "b'user'", "b'k'", "b'v'", "1", "-3"),
    "memfd_create": (319, "b'x'", "0"),
    "shmget": (29, "0", "4096", "0o1600"),
    "mq_open": (240, "b'q'", "0o102", "0o600", "0"),
    "msgget": (68, "0", "0o1600"),
    "semget": (64, "0", "1", "0o1600"),
    "pidfd_getfd": (438, "0", "0", "0"),
    "fsopen": (430, "b'tmpfs'", "0"),
    "open_tree": (428, "-100", "b'/'", "1"),
    "open_by_handle_at": (304, "0", "0", "0"),
    "kexec_load": (246, "0", "0", "0", "0"),
    "init_module": (175, "0", "0", "b''"),
    "swapon": (167, "b'x'", "0"),
    "reboot": (169, "0xfee1dead", "672274793", "0"),
    "settimeofday": (164, "ctypes.create_string_buffer(16)", "0"),
    "personality": (135, "0x40000"),
    "seccomp": (317, "1", "0", "0"),
    "a call newer than the filter": (460, "0", "0", "0", "0"),
    "untie from the template": (157, "1", "0", "0", "0", "0"),
    "execveat": (322, "-100", "b'/x'", "0", "0", "0"),
}

FAMILIES = {
    "inet": 2,
    "inet6": 10,
    "unix": 1,
    "netlink": 16,
    "packet": 17,
    "alg": 38,
    "vsock": 40,
    "bluetooth": 31,
    "tipc": 30,
}

# name: (statuses that are right, text that stdout must hold, snippet)
ATTACKS: dict[str, tuple[tuple[ToolStatus, ...], str, str]] = {
    # processes
    "fork": ((OK,), "held 11", refused("os.fork()")),
    "fork bomb": ((TIMEOUT, ERROR), "", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    "subprocess": ((OK,), "held 11", refused("subprocess.run(['/bin/true'])", ", subprocess")),
    "exec in place": ((OK,), "held 1", refused("os.execv('/usr/bin/true', ['true'])")),
    "daemon that leaves its session": (
        (OK,),
        "held 11",
        refused("os.setsid() if os.getpid() != os.getpgid(0) else 0; os.fork()"),
    ),
    "thread bomb": (
        (OK,),
        "held",
        "import threading, time\ntry:\n"
        "    for _ in range(2000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "except RuntimeError: print('held')",
    ),
    "kill everybody": ((OK,), "held 3", refused("os.kill(-1, 9)")),
    "kill my process group": ((OK,), "alive", "import os, signal\nos.kill(0, 9)\nos.killpg(0, 15)\nprint('alive')"),
    "kill the first process": ((OK,), "alive", "import os\nos.kill(1, 9)\nprint('alive')"),
    "parent is out of sight": ((OK,), "0 1", "import os\nprint(os.getppid(), os.getpid())"),
    "signal by guessed number": (
        (OK,),
        "held",
        "import os\nhit = 0\nfor pid in range(2, 40000):\n"
        "    try: os.kill(pid, 0); hit += 1\n    except ProcessLookupError: pass\n"
        "print('GOT THROUGH' if hit else 'held')",
    ),
    "scheduling class": ((OK,), "held", refused("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))")),
    "raise a limit": (
        (OK,),
        "held",
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('GOT THROUGH')\n"
        "except ValueError: print('held')",
    ),
    "better priority": ((OK,), "held", refused("os.nice(-5)")),
    # time
    "busy for ever": ((TIMEOUT,), "", "while True: pass"),
    "busy in C for ever": ((TIMEOUT,), "", "x = 10**(10**9)"),
    "sleep for ever": ((TIMEOUT,), "", "import time\ntime.sleep(1e6)"),
    "ignore every signal": (
        (TIMEOUT,),
        "",
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(9)",
    ),
    "stop itself": ((TIMEOUT, OK), "", "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(30)"),
    "hang at exit": ((TIMEOUT,), "", "import atexit, time\natexit.register(time.sleep, 1e6)"),
    "thread that outlives main": (
        (TIMEOUT,),
        "",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()",
    ),
    "wait for input": ((ERROR,), "", "input()"),
    "backtracking in the regex engine": ((TIMEOUT,), "", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"),
    # memory and disk
    "one huge list": ((MEMORY,), "", "x = [0] * 10**10"),
    "one huge block caught": ((OK,), "held", "try:\n    bytearray(10**11)\nexcept MemoryError: print('held')"),
    "growing list": ((MEMORY,), "", "x = []\nwhile True: x.append(' ' * 10**6)"),
    "doubling string": ((MEMORY,), "", "s = 'x'\nwhile True: s += s"),
    "numpy array": ((MEMORY,), "", "import numpy\nx = numpy.ones((10**6, 10**4))"),
    "many untouched arrays": ((MEMORY,), "", "import numpy\nx = [numpy.zeros(2 * 10**6) for _ in range(10**4)]"),
    "shared map": ((OK,), "held", refused("mmap.mmap(-1, 10**10)", ", mmap")),
    "zero device map": ((OK,), "held", refused("mmap.mmap(os.open('/dev/zero', os.O_RDWR), 10**10)", ", mmap")),
    "deep recursion": ((ERROR,), "", "def f(n): return f(n + 1)\nf(0)"),
    "recursion without limit": (
        (ERROR, MEMORY, TIMEOUT),
        "",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return [f(n + 1)]\nf(0)",
    ),
    "nested source": ((ERROR,), "", "eval('(' * 10**5 + ')' * 10**5)"),
    "one large file": ((OK,), "held 2", refused("open('x', 'wb').write(bytes(9 << 20))")),
    "many files": (
        (OK,),
        "held",
        refused("[open(str(i), 'wb').write(bytes(1 << 20)) for i in range(30)]"),
    ),
    "all inodes": ((OK,), "held", refused("[os.mkdir(str(i)) for i in range(10**5)]")),
    "all descriptors": ((OK,), "held 24", refused("[os.pipe() for _ in range(1000)]")),
    # output
    "endless stdout": ((OUTPUT,), "", "while True: print('x' * 1000)"),
    "endless stderr": ((OUTPUT,), "", "import sys\nwhile True: sys.stderr.write('x' * 1000)"),
    "closed descriptors": ((OK,), "", "import os\nfor fd in range(3): os.close(fd)"),
    "not text": ((OK,), "\ufffd", "import sys\nsys.stdout.buffer.write(bytes(range(256)))"),
    "lone surrogate": ((OK,), "held", "print('\\ud800')\nprint('held')"),
    "huge integer": ((ERROR,), "", "print(10**5000)"),
    # files of the host
    "shadow file": ((OK,), "held 2", refused("open('/etc/shadow')")),
    "no etc": ((OK,), "held 2", refused("os.listdir('/etc')")),
    "no proc": ((OK,), "held 2", refused("os.listdir('/proc')")),
    "no home": ((OK,), "held 2", refused("os.listdir('/home')")),
    "write to the root": ((OK,), "held 30", refused("open('/x', 'w')")),
    "write to the library": ((OK,), "held", refused("open(os.__file__, 'a')")),
    "write to dev": ((OK,), "held 30", refused("open('/dev/x', 'w')")),
    "shared memory folder": ((OK,), "held 2", refused("open('/dev/shm/x', 'w')")),
    "link to the host": ((OK,), "held 2", refused("os.symlink('/etc/passwd', 'l'); open('l')")),
    "climb out": ((OK,), "held 2", refused("open('../../../../etc/passwd')")),
    "device node": ((OK,), "held 1", refused("os.mknod('d', 0o60600, os.makedev(254, 0))")),
    "run a written program": (
        (OK,),
        "held",
        refused("open('p', 'w').write('#!/bin/sh'); os.chmod('p', 0o755); os.execv('p', ['p'])"),
    ),
    "become root": ((OK,), "held", refused("os.setuid(0)")),
    # further ways, not in any list of attacks we know
    "hard link to a library": ((OK,), "held", refused("os.link(os.__file__, 'l')")),
    "rename the working directory": ((OK,), "held", refused("os.rename('/tmp', '/x')")),
    "make a library writable": ((OK,), "held 30", refused("os.chmod(os.__file__, 0o777)")),
    "set back a library's time": ((OK,), "held 30", refused("os.utime(os.__file__, (0, 0))")),
    "privileged file attribute": (
        (OK,),
        "held",
        refused("open('f', 'w'); os.setxattr('f', 'security.capability', bytes(20))"),
    ),
    "up from the root by a descriptor": (
        (OK,),
        "held",
        "import os\nup = os.open('..', os.O_RDONLY, dir_fd=os.open('/', os.O_RDONLY))\n"
        "print('held' if os.fstat(up).st_ino == os.stat('/').st_ino else 'GOT THROUGH')",
    ),
    "descriptors by path": ((OK,), "held 2", refused("open('/dev/fd/1', 'w')")),
    "load a written library": (
        (OK,),
        "held",
        "import _ctypes, ctypes\nopen('x.so', 'wb').write(open(_ctypes.__file__, 'rb').read())\n"
        "try: ctypes.CDLL('./x.so'); print('GOT THROUGH')\nexcept OSError: print('held')",
    ),
    "sparse file": ((OK,), "held", refused("open('x', 'w').truncate(1 << 40)")),
    "reserve the disk": (
        (OK,),
        "held",
        refused("os.posix_fallocate(os.open('x', os.O_RDWR | os.O_CREAT), 0, 1 << 30)"),
    ),
    "nameless file": (
        (OK,),
        "held",
        refused("open(os.open('.', os.O_TMPFILE | os.O_RDWR), 'wb').write(bytes(9 << 20))"),
    ),
    "folders without end": ((OK,), "held", refused("[(os.mkdir('d'), os.chdir('d')) for _ in range(10**5)]")),
    "widen a pipe": ((OK,), "held", refused("fcntl.fcntl(os.pipe()[1], 1031, 1 << 30)", ", fcntl")),
    "lock memory": (
        (OK,),
        "held",
        "import ctypes, resource\nmay = resource.getrlimit(resource.RLIMIT_MEMLOCK) != (0, 0)\n"
        "print('GOT THROUGH' if may or ctypes.CDLL(None).mlockall(3) == 0 else 'held')",
    ),
    "file watches": (
        (OK,),
        "held",
        "import ctypes\nopened = [ctypes.CDLL(None).inotify_init() for _ in range(200)]\n"
        "print('held' if opened[-1] == -1 else 'GOT THROUGH')",
    ),
    "wait for a lock of its own": ((TIMEOUT,), "", "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()"),
    "storm of signals": (
        (TIMEOUT,),
        "",
        "import os, signal\nsignal.signal(10, lambda *_: None)\nwhile True: os.kill(os.getpid(), 10)",
    ),
    "timer without end": (
        (TIMEOUT,),
        "",
        "import signal\nsignal.signal(14, lambda *_: None)\nsignal.setitimer(0, 1e-4, 1e-4)\nwhile True: pass",
    ),
    "name that looks like a status": (
        (MEMORY,),
        "",
        "import ctypes\nctypes.CDLL(None).prctl(15, b') R 0\\nVmSize:0')\nx = [0] * 10**10",
    ),
    "hide from whoever looks": ((TIMEOUT,), "", "import ctypes\nctypes.CDLL(None).prctl(4, 0)\nwhile True: pass"),
    "hidden, and out of memory": ((MEMORY,), "", "import ctypes\nctypes.CDLL(None).prctl(4, 0)\nx = [0] * 10**10"),
    "large requests from many threads": (
        (OK, ERROR, MEMORY),
        "",
        "import mmap, threading\ndef take():\n    for _ in range(50):\n        try: mmap.mmap(-1, 100 << 20).close()\n"
        "        except OSError: pass\n"
        "threads = [threading.Thread(target=take) for _ in range(8)]\n[t.start() for t in threads]",
    ),
    "exit with a word of ours": ((ERROR,), "", "raise SystemExit('infra_error')"),
    "error that cannot be told": (
        (ERROR,),
        "",
        "class E(Exception):\n    def __str__(self): raise self\n    __repr__ = __str__\nraise E",
    ),
    "errors in a circle": (
        (ERROR,),
        "",
        "a, b = ValueError(), ValueError()\na.__cause__ = b\nb.__cause__ = a\nraise a",
    ),
    "hook on everything": ((OK, ERROR), "", "import sys\nsys.addaudithook(lambda *_: 1 / 0)"),
    "no standard streams": ((OK,), "", "import sys\nsys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None"),
    # forgery
    "exit code of a failed set-up": ((ERROR,), "", "import os\nos._exit(121)"),
    "exit 0 with a forged report": (
        (OK,),
        "infra_error",
        'import os\nprint(\'{"status": "infra_error"}\', flush=True)\nos._exit(0)',
    ),
    "own small CPU limit": (
        (ERROR,),
        "",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
    ),
    "raise MemoryError": ((ERROR,), "", "raise MemoryError"),
    "replace print and exit": ((OK,), "", "import builtins, sys, os\nbuiltins.print = sys.exit = os._exit = None"),
    "interrupt": ((ERROR,), "", "raise KeyboardInterrupt"),
    "segmentation fault": ((ERROR,), "", "import ctypes\nctypes.string_at(0)"),
    "abort": ((ERROR,), "", "import os\nos.abort()"),
}
ATTACKS |= {
    f"socket {name}": ((OK,), "held 1", refused(f"socket.socket({number}, 1)", ", socket"))
    for name, number in FAMILIES.items()
}
ATTACKS |= {
    f"datagram {name}": ((OK,), "held", refused(f"socket.socket({FAMILIES[name]}, 2)", ", socket"))
    for name in ("inet", "vsock")
}
if os.uname().machine == "x86_64":
    ATTACKS |= {f"system call {name}": ((OK,), "held", system_call(*call)) for name, call in X86_CALLS.items()}
    # mov eax, 20; int 0x80; ret / mov eax, 0x40000027; syscall; ret
    for name, code in {"32-bit": "b8 14000000 cd80 c3", "x32": "b8 27000040 0f05 c3"}.items():
        ATTACKS[f"{name} system call"] = (
            (ERROR,),
            "",
            "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\n"
            f"page.write(bytes.fromhex('{code}'))\n"
            "call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
            "print('GOT THROUGH', call(), flush=True)",
        )


@pytest.mark.parametrize("name", ATTACKS)
def test_promise_6_attack(sandbox: Driver, name: str) -> None:
    withstand(sandbox, *ATTACKS[name])


@pytest.mark.skipif(landlock.version() < 5, reason="Landlock of this kernel does not know devices' controls")
def test_landlock_stands_behind_the_other_walls(sandbox: Driver) -> None:
    """Reading the kernel's entropy count is open to everybody and allowed by every other layer."""
    assert "landlock" in jail.JAILED
    ask = "import fcntl, os\nprint(len(fcntl.ioctl(os.open('/dev/random', os.O_RDONLY), 0x80045200, bytes(4))))"
    result = sandbox.run(ask)
    assert (result.status, "Permission denied" in result.stderr) == (ERROR, True), result
    usual = "import os, tempfile\nwith tempfile.TemporaryDirectory() as d:\n    os.rename(d, d + 'x'); os.mkdir(d)\n"
    result = sandbox.run(usual + "open('a', 'w').write('b'); open('/dev/null', 'w').write('c'); os.listdir('/')")
    assert result.status == OK, result


def test_every_exit_code_is_ok_or_error(sandbox: Driver) -> None:
    codes = list(range(0, 256, 5)) + [121, 98]
    results = sandbox.run_all([f"import os; os._exit({code})" for code in codes])
    assert [(r.status, r.exit_code, r.attempts) for r in results] == [
        (ERROR if code else OK, code, 1) for code in codes
    ]


def test_descriptors_are_three_and_none_is_inherited(sandbox: Driver) -> None:
    """Hole 1: a descriptor of the launcher's, however high its number, must not be writable by the snippet."""
    code = (
        "import os\nfound = []\nfor fd in range(70000):\n    try: os.fstat(fd); found.append(fd)\n"
        "    except OSError: pass\nfound"
    )
    reader, writer = os.pipe()
    try:
        os.set_inheritable(writer, True)
        high = os.dup2(writer, 251, inheritable=True)
        with Driver(workers=1, slots=1, preload=()) as other:
            assert other.run(code).stdout == "[0, 1, 2]\n"
        os.close(high)
    finally:
        os.close(reader)
        os.close(writer)
    assert sandbox.run(code).stdout == "[0, 1, 2]\n"
    assert sandbox.run(code, stdin="text").stdout == "[0, 1, 2]\n"


def test_promise_6_nothing_is_left_for_the_next_call(sandbox: Driver) -> None:
    """Hole 2: no writable place is shared between calls, and none lies outside the sized directory."""
    leave = """
import os
written = []
places = [os.getcwd(), "/tmp", "/dev", "/dev/shm", "/", "/usr", "/var/tmp", "/run", os.path.dirname(os.__file__)]
for folder in dict.fromkeys(places):
    try:
        open(folder + "/left", "w").write("x"); written.append(folder)
    except OSError: pass
written == [os.getcwd()]"""
    assert sandbox.run(leave).stdout == "True\n"
    assert sandbox.run("import os; os.listdir('.'), os.path.exists('/tmp/left')").stdout == "([], False)\n"


@pytest.mark.parametrize("filling", [0, 200, 3000, 30_000, 300_000])
def test_promise_6_no_memory_has_the_code_of_calls_before(sandbox: Driver, filling: int) -> None:
    """Hole of our own: a template that keeps orders, or frees them unwiped, hands them to every later child."""
    for number in range(4):
        kept = f"x = 'kept from all {filling} {number}'\n"
        assert sandbox.run(f"{kept}{'#' * filling}\nprint(1)\n{kept}").stdout == "1\n"
    look = f"""
import ctypes, gc, os
import jaxrl.sandbox.orders
libc, near = ctypes.CDLL(None), set()
for thing in [*gc.get_objects(), b"x" * 5000, b"x" * 50000, *vars(jaxrl.sandbox.orders).values()]:
    page = id(thing) >> 12
    near.update(range(page - 40, page + 41))
found, descriptor = 0, os.open("pages", os.O_RDWR | os.O_CREAT)
for page in sorted(near):
    if libc.write(descriptor, ctypes.c_void_p(page << 12), ctypes.c_size_t(4096)) == 4096:  # where there is memory
        data, place = os.pread(descriptor, 4096, 0), -1
        while (place := data.find(b"kept from", place + 1)) >= 0:
            found += data[place + 10:].startswith(b"all {filling} ")
    os.lseek(descriptor, 0, 0)
found, len(near) > 1000"""
    limits = dataclasses.replace(LIMITS, cpu_seconds=20, wall_seconds=60)
    assert sandbox.run(look, limits=limits).stdout == "(0, True)\n"


def test_thread_limit_holds_and_is_not_shared(sandbox: Driver) -> None:
    """Hole 4: the process limit is void for root; here it holds, and calls do not count each other's threads."""
    code = """
import threading
threading.stack_size(64 << 10)
count, end = 1, threading.Event()
try:
    for _ in range(60):
        threading.Thread(target=end.wait, daemon=True).start(); count += 1
except RuntimeError: pass
end.wait(0.3)
print(count)"""
    limits = dataclasses.replace(LIMITS, threads=40)

    async def together() -> list[str]:
        results = await asyncio.gather(*(sandbox.pool.run(code, limits=limits) for _ in range(4)))
        return [result.stdout for result in results]

    assert sandbox.wait(together()) == ["40\n"] * 4


def test_children_are_ordinary_users_to_the_host(sandbox: Driver) -> None:
    """Hole 4: no process of the jail is the host's root."""
    for pid in sandbox.resting():
        users = pathlib.Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[:4]
        assert "0" not in users


def test_no_capability_and_no_way_to_gain_one(sandbox: Driver) -> None:
    """What the kernel says of a running child: no rights, none to be gained, filtered."""
    before = set(sandbox.resting())
    call = asyncio.run_coroutine_threadsafe(sandbox.pool.run("import time; time.sleep(0.5)"), sandbox.loop)
    child = set()
    while not child and not call.done():
        child = set(descendants(sandbox.pool.warden_pid)) - before
    time.sleep(0.1)  # past its set-up
    lines = dict(line.split(":\t") for line in pathlib.Path(f"/proc/{child.pop()}/status").read_text().splitlines())
    assert [int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")
    assert call.result().status is OK


def test_abstract_sockets_of_the_host_are_out_of_reach(sandbox: Driver) -> None:
    """Hole 5: socket() is denied in every family; the pair that event loops need cannot be turned outward."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host:
        host.bind("\0jaxrl-sandbox-test")
        host.setblocking(False)
        code = (
            "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            "there = '\\0jaxrl-sandbox-test'\n"
            "for act in (lambda: a.connect(there), lambda: a.sendto(b'x', there)):\n"
            "    try: act(); print('GOT THROUGH')\n    except OSError: print('held')"
        )
        assert sandbox.run(code).stdout == "held\nheld\n"
        with pytest.raises(BlockingIOError):
            host.recv(10)


def test_event_loops_work(sandbox: Driver) -> None:
    result = sandbox.run("import asyncio\nasync def f(): await asyncio.sleep(0.01); return 5\nasyncio.run(f())")
    assert result.stdout == "5\n", result


def test_environment_is_empty_of_the_host(sandbox: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXRL_TEST_SECRET", "swordfish")
    with Driver(workers=1, slots=1, preload=()) as other:
        listed = other.run("import os; print(sorted(os.environ), 'swordfish' in str(dict(os.environ)))").stdout
    assert "SECRET" not in listed and "PATH" not in listed and listed.endswith("False\n")
