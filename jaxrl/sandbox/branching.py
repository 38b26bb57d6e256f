"""One copy of a session's process in the making: who has to say what, and what must be seen before it is believed.

    original ── asks the kernel for a copy ──► halted by the listener: one thread, no descriptors but its own?
    copy ── exists ──► gets a directory of its own from the keeper, enters it
    both are halted ──► one thread each, no descriptors but their own, no memory shared, each in its own directory?

Until that is answered the copy has been believed in nothing, and may have had the original's files in sight.
"""

import time
from collections.abc import Callable

from jaxrl.sandbox import inspection, orders
from jaxrl.sandbox.leaves import Leaf
from jaxrl.sandbox.loop import Loop

_SECONDS = 10.0  # for the whole; beyond, the original is taken to play tricks
_LOOK_SECONDS = 0.0005  # between the first two looks at whether both stand still; doubled each time


class Copying:
    """Makes one copy of a resting leaf.

    Args:
        work: where working directories are mounted.
        copy: has pipes and a socket, and no process yet.
        finished: told the end; with the copy, or with None where there could be none.
    """

    def __init__(
        self, loop: Loop, work: str, original: Leaf, copy: Leaf, finished: Callable[[Leaf | None], None]
    ) -> None:
        self._loop, self._work = loop, work
        self._original, self._copy = original, copy
        self._finished: Callable[[Leaf | None], None] | None = finished
        self._granted = self._exists = self._copied = self._gone = False
        original.copying = copy.copying = self
        original.expect(orders.ANSWER_COPIED, self._hear_copied)
        copy.expect(orders.ANSWER_EXISTS, self._hear_exists)
        ends = copy.ends
        self._wanted = [*original.holds, *copy.holds[1:]]  # of the original while it makes the copy
        loop.at(time.monotonic() + _SECONDS, self.give_up)
        original.order(orders.ORDER_COPY, ends)
        copy.close_ends()

    def grant(self) -> bool:
        """Whether the original, halted in asking the kernel for the copy, may have it: once, and if it is fit."""
        if self._granted or self._finished is None:
            return False
        pid = self._original.pid
        kin = inspection.kin(pid)
        self._granted = kin is not None and kin.threads == 1 and inspection.holds_exactly(pid, self._wanted)
        return self._granted

    def give_up(self) -> None:
        """No copy; the original goes on if it did its part."""
        if self._finished is None:
            return
        if self._original.answer_is_due:
            self._original.kill()
        self._copy.kill()
        self._end(None)

    @property
    def at_large(self) -> bool:
        """Whether there may be a copy of which nothing is known."""
        return self._granted and self._copy.pid == 0

    def _end(self, copy: Leaf | None) -> None:
        finished, self._finished = self._finished, None
        assert finished is not None
        self._original.copying = self._copy.copying = None
        for leaf in (self._original, self._copy):
            if leaf.alive and not leaf.answer_is_due:
                leaf.halt()
                leaf.resting = leaf is self._original or copy is not None
        finished(copy)

    def _hear_copied(self, answer: bytes, _: int) -> None:
        self._copied = True
        self._original.halt()
        if answer != b"\1" or self._gone:
            self.give_up()
        else:
            self._furnish()

    def hear_nobody(self) -> None:
        """Nobody holds the copy's end of its socket any more."""
        self._gone = True
        if self._copied:
            self.give_up()

    def _hear_exists(self, _: bytes, pid: int) -> None:
        self._exists = True
        if not self._granted or not self._copy.identify(pid):
            self.give_up()
        else:
            self._furnish()

    def _furnish(self) -> None:
        if self._copied and self._exists:
            self._copy.family.furnish(self._copy, self._original, self._hear_furnished)

    def _hear_furnished(self, refusal: str) -> None:
        if self._finished is None:
            return
        if refusal:
            self.give_up()
            return
        self._copy.expect(orders.ANSWER_ENTERED, self._hear_entered)
        self._copy.order(orders.ORDER_ENTER)

    def _hear_entered(self, _: bytes, __: int) -> None:
        self._copy.halt()
        self._wait_for_standstill(_LOOK_SECONDS)

    def _wait_for_standstill(self, pause: float) -> None:
        """Each stops as soon as it has a core, if only to be stopped there."""
        if self._finished is None:
            return
        if not (inspection.is_stopped(self._original.pid) and inspection.is_stopped(self._copy.pid)):
            self._loop.at(time.monotonic() + pause, lambda: self._wait_for_standstill(2 * pause))
        elif self._stand_apart():
            self._end(self._copy)
        else:
            self.give_up()

    def _stand_apart(self) -> bool:
        """Whether, both halted, neither holds anything of the other's."""
        for leaf in (self._original, self._copy):
            kin = inspection.kin(leaf.pid)
            if kin is None or kin.threads != 1 or not inspection.holds_exactly(leaf.pid, leaf.holds):
                return False
        pids = self._copy.pid, self._original.pid
        return inspection.stands_in_own_directory(*pids, self._work) and not inspection.shares_memory(*pids, self._work)
