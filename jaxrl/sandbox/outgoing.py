"""Packets on their way to a process of ours that may be halted: what its socket does not take now waits here."""

import os
import select
import socket
from collections import deque
from collections.abc import Callable

from jaxrl.sandbox.loop import Loop
from jaxrl.sandbox.orders import send_packet


class Outgoing:
    """The warden's end of a control socket, which never keeps the warden waiting. Watches it for answers, too.

    A process that reads nothing any more is found by its silence, with whatever waits for it here.

    Args:
        control: does not block from now on.
        hear: called when there is something to receive.
    """

    def __init__(self, loop: Loop, control: socket.socket, hear: Callable[[], None]) -> None:
        self._loop, self._control, self._hear = loop, control, hear
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        control.setblocking(False)
        loop.watch(control.fileno(), self._serve)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send a packet, now or behind those that wait. The descriptors are closed once they are gone, or lost.

        Raises:
            OSError: nobody holds the other end any more.
        """
        self._waiting.append((data, fds))
        if len(self._waiting) == 1:
            self._flush()
            if self._waiting:
                self._loop.watch(self._control.fileno(), self._serve, select.EPOLLIN | select.EPOLLOUT)

    def close(self) -> None:
        """Drop what waits, and close the socket."""
        while self._waiting:
            _close(self._waiting.popleft()[1])
        self._loop.forget(self._control.fileno())
        self._control.close()

    def _serve(self, events: int) -> None:
        if events & select.EPOLLOUT:
            try:
                self._flush()
            except OSError:
                events |= select.EPOLLIN  # whose end is heard there
            if not self._waiting:
                self._loop.watch(self._control.fileno(), self._serve)
        if events & ~select.EPOLLOUT:
            self._hear()

    def _flush(self) -> None:
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                send_packet(self._control, data, fds)
            except BlockingIOError:
                return
            except OSError:
                self._drop_first()
                raise
            self._drop_first()

    def _drop_first(self) -> None:
        _close(self._waiting.popleft()[1])


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
