"""Languages other than Python: every status, files, input, and a compiled program built once."""

import asyncio
import dataclasses
import hashlib
import os
import pathlib

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, SandboxUnavailable, cgroups, languages
from jaxrl.sandbox.bench.processes import descendants
from jaxrl.sandbox.languages import Language
from tests.sandbox.driver import LIMITS, Driver
from tests.sandbox.test_jail import ORDINARY, REPOSITORY, python

OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
MEMORY, OUTPUT = ToolStatus.OUT_OF_MEMORY, ToolStatus.OUTPUT_LIMIT
PATIENT = dataclasses.replace(LIMITS, cpu_seconds=10.0, wall_seconds=20.0, memory_mib=64)

INCLUDE = "#include <cassert>\n#include <cstring>\n#include <iostream>\n#include <unistd.h>\n#include <vector>\n"

# name: (language, status, exit code, text of stdout, text of stderr, code)
ENDS: dict[str, tuple[str, ToolStatus, int | None, str, str, str]] = {
    "bash ok": ("bash", OK, 0, "3\n", "", "echo $((1 + 2))"),
    "bash pipeline": ("bash", OK, 0, "6\n", "", "seq 3 | awk '{ s += $1 } END { print s }'"),
    "bash input": ("bash", OK, 0, "TEXT", "", "tr a-z A-Z"),
    "bash exit code": ("bash", ERROR, 7, "before", "", "echo before; exit 7; echo after"),
    "bash no such program": ("bash", ERROR, 127, "", "line 1: curtains: command not found", "curtains"),
    "bash syntax": ("bash", ERROR, 2, "", "syntax error", "if then"),
    "bash signal": ("bash", ERROR, 139, "", "", "kill -SEGV $$"),
    "bash broken pipe": ("bash", OK, 0, "141 0", "", "yes | head -1 > /dev/null; echo ${PIPESTATUS[@]}"),
    "bash stops at the first failure": ("bash", ERROR, 1, "a", "", "set -e; echo a; false; echo b"),
    "bash busy": ("bash", TIMEOUT, None, "", "", "while :; do :; done"),
    "bash asleep": ("bash", TIMEOUT, None, "before", "", "echo before; sleep 1000"),
    "bash memory": ("bash", MEMORY, 137, "", "", "x=0123456789; while :; do x=$x$x; done"),
    "bash memory of a program": ("bash", MEMORY, 137, "", "Killed", "python3 -c 'bytearray(1 << 28)'; exit $?"),
    "bash memory, noticed": ("bash", OK, 0, "went on", "", "python3 -c 'bytearray(1 << 28)' || echo went on"),
    "bash output": ("bash", OUTPUT, None, "y\n", "", "yes"),
    "c++ ok": ("c++", OK, 0, "14\n", "", "int main() { std::cout << 2 * 7 << std::endl; }"),
    "c++ input": (
        "c++",
        OK,
        0,
        "text!",
        "",
        "int main() { std::string s; std::cin >> s; std::cout << s << '!'; }",
    ),
    "c++ exit code": ("c++", ERROR, 9, "", "", "int main() { return 9; }"),
    "c++ compile error": ("c++", ERROR, 1, "", "'x' was not declared", "int main() { return x; }"),
    "c++ link error": ("c++", ERROR, 1, "", "undefined reference to `f()'", "int f();\nint main() { return f(); }"),
    "c++ assertion": ("c++", ERROR, 134, "", "Assertion `1 > 2' failed", "int main() { assert(1 > 2); }"),
    "c++ exception": ("c++", ERROR, 134, "", "std::out_of_range", "int main() { std::vector<int>().at(0); }"),
    "c++ segmentation fault": ("c++", ERROR, 139, "", "", "int main() { volatile int* p = nullptr; *p = 1; }"),
    "c++ busy": ("c++", TIMEOUT, None, "", "", "int main() { for (volatile int i = 0;; ++i); }"),
    "c++ asleep": ("c++", TIMEOUT, None, "", "", "int main() { sleep(1000); }"),
    "c++ memory": (
        "c++",
        MEMORY,
        137,
        "",
        "",
        "char* kept[1000];\nint main() { for (char*& p : kept) memset(p = new char[1 << 20], 1, 1 << 20); }",
    ),
    "c++ output": ("c++", OUTPUT, None, "x\n", "", 'int main() { for (;;) puts("x"); }'),
}


def needs(*names: str) -> None:
    """Skip where the machine cannot run this."""
    try:
        cgroups.find()
        for name in names:
            languages.named(name)
    except (SandboxUnavailable, cgroups.CgroupsUnavailable) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ENDS)
def test_every_way_to_end(sandbox: Driver, name: str) -> None:
    language, status, exit_code, stdout, stderr, code = ENDS[name]
    needs(language)
    code = INCLUDE + code if language == "c++" else code
    limits = dataclasses.replace(PATIENT, cpu_seconds=0.3, wall_seconds=0.6) if status is TIMEOUT else PATIENT
    result = sandbox.run(code, language=language, stdin="text", limits=limits)
    assert (result.status, result.exit_code, result.attempts) == (status, exit_code, 1), result
    assert stdout in result.stdout and stderr in result.stderr, result
    assert result.stage == ("build" if name in ("c++ compile error", "c++ link error") else "run")
    assert "memory cgroup" in result.isolation


def test_files_in_and_out(sandbox: Driver) -> None:
    needs("bash", "c++")
    script = "sort data/in.csv > out.csv; mkdir deep; cp out.csv deep/copy.txt; ln -s /usr/bin/bash link"
    result = sandbox.run(script, language="bash", files={"data/in.csv": b"b\na\n"}, wanted=["*"], limits=PATIENT)
    assert (result.status, result.files_left_out) == (OK, 0), result
    assert result.files == {"data/in.csv": b"b\na\n", "out.csv": b"a\nb\n", "deep/copy.txt": b"a\nb\n"}

    program = '#include <fstream>\nint main() { int x; std::ifstream("in") >> x; std::ofstream("out") << x * x; }'
    result = sandbox.run(program, language="c++", files={"in": b"12"}, wanted=["*"], limits=PATIENT)
    assert (result.status, result.files) == (OK, {"in": b"12", "out": b"144"}), result
    for name in ("main.cpp", "main/file"):
        with pytest.raises(ValueError, match=r"files \['main.*'\] have the names of the program's own"):
            sandbox.run(program, language="c++", files={name: b""})


def test_a_program_is_built_once_and_its_limits_are_its_own(sandbox: Driver) -> None:
    """What the compiler takes is neither the program's time nor its memory, and is not taken again for other input."""
    needs("bash")
    write = "(echo '#!/usr/bin/bash'; echo \"read x; echo \\$x $RANDOM$RANDOM$RANDOM\") > made; sleep 0.5; cat source"
    language = Language("made up", "source", run=("./made",), build=("bash", "-c", write), program="made")
    limits = dataclasses.replace(PATIENT, wall_seconds=0.4)

    async def together() -> list[str]:
        calls = (sandbox.pool.run("code", language=language, stdin=text, limits=limits) for text in "abc")
        return [result.stdout for result in await asyncio.gather(*calls)]

    outputs = sandbox.wait(together())
    assert [line[:2] for line in outputs] == ["a ", "b ", "c "]
    assert len({line[2:] for line in outputs}) == 1, outputs
    other = sandbox.run("other code", language=language, stdin="a", limits=limits)
    assert other.status is OK and other.stdout != outputs[0]


def test_building_can_fail_in_every_way(sandbox: Driver) -> None:
    needs("bash")

    def build(command: str, **limits: float) -> Language:
        bounds = dataclasses.replace(LIMITS, **({"cpu_seconds": 5.0, "wall_seconds": 10.0} | limits))
        return Language("made up", "source", ("./made",), ("bash", "-c", command), "made", bounds)

    for command, limits, status, stderr in (
        ("echo no >&2; exit 3", {}, ERROR, "no\n"),
        ("while :; do :; done", {"cpu_seconds": 0.2}, TIMEOUT, ""),
        ("x=0123456789; while :; do x=$x$x; done", {"memory_mib": 32}, MEMORY, ""),
        ("yes >&2", {}, OUTPUT, "y\n"),
        ("cp /usr/bin/true made; echo half done >&2; exit 1", {}, ERROR, "half done\n"),
        ("true", {}, ERROR, "bash left no file 'made' of at most files_mib=16"),
        ("truncate -s 2M made", {"files_mib": 1}, ERROR, "bash left no file 'made' of at most files_mib=1"),
    ):
        result = sandbox.run("", language=build(command, **limits))
        assert (result.status, result.stage) == (status, "build"), (command, result)
        assert stderr in result.stderr and result.files == {}, (command, result)


def test_python_that_may_start_processes(sandbox: Driver) -> None:
    needs()
    code = """
import multiprocessing, subprocess, sys
print(subprocess.run([sys.executable, "-c", "import numpy; print(numpy.arange(3).sum())"], capture_output=True).stdout)
print(subprocess.run("echo $HOME | cat", shell=True, capture_output=True, text=True).stdout)
with multiprocessing.Pool(2) as pool:
    print(pool.map(abs, [-1, -2, 3]))
len(sys.path) > 0"""
    result = sandbox.run(code, processes=True, limits=dataclasses.replace(PATIENT, memory_mib=256))
    assert (result.status, result.stdout) == (OK, "b'3\\n'\n/tmp\n\n[1, 2, 3]\nTrue\n"), result
    assert sandbox.run("import os; os.fork()").status is ERROR, "elsewhere nothing has changed"


def test_unknown_and_missing_languages(sandbox: Driver) -> None:
    with pytest.raises(ValueError, match="language='cobol' is not known; choose one of python, bash, c"):
        sandbox.run("", language="cobol")
    needs()
    with pytest.raises(SandboxUnavailable, match="language 'k' needs 'no-such-compiler', not found in /"):
        sandbox.run("", language=Language("k", "main.k", ("./main",), ("no-such-compiler", "main.k"), "main"))


def test_those_who_need_no_second_jail_do_not_pay_for_it() -> None:
    needs("bash")
    with Driver(workers=1, slots=2, preload=()) as driver:
        driver.run("1")
        before = driver.resting()
        assert driver.run("echo", language="bash").status is OK
        assert len(driver.resting()) == len(before) + 2, "a stem and a template"


def test_calls_of_both_jails_run_beside_each_other_and_are_counted_once(sandbox: Driver) -> None:
    needs("bash")

    async def together() -> list[tuple[ToolStatus, str]]:
        bash = [sandbox.pool.run(f"echo {i}", language="bash", limits=PATIENT) for i in range(20)]
        python = [sandbox.pool.run(f"print({i})", limits=PATIENT) for i in range(20)]
        return [(r.status, r.stdout) for r in await asyncio.gather(*bash, *python)]

    assert sandbox.wait(together()) == [(OK, f"{i}\n") for i in range(20)] * 2


def test_many_calls_leave_no_descriptor_and_no_further_group(sandbox: Driver) -> None:
    needs("bash")

    def burst() -> tuple[int, int, int]:
        codes = ["echo", "exit 1", "sleep 60 & echo", "yes", "cat"] * 8

        async def together() -> list[ToolStatus]:
            calls = (sandbox.pool.run(code, language="bash", limits=PATIENT, wanted=["*"]) for code in codes)
            return [result.status for result in await asyncio.gather(*calls)]

        assert sandbox.wait(together()) == [OK, ERROR, OK, OUTPUT, OK] * 8
        warden = pathlib.Path(f"/proc/{sandbox.pool.warden_pid}")
        group = pathlib.Path(cgroups.find().folders["memory"])
        resting = len(sandbox.resting())
        return len(list((warden / "fd").iterdir())), resting, len(list(group.glob("jaxrl-*/[0-9]*")))

    first = burst()
    assert first[2] <= 12, "a group for every call that runs at once"
    for _ in range(2):
        descriptors, resting, groups = burst()
        assert resting == first[1] and groups <= 12
        # A group that was not needed before keeps its doors open: one a hierarchy, four at most.
        assert descriptors <= first[0] + 4 * (groups - first[2])


def test_a_cancelled_call_ends_with_all_its_processes(sandbox: Driver) -> None:
    needs("bash")
    sandbox.run("true", language="bash")
    before = sandbox.resting()

    async def cancel() -> None:
        call = asyncio.create_task(sandbox.pool.run("sleep 60 & sleep 60", language="bash", limits=PATIENT))
        while len(descendants(sandbox.pool.warden_pid)) < len(before) + 3:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    sandbox.wait(cancel())
    assert sandbox.resting() == before


def test_without_isolation_languages_run_too(tmp_path: pathlib.Path) -> None:
    with Driver(workers=1, slots=1, preload=(), unsafe=True) as driver:
        result = driver.run("cat; cat in > out", language="bash", stdin="7", files={"in": b"8"}, wanted=["out"])
    assert (result.status, result.stdout, result.files) == (OK, "7", {"out": b"8"}), result
    assert result.isolation == "unsafe: none"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the right to make cgroups away from root")
def test_no_memory_cgroup_is_a_refusal_unless_that_was_allowed() -> None:
    """As an ordinary user this machine's groups cannot be written to."""
    script = """
import asyncio, json
from jaxrl.sandbox import Limits, Pool, SandboxUnavailable
async def use(**settings):
    async with Pool(Limits(cpu_seconds=9, wall_seconds=20), workers=1, preload=(), **settings) as pool:
        found = [(await pool.run("6 * 7")).stdout]
        try:
            for code in ("echo $((6 * 7))", "python3 -c 'bytearray(1 << 33)'"):
                result = await pool.run(code, language="bash")
                found += [str(result.status), result.stdout, result.isolation, result.stderr]
        except SandboxUnavailable as error:
            found.append(str(error))
        return found
print(json.dumps([asyncio.run(use(processes_without_cgroup=allowed)) for allowed in (False, True)]))"""
    refused, allowed = python(ORDINARY, str(REPOSITORY), script)
    assert refused[0] == "42\n", "Python by itself needs none"
    assert "no memory cgroup can be made here" in refused[1] and "Pool(processes_without_cgroup=True)" in refused[1]
    assert "systemd-run --user --scope" in refused[1]
    assert allowed[1:3] == ["ok", "42\n"] and allowed[3].endswith(
        "each process's memory bounded by itself, not all together"
    )
    assert allowed[5] == "error" and "MemoryError" in allowed[8], "each process is bounded by itself"


def test_limits_of_a_build_can_be_chosen() -> None:
    assert languages.LANGUAGES["c++"].build_limits.cpu_seconds > Limits().cpu_seconds
    with pytest.raises(dataclasses.FrozenInstanceError):
        languages.LANGUAGES["c++"].name = "c"  # type: ignore[misc]


def test_draining_waits_for_the_run_of_what_it_saw_being_built() -> None:
    needs("bash")
    make = "sleep 0.5; (echo '#!/usr/bin/bash'; echo 'sleep 0.3; cat') > made"
    language = Language("slow", "source", run=("./made",), build=("bash", "-c", make), program="made")
    with Driver(workers=1, slots=2, preload=()) as driver:

        async def drained() -> list[tuple[bool, str]]:
            calls = [
                asyncio.create_task(driver.pool.run("code", language=language, stdin=text, limits=PATIENT))
                for text in "ab"
            ]
            await asyncio.sleep(0.2)
            await driver.pool.drain()
            return [(call.done(), (await call).stdout) for call in calls]

        assert driver.wait(drained()) == [(True, "a"), (True, "b")]


@pytest.mark.parametrize("language", ["bash", "c++"])
def test_any_bytes_on_standard_input(sandbox: Driver, language: str) -> None:
    needs(language)
    given = bytes(range(256)) * 40
    code = {
        "bash": "md5sum",
        "c++": """
#include <cstdio>
int main() { unsigned long sum = 0; int c; while ((c = getchar()) != EOF) sum = sum * 31 + c; printf("%lu", sum); }""",
    }[language]
    sum = 0
    for byte in given:
        sum = (sum * 31 + byte) % (1 << 64)
    expected = {"bash": f"{hashlib.md5(given).hexdigest()}  -\n", "c++": str(sum)}[language]
    assert sandbox.run(code, language=language, stdin=given).stdout == expected
