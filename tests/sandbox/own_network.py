"""Runs a Python file in a network that has nothing but a loopback device: for programs that would meet others in ours.

    python tests/sandbox/own_network.py FILE [ARGUMENT ...]

An interpreter of its own, because only a process without threads may enter a user namespace, and numpy starts threads.
"""

import ctypes
import fcntl
import os
import pathlib
import runpy
import socket
import struct
import sys

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


def alone() -> bool:
    """Whether this process sees no other network."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def command(file: str, *arguments: str) -> list[str]:
    """What runs the file in a network of its own."""
    return [sys.executable, __file__, file, *arguments]


def _enter() -> None:
    """Root needs no user namespace for it; others stay who they are in theirs."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET | (_CLONE_NEWUSER if user else 0)) != 0:
        raise OSError(ctypes.get_errno(), "this machine refuses a network namespace")
    if user:
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP | _IFF_RUNNING))


def main() -> None:
    _enter()
    del sys.argv[0]
    sys.path[0] = str(_REPOSITORY)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
