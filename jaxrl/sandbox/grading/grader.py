"""Grades programs with tests on a pool, so that no program ever shares a jail with its expected answers.

The grader itself reads nothing that a program wrote, except printed text that it compares: answers go from one jail to
the other as bytes.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from jaxrl.sandbox import arguments, jail, pool_arguments
from jaxrl.sandbox.grading import scripts
from jaxrl.sandbox.grading.cache import Cache
from jaxrl.sandbox.grading.cases import CallTest, CodeTest, StdioTest, Test
from jaxrl.sandbox.grading.codec import ANSWERS, EXAM, QUESTIONS, VERDICT
from jaxrl.sandbox.grading.grade import Grade, PassMatrix, matrix_of
from jaxrl.sandbox.grading.plan import Plan, divide
from jaxrl.sandbox.protocol import Limits
from jaxrl.sandbox.result import Result
from jaxrl.sandbox.runner import Runner
from jaxrl.statuses import ToolStatus

_ROUNDS = 32  # times that a test may ask something that rests on earlier answers
_INTERVIEWS = 16384  # remembered
_PATIENCE = 4  # times the wall time, for a test that did not come to its end on a busy machine
_LEFT_OUT_WORDS = 64  # bytes that say how much of an output was left out


class NotHidden(ValueError):
    """A test has to run beside the program, which could read the expected answers there, and that was not allowed."""


class _OurFault(Exception):
    """What came of a call says nothing about the program."""


@dataclasses.dataclass
class _Interview:
    """What is known of a test without any program."""

    plan: Plan
    questions: bytes  # what it asks first
    obstacle: str  # why it asks nothing
    runs: bool  # as far as it needs no program
    broken: str = ""  # why it can never run, whatever the program is
    tries: int = 0  # to find out
    fault: str = ""  # why the last try failed
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # one finds out, the others wait

    @property
    def known(self) -> bool:
        return bool(self.broken) or (self.runs and bool(self.questions or self.obstacle))


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What came of one run of a test without the program."""

    word: str  # as ``examining.run_test`` says it
    text: str
    questions: bytes  # all that the test asked
    status: ToolStatus
    ended: bool = True  # by itself


class Grader:
    """Runs programs on tests.

    Args:
        pool: an open ``Pool``, or what runs snippets as it does.
        limits: of each call; None takes the pool's.
        hidden_only: refuse tests that cannot be kept out of the program's reach.
        tenant: on whose behalf the pool runs the calls.
        cache_entries: grades kept in memory.
        cache_folder: where grades are kept for later runs; None keeps none.

    Raises:
        ValueError: ``hidden_only``, but the pool has no jail; or the pool gives no call that much.
    """

    def __init__(
        self,
        pool: Runner,
        limits: Limits | None = None,
        *,
        hidden_only: bool = False,
        tenant: str = "",
        cache_entries: int = 65536,
        cache_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if pool is None:
            raise TypeError("pool=None runs nothing; give an open Pool, or what runs snippets as it does")
        pool_arguments.check_limits(limits)
        arguments.flag("hidden_only", hidden_only)
        pool_arguments.check_tenant(tenant)
        arguments.whole("cache_entries", cache_entries, 0, "0 keeps none")
        arguments.kind("cache_folder", cache_folder, (str, os.PathLike, type(None)), "a path, or None for none")
        if hidden_only and pool.isolation == jail.UNSAFE:
            raise ValueError(f"hidden_only=True but the pool's isolation is {pool.isolation!r}; use a pool with a jail")
        self._pool = pool
        self._limits = limits or pool.limits
        _check_limits(self._limits, pool.most)
        self._hidden_only = hidden_only
        self._tenant = tenant
        self._cache = Cache(cache_entries, None if cache_folder is None else pathlib.Path(cache_folder))
        self._interviews: OrderedDict[CodeTest, _Interview] = OrderedDict()

    async def grade(self, program: str, test: Test) -> Grade:
        """Run one program on one test, unless the grade is known.

        Raises:
            TypeError: program or test is of a wrong kind.
            NotHidden: it cannot be hidden, and ``hidden_only`` was asked for.
            ValueError: the pool refuses to run a program whole, as for its language or size. Where it refuses what
                grading passes between jails, as answers too large for a server, the grade is ``infra_error``.
        """
        arguments.kind("program", program, str, "str")
        arguments.kind("test", test, Test, "a CallTest, CodeTest or StdioTest")
        key = self._key(program, test)
        known = self._cache.get(key)
        if known is not None and (known.hidden or not self._hidden_only):
            return known
        try:
            grade = await self._grade(program, test)
        except _OurFault as fault:
            grade = Grade(False, ToolStatus.INFRA_ERROR, True, 0.0, 0.0, str(fault))
        self._cache.put(key, grade)
        return grade

    async def matrix(self, programs: Sequence[str], tests: Sequence[Test]) -> PassMatrix:
        """Run every program on every test; equal programs once.

        Raises:
            NotHidden: as ``grade``; nothing is left running.
        """
        arguments.texts("programs", programs)
        arguments.kind("tests", tests, Sequence, "a sequence of tests")
        rows: dict[str, list[asyncio.Task[Grade]]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for program in dict.fromkeys(programs):
                    rows[program] = [group.create_task(self.grade(program, test)) for test in tests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return matrix_of([[task.result() for task in rows[program]] for program in programs], len(tests))

    def _key(self, program: str, test: Test) -> str:
        content = [
            scripts.VERSION,
            platform.python_version(),
            self._pool.isolation,
            dataclasses.astuple(self._limits),
            program,
            repr(test),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    async def _grade(self, program: str, test: Test) -> Grade:
        if isinstance(test, StdioTest):
            return await self._grade_printed(program, test)
        if isinstance(test, CallTest):
            test = test.as_code()
        interview = await self._interview(test)
        if not interview.obstacle:
            return await self._grade_answers(program, interview.plan, interview.questions)
        if self._hidden_only:
            raise NotHidden(
                f"hidden_only=True but {interview.obstacle}; rewrite the test, or let it run beside the program"
            )
        return await self._grade_beside(program, test, interview.obstacle)

    async def _grade_printed(self, program: str, test: StdioTest) -> Grade:
        kib = 1 + len(test.expected.encode("utf-8", "replace")) // 1024
        limits = dataclasses.replace(self._limits, output_kib=max(self._limits.output_kib, 2 * kib))
        ran = await self._run(program, limits=limits, stdin=test.stdin, language=test.language)
        if ran.status != ToolStatus.OK:
            return _grade([ran], False, ran.status, _last_line(ran.stderr))
        kept = len(ran.stdout.encode() if ran.stdout_bytes is None else ran.stdout_bytes)
        if ran.stdout_truncated and kept < len(test.expected.encode("utf-8", "replace")) + _LEFT_OUT_WORDS:
            raise _OurFault(
                f"the pool keeps at most {kept // 1024} KiB of output but {limits.output_kib} were asked for, since the"
                " expected output is longer; raise the pool's output_kib"
            )
        passed = test.accepts(ran.stdout)
        return _grade([ran], passed, ran.status, "" if passed else "the output is not the expected one")

    async def _grade_answers(self, program: str, plan: Plan, questions: bytes) -> Grade:
        """Let program and test talk until the test has come to its end."""
        calls = []
        script = scripts.answer(program, plan.beside, plan.function)
        for _ in range(_ROUNDS):
            called = await self._run(script, files={QUESTIONS: questions}, wanted=[ANSWERS])
            calls.append(called)
            answers = called.files.get(ANSWERS, b"")
            left_open = answers.count(b"\n") < questions.count(b"\n")
            if called.status != ToolStatus.OK and not (answers and left_open):
                return _grade(calls, False, called.status, _last_line(called.stderr))
            if answers == plan.right_answers:
                return _grade(calls, True, ToolStatus.OK, "")
            verdict = await self._examine(plan, questions, answers)
            if verdict.word != "more":
                return _grade(calls, verdict.word == "passed", verdict.status, verdict.text)
            if left_open:  # and the test does need what was not answered
                status = ToolStatus.ERROR if called.status == ToolStatus.OK else called.status
                return _grade(calls, False, status, _last_line(called.stderr) or "it ended before it had answered")
            questions = verdict.questions
        return _grade(calls, False, ToolStatus.OK, f"after {_ROUNDS} rounds the test still had questions")

    async def _examine(self, plan: Plan, questions: bytes, answers: bytes, limits: Limits | None = None) -> _Verdict:
        """Run the test on answers, in a jail of its own."""
        given = {EXAM: plan.exam, QUESTIONS: questions, ANSWERS: answers}
        judged = await self._run(scripts.EXAMINE, limits=limits, files=given, wanted=[VERDICT, QUESTIONS])
        if judged.status != ToolStatus.OK or not {VERDICT, QUESTIONS} <= judged.files.keys():
            status = ToolStatus.ERROR if judged.status == ToolStatus.OK else judged.status
            text = f"the test itself ended badly: {_last_line(judged.stderr)}"
            return _Verdict("failed", text, b"", status, ended=False)
        word, _, text = judged.files[VERDICT].decode("utf-8", "replace").partition("\n")
        status = ToolStatus.ERROR if word == "raised" else ToolStatus.OK
        return _Verdict(word, text, judged.files[QUESTIONS], status)

    async def _interview(self, test: CodeTest) -> _Interview:
        """What the test asks first; found once per test."""
        interview = self._interviews.get(test)
        if interview is None:
            plan = divide(test)
            interview = self._interviews[test] = _Interview(
                plan, plan.questions, plan.obstacle, runs=plan.alone is None
            )
        self._interviews.move_to_end(test)
        while len(self._interviews) > _INTERVIEWS:
            self._interviews.popitem(last=False)
        tries = interview.tries
        async with interview.turn:
            # Whoever waited here shares the fault of another.
            if not interview.known and interview.tries == tries:
                try:
                    await self._find_out(interview)
                except _OurFault as fault:
                    interview.fault = str(fault)
                interview.tries += 1
            if not interview.known:
                raise _OurFault(interview.fault)
        if interview.broken:
            raise _OurFault(interview.broken)
        return interview

    async def _find_out(self, interview: _Interview) -> None:
        """Fill in whether the test can run, and what it asks, or why it asks nothing.

        Only a run that came to its end tells that a test asks nothing: anything else may come of a busy machine, and
        an obstacle puts the expected answers within the program's reach.

        Raises:
            _OurFault: no run came to its end.
        """
        patient = dataclasses.replace(self._limits, wall_seconds=self._limits.wall_seconds * _PATIENCE)
        if not interview.runs:
            interview.broken = await self._try_alone(interview.plan, patient)
            interview.runs = not interview.broken
        if interview.known:
            return
        verdict = await self._examine(interview.plan, b"", b"")
        if not verdict.ended:
            verdict = await self._examine(interview.plan, b"", b"", patient)
        if not verdict.ended:
            raise _OurFault(f"the test ran into {verdict.status} before it asked anything: {verdict.text}")
        if verdict.word == "more":
            interview.questions = verdict.questions
        elif verdict.word == "closed":
            interview.obstacle = f"a question of the test cannot leave its process: {verdict.text}"
        else:
            interview.obstacle = f"the test {verdict.word} before it asked anything: {verdict.text}"

    async def _try_alone(self, plan: Plan, patient: Limits) -> str:
        """Why the beginning of a test, run without any program, fails; empty if it does not.

        Raises:
            _OurFault: it did not come to its end.
        """
        prelude, code = plan.alone or ("", "")
        token = secrets.token_hex(16)
        for limits in (self._limits, patient):
            ran = await self._run(scripts.stand_beside("", prelude, code, token), limits=limits, wanted=[ANSWERS])
            if ran.status == ToolStatus.OK and ran.files.get(ANSWERS) == token.encode():
                return ""
            if ran.status in (ToolStatus.OK, ToolStatus.ERROR):
                reason = _last_line(ran.stderr) or "it ends the process"
                return f"the test cannot be run, whatever the program is: {reason}"
        raise _OurFault(f"the test ran into {ran.status} before it asked anything: {_last_line(ran.stderr)}")

    async def _grade_beside(self, program: str, test: CodeTest, obstacle: str) -> Grade:
        # The token only tells an end of the test from an early end of the program; here the program may know all.
        token = secrets.token_hex(16)
        script = scripts.stand_beside(program, test.prelude, f"{test.beside}\n{test.code}", token)
        ran = await self._run(script, wanted=[ANSWERS])
        passed = ran.status == ToolStatus.OK and ran.files.get(ANSWERS) == token.encode()
        status = ToolStatus.ERROR if ran.status == ToolStatus.OK and not passed else ran.status
        return dataclasses.replace(_grade([ran], passed, status, obstacle), hidden=False)

    async def _run(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        stdin: str | bytes = "",
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        language: str = "python",
    ) -> Result:
        limits = limits or self._limits
        # Room for what is given, so that long answers of a program never make the setting up of its test fail.
        given = sum(map(len, (files or {}).values()))
        limits = dataclasses.replace(limits, disk_mib=limits.disk_mib + (given >> 20) + 1)
        most = self._pool.most
        if most is not None and 2 * given > most.disk_mib << 20:
            raise _OurFault(f"{given} bytes leave too little of the pool's disk_mib={most.disk_mib}; raise it")
        try:
            result = await self._pool.run(
                code,
                stdin=stdin,
                echo=False,
                limits=limits,
                tenant=self._tenant,
                files=files,
                wanted=wanted,
                language=language,
            )
        except ValueError as error:
            if files is None:
                raise
            raise _OurFault(f"the pool refuses {given} bytes of files: {error}") from error
        if result.status == ToolStatus.INFRA_ERROR:
            raise _OurFault(result.stderr)
        return result


def _check_limits(limits: Limits, most: Limits | None) -> None:
    """Refuse limits that a pool would cut, for then a program fails that keeps to them.

    Raises:
        ValueError: a limit is larger than the pool's.
    """
    for name, value in dataclasses.asdict(limits).items():
        if most is not None and value > getattr(most, name):
            raise ValueError(
                f"Limits.{name}={value} but the pool gives no call more than {getattr(most, name)}; lower it here, or"
                " raise it there"
            )


def _grade(calls: Sequence[Result], passed: bool, status: ToolStatus, detail: str) -> Grade:
    cpu_seconds = sum(call.cpu_seconds for call in calls)
    wall_seconds = sum(call.wall_seconds for call in calls)
    # Without a jail a program can read what is given to others, their tests included.
    hidden = all(call.isolation != jail.UNSAFE for call in calls)
    return Grade(passed, status, hidden, cpu_seconds, wall_seconds, detail)


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
