"""Orders from the warden to its processes in the jail, their answers, and the packets that carry descriptors."""

import array
import errno
import os
import socket
import struct

# Orders to a stem, with the new process's socket attached: b"T" a template, b"S" + JSON list of modules a stem.
ORDER_TEMPLATE, ORDER_STEM = b"T", b"S"
# Orders to a template: b"C" + CALL head + packed Call (or a memfd that holds it), b"?" are you there.
ORDER_CALL, ORDER_PING = b"C", b"?"
CALL_HEAD = struct.Struct("<QQB")  # call id, address space limit in bytes, 1 if the Call lies in a memfd
# Answers: READY (pidfd attached), failure (text), pong, BORN (pidfd attached) and DIED of a child.
ANSWER_READY, ANSWER_FAILED, ANSWER_PONG, ANSWER_BORN, ANSWER_DIED = b"R", b"F", b"!", b"B", b"D"
BORN = struct.Struct("<Q")
DIED = struct.Struct("<Qiddq")  # call id, wait status, user seconds, system seconds, peak RSS in KiB
STARTED = struct.Struct("<d")  # what a child writes when its walls stand: time.monotonic()

# Order to a template: b"K" + FAMILY head. Forks a keeper, which forks a session's first process. Its BORN and DIED bear
# the family's number, which begins where those of calls cannot reach.
ORDER_FAMILY = b"K"
FAMILY = struct.Struct("<QQIII")  # number, address space limit in bytes, working directory in MiB, open files, threads
FIRST_FAMILY = 1 << 62
# Order to a keeper, + DIRECTORY, pidfds attached of the process that gets a working directory and, for a copy, of the
# one whose files it gets. It answers the same letter and a text, empty where that was done; and b"D" + EXITED for every
# process that ended.
ORDER_DIRECTORY = b"W"
DIRECTORY = struct.Struct("<qI")  # the first one's process id in its own namespace, threads that all may have together
EXITED = struct.Struct("<qiddq")  # process id in its own namespace, wait status, user, system seconds, peak RSS in KiB
# Orders to a session's process: run a cell (CELL head, then files and code, or a memfd that holds both), make a copy of
# yourself (that one's descriptors attached), go into your new working directory.
ORDER_CELL, ORDER_COPY, ORDER_ENTER = b"C", b"F", b"E"
CELL = struct.Struct("<BBI")  # 1 to echo a trailing expression, 1 if what follows lies in a memfd, length of the files
# Its answers: I exist, I am in my directory, the cell is over (+ exit code), I am done copying (+ 1 if there is one).
ANSWER_EXISTS, ANSWER_ENTERED, ANSWER_OVER, ANSWER_COPIED = b"H", b"E", b"O", b"F"

# Largest packet: below the kernel's default socket buffer (208 KiB). Larger calls travel in a memfd.
PACKET_LIMIT = 96 * 1024
_MOST_DESCRIPTORS = 16  # of a call: three pipes, files, input, the doors of its control groups, the call itself
_FD_BYTES = array.array("i").itemsize
_SPACE = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _FD_BYTES)
# For the packet that is being received, by one thread. A template's children inherit it, and so it is wiped each time.
_room = memoryview(bytearray(PACKET_LIMIT + 4096))
# Plain numbers: arithmetic on the enumerations of ``socket`` is Python code.
_CLOSE_ON_EXEC, _AT_ONCE, _CUT = map(int, (socket.MSG_CMSG_CLOEXEC, socket.MSG_DONTWAIT, socket.MSG_CTRUNC))


def send_packet(channel: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    if fds:
        channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    else:
        channel.send(data)


def receive_packet(channel: socket.socket, wait: bool = True) -> tuple[bytes, list[int]]:
    """One packet and its descriptors; ``(b"", [])`` when the other side is gone.

    Raises:
        BlockingIOError: there is none, and none is to be waited for.
        OSError: descriptors were lost on the way.
    """
    how = _CLOSE_ON_EXEC if wait else _CLOSE_ON_EXEC | _AT_ONCE
    try:
        length, ancillary, flags, _ = channel.recvmsg_into([_room], _SPACE, how)
    except ConnectionResetError:
        return b"", []
    data = bytes(_room[:length])
    _room[:length] = bytes(length)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", payload[: len(payload) & -_FD_BYTES])
    if flags & _CUT:
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, f"only {len(fds)} descriptors of a packet arrived")
    return data, fds
