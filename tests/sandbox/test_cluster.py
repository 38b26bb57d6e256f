"""The pool over Ray: every call answered once and rightly, whatever is killed."""

import asyncio
import importlib.util
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
import unittest.mock
from collections.abc import Awaitable, Callable

import pytest

from jaxrl import __version__
from jaxrl.config import ConfigError, SandboxConfig
from jaxrl.envs.python_tool import PythonTool
from jaxrl.sandbox import ClusterPool, Limits, Pool, Result, SandboxUnavailable, pool_from_config
from jaxrl.sandbox.bench.processes import descendants, is_alive
from jaxrl.sandbox.node import unfinished
from jaxrl.sandbox.node_orders import CallOrder
from jaxrl.statuses import ToolStatus
from tests.sandbox.driver import LIMITS
from tests.sandbox.ray_nodes import RayNodes, in_cluster, on_common_pool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "jaxrl[ray]"')

OK = ToolStatus.OK


def pool_on(nodes: RayNodes, **settings: object) -> ClusterPool:
    return ClusterPool(nodes.address, **{"limits": LIMITS, "workers": 1, "slots": 2, "preload": ()} | settings)


async def run_all(pool: ClusterPool, codes: list[str]) -> list[Result]:
    return await asyncio.gather(*(pool.run(code) for code in codes))


async def ends(*work: Awaitable[object]) -> list[object]:
    """Results and exceptions."""
    return await asyncio.gather(*work, return_exceptions=True)


async def while_running(pool: ClusterPool, codes: list[str], act: Callable[[], None]) -> list[Result]:
    """Results of the calls; ``act`` is done once, when a few have ended."""
    tasks = [asyncio.create_task(pool.run(code)) for code in codes]
    await until(lambda: sum(task.done() for task in tasks) >= 5)
    await asyncio.to_thread(act)
    assert not all(task.done() for task in tasks)
    return await asyncio.gather(*tasks)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120.0):
        while not condition():
            await asyncio.sleep(0.05)


def running_calls(actor: int) -> dict[int, int]:
    """Processes that run code of calls, each with its template: those in a process namespace of their own."""
    templates = [template for warden in children(actor) for stem in children(warden) for template in children(stem)]
    return {child: template for template in templates for child in children(template) if in_own_namespace(child)}


def in_own_namespace(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    (numbers,) = (line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
    return len(numbers) > 1


def children(pid: int) -> list[int]:
    try:
        lists = [path.read_text() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for text in lists for word in text.split()]


def ray_is_connected() -> bool:
    import ray

    return ray.is_initialized()


# Statuses, and which call comes when


@on_common_pool
async def test_each_call_has_its_own_answer_from_some_node(nodes: RayNodes, pool: ClusterPool) -> None:
    results = await run_all(pool, [f"print({n})" for n in range(400)])
    assert [(result.status, result.stdout) for result in results] == [(OK, f"{n}\n") for n in range(400)]
    assert len(pool.nodes) == 2 and {result.node for result in results} == set(pool.nodes)
    assert {result.attempts for result in results} == {1}


@on_common_pool
async def test_results_are_those_of_a_pool(nodes: RayNodes, pool: ClusterPool) -> None:
    error, busy, asleep, large, given = await asyncio.gather(
        pool.run("import sys; print(sys.stdin.read()); 1 / 0", stdin="line"),
        pool.run("while True: pass"),
        pool.run("import time; time.sleep(60)", limits=Limits(wall_seconds=0.5)),
        pool.run("x = bytearray(1 << 30)"),
        pool.run("open('b', 'w').write(open('a').read() * 2)", files={"a": b"\xf0\x9f"}, wanted=["b"], tenant="t"),
    )
    assert (error.status, error.stdout, error.exit_code) == (ToolStatus.ERROR, "line\n", 1)
    assert "ZeroDivisionError" in error.stderr
    assert busy.status is ToolStatus.TIMEOUT and asleep.status is ToolStatus.TIMEOUT
    assert large.status is ToolStatus.OUT_OF_MEMORY
    assert given.status is ToolStatus.ERROR and "UnicodeDecodeError" in given.stderr
    copied = await pool.run("open('b', 'wb').write(open('a', 'rb').read())", files={"a": b"\xff"}, wanted=["b"])
    assert dict(copied.files) == {"b": b"\xff"}
    with pytest.raises(ValueError, match="relative"):
        await pool.run("1", files={"/a": b""})


@on_common_pool
async def test_slow_call_does_not_hold_its_batch(nodes: RayNodes, pool: ClusterPool) -> None:
    slow = asyncio.create_task(pool.run("import time; time.sleep(3)", limits=Limits(wall_seconds=60)))
    quick = await run_all(pool, ["1"] * 30)  # leave in the same turn of the event loop, so in the same batch
    assert not slow.done()
    assert {result.status for result in quick} == {OK}
    assert (await slow).status is OK


@on_common_pool
async def test_nodes_hold_no_more_than_their_window(nodes: RayNodes, pool: ClusterPool) -> None:
    tasks = [asyncio.create_task(pool.run(f"{n}")) for n in range(200)]
    free = set()
    while not all(task.done() for task in tasks):
        free |= {link.free for link in pool._members.living}
        await asyncio.sleep(0.001)
    assert min(free) == 0 and max(free) <= 5
    assert [task.result().stdout for task in tasks] == [f"{n}\n" for n in range(200)]
    assert [link.free for link in pool._members.living] == [5, 5]


@on_common_pool
async def test_tenants_take_turns(nodes: RayNodes, pool: ClusterPool) -> None:
    flood = [asyncio.create_task(pool.run("1", tenant="many")) for _ in range(200)]
    await asyncio.sleep(0)
    assert (await pool.run("2", tenant="one")).stdout == "2\n"
    assert sum(task.done() for task in flood) < 50
    await asyncio.gather(*flood)


class Unwritable(str):
    """Code that no message can hold."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("not to be written down")


@on_common_pool
async def test_arguments_that_cannot_be_sent_keep_no_room_and_lose_no_node(nodes: RayNodes, pool: ClusterPool) -> None:
    """Calls that leave in one batch with one that cannot be written down are none the worse for it."""
    for wrong in ({"code": None}, {"code": b"1"}, {"code": "1", "stdin": None}, {"code": "1", "wanted": "*"}):
        with pytest.raises(TypeError):
            await pool.run(**wrong)  # type: ignore[arg-type]
    before, *good = await ends(pool.run(Unwritable("1")), *(pool.run(f"{n}") for n in range(5)))
    assert isinstance(before, ValueError) and "cannot be sent to a node" in str(before)
    assert [result.stdout for result in good] == [f"{n}\n" for n in range(5)]
    assert [link.free for link in pool._members.living] == [5, 5]


@on_common_pool
async def test_pool_of_another_event_loop_says_so(nodes: RayNodes, pool: ClusterPool) -> None:
    for work in (pool.run("1"), pool.session().run("1"), pool.close()):
        with pytest.raises(RuntimeError, match="started in another event loop"):
            await asyncio.to_thread(asyncio.run, work)


@on_common_pool
async def test_arguments_that_a_node_refuses_are_the_callers_mistake(nodes: RayNodes, pool: ClusterPool) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(ValueError, match=f"open_files={most + 1} must be at most {most}"):
        await pool.run("1", limits=Limits(open_files=most + 1))
    with pytest.raises(ValueError, match="language='klingon' is not known"):
        await pool.run("1", language="klingon")
    assert (await pool.run("1")).attempts == 1 and len(pool.nodes) == 2


@in_cluster
async def test_starting_twice_starts_one_pool_on_each_node(nodes: RayNodes) -> None:
    nodes.have(1)
    pool = pool_on(nodes)
    first = asyncio.create_task(pool.start())
    await asyncio.sleep(0)
    await pool.start()
    assert first.done() and len(pool.nodes) == 1, "one that comes while another is under way waits for that"
    async with pool:
        before = nodes.all_actors()
        assert nodes.all_actors() == before and len(before) == 1
        assert (await pool.run("7")).stdout == "7\n"
    await until(lambda: not any(map(is_alive, before)))


# What is killed


@pytest.mark.slow
@in_cluster
async def test_killed_pool_loses_no_call_and_leaves_no_process(nodes: RayNodes) -> None:
    nodes.have(2)
    async with pool_on(nodes) as pool:
        victim = nodes.actors(0)[0]
        below = descendants(victim)
        codes = ["import time; time.sleep(0.1); print('done')"] * 100
        results = await while_running(pool, codes, lambda: os.kill(victim, signal.SIGKILL))
        assert {(result.status, result.stdout) for result in results} == {(OK, "done\n")}
        assert {result.attempts for result in results} == {1, 2}
        await until(lambda: not any(map(is_alive, below)))
        assert len(below) >= 3
        await until(lambda: len(pool.nodes) == 2)  # the node has a new pool
        again = await run_all(pool, ["1"] * 50)
        assert {result.node for result in again} == set(pool.nodes)


@pytest.mark.slow
@in_cluster
async def test_killed_node_loses_no_call(nodes: RayNodes) -> None:
    nodes.have(2)
    async with pool_on(nodes) as pool:
        first, second = pool.nodes
        codes = ["import time; time.sleep(0.1); print('done')", "1 / 0", "print('x' * 10**5)"] * 40
        results = await while_running(pool, codes, lambda: nodes.kill_node(0))
        assert [result.status for result in results] == [OK, ToolStatus.ERROR, OK] * 40
        assert {result.attempts for result in results} == {1, 2}
        await until(lambda: len(pool.nodes) == 1)
        remaining = set(pool.nodes)
        assert remaining < {first, second}
        assert {result.node for result in results if result.attempts == 2} == remaining


@pytest.mark.slow
@in_cluster
async def test_killed_agent_of_ray_takes_its_pool_along_and_loses_no_call(nodes: RayNodes) -> None:
    nodes.have(2)
    async with pool_on(nodes) as pool:
        below: list[int] = []
        codes = ["import time; time.sleep(0.1); print('done')"] * 100
        results = await while_running(pool, codes, lambda: below.extend(nodes.kill_node(0, only_agent=True)))
        assert {(result.status, result.stdout) for result in results} == {(OK, "done\n")}
        await until(lambda: not any(map(is_alive, below)))
        assert len(below) >= 4


@pytest.mark.slow
@in_cluster
async def test_many_calls_at_once_with_a_node_killed_half_way(nodes: RayNodes) -> None:
    """``benchmarks/cluster.py`` does the same with 45,000."""
    nodes.have(2)
    answers: list[tuple[int, Result]] = []

    async def one(number: int) -> None:
        answers.append((number, await pool.run(f"print({number})")))

    async with pool_on(nodes) as pool:
        tasks = [asyncio.create_task(one(number)) for number in range(4000)]
        await until(lambda: len(answers) >= 2000)
        nodes.kill_node(0)
        await asyncio.gather(*tasks)
    assert sorted(number for number, _ in answers) == list(range(4000))
    assert all((result.status, result.stdout) == (OK, f"{number}\n") for number, result in answers)
    assert 0 < sum(result.attempts > 1 for _, result in answers) < 100


@in_cluster
async def test_node_that_joins_later_is_used(nodes: RayNodes) -> None:
    nodes.have(1)
    async with pool_on(nodes) as pool:
        (before,) = pool.nodes
        nodes.add_node()
        await until(lambda: len(pool.nodes) == 2)
        results = await run_all(pool, ["1"] * 50)
        assert {result.node for result in results} == set(pool.nodes) > {before}


@pytest.mark.slow
@in_cluster
async def test_halted_pool_is_noticed(nodes: RayNodes) -> None:
    nodes.have(2)
    async with pool_on(nodes, silence_seconds=2.0) as pool:
        victim = nodes.actors(0)[0]
        below = [victim, *descendants(victim)]
        os.kill(victim, signal.SIGSTOP)
        results = await run_all(pool, [f"{n}" for n in range(200)])
        assert [(result.status, result.stdout) for result in results] == [(OK, f"{n}\n") for n in range(200)]
        await until(lambda: not any(map(is_alive, below)))
        await until(lambda: len(pool.nodes) == 2)


@pytest.mark.slow
@in_cluster
async def test_call_that_a_node_gives_up_is_tried_on_another(nodes: RayNodes) -> None:
    """Three templates lost under it make a call a fault of ours on that node; the next node brings it to its end."""
    nodes.have(2)
    async with pool_on(nodes) as pool:
        call = asyncio.create_task(pool.run("import time; time.sleep(4); 'end'", limits=Limits(wall_seconds=60)))
        actors = [nodes.actors(index)[0] for index in range(2)]
        await until(lambda: any(map(running_calls, actors)))
        actor = next(filter(running_calls, actors))
        killed: dict[int, int] = {}
        while len(killed) < 3 and not call.done():
            for child, template in running_calls(actor).items():
                if child not in killed:
                    killed[child] = template
                    os.kill(template, signal.SIGKILL)
            await asyncio.sleep(0.1)
        result = await call
        assert (result.status, result.stdout, result.attempts) == (OK, "'end'\n", 4), (result, killed)
        assert len(killed) == 3


@pytest.mark.slow
@in_cluster
async def test_cluster_without_nodes(nodes: RayNodes) -> None:
    nodes.have(1)
    async with pool_on(nodes, patience_seconds=3.0) as pool:
        running = asyncio.create_task(pool.run("import time; time.sleep(50)", limits=Limits(wall_seconds=60)))
        await asyncio.sleep(0.3)
        nodes.have(0)
        result, late = await asyncio.gather(running, pool.run("1"))
        assert (result.status, late.status) == (ToolStatus.INFRA_ERROR, ToolStatus.INFRA_ERROR)
        assert "no node for 3 s" in result.stderr and pool.nodes == []
        assert (await pool.run("1")).status is ToolStatus.INFRA_ERROR  # known by now: no wait
        nodes.add_node()
        await until(lambda: len(pool.nodes) == 1)
        assert (await pool.run("1")).stdout == "1\n"


# Cancelling, beginning and end


@on_common_pool
async def test_cancelling(nodes: RayNodes, pool: ClusterPool) -> None:
    """Calls that run, that wait on a node, that wait here, and one that has just left."""

    actors = nodes.all_actors()

    def running() -> int:
        return sum(len(running_calls(actor)) for actor in actors)

    code, limits = "import time; time.sleep(60)", Limits(wall_seconds=100)
    tasks = [asyncio.create_task(pool.run(code, limits=limits)) for _ in range(15)]
    await until(lambda: running() == 4)
    for task in tasks:
        task.cancel()
    tasks.append(asyncio.create_task(pool.run(code, limits=limits)))
    await asyncio.sleep(0)
    tasks[-1].cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await ends(*tasks))
    await until(lambda: running() == 0)
    await until(lambda: [link.free for link in pool._members.living] == [5, 5])
    assert {result.status for result in await run_all(pool, ["1"] * 20)} == {OK}


@pytest.mark.slow
@in_cluster
async def test_close_leaves_nothing_and_the_pool_opens_again(nodes: RayNodes) -> None:
    """Of more calls than may wait on the nodes."""
    nodes.have(2)
    pool = pool_on(nodes)
    on_termination = signal.getsignal(signal.SIGTERM)  # the trainer's own, in a run
    seen: list[int] = []
    for _ in range(2):
        async with pool:
            tasks = [asyncio.create_task(pool.run("import time; time.sleep(60)")) for _ in range(120)]
            await asyncio.sleep(0.5)
            actors = nodes.all_actors()
            below = [pid for actor in actors for pid in descendants(actor)]
        assert len(actors) == 2 and len(below) >= 6
        assert all(isinstance(end, RuntimeError) and "was closed" in str(end) for end in await ends(*tasks))
        with pytest.raises(RuntimeError, match="not open"):
            await pool.run("1")
        seen += actors + below
    await until(lambda: not any(map(is_alive, seen)))
    assert signal.getsignal(signal.SIGTERM) is on_termination
    assert not ray_is_connected()


@in_cluster
async def test_python_tool_runs_on_a_cluster(nodes: RayNodes) -> None:
    nodes.have(1)
    config = SandboxConfig(cluster=nodes.address, workers=1, slots=1, preload=())
    async with pool_from_config(config) as pool:
        call = await PythonTool(pool).call({"code": "6 * 7"}, seconds=5.0)
    assert (call.status, call.stdout) == (OK, "42\n")


@in_cluster
async def test_pools_of_one_process_share_its_connection(nodes: RayNodes) -> None:
    """They start and end in any order; the last one to leave disconnects, unless there was a connection before."""
    import ray

    nodes.have(1)
    first, second = pool_on(nodes), pool_on(nodes)
    await asyncio.gather(first.start(), second.start())
    await first.close()
    assert ray_is_connected()
    assert (await second.run("1")).stdout == "1\n"
    port = nodes.address.rpartition(":")[2]
    with pytest.raises(
        SandboxUnavailable, match=f"connected to the Ray cluster at '127.0.0.1:{port}', not '127.0.0.1:1'"
    ):
        await ClusterPool("127.0.0.1:1").start()
    await second.close()
    assert not ray_is_connected()
    ray.init(address=nodes.address, log_to_driver=False)
    async with ClusterPool(f"localhost:{port}", LIMITS, workers=1, slots=1, preload=()) as third:
        assert (await third.run("1")).stdout == "1\n"
    assert ray_is_connected()
    ray.shutdown()


@in_cluster
async def test_node_with_another_jaxrl_is_named(nodes: RayNodes) -> None:
    nodes.have(1)
    with (
        unittest.mock.patch("jaxrl.sandbox.node_link.__version__", "0.0.0"),
        pytest.raises(SandboxUnavailable, match=f"node 127.0.0.1/.* has jaxrl {__version__}, this machine 0.0.0: "),
    ):
        await pool_on(nodes).start()


@in_cluster
async def test_node_without_jail_is_named(nodes: RayNodes) -> None:
    nodes.have(1)
    with pytest.raises(SandboxUnavailable, match="node 127.0.0.1/.*preload names 'no_such_module_here'"):
        await pool_on(nodes, preload=("no_such_module_here",)).start()
    assert not ray_is_connected()


@in_cluster
async def test_cluster_without_nodes_at_the_start(nodes: RayNodes) -> None:
    nodes.have(0)
    with pytest.raises(SandboxUnavailable, match="has no node with CPUs"):
        await pool_on(nodes).start()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere:1"])
def test_address_where_nothing_answers(address: str) -> None:
    with pytest.raises(SandboxUnavailable, match=f"no Ray cluster answers at '{address}'.*ray start --head"):
        asyncio.run(ClusterPool(address, preload=()).start())


def test_absent_token_of_ray_is_named() -> None:
    """In a process of its own: Ray reads the variable once."""
    script = """
import asyncio, socket
from jaxrl.sandbox import ClusterPool, SandboxUnavailable
with socket.create_server(("127.0.0.1", 0)) as listening:
    try:
        asyncio.run(ClusterPool(f"127.0.0.1:{listening.getsockname()[1]}", preload=()).start())
    except SandboxUnavailable as error:
        print(error)"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "does not let us in: " in line and "RAY_AUTH_TOKEN" in line


@pytest.mark.parametrize(
    ("language", "processes", "error", "lost"),
    [
        ("python", False, SandboxUnavailable("no jail"), True),
        ("python", False, RuntimeError("not open"), True),
        ("python", True, SandboxUnavailable("no memory cgroup"), False),
        ("c++", False, SandboxUnavailable("no compiler"), False),
        ("python", False, OverflowError("a limit"), False),
        ("python", False, struct.error("a limit"), False),
    ],
)
def test_what_a_node_lacks_is_told_from_a_node_that_is_lost(
    language: str, processes: bool, error: Exception, lost: bool
) -> None:
    answer = unfinished(CallOrder(7, "1", "", True, LIMITS, "", None, (), language, processes), error)
    assert (answer.id, answer.outcome) == (7, None)
    assert bool(answer.fault) == lost
    assert lost or isinstance(answer.refusal, SandboxUnavailable | ValueError)


@pytest.mark.parametrize("error", [OSError("too many open files"), KeyError("a bug"), AssertionError()])
def test_what_breaks_one_call_on_a_node_is_a_fault_of_ours_and_no_loss(error: Exception) -> None:
    answer = unfinished(CallOrder(7, "1", "", True, LIMITS, "", None, (), "python", False), error)
    assert (answer.fault, answer.refusal) == ("", None)
    assert isinstance(answer.outcome, Result) and answer.outcome.status is ToolStatus.INFRA_ERROR
    assert type(error).__name__ in answer.outcome.stderr


def test_configuration_chooses_the_pool() -> None:
    assert type(pool_from_config(SandboxConfig(preload=()))) is Pool
    pool = pool_from_config(SandboxConfig(cluster="auto", memory_mib=99, unsafe=True))
    assert isinstance(pool, ClusterPool)
    assert (pool.limits.memory_mib, pool.isolation) == (99, "unsafe: none")


def test_session_that_would_be_put_out_by_itself_is_refused() -> None:
    pool = ClusterPool("auto", Limits(memory_mib=80, disk_mib=8), session_memory_mib=87)
    with pytest.raises(ValueError, match="disk_mib = 88 may outgrow session_memory_mib=87"):
        pool.session()
    pool.session(live=False)


class NoNodes:
    """A cluster in which everybody waits."""

    deserted = False
    living = ()


def test_waiting_call_takes_little_memory() -> None:
    """In this process, since one with Ray's threads may crash when tracing of memory begins or ends."""
    calls = 5000

    async def wait() -> int:
        pool = ClusterPool("auto", preload=())
        pool._members = NoNodes()  # type: ignore[assignment]
        tracemalloc.start()
        tasks = [asyncio.create_task(pool.run(f"print({number})")) for number in range(calls)]
        await asyncio.sleep(0)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert pool._admission.waiting()[0] == calls
        for task in tasks:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await ends(*tasks))
        return size

    assert asyncio.run(wait()) < 2048 * calls


def test_absent_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'SandboxConfig.cluster="auto" needs Ray: pip install "jaxrl\[ray\]"'):
        pool_from_config(SandboxConfig(cluster="auto"))


def test_ray_is_loaded_only_where_asked_for() -> None:
    code = """
import asyncio, sys
from jaxrl.config import SandboxConfig
from jaxrl.sandbox import ClusterPool, pool_from_config
pool_from_config(SandboxConfig(preload=()))
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
