import asyncio
import dataclasses

import pytest

from jaxrl.envs.python_tool import PythonTool
from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result

FINISHED = Result(
    status=ToolStatus.OK, stdout="5\n", stderr="", exit_code=0, signal=None, cpu_seconds=0.1, wall_seconds=0.2,
    queue_seconds=0.3, peak_rss_kib=1, attempts=2, stdout_truncated=False, stderr_truncated=False, isolation="walls",
)  # fmt: skip


class RecordingPool:
    """Answers every run with one result and keeps what it was asked."""

    limits = Limits(wall_seconds=8.0)

    def __init__(self, result: Result = FINISHED) -> None:
        self.result = result
        self.asked = []

    async def run(self, code, stdin="", echo=True, limits=None):
        self.asked.append((code, stdin, echo, limits))
        return self.result


def call(arguments, pool=None, seconds=20.0):
    return asyncio.run(PythonTool(pool or RecordingPool()).call(arguments, seconds))


def test_what_reaches_the_pool_and_what_comes_back():
    pool = RecordingPool()
    done = call({"code": "2+3", "input": "line\n"}, pool)
    assert pool.asked == [("2+3", "line\n", True, Limits(wall_seconds=8.0))]
    assert (done.name, done.arguments, done.status) == ("python", {"code": "2+3", "input": "line\n"}, ToolStatus.OK)
    assert (done.stdout, done.seconds, done.queue_seconds, done.attempts) == ("5\n", 0.2, 0.3, 2)
    assert done.isolation == "walls"


def test_the_episode_may_leave_less_time_than_the_pool():
    pool = RecordingPool()
    call({"code": "1"}, pool, seconds=0.5)
    assert pool.asked[0][3] == Limits(wall_seconds=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, 'missing argument "code"'),
        ({"input": "x"}, 'missing argument "code"'),
        ({"code": 3}, 'argument "code" must be a string'),
        ({"code": None}, 'argument "code" must be a string'),
        ({"code": "1", "input": 3}, 'argument "input" must be a string'),
        ({"code": "1", "cod": "1"}, 'unknown argument "cod"; there are: code, input'),
        ("print(1)", "arguments must be an object"),
        ([{"code": "1"}], "arguments must be an object"),
        (None, "arguments must be an object"),
    ],
)
def test_bad_arguments_are_told_and_not_run(arguments, message):
    pool = RecordingPool()
    refused = call(arguments, pool)
    assert refused.status is ToolStatus.BAD_ARGUMENTS
    assert message in refused.stderr
    assert pool.asked == []
    assert isinstance(refused.arguments, dict)


def test_a_failure_without_words_is_given_some():
    silent = dataclasses.replace(FINISHED, status=ToolStatus.ERROR, stdout="", exit_code=3)
    assert call({"code": "x"}, RecordingPool(silent)).stderr == "exit status 3"
    killed = dataclasses.replace(silent, exit_code=None, signal=9)
    assert call({"code": "x"}, RecordingPool(killed)).stderr == "killed by signal 9"
    loud = dataclasses.replace(silent, stderr="KeyError: 1\n")
    assert call({"code": "x"}, RecordingPool(loud)).stderr == "KeyError: 1\n"


def test_a_fault_of_the_pool_stays_one():
    fault = dataclasses.replace(FINISHED, status=ToolStatus.INFRA_ERROR, stdout="")
    assert call({"code": "x"}, RecordingPool(fault)).status is ToolStatus.INFRA_ERROR
