"""The search for changes that make a run fit: proposed by estimates, judged by compiling, the cheapest first."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxrl.check.remedies import Remedy

REMEDIES = 3
"""Remedies that are looked for."""
TRIES = 6
"""Remedies that are judged, at most."""
AT_ONCE = 2
"""Remedies that are judged side by side."""

Outcome = TypeVar("Outcome")


def search(
    proposed: Iterator[Remedy],
    judge: Callable[[Remedy], Outcome | None],
    says_little: Callable[[Remedy, Remedy], bool],
) -> tuple[list[tuple[Remedy, Outcome]], int]:
    """The cheapest remedies that help, with what was found of each; and how many were judged.

    Those of one round are judged side by side: as many as are still wanted.

    Args:
        proposed: the cheapest first.
        judge: None for one that does not help; called from several threads.
        says_little: whether a remedy says little beside another, cheaper one that helps.
    """
    seen: list[Remedy] = []
    judged: dict[int, Outcome | None] = {}  # by place among the seen
    while True:
        helped: dict[int, Outcome] = {}
        for place, outcome in sorted(judged.items()):
            if outcome is not None and not any(says_little(seen[place], seen[other]) for other in helped):
                helped[place] = outcome
        most = min(REMEDIES - len(helped), TRIES - len(judged))
        chosen: list[int] = []
        for place, remedy in enumerate(_again(seen, proposed) if most else ()):
            if place in judged or any(says_little(remedy, seen[other]) for other in (*helped, *chosen)):
                continue
            chosen.append(place)
            if len(chosen) == most:
                break
        if not chosen:
            return [(seen[place], outcome) for place, outcome in helped.items()], len(judged)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as workers:
            judged |= zip(chosen, workers.map(judge, [seen[place] for place in chosen]), strict=True)


def _again(seen: list[Remedy], proposed: Iterator[Remedy]) -> Iterator[Remedy]:
    """What was seen, and what is proposed next, which then is seen too."""
    yield from tuple(seen)
    for remedy in proposed:
        seen.append(remedy)
        yield remedy
