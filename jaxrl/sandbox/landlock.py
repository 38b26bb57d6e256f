"""A second wall around files: Landlock rules, which hold even where a mount or a namespace should not.

The rules name the same things the private root holds: everything may be read, ``/dev`` written, the working directory
used as any other; nothing executed unless the call may start programs. From the kernel's documentation,
userspace-api/landlock.rst. A kernel without Landlock is left as it is: the walls of ``jail`` stand without it.
"""

import functools
import os
import struct

from jaxrl.sandbox import syscalls

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_ASK_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULESET = struct.Struct("=QQQ")  # handled accesses of files and of TCP, scopes
_PATH_BENEATH = struct.Struct("=Qi")

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER, _MAKE_DEVICES = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 6 | 1 << 11
_TRUNCATE, _CONTROL_DEVICE = 1 << 14, 1 << 15
_FILE_ACCESSES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by first version
_TCP_BIND_AND_CONNECT = 3  # from version 4
_SCOPE_SOCKETS_AND_SIGNALS = 3  # from version 6


@functools.cache
def version() -> int:
    """Version of Landlock in this kernel; 0 where there is none, or it is switched off or refused."""
    try:
        return syscalls.raw("landlock_create_ruleset", _CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError:
        return 0


class Rules:
    """What a child may do to files; made before the fork.

    Args:
        writable: its own folders, mounted by the time the calls are made. A session's copies have others, unknown to
            its rules; so a session may write wherever the root itself is not read-only, and this is ``/``.
        programs: what can be read can also be executed.
    """

    def __init__(self, writable: tuple[str, ...], programs: bool = False) -> None:
        known = version()
        files = max((accesses for first, accesses in _FILE_ACCESSES.items() if first <= known), default=0)
        tcp = _TCP_BIND_AND_CONNECT if known >= 4 else 0
        scopes = _SCOPE_SOCKETS_AND_SIGNALS if known >= 6 else 0
        self._ruleset = _RULESET.pack(files, tcp, scopes)
        execute = _EXECUTE if programs else 0
        read = _READ_FILE | _READ_FOLDER | execute
        self._rules = (
            ("/", read),
            ("/dev", files & (_READ_FILE | _READ_FOLDER | _WRITE_FILE | _TRUNCATE)),
            *((place, files & ~(_EXECUTE | _MAKE_DEVICES | _CONTROL_DEVICE) | execute) for place in writable),
        )

    def prepare(self, first: int) -> list[syscalls.Prepared]:
        """The calls that put a thread, and whatever it starts, under the rules. They need no_new_privs.

        Args:
            first: the first of some descriptors in a row. Two are opened now and stay open, for children of this
                process too; the others by whoever makes the calls, for whom they must be the lowest that are free.
        """
        root, devices, ruleset, *places = range(first, first + 1 + len(self._rules))
        calls = [
            syscalls.prepare("syscall", _CREATE_RULESET, self._ruleset, len(self._ruleset), 0, gives=ruleset),
        ]
        for (path, accesses), number in zip(self._rules, (root, devices, *places), strict=True):
            if number in places:
                calls.append(syscalls.prepare("open", path.encode(), os.O_PATH, gives=number))
            else:
                _open_as(number, path)
            rule = _PATH_BENEATH.pack(accesses, number)
            calls.append(syscalls.prepare("syscall", _ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0))
        return [*calls, syscalls.prepare("syscall", _RESTRICT_SELF, ruleset, 0)]


def _open_as(number: int, path: str) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
