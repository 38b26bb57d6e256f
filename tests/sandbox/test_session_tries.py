"""How often a cell is tried again: against a pool whose losses are laid out beforehand, and against a real one."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits
from jaxrl.sandbox.protocol import Call, CellHead, Outcome, Report
from jaxrl.sandbox.session import Backend, Session, Terms
from tests.sandbox.cells import PATIENT, session
from tests.sandbox.driver import Driver, wait_until

FINE, LOST_WAITING, LOST_RUNNING, PUT_OUT = "fine", "lost while it waited", "lost while it ran", "put out"


def losing(fates: Sequence[str]) -> tuple[Session, list[bytes]]:
    """A session whose cells meet these fates one after the other, the last one for ever; and what was submitted."""
    submitted: list[bytes] = []

    async def submit(call: Call, head: CellHead) -> Report:
        fate = fates[min(len(submitted), len(fates) - 1)]
        submitted.append(call.code)
        tries = call.attempts + (fate in (FINE, LOST_RUNNING))
        if fate is not FINE:
            outcome = Outcome.PUT_OUT if fate is PUT_OUT else Outcome.LOST
            return Report.without_run(call, outcome, tries, fate.encode())
        return Report(call.id, Outcome.OK, tries, 0, 0, 0.0, 0.0, 0.0, 0, b"", b"", False, False, survived=True)

    async def never(*_: object) -> list[int]:
        raise AssertionError("not of use here")

    ids = iter(range(1, 1000))
    backend = Backend(
        check=lambda: None,
        taken=contextlib.nullcontext(),
        next_id=lambda: next(ids),
        run=never,
        submit=submit,
        fork=never,
        end=lambda process: None,
        result=lambda report, *_: report,
        cancelled=lambda: None,
    )
    return Session(backend, Terms(Limits(), 0, checkpoint=False, live=True)), submitted


@pytest.mark.parametrize(
    ("fates", "outcome", "attempts", "submitted"),
    [
        ([FINE], Outcome.OK, 1, 1),
        ([LOST_WAITING] * 4 + [FINE], Outcome.OK, 1, 5),
        ([LOST_WAITING], Outcome.INFRA_ERROR, 0, 5),
        ([LOST_RUNNING] * 2 + [FINE], Outcome.OK, 3, 3),
        ([LOST_RUNNING], Outcome.INFRA_ERROR, 3, 3),
        ([*[LOST_WAITING] * 4, LOST_RUNNING] * 2 + [FINE], Outcome.OK, 3, 11),
        ([PUT_OUT] * 40 + [LOST_WAITING] * 4 + [FINE], Outcome.OK, 1, 45),
        ([PUT_OUT], Outcome.INFRA_ERROR, 0, 50),
    ],
)
def test_only_a_cell_that_ran_has_used_up_a_try(
    fates: list[str], outcome: Outcome, attempts: int, submitted: int
) -> None:
    cells, sent = losing(fates)
    report = asyncio.run(cells.run("x"))
    assert (report.outcome, report.attempts, len(sent)) == (outcome, attempts, submitted)
    assert report.stderr.decode() == ("" if outcome is Outcome.OK else fates[-1])


def test_a_session_that_cannot_be_rebuilt_is_not_rebuilt_for_ever() -> None:
    cells, sent = losing([FINE, FINE, LOST_WAITING, FINE, LOST_RUNNING])

    async def use() -> Report:
        await cells.run("first")
        await cells.run("second")
        return await cells.run("third")

    report = asyncio.run(use())
    assert (report.outcome, report.attempts) == (Outcome.INFRA_ERROR, 0)
    assert sent == [b"first", b"second", b"third", *[b"first", b"second"], *[b"first"] * 3]


def test_a_session_that_is_lost_while_its_cell_waits_costs_no_try() -> None:
    settings = {"workers": 1, "slots": 1, "slow_slots": 0, "preload": (), "limits": PATIENT}
    with Driver(**settings) as driver, session(driver) as cells:
        cells.out("x = 41")
        leaf = driver.resting()[-1]  # the deepest
        before = asyncio.run_coroutine_threadsafe(driver.pool.run("import time; time.sleep(1.0)"), driver.loop)
        waiting = asyncio.run_coroutine_threadsafe(cells.session.run("x + 1"), driver.loop)
        wait_until(lambda: driver.wait(driver.pool.metrics()).waiting)
        os.kill(leaf, signal.SIGKILL)
        result = waiting.result(60)
        assert before.result(60).status is ToolStatus.OK
        assert (result.status, result.stdout, result.attempts, result.rebuilt) == (ToolStatus.OK, "42\n", 1, True)
