"""What hostile code tries where it may start processes: the walls of every call, and what many processes add."""

import asyncio
import contextlib
import dataclasses
import errno
import os
import pathlib
import signal
from collections.abc import Iterator

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result, cgroups, seccomp, syscalls
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox.driver import LIMITS, Driver
from tests.sandbox.test_attacks import ATTACKS
from tests.sandbox.test_languages import needs

OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
MEMORY, OUTPUT = ToolStatus.OUT_OF_MEMORY, ToolStatus.OUTPUT_LIMIT
PATIENT = dataclasses.replace(LIMITS, cpu_seconds=8.0, wall_seconds=20.0, memory_mib=128)
SHORT = dataclasses.replace(LIMITS, cpu_seconds=0.6, wall_seconds=1.0, memory_mib=128)

# Rows of the table for calls without processes that mean something else here, by reason.
OTHERWISE = {
    "processes and programs are what such a call may have": (
        "fork",
        "subprocess",
        "exec in place",
        "daemon that leaves its session",
        "run a written program",
        "load a written library",
        "system call clone a process",
        "system call execveat",
    ),
    "memory is bounded when it is touched, not when it is asked for": (
        "raise a limit",
        "one huge list",
        "numpy array",
        "many untouched arrays",
        "shared map",
        "zero device map",
        "name that looks like a status",
        "hidden, and out of memory",
    ),
    "a call has its own, which goes with it": ("shared memory folder",),
    "links among programs lead through /etc/alternatives": ("no etc",),
}

# name: (language, statuses that are right, text that stdout must hold, code)
PROCESS_ATTACKS: dict[str, tuple[str, tuple[ToolStatus, ...], str, str]] = {
    "fork bomb of a shell": ("bash", (TIMEOUT, ERROR), "", "bomb() { bomb | bomb & }; bomb; while :; do :; done"),
    "fork bomb that spins": (
        "python",
        (TIMEOUT,),
        "",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ),
    "forks are counted": (
        "python",
        (OK,),
        "31 held",
        "import os, time\nchildren = 0\ntry:\n    while True:\n        if not os.fork(): time.sleep(60); os._exit(0)\n"
        "        children += 1\nexcept BlockingIOError: print(children, 'held')",
    ),
    "threads are counted with processes": (
        "python",
        (OK,),
        "held",
        "import os, threading, time\nthreading.stack_size(65536)\nfor _ in range(20):\n"
        "    if not os.fork(): time.sleep(60); os._exit(0)\ncount = 0\ntry:\n    while count < 40:\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); count += 1\n"
        "except RuntimeError: print('held' if count <= 12 else 'GOT THROUGH'); os._exit(0)",
    ),
    "zombies are counted": (
        "python",
        (OK,),
        "held",
        "import os\ntry:\n    for _ in range(100):\n        if not os.fork(): os._exit(0)\n    print('GOT THROUGH')\n"
        "except BlockingIOError: print('held')",
    ),
    "daemon of its own session": ("bash", (OK,), "left", "(setsid sleep 60 > /dev/null 2>&1 &) & echo left"),
    "daemon that holds the output": ("bash", (OK,), "left", "(setsid sleep 60 &) ; sleep 60 & echo left"),
    "daemon that ignores every signal": (
        "bash",
        (OK,),
        "left",
        "(trap '' HUP INT QUIT TERM CHLD PIPE; while :; do :; done) & disown; echo left",
    ),
    "children whose time nobody collects": (
        "bash",
        (TIMEOUT,),
        "",
        "trap '' CHLD\nfor _ in 1 2 3 4; do (while :; do :; done) & done\nsleep 60",
    ),
    "short children without end": ("bash", (TIMEOUT,), "", "while :; do (:); done"),
    "programs that replace each other without end": ("bash", (TIMEOUT,), "", "exec bash main.sh"),
    "everything stopped": ("bash", (TIMEOUT,), "", "sleep 60 & kill -STOP -1; kill -STOP $$; sleep 60"),
    "kill everybody": ("bash", (OK, ERROR), "", "sleep 60 & kill -9 -1; echo alive"),
    "kill the first process": ("bash", (OK,), "alive", "kill -9 1; kill -TERM 1; echo alive"),
    "ten children of much memory": (
        "python",
        (OK,),
        "[9, 9, 9, 9, 9, 9, 9, 9, 9, 9]",
        "import os\nchildren = []\nfor _ in range(10):\n    child = os.fork()\n    if not child:\n"
        "        bytearray(b'x') * (300 << 20); os._exit(0)\n    children.append(child)\n"
        "print([os.waitpid(child, 0)[1] for child in children])",
    ),
    "ten children of much memory, and failure": (
        "python",
        (MEMORY,),
        "",
        "import os\nfor _ in range(10):\n    if not os.fork(): bytearray(b'x') * (300 << 20); os._exit(0)\n"
        "while True: os.wait()",
    ),
    "memory in files": ("bash", (OK,), "held", "yes > a; head -c 9M /dev/zero > b || echo held"),
    "memory in shared files": (
        "bash",
        (OK,),
        "held",
        "head -c 9M /dev/zero > /dev/shm/a || head -c 9M /dev/zero > /dev/shm/b || echo held",
    ),
    "memory in pipes of many processes": (
        "python",
        (OK, MEMORY),
        "",
        "import os, time\nfor _ in range(25):\n    if not os.fork():\n        try:\n"
        "            while True: os.write(os.pipe()[1], bytes(65536))\n        except OSError: time.sleep(60)\n"
        "time.sleep(0.3)",
    ),
    "root by a program of root's": (
        "bash",
        (OK,),
        "held",
        "for p in $(find /usr/bin -perm -4000) ; do [ -u $p ] && [ $(stat -c %u $p) = 0 ] && echo GOT THROUGH; done\n"
        "su -c id 2>/dev/null | grep -q uid=0 && echo GOT THROUGH\necho held",
    ),
    "root by its own program": (
        "bash",
        (OK,),
        "65534\n6755",
        "cp /usr/bin/id . && chmod 6755 id && ./id -u; stat -c %a id",
    ),
    "namespaces by a program": (
        "bash",
        (OK,),
        "held",
        "unshare -Ur id && echo GOT THROUGH; unshare -m true && echo GOT THROUGH; unshare -p true && echo GOT THROUGH\n"
        "nsenter -t 1 -m true && echo GOT THROUGH; chroot . true && echo GOT THROUGH\n"
        "mount -t tmpfs none /tmp && echo GOT THROUGH; echo held",
    ),
    "files of the host": (
        "bash",
        (OK,),
        "alternatives ld.so.cache held",
        "echo $(ls /etc) $(cat /etc/passwd /etc/shadow /proc/1/environ) $(ls -d /proc /sys /home /var /run /root/*) "
        "held",
    ),
    "writing to programs": (
        "bash",
        (OK,),
        "held",
        "for f in /usr/bin/x /bin/bash /usr/lib/x /etc/x /dev/x /x; do\n"
        "    echo x 2>/dev/null >> $f && echo GOT THROUGH\ndone\n"
        "rm -f /usr/bin/ls && echo GOT THROUGH; mv /usr/bin/ls /tmp && echo GOT THROUGH; echo held",
    ),
    "network by a program": (
        "bash",
        (OK,),
        "held",
        "(echo > /dev/tcp/127.0.0.1/22) 2>/dev/null && echo GOT THROUGH; echo held",
    ),
    "descriptors of ours": (
        "bash",
        (OK,),
        "held",
        "for fd in $(seq 3 63); do (: >&$fd) 2>/dev/null && echo GOT THROUGH $fd; done; echo held",
    ),
    "more than was granted": (
        "bash",
        (OK,),
        "held",
        "ulimit -u 1000 && echo GOT THROUGH; ulimit -n 1000 && echo GOT THROUGH\n"
        "ulimit -f unlimited && echo GOT THROUGH\n"
        "ulimit -t unlimited && echo GOT THROUGH; nice -n -5 true 2>&1 | grep -q 'cannot set' && echo held",
    ),
    "compiler that includes the host's files": (
        "c++",
        (ERROR,),
        "",
        '#include "/etc/passwd"\n#include "/proc/self/environ"\n#include "/etc/shadow"\nint main() {}',
    ),
    "assembler that includes the host's files": (
        "c++",
        (ERROR,),
        "",
        'asm(".incbin \\"/etc/passwd\\"");\nint main() {}',
    ),
    "compiler that reads without end": ("c++", (ERROR, MEMORY, TIMEOUT), "", '#include "/dev/zero"\nint main() {}'),
}


@pytest.fixture
def quiet(sandbox: Driver) -> Iterator[Driver]:
    """The pool with both its jails; afterwards nothing may be left, and both answer."""
    needs("bash")
    sandbox.run("true", language="bash")
    before = sandbox.resting()
    yield sandbox
    healthy = sandbox.run("echo $((6 * 7))", language="bash", limits=PATIENT)
    assert (healthy.status, healthy.stdout, healthy.attempts) == (OK, "42\n", 1), healthy
    healthy = sandbox.run("print(6 * 7)")
    assert (healthy.status, healthy.stdout, healthy.attempts) == (OK, "42\n", 1), healthy
    assert sandbox.resting() == before, "a process survived, or a template was lost"


@pytest.mark.parametrize("name", PROCESS_ATTACKS)
def test_promise_6_attack_with_processes(quiet: Driver, name: str) -> None:
    language, statuses, text, code = PROCESS_ATTACKS[name]
    needs(*{language} - {"python"})
    result = run(quiet, code, language, SHORT if TIMEOUT in statuses else PATIENT)
    assert result.status in statuses, result
    assert "GOT THROUGH" not in result.stdout and "root:x" not in result.stdout + result.stderr, result
    assert text in result.stdout, result
    assert result.attempts == 1, "a snippet must not look like a fault of ours"


def run(driver: Driver, code: str, language: str, limits: Limits) -> Result:
    processes = language == "python"
    return driver.run(code, language=language, processes=processes, limits=limits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTACKS if not any(name in rows for rows in OTHERWISE.values())])
def test_the_walls_are_those_of_every_call(quiet: Driver, name: str) -> None:
    statuses, text, code = ATTACKS[name]
    result = run(quiet, code, "python", LIMITS if TIMEOUT in statuses else PATIENT)
    assert result.status in statuses and text in result.stdout, result
    assert "GOT THROUGH" not in result.stdout and result.attempts == 1, result


def test_a_process_is_cloned_and_a_namespace_is_not() -> None:
    """The filter by itself, as behind it the lack of rights refuses the same."""
    number = {"x86_64": 56, "aarch64": 220}[syscalls.MACHINE]
    namespaces = [1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)]  # mount, cgroup, uts, ipc, user, pid, network
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        answers = []
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.child_filter(processes=True).install()
        for flag in [0, *namespaces]:
            try:
                if not syscalls.raw("clone", number, flag | signal.SIGCHLD, 0, 0, 0, 0):
                    os._exit(0)
                answers.append(0)
            except OSError as error:
                answers.append(error.errno)
        os.write(writer, bytes(answers))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answers:
        assert list(answers.read()) == [0] + [errno.EAGAIN] * len(namespaces)
    os.waitpid(pid, 0)


def test_every_row_is_named_that_means_something_else_here() -> None:
    assert all(name in ATTACKS for rows in OTHERWISE.values() for name in rows)


def test_neighbours_of_one_that_takes_all_memory_are_fine(quiet: Driver) -> None:
    """Ten children of 300 MB die within their call's group; calls beside them, of both kinds, do not notice."""
    _, _, text, hog = PROCESS_ATTACKS["ten children of much memory"]
    place = cgroups.find()
    home = pathlib.Path(place.folders["memory"])
    peaks = [*home.glob("jaxrl-*/memory.max_usage_in_bytes"), *home.glob("jaxrl-*/memory.peak")]
    for peak in peaks:
        with contextlib.suppress(OSError):  # version 2 keeps the peak of all time
            peak.write_text("0")

    async def together() -> list[Result]:
        hogs = [quiet.pool.run(hog, processes=True, limits=PATIENT) for _ in range(2)]
        shells = [quiet.pool.run("x=$(seq 20000); echo ${#x}", language="bash", limits=PATIENT) for _ in range(4)]
        snippets = [quiet.pool.run("len(bytearray(50 << 20))", limits=PATIENT) for _ in range(4)]
        return await asyncio.gather(*hogs, *shells, *snippets)

    results = quiet.wait(together())
    assert [(r.status, r.attempts) for r in results] == [(OK, 1)] * 10, results
    assert [r.stdout for r in results] == [text + "\n"] * 2 + ["108893\n"] * 4 + ["52428800\n"] * 4
    granted = (PATIENT.memory_mib + PATIENT.disk_mib + 16) << 20
    assert all(int(peak.read_text()) <= 6 * granted for peak in peaks), "more than six such calls may have"


def test_nothing_is_left_for_the_next_call(quiet: Driver) -> None:
    """No writable place is shared between calls, or between the two jails."""
    leave = "for d in / /tmp /dev /dev/shm /var/tmp /usr/bin /usr/include /etc /etc/alternatives /run $PWD; do\n"
    leave += "(echo x > $d/left) 2>/dev/null && echo $d; done | sort -u"
    assert run(quiet, leave, "bash", PATIENT).stdout == "/dev/shm\n/tmp\n"
    look = "ls /tmp /dev/shm /left /dev/left 2>/dev/null"
    assert run(quiet, look, "bash", PATIENT).stdout == "/dev/shm:\n\n/tmp:\nmain.sh\n"
    assert quiet.run("import os; os.listdir('/tmp'), os.path.exists('/dev/shm')").stdout == "([], False)\n"


def test_time_of_all_processes_is_counted(quiet: Driver) -> None:
    """Four children whose time no parent collects end the call when together they have used what it has."""
    limits = dataclasses.replace(PATIENT, cpu_seconds=1.0, wall_seconds=60.0)
    result = run(quiet, PROCESS_ATTACKS["children whose time nobody collects"][3], "bash", limits)
    assert result.status is TIMEOUT, result
    assert 1.0 <= result.cpu_seconds < 10.0, result


def test_exit_codes_that_imitate_ours_are_errors(quiet: Driver) -> None:
    for code in (98, 121, 126, 127, 128 + 9, 128 + 24, 255):
        result = run(quiet, f"exit {code}", "bash", PATIENT)
        assert (result.status, result.exit_code, result.attempts) == (ERROR, code, 1), result


def test_a_template_that_dies_under_processes_takes_them_along(sandbox: Driver) -> None:
    """Killed from outside: the call is tried again, and no process of the first try survives."""
    needs("bash")
    sandbox.run("true", language="bash")
    before = set(sandbox.resting())
    call = asyncio.run_coroutine_threadsafe(
        sandbox.pool.run("sleep 60 & sleep 0.5; echo done", language="bash", limits=PATIENT), sandbox.loop
    )
    born: set[int] = set()
    while len(born) < 2 and not call.done():
        born = set(descendants(sandbox.pool.warden_pid)) - before
    parent = int(pathlib.Path(f"/proc/{min(born)}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent in before, "the template"
    os.kill(parent, signal.SIGKILL)
    result = call.result()
    assert (result.status, result.stdout, result.attempts) == (OK, "done\n", 2), result
    after = set(sandbox.resting())
    assert not born & after and len(after) == len(before), "a new template is in the place of the lost one"


@pytest.mark.parametrize("size", [1, 200_000])
@pytest.mark.parametrize("wanted", [(), ("out",)])
@pytest.mark.parametrize("stdin", ["", "abc"])
def test_input_files_and_wanted_files_come_through_together(
    quiet: Driver, stdin: str, wanted: tuple[str, ...], size: int
) -> None:
    """Every descriptor of a call arrives: pipes, input, files, the large call itself, the doors of its groups."""
    files = {"big": b"x" * size}
    result = quiet.run("cat > out; wc -c < big", language="bash", stdin=stdin, wanted=wanted, files=files)
    assert (result.status, result.attempts, result.stdout.strip()) == (ToolStatus.OK, 1, str(size))
    assert result.files == ({"out": stdin.encode()} if wanted else {})
