"""Whose call is next: tenants in turn, so that one that submits thousands keeps nobody else waiting."""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from jaxrl.sandbox.job import Job

Place = TypeVar("Place")


class Turns:
    """Waiting calls of all tenants. Within a tenant first come, first served, as far as there is a place for it."""

    def __init__(self) -> None:
        # Whose turn is next comes first; within a tenant by the kind of place wanted.
        self._tenants: dict[int, dict[str, deque[Job]]] = {}

    def __bool__(self) -> bool:
        """Whether any call may be waiting; False only where none is."""
        return bool(self._tenants)

    def add(self, job: Job, *, first: bool = False) -> None:
        """Let a call wait, with ``first`` before all others of its tenant."""
        queue = self._tenants.setdefault(job.call.tenant, {}).setdefault(job.kind, deque())
        if first:
            queue.appendleft(job)
        else:
            queue.append(job)

    def oldest(self) -> float | None:
        """When the longest waiting call was submitted; None where none waits."""
        queues = (queue for queues in self._tenants.values() for queue in queues.values())
        first = (next((job.call.submitted for job in queue if not job.done), None) for queue in queues)
        return min((moment for moment in first if moment is not None), default=None)

    def take(self, place_for: Callable[[Job], Place | None]) -> tuple[Job, Place] | None:
        """The next call that has a place, which then no longer waits; calls that are done meanwhile are dropped."""
        for _ in range(len(self._tenants)):
            tenant = next(iter(self._tenants))
            queues = self._tenants.pop(tenant)
            chosen = _oldest_with_place(queues, place_for)
            if any(queues.values()):
                self._tenants[tenant] = queues  # at the end: the others come first now
            if chosen is not None:
                return chosen
        return None


def _oldest_with_place(
    queues: dict[str, deque[Job]], place_for: Callable[[Job], Place | None]
) -> tuple[Job, Place] | None:
    for queue in queues.values():
        while queue and queue[0].done:
            queue.popleft()
    for queue in sorted(filter(None, queues.values()), key=lambda queue: queue[0].call.submitted):
        for index, job in enumerate(queue):
            place = None if job.done else place_for(job)
            if place is not None:
                del queue[index]
                return job, place
            if not job.has_own_place:
                break  # those behind it wait for the same
    return None
