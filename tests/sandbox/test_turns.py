"""Tenants take turns, at the pool's door and at the warden's slots."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sandbox import Limits
from jaxrl.sandbox.admission import Admission
from jaxrl.sandbox.cell_job import CellJob
from jaxrl.sandbox.job import Job
from jaxrl.sandbox.protocol import Call, CellHead
from jaxrl.sandbox.turns import Turns
from tests.sandbox.driver import Driver


def job(id: int, tenant: int = 0, full: bool = False) -> Job:
    return Job(Call(id, b"", b"", True, Limits(), float(id), tenant=tenant), full)


def cell(id: int, session: int, fresh: bool = False) -> CellJob:
    return CellJob(CellHead(session, fresh, False), Call(id, b"", b"", True, Limits(), float(id)), full=True)


def taken(turns: Turns, allowed=lambda job: True) -> list[int]:
    """Ids in the order in which calls are taken."""
    ids = []
    while (next_ := turns.take(lambda job: "place" if allowed(job) else None)) is not None:
        ids.append(next_[0].call.id)
    return ids


def test_one_tenant_is_served_in_order_as_far_as_there_is_a_place() -> None:
    turns = Turns()
    for id, full in enumerate((True, False, True, False)):
        turns.add(job(id, full=full))
    assert taken(turns, allowed=lambda job: not job.full) == [1, 3]
    turns.add(job(9), first=True)
    assert taken(turns) == [0, 2, 9]


def test_a_flood_does_not_keep_others_waiting() -> None:
    turns = Turns()
    for id in range(100):
        turns.add(job(id, tenant=1))
    turns.add(job(100, tenant=2))
    turns.add(job(101, tenant=2, full=True))
    assert taken(turns)[:5] == [0, 100, 1, 101, 2]


def test_a_cell_waits_for_its_session_only() -> None:
    """Not for a template, nor for another session that is not ready, nor behind a cell that is done."""
    turns = Turns()
    turns.add(job(0, full=True))
    turns.add(cell(1, session=10, fresh=True))  # which has no process yet
    for id, session in ((2, 11), (3, 12), (4, 13), (5, 14)):
        turns.add(cell(id, session))
    ready = {12, 13, 14}

    def allowed(job: Job) -> bool:
        assert not job.done
        job.done = isinstance(job, CellJob) and job.head.session == 13  # found to be lost when its turn comes
        return isinstance(job, CellJob) and not job.head.fresh and job.head.session in ready and not job.done

    assert taken(turns, allowed) == [3, 5]
    ready.add(11)
    assert taken(turns, allowed) == [2]
    assert taken(turns) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=40))
def test_every_call_is_taken_once_and_in_the_order_of_its_tenant(calls: list[tuple[int, bool, bool]]) -> None:
    turns, jobs = Turns(), []
    for id, (tenant, full, done) in enumerate(calls):
        jobs.append(job(id, tenant, full))
        jobs[-1].done = done
        turns.add(jobs[-1])
    order = taken(turns)
    assert sorted(order) == [one.call.id for one in jobs if not one.done]
    for tenant in range(4):
        own = [id for id in order if jobs[id].call.tenant == tenant]
        assert own == sorted(own)


def test_admission_is_by_turns_and_a_cancelled_wait_takes_no_room() -> None:
    async def run() -> list[str]:
        admission, entered = Admission(1), []
        await admission.enter(0)

        async def come(name: str, tenant: int) -> None:
            await admission.enter(tenant)
            entered.append(name)

        tasks = [asyncio.create_task(come(*who)) for who in (("a", 1), ("b", 1), ("c", 1), ("d", 2))]
        await asyncio.sleep(0)
        tasks[1].cancel()
        admission.leave()
        await asyncio.sleep(0)
        tasks[0].cancel()  # it has entered: too late
        for _ in range(2):
            admission.leave()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        admission.leave()
        await asyncio.wait_for(admission.enter(3), 1)  # the room is whole again
        return entered

    assert asyncio.run(run()) == ["a", "d", "c"]


def test_room_that_comes_together_with_a_cancellation_is_passed_on() -> None:
    async def run() -> None:
        admission = Admission(1)
        await admission.enter(0)
        waiting = asyncio.create_task(admission.enter(1))
        await asyncio.sleep(0)
        admission.leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(admission.enter(2), 1)

    asyncio.run(run())


def test_room_that_is_taken_away_is_owed() -> None:
    async def run() -> list[str]:
        admission, entered = Admission(0), []

        async def come(name: str, first: bool = False) -> None:
            await admission.enter(0, first=first)
            entered.append(name)

        admission.leave(2)
        tasks = [asyncio.create_task(come("a"))]
        await asyncio.sleep(0)
        admission.leave(-2)  # one of the two places is in use
        tasks += [asyncio.create_task(come("b")), asyncio.create_task(come("c", first=True))]
        await asyncio.sleep(0)
        admission.leave()
        await asyncio.sleep(0)
        assert entered == ["a"]
        admission.leave(2)
        await asyncio.gather(*tasks)
        return entered

    assert asyncio.run(run()) == ["a", "c", "b"]


def test_dismissed_callers_take_no_room() -> None:
    async def run() -> None:
        admission = Admission(0)
        tasks = [asyncio.create_task(admission.enter(tenant)) for tenant in (1, 1, 2)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        admission.dismiss(LookupError)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError, LookupError, LookupError]
        admission.leave()
        await asyncio.wait_for(admission.enter(3), 1)

    asyncio.run(run())


def test_a_tenant_that_floods_the_pool_hardly_delays_another() -> None:
    """The queue of 8 is always full of the flood's calls; the other's call waits for a turn, not for all of them."""
    with Driver(workers=1, slots=1, slow_slots=0, queue=8, preload=()) as driver:

        async def both() -> tuple[float, float]:
            began = time.monotonic()
            flood = [asyncio.create_task(driver.pool.run("1", tenant="flood")) for _ in range(200)]
            await asyncio.sleep(0.05)
            await driver.pool.run("2", tenant="other")
            waited = time.monotonic() - began
            await asyncio.gather(*flood)
            return waited, time.monotonic() - began

        waited, everything = driver.wait(both())
        assert waited < 0.5 * everything
