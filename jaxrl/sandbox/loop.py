"""The warden's event loop: descriptors by epoll, timers by a heap. One thread, callbacks, nothing blocks."""

import heapq
import itertools
import select
import time
from collections.abc import Callable


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._afterwards: list[Callable[[], None]] = []
        self._order = itertools.count()
        self._running = True

    def watch(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready; a second call changes the events."""
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        """Stop watching; call this before closing the descriptor. Unknown descriptors are ignored."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at(self, moment: float, callback: Callable[[], None]) -> None:
        """Call once when ``time.monotonic()`` reaches ``moment``."""
        heapq.heappush(self._timers, (moment, next(self._order), callback))

    def afterwards(self, callback: Callable[[], None]) -> None:
        """Call once, at the end of this round of callbacks."""
        self._afterwards.append(callback)

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            wait = -1.0
            if self._timers:
                wait = max(self._timers[0][0] - time.monotonic(), 0.0)
            # A callback may close a descriptor of which this round has news still to come, and the next one opened gets
            # its number: news is for who was watching when it came. A new watcher's own comes with the next round.
            for fd, events, callback in [(fd, events, self._callbacks[fd]) for fd, events in self._epoll.poll(wait)]:
                if self._callbacks.get(fd) is callback:
                    callback(events)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            while self._afterwards:
                self._afterwards.pop()()
