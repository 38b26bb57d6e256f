"""Playing episodes: the loop between a policy that writes and an environment that answers, many at once.

The loop is that of rStar2-Agent (arXiv 2508.20722, section 2 and its released agent loop), token-in token-out: ids are
appended as they are sampled or rendered and never tokenised again. What differs on purpose: a call that names no
tool, has bad arguments or is one too many is answered with the reason instead of being dropped; the newline that
ChatML puts after a turn is part of the tool turn; the answer is read from the policy's own visible text alone; and a
fault of our own machinery ends the trajectory as ``infra_error`` instead of being shown to the policy.
"""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrl.config import EnvConfig
from jaxrl.envs.rendering import render, tokenize_output
from jaxrl.envs.tool import Tool
from jaxrl.records import Group, Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn
from jaxrl.rewards.answers import extract_answer
from jaxrl.rewards.scorer import CORRECTNESS, Scorer
from jaxrl.rewards.verifier import Verifier
from jaxrl.rollout.engine import Engine, Sample
from jaxrl.rollout.engine import Sequence as EngineSequence
from jaxrl.rollout.fleet import Fleet
from jaxrl.text.chat import ChatFormat
from jaxrl.text.tokenizer import Tokenizer
from jaxrl.text.tool_calls import CallError, ParsedCall, parse_tool_calls

GREEDY_SAMPLE = 1 << 20
"""Sample index of the greedy trajectory of a group; no group has so many."""


@dataclasses.dataclass(frozen=True)
class Player:
    """Everything an episode is played with.

    Attributes:
        tools: at most one of each name.
        max_response_tokens: budget of all turns together, tool output and framing included.
        temperature: None = the engine's own.
        scorer: makes rewards of what the verifier says.
    """

    engine: Engine | Fleet
    chat: ChatFormat
    tokenizer: Tokenizer
    tools: Sequence[Tool]
    verifier: Verifier
    config: EnvConfig
    max_response_tokens: int
    temperature: float | None = None
    scorer: Scorer = CORRECTNESS


JointPlay = Callable[[Player, Problem, int, int], Awaitable[tuple[Trajectory, ...]]]
"""Plays a number of episodes of a drawn problem in which several agents take part; all that they wrote."""


@dataclasses.dataclass
class _Clock:
    """Time one episode has used itself: rounds it decoded in and calls that ran. Waiting for others is not counted."""

    limit: float
    used: float = 0.0

    @property
    def left(self) -> float:
        return self.limit - self.used


class _Response:
    """The growing response of one episode."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.turns: list[Turn] = []
        self.experts: np.ndarray | None = None

    def add_sample(self, sample: Sample) -> None:
        start, count = len(self.ids), len(sample.ids)
        self.ids.extend(map(int, sample.ids))
        self.mask.extend([1] * count)
        self.logprobs.extend(map(float, sample.logprobs))
        self.versions.extend(map(int, sample.versions))
        self.experts = sample.experts
        self.turns.append(Turn(start, start + count, "policy"))

    def add_calls(self, calls: Sequence[ToolCall]) -> None:
        """Note the calls that the last policy turn made."""
        self.turns[-1] = dataclasses.replace(self.turns[-1], calls=tuple(calls))

    def add_tool_turn(self, ids: Sequence[int]) -> None:
        start, count = len(self.ids), len(ids)
        self.ids.extend(map(int, ids))
        self.mask.extend([0] * count)
        self.logprobs.extend([0.0] * count)
        self.versions.extend([-1] * count)
        self.turns.append(Turn(start, start + count, "tool"))

    def policy_texts(self, tokenizer: Tokenizer) -> list[str]:
        """Each policy turn decoded alone, so that no tag can arise across a tool turn."""
        return [tokenizer.decode(self.ids[turn.start : turn.end]) for turn in self.turns if turn.author == "policy"]


async def play_episode(player: Player, problem: Problem, draw: int, sample: int) -> Trajectory:
    """Play one problem to its end and grade it.

    The wall clock (``EnvConfig.wall_seconds``) counts the engine's rounds that the episode took part in and the run
    time of its calls, not what it waited for pages, for a decode slot or in the sandbox's queue. It is read between
    turns and bounds the run time of tool calls; a turn that is being sampled is finished, since its length is bounded
    by tokens. Grading is not part of it.

    Args:
        draw: index of the draw in the run's stream of problems; with ``sample`` it names the random key.
        sample: index within the group.

    Raises:
        PromptTooLong: the prompt is longer than ``EngineConfig.max_prompt_tokens``.
    """
    prompt = player.chat.prompt(problem.question)
    response = _Response()
    sequence = await player.engine.open(
        prompt, draw=draw, sample=sample, max_tokens=player.max_response_tokens, temperature=player.temperature
    )
    clock = _Clock(player.config.wall_seconds)
    try:
        stop_reason = await _converse(player, sequence, response, clock)
    finally:
        sequence.close()
    texts = response.policy_texts(player.tokenizer)
    tags = extract_answer(texts, opened_reason=player.chat.config.open_reason)
    status = RewardStatus.NO_ANSWER
    if stop_reason is not StopReason.INFRA_ERROR:
        status = await player.verifier.grade(tags.last, problem.answer)
    trajectory = Trajectory(
        problem=problem,
        draw=draw,
        sample=sample,
        prompt_ids=prompt,
        ids=np.asarray(response.ids, np.int32),
        mask=np.asarray(response.mask, np.int8),
        logprobs=np.asarray(response.logprobs, np.float32),
        versions=np.asarray(response.versions, np.int32),
        turns=tuple(response.turns),
        stop_reason=stop_reason,
        text=player.tokenizer.decode(response.ids),
        answer=tags.last,
        answer_tags=tags.count,
        balanced_tags=tags.balanced,
        reward_status=status,
        seconds=clock.used,
        tool_seconds=sum(call.seconds for turn in response.turns for call in turn.calls),
        experts=response.experts,
    )
    return await player.scorer.score(trajectory, player.max_response_tokens)


async def play_groups(
    player: Player,
    draws: Iterable[tuple[int, Problem]],
    samples: int,
    *,
    in_flight: int | None = None,
    greedy_baseline: bool = False,
    extra_samples: Callable[[np.ndarray], int] | None = None,
) -> AsyncGenerator[Group]:
    """Play ``samples`` trajectories of every drawn problem and yield the groups in the order of the draws.

    All groups in flight share the engine, so that its slots stay busy while others wait for tools. A trajectory that
    ended in ``infra_error`` is in its group, not trainable. When an episode fails with an exception, it is raised at
    once. However the iteration ends, nothing of it goes on: every sequence is closed and every call is cancelled.
    Leave early through ``contextlib.aclosing``, so that this happens then and not at garbage collection.

    Args:
        draws: (draw, problem) pairs; taken from the iterable only when their group is begun.
        samples: trajectories of each problem.
        in_flight: groups begun but not yet yielded at most; None = all. Needed where ``draws`` does not end.
        greedy_baseline: play one more trajectory of each problem, greedily; it is not in the group, but its reward is
            in those that are, unless it is not trainable.
        extra_samples: once the first ``samples`` of a problem are graded, how many more to play, from the correctness
            [at most samples] of those that are trainable.
    """
    source = iter(draws)
    groups: collections.deque[asyncio.Task[Group]] = collections.deque()
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(count: int | None) -> None:
        for draw, problem in itertools.islice(source, count):
            played = play_group(
                player, problem, draw, samples, greedy_baseline=greedy_baseline, extra_samples=extra_samples
            )
            task = asyncio.create_task(played, name=f"group {draw}")
            task.add_done_callback(report)
            groups.append(task)

    def report(task: asyncio.Task[Group]) -> None:
        if not task.cancelled() and task.exception() is not None and not failure.done():
            failure.set_exception(first_cause(task.exception()))

    try:
        begin(in_flight)
        while groups:
            await asyncio.wait((groups[0], failure), return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                failure.result()
            group = groups.popleft().result()
            begin(1 if in_flight is not None else 0)
            yield group
    finally:
        failure.cancel()
        for task in groups:
            task.cancel()
        await asyncio.gather(*groups, return_exceptions=True)


async def play_group(
    player: Player,
    problem: Problem,
    draw: int,
    samples: int,
    *,
    greedy_baseline: bool = False,
    extra_samples: Callable[[np.ndarray], int] | None = None,
    joint: JointPlay | None = None,
) -> Group:
    """Play ``samples`` trajectories of one drawn problem side by side; further arguments as for ``play_groups``.

    Args:
        joint: plays ``samples`` episodes of several agents each, in their place.

    Raises:
        BaseExceptionGroup: around what an episode raised; see ``first_cause``.
    """
    if joint is not None:
        return Group(problem, draw, await joint(player, problem, draw, samples))
    async with asyncio.TaskGroup() as tasks:
        episodes = [tasks.create_task(play_episode(player, problem, draw, sample)) for sample in range(samples)]
        if greedy_baseline:
            greedy_player = dataclasses.replace(player, temperature=0.0)
            greedy = tasks.create_task(play_episode(greedy_player, problem, draw, GREEDY_SAMPLE))
    if extra_samples is not None:
        graded = [episode.result() for episode in episodes]
        more = extra_samples(np.array([trajectory.correct for trajectory in graded if trajectory.trainable], bool))
        async with asyncio.TaskGroup() as tasks:
            played = [play_episode(player, problem, draw, sample) for sample in range(samples, samples + more)]
            episodes += [tasks.create_task(episode) for episode in played]
    trajectories = tuple(episode.result() for episode in episodes)
    if greedy_baseline and greedy.result().trainable:
        baseline = greedy.result().reward
        trajectories = tuple(dataclasses.replace(played, greedy_reward=baseline) for played in trajectories)
    return Group(problem, draw, trajectories)


def first_cause(error: BaseException) -> BaseException:
    """The exception that made a task group fail, out of its wrapping."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _converse(player: Player, sequence: EngineSequence, response: _Response, clock: _Clock) -> StopReason:
    """Alternate between policy and tools until something ends the episode."""
    config = player.config
    for turn in itertools.count(1):
        room = player.max_response_tokens - len(response.ids)
        sample = await sequence.generate(min(room, config.max_turn_tokens or room))
        response.add_sample(sample)
        clock.used += sample.seconds
        if not sample.stopped:
            return StopReason.MAX_TOKENS
        text = player.tokenizer.decode(sample.ids)
        requests = parse_tool_calls(text)
        if not requests:
            answered = extract_answer([text], opened_reason=player.chat.config.open_reason).last is not None
            return StopReason.ANSWERED if answered else StopReason.NO_CALL
        if turn >= config.max_turns:
            return StopReason.MAX_TURNS
        if clock.left <= 0:
            return StopReason.WALL_CLOCK
        calls = await _answer_all(player, requests, clock)
        response.add_calls(calls)
        if any(call.status is ToolStatus.INFRA_ERROR for call in calls):
            return StopReason.INFRA_ERROR
        if clock.left <= 0:
            return StopReason.WALL_CLOCK
        outputs = [
            tokenize_output(render(call, config.traceback), player.tokenizer, config.max_tool_tokens) for call in calls
        ]
        tool_ids = player.chat.tool_turn(outputs)
        if len(response.ids) + len(tool_ids) >= player.max_response_tokens:
            return StopReason.MAX_TOKENS  # without it: the last token stays the policy's own
        response.add_tool_turn(tool_ids)
        sequence.append(tool_ids)
    raise AssertionError("unreachable")


async def _answer_all(player: Player, requests: Sequence[ParsedCall | CallError], clock: _Clock) -> list[ToolCall]:
    """Run the calls of one turn side by side; results in the order of the calls."""
    left = player.config.max_parallel_calls
    answers: list[ToolCall | asyncio.Task[tuple[ToolCall, float]]] = []
    tools = {tool.schema.name: tool for tool in player.tools}
    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            refusal = _refusal(request, tools, left, player.config.max_parallel_calls)
            if refusal is not None:
                answers.append(refusal)
                continue
            left -= 1
            call = _call_with_retries(tools[request.name], request.arguments, player.config, clock.left)
            answers.append(tasks.create_task(call))
    results = [(answer, 0.0) if isinstance(answer, ToolCall) else answer.result() for answer in answers]
    clock.used += max(seconds for _, seconds in results)  # they ran side by side
    return [call for call, _ in results]


def _refusal(request: ParsedCall | CallError, tools: dict[str, Tool], left: int, limit: int) -> ToolCall | None:
    """The answer to a call that cannot be run; None where it can."""
    if isinstance(request, CallError):
        return ToolCall("", {}, ToolStatus.PARSE_ERROR, stderr=request.message)
    arguments = request.arguments if isinstance(request.arguments, dict) else {}
    if request.name not in tools:
        reason = f'unknown tool "{request.name}"; there are: {", ".join(tools) or "none"}'
        return ToolCall(request.name, arguments, ToolStatus.UNKNOWN_TOOL, stderr=reason)
    if left <= 0:
        reason = f"not run: at most {limit} call{'s' if limit != 1 else ''} in a turn"
        return ToolCall(request.name, arguments, ToolStatus.BAD_ARGUMENTS, stderr=reason)
    return None


async def _call_with_retries(tool: Tool, arguments: Any, config: EnvConfig, seconds: float) -> tuple[ToolCall, float]:
    """One call, tried afresh after faults of our own, and the seconds it ran, without waiting and without those tries.

    ``attempts`` and ``queue_seconds`` of the call count all tries.
    """
    attempts, queued, began = 0, 0.0, time.monotonic()
    for _ in range(1 + config.infra_retries):
        started = time.monotonic()
        call = ToolCall(tool.schema.name, {}, ToolStatus.INFRA_ERROR, stderr="no result from the tool in time")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + config.queue_seconds):
                call = await tool.call(arguments, seconds)
        attempts += call.attempts
        # A try that failed by our own fault is waiting, not running.
        failed = call.status is ToolStatus.INFRA_ERROR
        queued += time.monotonic() - started if failed else call.queue_seconds
        if not failed:
            break
    return dataclasses.replace(call, attempts=attempts, queue_seconds=queued), time.monotonic() - began - queued
