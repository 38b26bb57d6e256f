"""The Linux system calls that Python does not wrap, through ctypes. Every failure is an OSError that names the call."""

import ctypes
import errno
import os
import platform
import select
import signal
import struct
from collections.abc import Callable, Iterable
from typing import Any

CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_SYS_CHROOT, CAP_SYS_ADMIN = 18, 21

MACHINE = platform.machine()
# These have the same number on every architecture (they are newer than the common table), bar the two old ones.
_OPEN_TREE, _MOVE_MOUNT, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 436, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(MACHINE, -1)
SECCOMP = {"x86_64": 317, "aarch64": 277}.get(MACHINE, -1)
_CLONE = {"x86_64": 56, "aarch64": 220}.get(MACHINE, -1)

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4

# libc's struct sigaction on 64 bits: the handler, a mask of 128 bytes, flags, and eight bytes of its own.
_SIGACTION_BYTES, _SIGACTION_FLAGS = 152, 136
_SA_NOCLDSTOP = 1

# A system call: name of libc's function, the function, arguments that are bytes, None or numbers of 32 bits, and what
# it returns if all is well.
Prepared = tuple[str, Callable[..., int], tuple[Any, ...], int]

_libc = ctypes.CDLL(None, use_errno=True)
# For prepared calls: without argument types, so that nothing is converted, and without letting other threads run.
_plain = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_wait = _plain.wait4
_STATUS, _USAGE = struct.Struct("=i"), struct.Struct("=5q")  # the latter begins struct rusage
_status, _usage = ctypes.create_string_buffer(_STATUS.size), ctypes.create_string_buffer(144)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

# How a session's process copies itself: a sibling, child of the same parent, with a mount namespace of its own.
COPY_FLAGS = CLONE_PARENT | CLONE_NEWNS | signal.SIGCHLD


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def raw(name: str, number: int, *arguments: object) -> int:
    """A system call by number; ``name`` is for the error message."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), name)


def prepare(function: str, *arguments: int | bytes | None, gives: int = 0) -> Prepared:
    """A call of libc's ``function``, to be made later by ``perform`` at the least cost."""
    return function, getattr(_plain, function), arguments, gives


def perform(calls: Iterable[Prepared]) -> None:
    """Make prepared calls in their order; each must return what it was prepared to give."""
    for name, function, arguments, gives in calls:
        result = function(*arguments)
        if result != gives:
            number = ctypes.get_errno() if result < 0 else 0
            raise OSError(number, f"{name}{arguments} gave {result}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def prepare_mount(source: str, target: str, kind: str, flags: int, data: str) -> Prepared:
    return prepare("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def copy_process() -> int:
    """Fork a sibling by ``COPY_FLAGS``: the copy's process id in the original, 0 in the copy. Only with one thread.

    The interpreter's lock is held throughout, so that the copy wakes up holding it.
    """
    zeros = [ctypes.c_long(0)] * 4  # on the same stack, nothing to be told
    return _check(_plain.syscall(ctypes.c_long(_CLONE), ctypes.c_long(COPY_FLAGS), *zeros), "clone")


def bury(pid: int) -> tuple[int, float, float, int]:
    """Reap a child that has ended: wait status, user seconds, system seconds, peak of resident memory in KiB.

    ``os.wait4`` says the same, but looks for a module each time, on pages that a template would copy after each fork.
    For one thread.

    Raises:
        OSError: it has not ended, or is no child.
    """
    if _check(_wait(pid, _status, os.WNOHANG, _usage), "wait4") != pid:
        raise OSError(errno.EAGAIN, f"wait4: process {pid} has not ended")
    (status,) = _STATUS.unpack(_status)
    user, user_micro, system, system_micro, peak_kib = _USAGE.unpack_from(_usage)
    return status, user + 1e-6 * user_micro, system + 1e-6 * system_micro, peak_kib


def enter_mount_namespace(pidfd: int) -> None:
    """See the files that the process behind ``pidfd`` sees."""
    _check(_libc.setns(pidfd, CLONE_NEWNS), "setns(mount)")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode())
    _check(result, f"mount({kind or source} on {target})")


def detach_mount(target: str) -> None:
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount({target})")


def pivot_root(new: str, old: str) -> None:
    raw("pivot_root", _PIVOT_ROOT, new.encode(), old.encode())


def clone_mount(path: str) -> int:
    """A detached copy of the mount tree at ``path``; returns its descriptor. Linux 5.2."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return raw(f"open_tree({path})", _OPEN_TREE, _AT_FDCWD, path.encode(), flags)


def attach_mount(tree: int, target: str) -> None:
    """Put a detached mount tree at ``target``. Linux 5.2."""
    name = f"move_mount({target})"
    raw(name, _MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def restrict_mount(tree: int | str, attributes: int) -> None:
    """Set mount attributes on a whole detached tree (descriptor) or on one mounted path. Linux 5.12."""
    request = struct.pack("=QQQQ", attributes, 0, 0, 0)
    if isinstance(tree, int):
        where, path, flags = tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE
    else:
        where, path, flags = _AT_FDCWD, tree.encode(), 0
    raw("mount_setattr", _MOUNT_SETATTR, where, path, flags, request, len(request))


def prctl(option: int, value: int = 0) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl({option}, {value})")


def hear_only_ends_of_children() -> None:
    """Have SIGCHLD sent when a child ends, and no longer when one is halted or goes on; after its handler is set."""
    action = ctypes.create_string_buffer(_SIGACTION_BYTES)
    _check(_libc.sigaction(signal.SIGCHLD, None, action), "sigaction(SIGCHLD)")
    (flags,) = struct.unpack_from("=i", action, _SIGACTION_FLAGS)
    struct.pack_into("=i", action, _SIGACTION_FLAGS, flags | _SA_NOCLDSTOP)
    _check(_libc.sigaction(signal.SIGCHLD, action, None), "sigaction(SIGCHLD)")


def prepare_close_from(first: int) -> Prepared:
    """Close every descriptor numbered ``first`` or higher. Linux 5.9."""
    return prepare("syscall", _CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def close_all_but(kept: list[int]) -> None:
    """Close every descriptor from 3 on that is not among these. Linux 5.9."""
    first = 3
    for fd in sorted(kept):
        if fd > first:
            raw("close_range", _CLOSE_RANGE, first, fd - 1, 0)
        first = fd + 1
    perform([prepare_close_from(first)])


def prepare_capabilities(*kept: int) -> Prepared:
    """Keep only these capabilities, effective and permitted; none inheritable."""
    mask = sum(1 << capability for capability in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
    return prepare("capset", header, struct.pack("=6I", low, low, 0, high, high, 0))


def set_capabilities(keep: tuple[int, ...] = ()) -> None:
    """Keep only these capabilities, effective and permitted; none inheritable."""
    perform([prepare_capabilities(*keep)])


def prepare_limit(resource: int, value: int) -> Prepared:
    """Set the soft and the hard limit of one of ``resource``'s constants."""
    return prepare("setrlimit", resource, struct.pack("=QQ", value, value))


def prepare_check_alive(pidfd: int) -> Prepared:
    """Fails where the process behind the descriptor is dead: then one descriptor is ready."""
    return prepare("poll", struct.pack("=ihh", pidfd, select.POLLIN, 0), 1, 0)


def drop_capability_bounds() -> None:
    """Empty the bounding set, so that nothing executed later can gain a capability."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            return  # past the kernel's last capability
