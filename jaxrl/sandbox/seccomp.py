"""System-call filters as raw BPF programs: a large one for the template, small ones for every child and session.

The large filter is inherited by each fork, so its cost is paid once; the child adds only what the template itself
still needs to do (mounts, namespaces, forks). Denied calls fail with an error the snippet can read. A call through
another ABI (int 0x80, x32) kills the process, since its numbers mean other things.
"""

import contextlib
import ctypes
import errno
import fcntl
import struct
from typing import NamedTuple

from jaxrl.sandbox import syscalls

# name: (x86_64, aarch64); None where the architecture lacks the call
_DENIED = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bind": (49, 200),
    "bpf": (321, 280),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    # Watches on files are counted per user, over all calls together.
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "listen": (50, 201),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_notify": (244, 184),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    # A flush is of the host's disks, not of the call's own files.
    "sync": (162, 81),
    "syncfs": (306, 267),
    "syslog": (103, 116),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
_DENIED_IN_CHILD = {
    "chroot": (161, 51),
    "mount": (165, 40),
    "seccomp": (317, 277),
    # Descriptors on their way through a socket are counted per user, over all calls and the template together.
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "setns": (308, 268),
    "umount2": (166, 39),
    "unshare": (272, 97),
}
_PROGRAMS = {"execve": (59, 221), "execveat": (322, 281)}
# The processes of a session and its copies share a user and a pid namespace: what reaches one by its number is denied.
_DENIED_IN_SESSION = {
    "get_robust_list": (274, 100),
    "ioprio_set": (251, 30),
    "kill": (62, 129),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "process_mrelease": (448, 448),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tgkill": (234, 131),
    "timer_create": (222, 107),  # between cells a session is stopped; a timer's signal could continue it
    "tkill": (200, 130),
}
# name: (x86_64, aarch64, which argument names a process); 0 there is the caller itself
_SELF_ONLY_IN_SESSION = {
    "prlimit64": (302, 261, 0),
    "sched_setaffinity": (203, 122, 0),
    "sched_setattr": (314, 274, 0),
    "sched_setparam": (142, 118, 0),
    "sched_setscheduler": (144, 119, 0),
    "setpriority": (141, 140, 1),
}
# name: (x86_64, aarch64, argument, its values that are denied)
_DENIED_VALUES_IN_SESSION = {
    "fcntl": (72, 25, 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a descriptor's signal to any process
    "ioctl": (16, 29, 1, (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP: the same
    "prctl": (157, 167, 0, (62,)),  # PR_SCHED_CORE
    "prlimit64": (302, 261, 1, (6,)),  # RLIMIT_NPROC, which the warden sets, since it counts for all copies together
    "setpriority": (141, 140, 0, (1, 2)),  # of a group, of a user
    "setrlimit": (160, 164, 0, (6,)),
}
_FORKS = {"fork": (57, None), "vfork": (58, None)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SOCKETPAIR = (53, 199)
_PRCTL = (157, 167)
_FCNTL, _SET_LEASE, _WATCH_FOLDER, _SET_PIPE_SIZE = (72, 25), 1024, 1026, 1031
_MMAP, _MREMAP = (9, 222), (25, 216)
_EXIT_GROUP = (231, 94)
# Everything from here on is newer than this table (statmount, lsm_set_self_attr, ...); told "no such call",
# libraries fall back on older ones.
_FIRST_UNKNOWN = 452

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(syscalls.MACHINE, -1)
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
FAILED = 0x100  # of an exit code that the warden is to see; beyond the eight bits that the kernel keeps
_NEW_NAMESPACES = 0x7E020000  # every flag of clone that makes one
_AF_UNIX = 1

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO, _NOTIFY = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each, little-endian

_SET_MODE_FILTER, _FLAG_NEW_LISTENER = 1, 8
_NOTIFICATION = 80  # size of struct seccomp_notif
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_ANSWER_CONTINUE = 1


def supported() -> bool:
    """Whether there is a filter table for this machine's architecture."""
    return _COLUMN >= 0


class Filter:
    """A BPF program, and the C structure that points at it."""

    def __init__(self, instructions: list[tuple[int, int, int, int]]) -> None:
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in instructions))
        self._program = struct.pack("@HP", len(instructions), ctypes.addressof(self._code))

    def prepare(self) -> syscalls.Prepared:
        """The call that confines the calling thread and its future children, for as long as this object lives."""
        return syscalls.prepare("syscall", syscalls.SECCOMP, _SET_MODE_FILTER, 0, self._program)

    def install(self, listen: bool = False) -> int:
        """Confine this thread and its future children; with ``listen`` returns the descriptor of the notifications."""
        flags = _FLAG_NEW_LISTENER if listen else 0
        return syscalls.raw("seccomp", syscalls.SECCOMP, _SET_MODE_FILTER, flags, self._program)


def _head() -> list[tuple[int, int, int, int]]:
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[syscalls.MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if syscalls.MACHINE == "x86_64":
        lines += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    return lines


def _deny(table: dict[str, tuple[int | None, int | None]], error: int) -> list[tuple[int, int, int, int]]:
    lines = []
    for numbers in table.values():
        number = numbers[_COLUMN]
        if number is not None:
            lines += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    return lines


def template_filter() -> Filter:
    """For the template and all it forks: no sockets, keys, tracing, clocks, modules, shared memory, new mount calls."""
    return Filter(
        [
            *_head(),
            *_deny(_DENIED, errno.EPERM),
            (_JUMP_GREATER_EQUAL, 0, 1, _FIRST_UNKNOWN),
            (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
            # A Unix pair connects to nobody outside and event loops need one; pairs of other families are refused.
            (_JUMP_EQUAL, 0, 3, _SOCKETPAIR[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS),
            (_JUMP_EQUAL, 1, 0, _AF_UNIX),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


def child_filter(processes: bool = False, copies: bool = False) -> Filter:
    """For the child, after its set-up: no mounts and namespaces; programs and processes only with ``processes``.

    Threads are allowed. With ``copies`` it may ask for a copy of itself (``syscalls.COPY_FLAGS``), as a session's
    process does.
    """
    processes_denied = [*_deny(_PROGRAMS, errno.EPERM), *_deny(_FORKS, errno.EAGAIN)]
    # With processes a clone is a process or a thread, never a new namespace; else it is a thread or nothing.
    clone = [(_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES)] if processes else [(_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD)]
    copy = [(_JUMP_EQUAL, 0, 1, syscalls.COPY_FLAGS), (_RETURN, 0, 0, _ALLOW)] if copies else []
    return Filter(
        [
            *_head(),
            *_deny(_DENIED_IN_CHILD, errno.EPERM),
            *([] if processes else processes_denied),
            *_deny({"clone3": _CLONE3}, errno.ENOSYS),  # its flags lie in memory, out of a filter's sight
            # The child's life hangs on its template's: it may not untie that.
            (_JUMP_EQUAL, 0, 4, _PRCTL[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS),
            (_JUMP_EQUAL, 0, 1, syscalls.PR_SET_PDEATHSIG),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
            # What lies in a pipe is memory that no limit of the call counts; watches and leases reach others through
            # files that all may read.
            (_JUMP_EQUAL, 0, 6, _FCNTL[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS + 8),
            (_JUMP_EQUAL, 2, 0, _SET_PIPE_SIZE),
            (_JUMP_EQUAL, 1, 0, _WATCH_FOLDER),
            (_JUMP_EQUAL, 0, 1, _SET_LEASE),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
            (_JUMP_EQUAL, 0, 3 + len(copy), _CLONE[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS),
            *copy,
            *clone,
            (_RETURN, 0, 0, _ERRNO | errno.EAGAIN),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


def session_filter() -> Filter:
    """For a session's process, besides ``child_filter``: nothing that reaches its copies, no thread elsewhere."""
    lines = [*_head(), *_deny(_DENIED_IN_SESSION, errno.EPERM)]
    for *numbers, argument in _SELF_ONLY_IN_SESSION.values():
        lines += _check_argument(numbers[_COLUMN], argument, [(_JUMP_EQUAL, 1, 0, 0)])
    for *numbers, argument, values in _DENIED_VALUES_IN_SESSION.values():
        for value in values:
            lines += _check_argument(numbers[_COLUMN], argument, [(_JUMP_EQUAL, 0, 1, value)])
    # As the owner of its user namespace it might give a thread namespaces of its own.
    copy_or_none = [(_JUMP_EQUAL, 2, 0, syscalls.COPY_FLAGS), (_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES)]
    return Filter([*lines, *_check_argument(_CLONE[_COLUMN], 0, copy_or_none), (_RETURN, 0, 0, _ALLOW)])


def _check_argument(
    number: int, argument: int, test: list[tuple[int, int, int, int]]
) -> list[tuple[int, int, int, int]]:
    """Deny the system call unless the test, on the low word of an argument, jumps over one further line at its end."""
    return [
        (_JUMP_EQUAL, 0, 3 + len(test), number),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        *test,
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _NUMBER),
    ]


def memory_watch(threshold: int) -> Filter:
    """Tells the warden of what it must know before the kernel decides it: much memory, or a process of a session.

    A request for memory that RLIMIT_AS refuses leaves no trace in the wait-status, so this is how the trusted side can
    know that a call ran out of it rather than believe what it says. ``threshold`` is in bytes, of a single request. A
    session's process that copies itself (``syscalls.COPY_FLAGS``) is stopped there until the warden has looked at it,
    and so is one that ends with an exit code that has the bit ``FAILED``: many requests below ``threshold`` may have
    taken all there was.
    """

    def notify_if_large(argument: int) -> list[tuple[int, int, int, int]]:
        low = _ARGUMENTS + 8 * argument
        return [
            (_LOAD, 0, 0, low + 4),
            (_JUMP_EQUAL, 0, 2, 0),  # a high word means 4 GiB or more
            (_LOAD, 0, 0, low),
            (_JUMP_GREATER_EQUAL, 0, 1, threshold),
            (_RETURN, 0, 0, _NOTIFY),
            (_RETURN, 0, 0, _ALLOW),
        ]

    return Filter(
        [
            *_head(),
            (_JUMP_EQUAL, 0, 6, _MMAP[_COLUMN]),
            *notify_if_large(1),
            (_JUMP_EQUAL, 0, 6, _MREMAP[_COLUMN]),
            *notify_if_large(2),
            (_JUMP_EQUAL, 0, 4, _EXIT_GROUP[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS),
            (_JUMP_ANY_BIT, 0, 1, FAILED),
            (_RETURN, 0, 0, _NOTIFY),
            (_RETURN, 0, 0, _ALLOW),
            (_JUMP_EQUAL, 0, 4, _CLONE[_COLUMN]),
            (_LOAD, 0, 0, _ARGUMENTS),
            (_JUMP_ANY_BIT, 2, 0, _CLONE_THREAD),
            (_JUMP_ANY_BIT, 0, 1, syscalls.CLONE_PARENT),
            (_RETURN, 0, 0, _NOTIFY),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


class Request(NamedTuple):
    """A thread that asks for much memory, for a copy of its process or for its end, halted until it is released."""

    id: int
    thread: int  # thread id in the reader's pid namespace
    copies: bool
    size: int  # bytes asked for
    ends: bool = False


def receive_request(listener: int) -> Request | None:
    """The next halted request; None if its thread died meanwhile."""
    buffer = bytearray(_NOTIFICATION)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError:
        return None
    id, thread, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", buffer)
    if number == _CLONE[_COLUMN]:
        return Request(id, thread, True, 0)
    if number == _EXIT_GROUP[_COLUMN]:
        return Request(id, thread, False, 0, ends=True)
    size = arguments[1] if number == _MMAP[_COLUMN] else max(arguments[2] - arguments[1], 0)
    return Request(id, thread, False, size)


def release_request(listener: int, request: Request) -> bool:
    """Let the kernel decide the request as usual; False where the thread no longer waits for that."""
    try:
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", request.id, 0, 0, _ANSWER_CONTINUE))
    except OSError:
        return False
    return True


def refuse_request(listener: int, request: Request) -> None:
    """Let the request fail as if there were no room for a process."""
    with contextlib.suppress(OSError):  # the thread may have been killed
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", request.id, 0, -errno.EAGAIN, 0))
