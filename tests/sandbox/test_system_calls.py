"""System calls that a snippet is refused, tried one by one with the numbers of x86-64.

Each is called raw, with arguments that the kernel itself would answer otherwise where it is given a chance to look at
them. Every row runs in one call of its own: a call that is let through may do anything to the process that made it.
"""

import os

import pytest

from jaxrl.records import ToolStatus
from tests.sandbox.attacks import system_call, withstand
from tests.sandbox.driver import Driver

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")

LIBRARY = "open(__import__('os').__file__).fileno()"
ROOM = "ctypes.create_string_buffer(200)"

CALLS = {
    # memory that no limit of the call counts
    "memfd_secret": (447, "0"),
    "memfd_create with huge pages": (319, "b'x'", "4"),
    "shmat": (30, "0", "0", "0"),
    "semop": (65, "0", ROOM, "1"),
    "msgsnd": (69, "0", ROOM, "8", "0"),
    "mq_unlink": (241, "b'q'"),
    "widen a pipe a little": (72, "__import__('os').pipe()[1]", "1031", "1 << 20"),
    # what others do with files that all may read
    "watch a folder": (72, "__import__('os').open('/usr/lib', 0)", "1026", "0x80000001"),
    "lease a file": (72, "__import__('os').open(__import__('os').__file__, 0)", "1024", "0"),
    # other processes and their memory
    "process_vm_writev": (311, "1", "0", "0", "0", "0", "0"),
    "process_madvise": (440, "0", "0", "0", "0", "0"),
    "kcmp": (312, "1", "1", "0", "0", "0"),
    "move_pages": (279, "1", "0", "0", "0", "0", "0"),
    "migrate_pages": (256, "1", "0", "0", "0"),
    "vfork": (58,),
    "clone with a signal of its own": (56, "10", "0", "0", "0", "0"),
    "clone as a sibling": (56, "0x8011", "0", "0", "0", "0"),
    "clone that shares memory": (56, "0x4111", "0", "0", "0", "0"),
    "clone into a pid namespace": (56, "0x20000011", "0", "0", "0", "0"),
    # mounts and roots
    "mount_setattr": (442, "-100", "b'/'", "0", ROOM, "32"),
    "move_mount": (429, "-100", "b'/'", "-100", "b'/tmp'", "0"),
    "fsmount": (432, "0", "0", "0"),
    "fsconfig": (431, "0", "0", "0", "0", "0"),
    "fspick": (433, "-100", "b'/'", "0"),
    "name_to_handle_at": (303, "-100", "b'/'", ROOM, ROOM, "0"),
    "quotactl": (179, "0", "0", "0", "0"),
    "acct": (163, "0"),
    "uselib": (134, "b'x'"),
    "fanotify_init": (300, "0", "0"),
    # the machine
    "clock_settime": (227, "0", ROOM),
    "adjtimex": (159, ROOM),
    "clock_adjtime": (305, "0", ROOM),
    "finit_module": (313, "0", "b''", "0"),
    "delete_module": (176, "b'x'", "0"),
    "kexec_file_load": (320, "0", "0", "0", "0", "0"),
    "swapoff": (168, "b'x'"),
    "syslog": (103, "3", ROOM, "200"),
    "sethostname": (170, "b'x'", "1"),
    "setdomainname": (171, "b'x'", "1"),
    "iopl": (172, "3"),
    "ioperm": (173, "0", "1", "1"),
    "modify_ldt": (154, "0", ROOM, "200"),
    "vhangup": (153,),
    "io_uring_enter": (426, "0", "0", "0", "0", "0", "0"),
    "io_uring_register": (427, "0", "0", "0", "0"),
    "request_key": (249, "b'user'", "b'k'", "0", "0"),
    "lookup_dcookie": (212, "0", ROOM, "8"),
    "flush every disk of the host": (162,),
    "flush the disk under the libraries": (306, LIBRARY),
    # the network, past the socket that cannot be made
    "connect": (42, "0", ROOM, "16"),
    "bind": (49, "0", ROOM, "16"),
    "listen": (50, "0", "1"),
    "accept": (43, "0", "0", "0"),
    "a pair of another family": (53, "2", "1", "0", ROOM),
    "a pair of the kernel's cipher family": (53, "38", "5", "0", ROOM),
    "send descriptors": (46, "0", ROOM, "0"),
    "send descriptors by the dozen": (307, "0", ROOM, "1", "0"),
    # watches
    "inotify_init1": (294, "0"),
    # ways back through what was just given up
    "execve": (59, "b'/x'", "0", "0"),
    "umount, lazily": (166, "b'/'", "2"),
    "setns by a descriptor of its own": (308, "__import__('os').pidfd_open(1)", "0x20000"),
    "unshare all": (272, "0x7e020000"),
    "seccomp with a listener": (317, "1", "8", ROOM),
}


@pytest.mark.parametrize("name", CALLS)
def test_promise_6_system_call(sandbox: Driver, name: str) -> None:
    withstand(sandbox, (ToolStatus.OK,), "held", system_call(*CALLS[name]))
