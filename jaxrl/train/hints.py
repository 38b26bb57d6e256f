"""What a policy is told beside a problem when it is its own teacher: how the problem is solved, or what went wrong."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from jaxrl.data.recorded import Worked
from jaxrl.records import Conversation, Demonstration, Trajectory
from jaxrl.train.session import Session

SOLVED = "Here is a solution of it:"
FAILED = "An earlier attempt failed. It was told:"
AGAIN = "Solve it yourself now."


def hinted(session: Session, trajectories: Sequence[Trajectory]) -> list[Trajectory | None]:
    """The trajectories as if they had been written after a prompt with a hint; None where there is none, or where
    ``TrainConfig.row_tokens`` cannot hold it.

    With ``AlgorithmConfig.hint = "demonstration"`` the hint is the first demonstration of the problem. With "attempts"
    it is the first other one of the same draw that is correct, and without one, of a wrong trajectory, what its tools
    answered.

    Args:
        trajectories: all that selection kept in a step; it looks at no others.
    """
    hint = _demonstrated(session) if session.config.algorithm.hint == "demonstration" else _attempted(trajectories)
    told: list[Trajectory | None] = []
    for one in trajectories:
        text = hint(one)
        question = f"{one.problem.question}\n\n{text}\n\n{AGAIN}"
        after = dataclasses.replace(one, prompt_ids=session.chat.prompt(question), experts=None) if text else None
        fits = after is not None and len(after.prompt_ids) + len(after.ids) <= session.config.train.row_tokens
        told.append(after if fits else None)
    return told


def _demonstrated(session: Session) -> Callable[[Trajectory], str]:
    texts: dict[str, str] = {}
    for worked in session.demonstrations:
        texts.setdefault(_problem_of(worked), f"{SOLVED}\n{_text_of(worked)}")
    return lambda one: texts.get(one.problem.id, "")


def _attempted(trajectories: Sequence[Trajectory]) -> Callable[[Trajectory], str]:
    solved: dict[int, list[Trajectory]] = collections.defaultdict(list)
    for one in trajectories:
        if one.correct:
            solved[one.draw].append(one)

    def hint(one: Trajectory) -> str:
        others = [other for other in solved[one.draw] if other.sample != one.sample]
        if others:
            return f"{SOLVED}\n{min(others, key=lambda other: other.sample).text}"
        answered = [part for call in one.calls for part in (call.stdout, call.stderr) if part]
        return "" if one.correct or not answered else "\n".join((FAILED, *answered))

    return hint


def _problem_of(worked: Worked) -> str:
    return worked.id if isinstance(worked, Conversation) else worked.problem.id


def _text_of(worked: Worked) -> str:
    if isinstance(worked, Demonstration):
        return "\n".join(worked.turns)
    if isinstance(worked, Conversation):
        return "\n".join(message.text for message in worked.messages if message.role in ("assistant", "tool"))
    return worked.text
