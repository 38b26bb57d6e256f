import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxrl.config import RewardConfig
from jaxrl.records import RewardStatus
from jaxrl.rewards import verifier as module
from jaxrl.rewards.verifier import MathVerifier, VerifierStartError

CORRECT, WRONG = RewardStatus.CORRECT, RewardStatus.WRONG
HANGS = "9^{9^{9}}"


def children() -> set[int]:
    """Process ids of this process' living children."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(entry))
    return found


def run(scenario, **settings):
    before = children()

    async def main():
        try:
            async with MathVerifier(RewardConfig(**settings)) as verifier:
                return await scenario(verifier)
        finally:
            assert children() == before, "a verifier process was left behind"

    return asyncio.run(main())


def test_statuses_and_replacement_after_a_timeout():
    async def scenario(verifier):
        assert await verifier.grade("\\frac{84}{2}", "42") is CORRECT
        assert await verifier.grade("\\frac{84}{3}", "42") is WRONG
        assert await verifier.grade("40 2", "42") is WRONG
        assert await verifier.grade("anything", "") is RewardStatus.VERIFIER_CRASH
        started = time.monotonic()
        assert await verifier.grade(HANGS, "42") is RewardStatus.VERIFIER_TIMEOUT
        assert 1.9 <= time.monotonic() - started < 20.0
        assert await verifier.grade("2\\sqrt{3}", "\\sqrt{12}") is CORRECT

    run(scenario, workers=1, seconds=2.0)


def test_what_needs_no_process_gets_none(monkeypatch):
    async def scenario(verifier):
        monkeypatch.setattr(module._Process, "ask", None)
        assert await verifier.grade("1,080.0", "1080") is CORRECT
        assert await verifier.grade("84", "85") is WRONG
        assert await verifier.grade(" 12:30 ", "12:30") is CORRECT
        assert await verifier.grade(None, "1") is RewardStatus.NO_ANSWER
        assert await verifier.grade("  ", "1") is RewardStatus.NO_ANSWER

    run(scenario)


def test_a_killed_process_is_replaced_and_two_are_a_crash(monkeypatch):
    ask = module._Process.ask
    dies = iter([True, False, True, True, False])

    async def ask_and_die(process, answer, gold):
        if not next(dies):
            return await ask(process, answer, gold)
        child = process._child
        asyncio.get_running_loop().call_later(0.1, child.kill)
        return await ask(process, HANGS, gold)

    async def scenario(verifier):
        monkeypatch.setattr(module._Process, "ask", ask_and_die)
        statuses = [await verifier.grade("84/2", "42") for _ in range(3)]
        assert statuses == [CORRECT, RewardStatus.VERIFIER_CRASH, CORRECT]

    run(scenario, workers=1, seconds=20.0)


def test_a_process_that_dies_while_it_starts_is_a_crash(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(1)")

    async def scenario(verifier):
        await verifier._processes[0].stop()
        monkeypatch.setattr(module, "_SCRIPT", script)
        assert await verifier.grade("84/2", "42") is RewardStatus.VERIFIER_CRASH

    run(scenario)


def test_a_cancelled_question_does_not_answer_the_next():
    async def scenario(verifier):
        task = asyncio.create_task(verifier.grade(HANGS, "42"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await verifier.grade("84/2", "42") is CORRECT
        # Cancelled while it waits for a process: nothing is lost.
        waiting = [asyncio.create_task(verifier.grade(f"{n}/2", "42")) for n in range(20)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [r is WRONG for r in results[1::2]] == [True] * 10
        assert await verifier.grade("84/2", "42") is CORRECT

    run(scenario, workers=1, seconds=10.0)


def test_a_burst_is_answered_in_its_order_over_several_processes():
    async def scenario(verifier):
        results = await asyncio.gather(*(verifier.grade(f"{n}/2", "100") for n in range(180, 220)))
        assert [n for n, result in zip(range(180, 220), results, strict=True) if result is CORRECT] == [200]

    run(scenario, workers=2, seconds=10.0)


def test_leaving_while_a_question_hangs_leaves_no_process():
    async def scenario(verifier):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(verifier.grade(HANGS, "42"))
            await asyncio.sleep(0.1)
            raise KeyError("the run failed")

    with pytest.raises(ExceptionGroup):
        run(scenario, workers=1, seconds=30.0)


def test_an_orphan_ends_by_itself():
    """A process whose parent was killed while it computes does not compute for ever."""
    child = subprocess.Popen(
        [sys.executable, str(module._SCRIPT), "0.1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert "ready" in child.stdout.readline()
        child.stdin.write(f'{{"answer": "{HANGS}", "gold": "42"}}\n')
        child.stdin.flush()
        assert child.wait(timeout=20) == -signal.SIGALRM


def test_the_process_never_imports_jax():
    """It must start fast and may not touch an accelerator."""
    code = (
        f"import runpy, sys; runpy.run_path({str(module._SCRIPT)!r})['correct']('x', 'y'); print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_process_that_cannot_start_is_said(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text('print(\'{"failed": "no module named math_verify"}\')')
    monkeypatch.setattr(module, "_SCRIPT", script)
    with pytest.raises(VerifierStartError, match="no module named math_verify"):
        run(lambda verifier: asyncio.sleep(0))


def test_grading_outside_of_the_context_is_refused():
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(MathVerifier(RewardConfig()).grade("1", "1"))
