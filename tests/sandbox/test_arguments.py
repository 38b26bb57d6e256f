"""Wrong arguments are refused where they are given: the message has the value, what is wanted and the remedy."""

import asyncio
import math
import os
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import pytest

from jaxrl.sandbox import ClusterPool, Language, Limits, Pool, RunRequest, SandboxClient
from jaxrl.sandbox.grading import CallTest, CodeTest, Grader, StdioTest
from tests.sandbox.driver import Driver, descendants
from tests.sandbox.test_languages import needs

WRONG_FOR_POOLS = [
    ({"limits": 5}, TypeError, "limits=5 is of type int; it must be a sandbox.Limits"),
    ({"workers": 1.5}, TypeError, "workers=1.5 is of type float; it must be a whole number"),
    ({"workers": True}, TypeError, "workers=True is of type bool; it must be a whole number"),
    ({"workers": 0}, ValueError, "workers=0 must be at least 1"),
    ({"slots": "4"}, TypeError, "slots='4' is of type str; it must be a whole number"),
    ({"slots": 0}, ValueError, "slots=0 must be at least 1"),
    ({"slow_slots": -1}, ValueError, "slow_slots=-1 must not be negative; 0 is none"),
    ({"queue": 0}, ValueError, "queue=0 must be at least 1"),
    ({"preload": "numpy"}, TypeError, r"preload='numpy' is a single str; give a sequence, \('numpy',\)"),
    ({"preload": ("numpy", 3)}, TypeError, "an entry of preload=3 is of type int; it must be str"),
    ({"unsafe": "no"}, TypeError, "unsafe='no' is of type str; it must be True or False"),
    ({"heartbeat_seconds": "8"}, TypeError, "heartbeat_seconds='8' is of type str; it must be a number"),
    ({"heartbeat_seconds": 0.0}, ValueError, "heartbeat_seconds=0.0 must be above 0"),
    ({"heartbeat_seconds": math.nan}, ValueError, "heartbeat_seconds=nan must be above 0"),
    ({"processes_without_cgroup": 1}, TypeError, "processes_without_cgroup=1 is of type int; it must be True or False"),
    ({"recycle_calls": 0}, ValueError, "recycle_calls=0 must be at least 1"),
    ({"recycle_growth_mib": 0}, ValueError, "recycle_growth_mib=0 must be at least 1"),
    ({"session_memory_mib": 0}, ValueError, "session_memory_mib=0 must be at least 1"),
    ({"program_folders": "/opt"}, TypeError, "program_folders='/opt' is a single str"),
    ({"program_folders": ("opt",)}, ValueError, "program_folders names 'opt', which is relative; give its path from /"),
]

WRONG_CALLS = [
    ({"code": b"1"}, "code=b'1' is of type bytes; it must be str"),
    ({"code": None}, "code=None is of type NoneType; it must be str"),
    ({"code": "1", "stdin": 1}, "stdin=1 is of type int; it must be str or bytes"),
    ({"code": "1", "echo": "no"}, "echo='no' is of type str; it must be True or False"),
    ({"code": "1", "limits": {"cpu_seconds": 1}}, "it must be a sandbox.Limits, or None for the pool's"),
    ({"code": "1", "tenant": 7}, "tenant=7 is of type int; it must be str"),
    ({"code": "1", "files": ["a"]}, "files=.* is of type list; it must be a mapping from relative path to bytes"),
    ({"code": "1", "files": {"a": "text"}}, r"files\['a'\]='text' is of type str; it must be bytes; .* text.encode()"),
    ({"code": "1", "files": {"a": bytearray(b"1")}}, r"files\['a'\]=.* of type bytearray; it must be bytes"),
    ({"code": "1", "files": {"a": memoryview(b"1")}}, r"files\['a'\]=.* of type memoryview; it must be bytes"),
    ({"code": "1", "wanted": "*.png"}, r"wanted='\*.png' is a single str; give a sequence"),
    ({"code": "1", "language": None}, "language=None is of type NoneType; it must be a name or a sandbox.Language"),
    ({"code": "1", "processes": 1}, "processes=1 is of type int; it must be True or False"),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG_FOR_POOLS)
@pytest.mark.parametrize("kind", [Pool, lambda **given: ClusterPool("auto", **given)], ids=["Pool", "ClusterPool"])
def test_pools(kind: Callable[..., Any], given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kind(**given)


@pytest.mark.parametrize(("given", "words"), WRONG_CALLS)
def test_calls(sandbox: Driver, given: dict, words: str) -> None:
    """Whether the pool is open or not."""
    closed, cluster, client = Pool(preload=()), ClusterPool("auto", preload=()), SandboxClient("http://127.0.0.1:1")
    for run in (sandbox.pool.run, closed.run, cluster.run, client.run):
        with pytest.raises(TypeError, match=words):
            sandbox.wait(run(**given))


@pytest.mark.parametrize(
    ("given", "words"), [(given, words) for given, words in WRONG_CALLS if given.keys() <= {"code", "echo", "files"}]
)
def test_cells(sandbox: Driver, given: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        sandbox.wait(sandbox.pool.session().run(**given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limits": 3}, "limits=3 is of type int"),
        ({"tenant": None}, "tenant=None is of type NoneType; it must be str"),
        ({"checkpoint": 1}, "checkpoint=1 is of type int; it must be True or False"),
        ({"live": "no"}, "live='no' is of type str; it must be True or False"),
    ],
)
def test_sessions(sandbox: Driver, given: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        sandbox.pool.session(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"files": {"a\udc80": b""}}, r"a path in files='a\\udc80' holds half a surrogate pair.*leave it out"),
        ({"wanted": ["a\udc80*"]}, r"an entry of wanted='a\\udc80\*' holds half a surrogate pair"),
        ({"wanted": ["*.txt", "../*"]}, r"wanted names '../\*', which leads out of the working directory; give"),
        ({"wanted": ["a/../b"]}, "wanted names 'a/../b', which leads out"),
        ({"wanted": ["/etc/*"]}, r"wanted names '/etc/\*', which leads out"),
    ],
)
def test_paths(sandbox: Driver, given: dict, words: str) -> None:
    cluster, client = ClusterPool("auto", preload=()), SandboxClient("http://127.0.0.1:1")
    for run in (sandbox.pool.run, cluster.run, client.run, sandbox.pool.session().run):
        with pytest.raises(ValueError, match=words) as caught:
            sandbox.wait(run("1", **given))
        assert not isinstance(caught.value, UnicodeError)
    assert sandbox.run("open('..a', 'w').close()", wanted=["..*"]).files == {"..a": b""}


def test_tenants(sandbox: Driver) -> None:
    words = r"tenant='\\udc80' holds half a surrogate pair"
    for use in (
        lambda: sandbox.run("1", tenant="\udc80"),
        lambda: sandbox.pool.session(tenant="\udc80"),
        lambda: Grader(sandbox.pool, tenant="\udc80"),
    ):
        with pytest.raises(ValueError, match=words):
            use()


def test_more_copies_than_are_made_at_once(sandbox: Driver) -> None:
    with pytest.raises(ValueError, match="copies=1000000000 must be at most 4096; fork several times"):
        sandbox.wait(sandbox.pool.session().fork(10**9))


@pytest.mark.parametrize("copies", [1.5, "2", True])
def test_numbers_of_copies(sandbox: Driver, copies: Any) -> None:
    with pytest.raises(TypeError, match=f"copies={copies!r} is of type .*; it must be a whole number"):
        sandbox.wait(sandbox.pool.session().fork(copies))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory_mib": 64.0}, r"Limits.memory_mib=64.0 is of type float; it must be a whole number"),
        ({"threads": "9"}, r"Limits.threads='9' is of type str; it must be a number"),
        ({"cpu_seconds": None}, r"Limits.cpu_seconds=None is of type NoneType; it must be a number"),
        ({"processes": True}, r"Limits.processes=True is of type bool; it must be a number"),
    ],
)
def test_limits(given: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Limits(**given)


@pytest.mark.parametrize(
    ("name", "number"), [("open_files", resource.RLIMIT_NOFILE), ("threads", resource.RLIMIT_NPROC)]
)
def test_limits_beyond_those_of_this_process_are_no_fault_of_ours(sandbox: Driver, name: str, number: int) -> None:
    most = resource.getrlimit(number)[1]
    if not 0 < most < 1 << 31:
        pytest.skip(f"this process has no limit of {name}")
    assert sandbox.run("1", limits=Limits(**{name: most})).status == "ok"
    with pytest.raises(ValueError, match=rf"Limits.{name}={most + 1} must be at most {most}.*ulimit -H"):
        sandbox.run("1", limits=Limits(**{name: most + 1}))
    with pytest.raises(ValueError, match=f"Limits.{name}"):
        Pool(Limits(**{name: most + 1}), preload=())


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"run": "./main"}, TypeError, "Language.run='./main' is a single str"),
        ({"run": ()}, ValueError, r"Language.run=\(\) must name a program"),
        ({"source": "a/b.c"}, ValueError, "Language.source='a/b.c' must be the name of a file, without folders"),
        ({"source": ""}, ValueError, "Language.source='' must be the name of a file"),
        ({"program": "../main"}, ValueError, "Language.program='../main' must be the name of a file"),
        ({"build": ("gcc", "main.c")}, ValueError, "makes a file, but Language.program does not name it"),
        ({"build_limits": 60}, TypeError, "Language.build_limits=60 is of type int"),
    ],
)
def test_languages(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Language(**{"name": "c", "source": "main.c", "run": ("./main",)} | given)


@pytest.mark.parametrize("address", ["junk", "", "host:", ":6379", "host:port", "ray://host:6379/x"])
def test_addresses_of_clusters(address: str) -> None:
    with pytest.raises(ValueError, match='must be "auto" or "host:port", such as "10.0.0.1:6379"'):
        ClusterPool(address, preload=())


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"url": "127.0.0.1:8780"}, ValueError, "url='127.0.0.1:8780' must begin with http:// or https:// and a host"),
        ({"url": "http://"}, ValueError, "url='http://' must begin with"),
        ({"url": None}, TypeError, "url=None is of type NoneType"),
        ({"token": b"x"}, TypeError, "token=b'x' is of type bytes; it must be str"),
        ({"token": "x\n"}, ValueError, "token holds white space"),
        ({"patience_seconds": 0}, ValueError, "patience_seconds=0 must be above 0"),
        ({"silence_seconds": "9"}, TypeError, "silence_seconds='9' is of type str"),
        ({"connections": 0}, ValueError, "connections=0 must be at least 1"),
    ],
)
def test_clients(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SandboxClient(**{"url": "http://127.0.0.1:8780"} | given)


def test_batches_of_clients(sandbox: Driver) -> None:
    async def first(calls: Any) -> object:
        return await anext(SandboxClient("http://127.0.0.1:1").run_batch(calls))

    for calls in (RunRequest("1"), iter([])):
        with pytest.raises(TypeError, match="calls=.* it must be a sequence of sandbox.RunRequest"):
            sandbox.wait(first(calls))
    for calls in ("1 + 1", ["1 + 1"]):
        with pytest.raises(TypeError, match="an entry of calls='1.*' is of type str; it must be a sandbox.RunRequest"):
            sandbox.wait(first(calls))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: StdioTest(5, "5"), TypeError, "StdioTest.stdin=5 is of type int; it must be str or bytes"),
        (lambda: StdioTest("5", 5), TypeError, "StdioTest.expected=5 is of type int; it must be str"),
        (lambda: StdioTest("5", "5", tolerance=-1.0), ValueError, "StdioTest.tolerance=-1.0 must not be negative"),
        (lambda: CallTest(max, [1], 1), TypeError, "CallTest.function=.* it must be the function's name"),
        (lambda: CallTest("f", 1, 1), TypeError, "CallTest.arguments=1 is of type int; it must be a list or tuple"),
        (lambda: CallTest("f", "ab", 1), TypeError, "CallTest.arguments='ab' is of type str"),
        (lambda: CallTest("f", [1], 1, keywords=[]), TypeError, "CallTest.keywords"),
        (lambda: CallTest("f", [1], 1, tolerance="x"), TypeError, "CallTest.tolerance='x' is of type str"),
        (
            lambda: StdioTest("5", "5", language="java"),
            ValueError,
            "language='java' is not known; choose",
        ),
        (lambda: CallTest("", [1], 1), ValueError, "CallTest.function='' is no name of a function"),
        (lambda: CallTest("a;b", [1], 1), ValueError, "CallTest.function='a;b' is no name of a function"),
        (lambda: CallTest("no such", [1], 1), ValueError, "CallTest.function='no such' is no name"),
        (lambda: CallTest("f # x", [1], 1), ValueError, "CallTest.function='f # x' is no name"),
        (lambda: CallTest("None", [1], 1), ValueError, "CallTest.function='None' is no name"),
        (lambda: CallTest("lambda: f", [1], 1), ValueError, "CallTest.function='lambda: f' is no name"),
        (lambda: CallTest("f", [1], 1, {"a b": 1}), ValueError, "CallTest.keywords names 'a b'"),
        (lambda: CodeTest(""), ValueError, "CodeTest.code='' tests nothing"),
        (lambda: CodeTest("\n # later\n"), ValueError, "CodeTest.code=.* tests nothing"),
        (lambda: CodeTest(b"assert f(1)"), TypeError, "CodeTest.code=b'assert.*it must be str"),
    ],
)
def test_tests(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_graders(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    for given in ({"limits": 2}, {"hidden_only": 1}, {"tenant": None}, {"cache_entries": 1.5}, {"cache_folder": 7}):
        with pytest.raises(TypeError, match=f"{next(iter(given))}={next(iter(given.values()))} is of type"):
            Grader(sandbox.pool, **given)
    with pytest.raises(TypeError, match="pool=None runs nothing; give an open Pool"):
        Grader(None)
    grader = Grader(sandbox.pool, cache_folder=str(tmp_path / "kept"))
    test = CallTest("f", [1], 1)
    assert sandbox.wait(grader.grade("def f(x): return x", test)).passed
    assert list((tmp_path / "kept").rglob("*.json"))
    with pytest.raises(TypeError, match="programs='def f.*' is a single str"):
        sandbox.wait(grader.matrix("def f(x): return x", [test]))
    with pytest.raises(TypeError, match="tests=.* it must be a sequence of tests"):
        sandbox.wait(grader.matrix(["def f(x): return x"], test))
    with pytest.raises(TypeError, match="test='assert f' is of type str; it must be a CallTest, CodeTest or StdioTest"):
        sandbox.wait(grader.grade("def f(x): return x", "assert f"))


@pytest.mark.parametrize(
    "folder", ["/", "/etc", "/root", "/home", "/var", "/tmp", "/proc/self", "/dev", "/dev/shm", "/sys", "/run/secrets"]
)
def test_folders_that_would_show_what_code_must_not_see(folder: str) -> None:
    with pytest.raises(ValueError, match=f"program_folders names '{folder}', which would show /.* to the code; give"):
        Pool(program_folders=(folder,), preload=())


def test_the_home_folder_and_its_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    for folder in ("", ".ssh/more", "tools/bin"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "alias").symlink_to(home)
    for folder in (tmp_path, home, home / ".ssh", home / ".ssh" / "more", home / "tools" / "..", tmp_path / "alias"):
        with pytest.raises(ValueError, match="which would show"):
            Pool(program_folders=(str(folder),), preload=())
    Pool(program_folders=(str(home / "tools" / "bin"),), preload=())


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="program_folders names '/opt/no-such', which is no folder here: install it"):
        Pool(program_folders=("/opt/no-such",), preload=())
    ClusterPool("auto", program_folders=("/opt/no-such",), preload=())  # the nodes may have it


def test_a_program_of_a_folder_runs_also_by_a_linked_name(tmp_path: pathlib.Path) -> None:
    needs("bash")
    tools = tmp_path / "tools-1.2"
    tools.mkdir()
    for path in (tmp_path, tools):
        path.chmod(0o755)
    (tools / "shout").write_text("#!/bin/bash\ntr a-z A-Z < $1\n")
    (tools / "shout").chmod(0o755)
    (tmp_path / "tools").symlink_to(tools)
    linked = str(tmp_path / "tools")
    language = Language("shout", "text", (f"{linked}/shout", "text"))
    with Driver(program_folders=(linked,), workers=1, preload=(), limits=None) as driver:
        result = driver.run("hello", language=language)
        assert (str(result.status), result.stdout) == ("ok", "HELLO"), result.stderr
        seen = driver.run(f"import os; print(os.path.isdir({os.fspath(tools)!r}))")
    assert seen.stdout == "False\n"  # calls that start no programs do not need it


def test_nothing_is_started_for_arguments_that_are_refused() -> None:
    before = set(descendants(os.getpid()))

    async def refused() -> None:
        with pytest.raises(TypeError):
            async with Pool(slots=1.5, preload=()):
                raise AssertionError("a pool with half a slot was opened")

    asyncio.run(refused())
    assert set(descendants(os.getpid())) <= before
