"""Sessions on a cluster: those of a pool, on one node each, and on another one when that is lost."""

import asyncio
import importlib.util
import os
import resource
import signal
from collections import Counter

import pytest

from jaxrl.sandbox import ClusterPool, Limits, Session
from jaxrl.sandbox.bench.processes import descendants, is_alive
from jaxrl.statuses import ToolStatus
from tests.sandbox.driver import LIMITS
from tests.sandbox.ray_nodes import RayNodes, in_cluster, on_common_pool
from tests.sandbox.test_cluster import ends, pool_on, running_calls, until

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "jaxrl[ray]"')

OK, ERROR, TIMEOUT, INFRA = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.INFRA_ERROR
PATIENT = Limits(cpu_seconds=5.0, wall_seconds=60.0, memory_mib=256, output_kib=8, disk_mib=8)


async def told(session: Session, code: str) -> tuple[ToolStatus, str, bool]:
    """Status and output of a cell, and whether the session was rebuilt for it."""
    result = await session.run(code)
    assert not result.replay_differs, result
    return result.status, result.stdout, result.rebuilt


def below(nodes: RayNodes) -> set[int]:
    """What runs on the nodes for their pools."""
    return {pid for actor in nodes.all_actors() for pid in descendants(actor)}


# As in a pool


@on_common_pool
async def test_state_files_and_statuses_are_those_of_a_pool(nodes: RayNodes, pool: ClusterPool) -> None:
    async with pool.session(limits=PATIENT) as session:
        result = await session.run("import os; x = 41; open('f').read()", files={"f": b"given"})
        assert (result.status, result.stdout, result.rebuilt) == (OK, "'given'\n", False)
        assert result.node in pool.nodes and result.attempts == 1 and result.isolation == pool.isolation
        result = await session.run("x += 1; open('out', 'wb').write(b'\\xff'); x", wanted=["out"])
        assert (result.stdout, dict(result.files)) == ("42\n", {"out": b"\xff"})
        assert await told(session, "1 / 0") == (ERROR, "", False)
        assert (await session.run("x", echo=False)).stdout == ""
        assert await told(session, "os._exit(3)") == (ERROR, "", False)
        assert await told(session, "x, sorted(os.listdir())") == (OK, "(42, ['f', 'out'])\n", True)
        with pytest.raises(ValueError, match="relative"):
            await session.run("1", files={"/a": b""})
        assert await told(session, "x") == (OK, "42\n", False)
    with pytest.raises(RuntimeError, match="session is closed"):
        await session.run("1")


@on_common_pool
async def test_limits_checkpoints_and_replay_are_those_of_a_pool(nodes: RayNodes, pool: ClusterPool) -> None:
    async with pool.session(limits=LIMITS, checkpoint=True) as session, pool.session(live=False) as replayed:
        for code in ("import time\nx = 1", "x += 1"):
            assert (await session.run(code)).status is (await replayed.run(code)).status is OK
        for one in (session, replayed):
            assert (await one.run("x = 9\nwhile True: pass")).status is TIMEOUT
            result = await one.run("x")
            assert (result.stdout, result.rebuilt) == ("2\n", False)
            assert result.node in pool.nodes


@on_common_pool
async def test_copies_live_where_their_original_lives(nodes: RayNodes, pool: ClusterPool) -> None:
    """And share nothing with it; nothing is left of any of them once they are closed."""
    before = below(nodes)
    async with pool.session(limits=PATIENT) as session:
        home = (await session.run("x = [1]")).node
        left, right = await session.fork(2)
        (last,) = await left.fork(1)
        everybody = (session, left, right, last)
        for index, one in enumerate(everybody):
            result = await one.run(f"x.append({index}); x")
            assert (result.stdout, result.rebuilt, result.node) == (f"[1, {index}]\n", False, home)
        assert len(below(nodes) - before) == 5, "a keeper and a process for each"
        for one in everybody:
            await one.close()
        await until(lambda: below(nodes) == before)


@on_common_pool
async def test_sessions_are_spread_over_the_nodes(nodes: RayNodes, pool: ClusterPool) -> None:
    sessions = [pool.session(limits=PATIENT) for _ in range(6)]
    homes = [(await session.run("1")).node for session in sessions]
    assert Counter(homes) == dict.fromkeys(pool.nodes, 3)
    for session, home in zip(sessions, homes, strict=True):
        assert (await session.run("1")).node == home
    await asyncio.gather(*(session.close() for session in sessions if homes[0] != homes[sessions.index(session)]))
    async with pool.session(limits=PATIENT) as late:
        assert (await late.run("1")).node != homes[0], "there are fewer by now"
    await asyncio.gather(*(session.close() for session in sessions))


@on_common_pool
async def test_cells_do_not_wait_for_a_window_that_is_full_of_calls(nodes: RayNodes, pool: ClusterPool) -> None:
    """And widen it for no calls."""
    async with pool.session(limits=PATIENT, tenant="one") as session:
        for code in ("x = 1", *["x"] * 20):
            assert (await session.run(code)).status is OK
        flood = [asyncio.create_task(pool.run("1", tenant="many")) for _ in range(200)]
        await asyncio.sleep(0)
        cell = asyncio.create_task(session.run("x"))
        free = set()
        while not cell.done():
            free |= {link.free for link in pool._members.living}
            await asyncio.sleep(0.001)
        assert min(free) == 0
        assert (cell.result().stdout, cell.result().rebuilt) == ("1\n", False)
        assert sum(task.done() for task in flood) < 50
        await asyncio.gather(*flood)
    assert [link.free for link in pool._members.living] == [5, 5]


@on_common_pool
async def test_cancelled_cell_is_killed_and_leaves_no_process(nodes: RayNodes, pool: ClusterPool) -> None:
    """One that was the first of its session, and one that others came before; both wait in line and run."""
    before = below(nodes)
    async with pool.session(limits=PATIENT) as session, pool.session(limits=PATIENT) as fresh:
        await session.run("import time; x = 1")
        for seconds in (0.0, 0.01, 0.1, 0.5):
            cells = [asyncio.create_task(one.run("import time; time.sleep(50)")) for one in (session, fresh)]
            await asyncio.sleep(seconds)
            for cell in cells:
                cell.cancel()
            assert all(isinstance(end, asyncio.CancelledError) for end in await ends(*cells))
            await until(lambda: len(below(nodes) - before) <= 2)
            assert (await session.run("x")).stdout == "1\n"
    await until(lambda: below(nodes) == before)
    assert [link.free for link in pool._members.living] == [5, 5]


@on_common_pool
async def test_closing_a_session_ends_the_cell_that_it_runs(nodes: RayNodes, pool: ClusterPool) -> None:
    before = below(nodes)
    session = pool.session(limits=PATIENT)
    await session.run("import time")
    cell = asyncio.create_task(session.run("time.sleep(50)"))
    await asyncio.sleep(0.3)
    await session.close()
    with pytest.raises(RuntimeError, match="session was closed"):
        await cell
    assert below(nodes) == before


@on_common_pool
async def test_limits_beyond_a_nodes_own_are_the_callers_mistake(nodes: RayNodes, pool: ClusterPool) -> None:
    """And no reason to distrust the node."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for live in (True, False):
        async with pool.session(limits=Limits(open_files=most + 1), live=live) as session:
            for _ in range(2):
                with pytest.raises(ValueError, match=f"open_files={most + 1} must be at most {most}"):
                    await session.run("1")
    assert pool._sessions._distrusted == {} and len(pool.nodes) == 2
    async with pool.session(limits=PATIENT) as session:
        assert (await session.run("1")).attempts == 1


# What is lost


@in_cluster
async def test_node_that_loses_a_new_process_is_not_chosen_again_at_once(nodes: RayNodes) -> None:
    """Otherwise one that keeps none would have the fewest, and be given them all."""

    def keepers() -> set[int]:
        return {keeper for actor in nodes.all_actors() for keeper in running_calls(actor)}

    nodes.have(2)
    async with pool_on(nodes, limits=PATIENT) as pool, pool.session() as first, pool.session() as second:
        emptied, other = [(await one.run("1")).node for one in (first, second)]
        assert emptied != other
        await first.close()
        before = keepers()
        async with pool.session() as fresh:
            cell = asyncio.create_task(fresh.run("import time; time.sleep(1); 'end'"))
            await until(lambda: keepers() > before)
            (new,) = keepers() - before
            os.kill(new, signal.SIGKILL)
            result = await cell
            assert (result.status, result.stdout, result.node) == (OK, "'end'\n", other)
            assert len(pool.nodes) == 2


@pytest.mark.slow
@in_cluster
async def test_session_of_a_killed_node_goes_on_elsewhere(nodes: RayNodes) -> None:
    """In the middle of a cell, which is answered once; and so do copies and sessions that were idle."""
    nodes.have(2)
    async with pool_on(nodes, limits=PATIENT) as pool, pool.session() as session, pool.session(live=False) as replayed:
        home = (await session.run("import time; x = [1]")).node
        await replayed.run("import time; y = 1")
        await session.run("x.append(len(x) + 1); open('f', 'w').write('kept')")
        (copy,) = await session.fork(1)
        await copy.run("x.append('copy')")
        actors = {nodes.actors(index)[0]: index for index in range(2)}
        running = [asyncio.create_task(one.run("time.sleep(1.5); 'end'")) for one in (session, replayed)]
        await asyncio.sleep(0.5)
        victim = max(actors, key=lambda actor: len(descendants(actor)))
        nodes.kill_node(actors[victim])
        results = await asyncio.gather(*running)
        assert [(result.status, result.stdout) for result in results] == [(OK, "'end'\n")] * 2
        assert (results[0].rebuilt, results[0].replay_differs) == (True, False)
        await until(lambda: home not in pool.nodes)
        assert {result.node for result in results} == set(pool.nodes)
        result = await session.run("x, open('f').read()")
        assert (result.stdout, result.rebuilt) == ("([1, 2], 'kept')\n", False)
        assert await told(copy, "x") == (OK, "[1, 2, 'copy']\n", True)
        (second,) = await copy.fork(1)
        assert await told(second, "x") == (OK, "[1, 2, 'copy']\n", False)
        await asyncio.gather(copy.close(), second.close())


@pytest.mark.slow
@in_cluster
async def test_many_sessions_with_a_node_killed_half_way_count_on(nodes: RayNodes) -> None:
    """Each cell adds one, so that one without effect, or with it twice, would be seen in those after it.

    Half-way each session is copied, and both count on.
    """
    nodes.have(2)
    cells = 12
    done = 0

    async def count(session: Session, first: int) -> list[bool]:
        nonlocal done
        rebuilt = []
        async with session:
            for number in range(first, cells + 1):
                result = await session.run("n += 1; n" if number > 1 else "n = 1; n")
                assert (result.status, result.stdout, result.replay_differs) == (OK, f"{number}\n", False), result
                rebuilt.append(result.rebuilt)
                done += 1
                if number == cells // 2 and first == 1:
                    (copy,) = await session.fork(1)
                    rebuilt += await count(copy, number + 1)
        return rebuilt

    async with pool_on(nodes, limits=PATIENT, slots=4) as pool:
        tasks = [asyncio.create_task(count(pool.session(), 1)) for _ in range(30)]
        await until(lambda: done > 30 * cells // 2)
        nodes.kill_node(0)
        rebuilt = await asyncio.gather(*tasks)
    assert done == 30 * (cells + cells // 2)
    assert any(any(flags) for flags in rebuilt) and not all(any(flags) for flags in rebuilt)


@in_cluster
async def test_node_that_dies_while_its_sessions_are_idle_costs_them_no_try(nodes: RayNodes) -> None:
    """Nor is anything remembered of it."""
    nodes.have(2)
    async with pool_on(nodes, limits=PATIENT) as pool:
        sessions = [pool.session() for _ in range(4)]
        for session in sessions:
            await session.run("x = 41")
        links, kept = pool._members.living, pool._sessions
        os.kill(nodes.all_actors()[0], signal.SIGKILL)
        await until(lambda: not all(link.alive for link in links))
        assert all(link.alive for link in (*kept._homes.values(), *kept._processes, *kept._distrusted))
        results = await asyncio.gather(*(session.run("x + 1") for session in sessions))
        assert [(result.status, result.stdout, result.attempts) for result in results] == [(OK, "42\n", 1)] * 4
        assert Counter(result.rebuilt for result in results) == {True: 2, False: 2}
        await asyncio.gather(*(session.close() for session in sessions))


@in_cluster
async def test_killed_pool_costs_sessions_nothing_but_time(nodes: RayNodes) -> None:
    """Its node has another soon, where a session that has lost its process is no worse off than on others."""
    nodes.have(1)
    async with pool_on(nodes, limits=PATIENT) as pool, pool.session() as session:
        await session.run("x = 41")
        victim = nodes.actors(0)[0]
        processes = [victim, *descendants(victim)]
        os.kill(victim, signal.SIGKILL)
        copies = await session.fork(2)
        for one in (session, *copies):
            assert await told(one, "x + 1") == (OK, "42\n", True)
        await until(lambda: not any(map(is_alive, processes)))
        await asyncio.gather(*(copy.close() for copy in copies))


@pytest.mark.slow
@in_cluster
async def test_session_without_any_node_is_a_fault_of_ours_and_goes_on_when_there_is_one(nodes: RayNodes) -> None:
    nodes.have(1)
    async with pool_on(nodes, limits=PATIENT, patience_seconds=1.0) as pool, pool.session() as session:
        await session.run("x = 41")
        nodes.have(0)
        async with pool.session() as fresh:
            results = [await session.run("x"), await fresh.run("1")]
        assert [result.status for result in results] == [INFRA] * 2
        assert [result.stderr for result in results] == [
            "its session could not be rebuilt: no node for 1 s",
            "no node for 1 s",
        ]
        nodes.add_node()
        await until(lambda: len(pool.nodes) == 1)
        assert (await session.run("x + 1")).stdout == "42\n"


@pytest.mark.slow
@in_cluster
async def test_closing_the_pool_ends_sessions_and_their_cells(nodes: RayNodes) -> None:
    nodes.have(1)
    pool = pool_on(nodes, limits=PATIENT)
    session = pool.session()
    with pytest.raises(RuntimeError, match="not open"):
        await session.run("1")
    async with pool:
        await session.run("import time; x = 1")
        idle = pool.session()
        await idle.run("y = 2")
        cells = [asyncio.create_task(session.run(code)) for code in ("time.sleep(50)", "x")]
        await asyncio.sleep(0.5)
        processes = below(nodes)
        assert len(processes) >= 6
    assert all(isinstance(end, RuntimeError) and "closed" in str(end) for end in await ends(*cells))
    await until(lambda: not any(map(is_alive, processes)))
    with pytest.raises(RuntimeError, match="not open"):
        await idle.run("1")
    async with pool:
        assert await told(idle, "y") == (OK, "2\n", True)
        await asyncio.gather(session.close(), idle.close())
