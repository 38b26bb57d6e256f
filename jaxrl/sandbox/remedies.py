"""What on this machine keeps an ordinary process from having namespaces and mounts of its own, and what to do about it.

Read from what the kernel shows: user_namespaces(7), the AppArmor restriction of Ubuntu 23.10 and later, the default
seccomp and AppArmor profiles of container runtimes, SELinux's type for containers.
"""

import os
import re
import sys

_NAMESPACES = {"user": "user", "mnt": "mount", "pid": "pid", "net": "network", "ipc": "ipc", "uts": "uts"}
ORDINARY_USER = 65534  # in place of root
_OLDEST = (5, 12)  # Linux that can copy a mount with attributes of its own
_UNKNOWN = (
    "none of the usual reasons is to be seen here: ask whoever runs this machine for user namespaces "
    "(CONFIG_USER_NS, and no chroot around this process)"
)


def find(root: str = "/", release: str = "") -> list[str]:
    """What to do, one entry for each thing found in the way; never empty.

    Args:
        root: where the machine's /proc lies.
        release: of the kernel; empty takes this one's.
    """
    found = [
        *_kernel(release or os.uname().release),
        *_settings(root),
        *_mapping(root),
        *_filter(root),
        *_profile(root),
    ]
    return found or [_UNKNOWN]


def _kernel(release: str) -> list[str]:
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    return [f"boot Linux 5.12 or newer; this is {release}"] if version < _OLDEST else []


def _settings(root: str) -> list[str]:
    found = []
    for kind, name in _NAMESPACES.items():
        if _read(root, f"proc/sys/user/max_{kind}_namespaces") == "0":
            found.append(f"{name} namespaces are switched off: as root sysctl -w user.max_{kind}_namespaces=15000")
    if _read(root, "proc/sys/kernel/unprivileged_userns_clone") == "0":  # of Debian's and others' kernels
        found.append("they are kept for root: as root sysctl -w kernel.unprivileged_userns_clone=1")
    if _read(root, "proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        interpreter = os.path.realpath(sys.executable)
        profile = f"profile jaxrl {interpreter} flags=(unconfined) {{\\n  userns,\\n}}"
        found.append(
            "AppArmor leaves no rights in them, as in Ubuntu from 23.10 on: as root, for every program "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or for this interpreter "
            f"printf 'abi <abi/4.0>,\\ninclude <tunables/global>\\n{profile}\\n' > /etc/apparmor.d/jaxrl && "
            "apparmor_parser -r /etc/apparmor.d/jaxrl"
        )
    return found


def _mapping(root: str) -> list[str]:
    """Root gives way to an ordinary user, who has to be known in the user namespace that is around this process."""
    if not re.search(r"^Uid:\s*0\b", _read(root, "proc/self/status"), re.MULTILINE):
        return []
    lines = [tuple(map(int, line.split())) for line in _read(root, "proc/self/uid_map").splitlines()]
    host_root = any(first == outside == 0 for first, outside, _ in lines)
    if not host_root or any(first <= ORDINARY_USER < first + count for first, _, count in lines):
        return []
    return [
        f"this process is root in a user namespace without user {ORDINARY_USER}, as whom the sandbox runs in place of "
        f"root: map that user too (ids 0 to 65535), or start as another user than root, as unshare "
        "--user --map-user=1000 does"
    ]


def _filter(root: str) -> list[str]:
    if not re.search(r"^Seccomp:\s*2$", _read(root, "proc/self/status"), re.MULTILINE):
        return []
    return [
        "a system-call filter is around this process, as container runtimes have it: in Docker or Podman "
        "--security-opt seccomp=unconfined, in Kubernetes securityContext.seccompProfile.type: Unconfined"
    ]


def _profile(root: str) -> list[str]:
    """Of a security module."""
    label = _read(root, "proc/self/attr/current").rstrip("\0")
    if ":container_t:" in label:
        return ["SELinux holds this process as a container: in Docker or Podman --security-opt label=disable"]
    name = label.removesuffix(" (enforce)")
    if name == label:
        return []
    return [
        f"AppArmor's profile {name} holds this process: in Docker or Podman --security-opt apparmor=unconfined, in "
        "Kubernetes securityContext.appArmorProfile.type: Unconfined"
    ]


def _read(root: str, path: str) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        with open(os.path.join(root, path)) as file:
            return file.read().strip()
    except OSError:
        return ""
