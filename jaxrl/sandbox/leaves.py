"""Sessions' processes, the leaves of families, as the warden holds them: a keeper, a first leaf, and copies of leaves.

A leaf is halted whenever it runs no cell. It is told what to do over a socket, and each answer is expected: one that
speaks out of turn is ended.
"""

import contextlib
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxrl.sandbox import inspection, orders
from jaxrl.sandbox.cell_job import CellJob
from jaxrl.sandbox.fleet import Template
from jaxrl.sandbox.job import output_pipe, send_signal
from jaxrl.sandbox.protocol import Limits

if TYPE_CHECKING:
    from jaxrl.sandbox.branching import Copying

_CREDENTIALS = struct.Struct("iII")
_ROOM_FOR_CREDENTIALS = socket.CMSG_SPACE(_CREDENTIALS.size)  # and for no descriptor, which then never gets here

Answered = Callable[[bytes, int], None]  # the answer's body and the process id of who sent it


class Leaf:
    """One session's process. The pipes and the control socket are there before it is."""

    def __init__(self, id: int, family: "Family") -> None:
        self.id = id
        self.family = family
        self.job: CellJob | None = None  # that it runs, or for which it is being made ready
        self.resting = False  # halted, and free to be given a cell
        self.alive = True
        self.pid = self.inner = 0
        self.pidfd = -1
        self.residence = inspection.Residence(0)
        self.spare: Leaf | None = None  # a copy from before the cell, to take over if that ends the process
        self.copying: Copying | None = None  # of which it is the original or the copy
        self.ended: Callable[[], None] | None = None  # called when nothing is left of it
        self.doomed = 0.0  # when it was first seen to be killed and not yet dead
        self.last_used = 0.0
        self.awaited = False  # another cell, or a fork, is on its way to it
        self.memory_kib = 0
        self.measured = False  # since its last cell
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.control.setblocking(False)  # it need not read what it is sent
        self.stdout, out_write = output_pipe()
        self.stderr, err_write = output_pipe()
        self.ends = (theirs.detach(), out_write, err_write)  # the leaf's own, open here until it has them
        self.holds = [family.null, *map(inspection.identity, self.ends)]
        self._expected = b""
        self._answered: Answered | None = None

    @property
    def template_rss_kib(self) -> int:
        return self.family.template.rss_kib

    def expect(self, letter: bytes, answered: Answered) -> None:
        self._expected, self._answered = letter, answered

    def order(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send an order and let the leaf run, to carry it out."""
        try:
            orders.send_packet(self.control, data, fds)
        except OSError:
            self.kill()  # it closed the socket, or let it fill
        self.resting = False
        if self.pidfd >= 0:
            send_signal(self.pidfd, signal.SIGCONT)

    def hear(self) -> bool:
        """Take one message; False where the leaf is past talking."""
        try:
            data, ancillary, _, _ = self.control.recvmsg(64, _ROOM_FOR_CREDENTIALS)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        answered = self._answered
        if not data or answered is None or data[:1] != self._expected:
            self.kill()
            return False
        self._expected, self._answered = b"", None
        senders = [_CREDENTIALS.unpack(load)[0] for _, kind, load in ancillary if kind == socket.SCM_CREDENTIALS]
        answered(data[1:], senders[0] if senders else 0)
        return True

    @property
    def answer_is_due(self) -> bool:
        return self._answered is not None

    def identify(self, pid: int) -> bool:
        """Learn who it is; False where that is not a further child of the keeper's."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        kin = inspection.kin(pid)
        if kin is None or kin.parent != self.family.pid or kin.inner in self.family.leaves:
            os.close(pidfd)
            return False
        self.pid, self.pidfd, self.inner = pid, pidfd, kin.inner
        self.residence = inspection.Residence(pid)
        self.family.leaves[kin.inner] = self
        self.family.template.residents.add(pid)
        return True

    def halt(self) -> None:
        if self.pidfd >= 0:
            send_signal(self.pidfd, signal.SIGSTOP)

    def kill(self) -> None:
        self.resting = False
        if self.pidfd >= 0:
            send_signal(self.pidfd, signal.SIGKILL)

    def close_ends(self) -> None:
        """Once the leaf has its ends of pipes and socket, or never will."""
        for fd in self.ends:
            os.close(fd)
        self.ends = ()

    def release(self) -> None:
        """Close all that is held of a dead leaf."""
        self.alive = self.resting = False
        self.close_ends()
        self.control.close()
        for fd in (self.stdout, self.stderr, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.stdout = self.stderr = -1
        self.family.leaves.pop(self.inner, None)
        self.family.template.residents.discard(self.pid)


class Family:
    """A keeper and the leaves it is the parent of."""

    def __init__(self, number: int, template: Template, limits: Limits) -> None:
        self.number = number
        self.template = template
        self.limits = limits
        self.control, self.keeper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = 0
        self.pidfd = -1
        self.alive = True
        self.memory_kib = 0  # of the keeper
        self.leaves: dict[int, Leaf] = {}  # by process id in their own namespace
        self.first: Leaf | None = None  # the one that the keeper forked
        self.claim: Callable[[], None] | None = None  # for when the keeper's birth is known
        self.null = inspection.file_identity(os.devnull)
        self._places = 1  # for so many leaves threads are allowed
        self.endings: list[Callable[[], None]] = []  # of leaves that are dead, for when their world is as well
        self._furnished: deque[Callable[[str], None]] = deque()

    def kill_strangers(self) -> bool:
        """End copies that never said who they are; False where the kernel does not tell of them."""
        found = inspection.children(self.pid)
        if found is None:
            return False
        for pid in found - {leaf.pid for leaf in self.leaves.values()}:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                kin = inspection.kin(pid)
                if kin is not None and kin.parent == self.pid:
                    send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
        return True

    def found(self, first: Leaf) -> None:
        """Have the template fork the keeper, and that one the first leaf.

        Raises:
            OSError: the template is dying.
        """
        limits = self.limits
        address_space = self.template.address_space + (limits.memory_mib << 20)
        order = orders.FAMILY.pack(self.number, address_space, limits.disk_mib, limits.open_files, limits.threads)
        ends = (self.keeper_end.detach(), *first.ends)
        first.ends = ()
        self.template.outgoing.send(orders.ORDER_FAMILY + order, ends)

    def furnish(self, owner: Leaf, original: Leaf | None, furnished: Callable[[str], None]) -> None:
        """Give a leaf a working directory, with the original's files; ``furnished`` is told what stood against it."""
        self._furnished.append(furnished)
        # Threads are counted by user, and all leaves have the same one: each is allowed what all may have together.
        if len(self.leaves) > self._places:
            self._places = 2 * len(self.leaves)
        order = orders.DIRECTORY.pack(owner.inner, self._places * self.limits.threads)
        fds = (owner.pidfd,) if original is None else (owner.pidfd, original.pidfd)
        with contextlib.suppress(OSError):  # the keeper is dying; its loss is handled where it is heard
            orders.send_packet(self.control, orders.ORDER_DIRECTORY + order, fds)

    def heard_furnished(self, refusal: str) -> None:
        self._furnished.popleft()(refusal)

    def tell_end(self) -> None:
        endings, self.endings = self.endings, []
        for ended in endings:
            ended()

    def drop(self) -> None:
        """End the keeper, and with it all leaves."""
        self.alive = False
        if self.pidfd >= 0:
            send_signal(self.pidfd, signal.SIGKILL)
            os.close(self.pidfd)
        self.pidfd = -1
        self.control.close()
        self.keeper_end.close()
