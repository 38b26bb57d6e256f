"""Verifiers that compare by a function, in this process: for answers that are no mathematics."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxrl.config import ConfigError, nearest
from jaxrl.records import RewardStatus
from jaxrl.rewards.components.execution import same_output
from jaxrl.rewards.components.judged import same_verdict
from jaxrl.rl.methods import configured

MATH = "math"
"""The verifier that compares as mathematics, in processes of its own; see ``verifier``."""


class Pair(NamedTuple):
    """What is compared."""

    answer: str
    gold: str


def text(pair: Pair) -> bool:
    """The same words, white space aside."""
    return pair.answer.split() == pair.gold.split()


def execution(pair: Pair) -> bool:
    """The same standard output and standard error; see ``execution_prediction``."""
    return same_output(pair.answer, pair.gold)


def error_location(pair: Pair) -> bool | None:
    """A judge's verdict is right on whether there is an error; see the component of that name."""
    return same_verdict(pair.answer, pair.gold)


COMPARISONS: Mapping[str, Callable[[Pair], bool | None]] = {
    "text": text,
    "execution": execution,
    "error_location": error_location,
}
"""By name. None = the expected answer cannot be read."""

_STATUSES = {True: RewardStatus.CORRECT, False: RewardStatus.WRONG, None: RewardStatus.VERIFIER_CRASH}


class ComparingVerifier:
    """Grades by a function of answer and expected answer."""

    def __init__(self, same: Callable[[Pair], bool | None]) -> None:
        self._same = same

    async def grade(self, answer: str | None, gold: str) -> RewardStatus:
        """``NO_ANSWER`` for None and blank, otherwise what the function says; ``VERIFIER_CRASH`` for None."""
        if answer is None or not answer.strip():
            return RewardStatus.NO_ANSWER
        same = self._same(Pair(answer, gold))
        return _STATUSES[None if same is None else bool(same)]


def comparison(name: str) -> Callable[[Pair], bool | None]:
    """The function that ``RewardConfig.verifier`` names, a row of ``COMPARISONS`` or "path/to/file.py:function".

    Raises:
        ConfigError: there is none.
    """
    if ":" not in name and name not in COMPARISONS:
        names = (MATH, *COMPARISONS)
        raise ConfigError(
            f"RewardConfig.verifier={name!r} is no verifier{nearest(name, names)}; there are {', '.join(names)}, "
            'or give a function of your own as "path/to/file.py:function"'
        )
    return configured("RewardConfig.verifier", COMPARISONS, name, {})
