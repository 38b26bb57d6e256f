"""The walls around a template: namespaces, a root with nothing but the interpreter in it, an ordinary user.

Built by a fresh process, before it loads any library: once per warden, and once more for calls that may start
processes. In the first nothing is executed afterwards, so the dynamic loader, a shell or the interpreter's own binary
need not exist inside.
"""

import dataclasses
import errno
import importlib.util
import os
import socket
import stat
import sys
import sysconfig
from collections.abc import Callable

from jaxrl.sandbox import landlock, remedies, seccomp, syscalls
from jaxrl.sandbox.files import MOST_INODES

UNSAFE = "unsafe: none"
JAILED = "jail: namespaces, seccomp, rlimits, ordinary user" + (", landlock" if landlock.version() else "")

_BASE = "/tmp"  # where the new root is put together, out of everybody else's sight
SHARED_MEMORY = "/dev/shm"
_DEVICES = ("null", "zero", "random", "urandom")
_LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
NAMESPACES = {
    "mount": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
}


class SandboxUnavailable(RuntimeError):
    """This machine refuses a layer of the jail. The message names the layer and the remedy."""


def unavailable(layer: str, error: object) -> SandboxUnavailable:
    return SandboxUnavailable(
        f"the sandbox cannot isolate tool code here: {layer} was refused ({error}). Remedies: "
        f"{'; '.join(remedies.find())} (`jaxrl sandbox doctor` looks at every layer). Or run the code without "
        "isolation at your own risk: SandboxConfig.unsafe = True, on the command line --unsafe-sandbox"
    )


@dataclasses.dataclass(frozen=True)
class View:
    """What of the host a call can see, all of it read-only."""

    folders: tuple[str, ...]  # bound at their own real path
    links: tuple[tuple[str, str], ...]  # (path, target) of top-level symbolic links such as /lib64
    packages: tuple[str, ...]  # appended to the module search path
    files: tuple[str, ...] = ()  # single ones, bound likewise
    shared_memory: bool = False  # an empty /dev/shm, over which a call mounts its own
    work: str = "/tmp"  # the child's private working directory; without a jail the folder that holds all of them


def plan_view(preload: tuple[str, ...], more: tuple[str, ...] = ()) -> View:
    """The interpreter's libraries, the packages of this environment and the system's shared libraries.

    Args:
        preload: modules that must be found.
        more: further folders, as far as they exist.

    Raises:
        ValueError: a module of ``preload`` is not installed.
    """
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for name in preload:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is None:
            raise ValueError(
                f"preload names {name!r}, which {sys.executable} does not have: install it, "
                "or take it out of SandboxConfig.preload"
            )
        for place in spec.submodule_search_locations or [spec.origin or ""]:
            packages.append(os.path.dirname(place))
    packages = [os.path.realpath(path) for path in packages if os.path.isdir(path)]
    folders = [*more, *packages, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    if sys.base_prefix != "/usr":
        folders.append(os.path.join(sys.base_prefix, "lib"))
    links = []
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in _LIBRARY_FOLDERS:
        if os.path.islink(folder):
            links.append((folder, os.readlink(folder)))
        elif multiarch and os.path.isdir(os.path.join(folder, multiarch)):
            folders.append(os.path.join(folder, multiarch))
        elif folder != "/usr/local/lib":
            folders.append(folder)
    real = sorted({os.path.realpath(path) for path in folders if os.path.isdir(path)})
    outermost = [path for path in real if not any(path != other and inside(path, other) for other in real)]
    work = "/sandbox" if any(inside(path, "/tmp") for path in outermost) else "/tmp"
    return View(tuple(outermost), tuple(links), tuple(dict.fromkeys(packages)), work=work)


def directory_options(disk_mib: int) -> str:
    """How a directory of a call's or a session's own is mounted."""
    return f"size={disk_mib}m,nr_inodes={MOST_INODES},mode=700"


def inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies below it."""
    return os.path.commonpath((path, folder)) == folder


def enter(view: View) -> None:
    """Move this process behind the walls. The pid namespace begins with its next fork.

    Raises:
        SandboxUnavailable: a layer is refused; names it.
    """
    if not seccomp.supported():
        raise unavailable("a system-call filter", f"no table for {syscalls.MACHINE}")
    trees = None
    if os.geteuid() == 0:
        trees = _build_as_root(view)  # binds what only root may reach
    become_isolated_user()
    for name, flag in NAMESPACES.items():
        _layer(f"a {name} namespace", syscalls.unshare, flag)
    if trees is None:
        _layer("a private root", _build_root, view)
    _layer("a private root", _pivot)
    socket.sethostname("sandbox")


def become_isolated_user() -> None:
    """Be an ordinary user, as limits do not hold for root, in a user namespace that allows to build the rest."""
    become_ordinary()
    user, group = os.geteuid(), os.getegid()
    _layer("a user namespace", syscalls.unshare, syscalls.CLONE_NEWUSER)
    _layer("a user namespace's identity map", _map_identity, user, group)


def _layer(name: str, action: Callable[..., object], *arguments: object) -> None:
    try:
        action(*arguments)
    except OSError as error:
        raise unavailable(name, error) from error


def _build_as_root(view: View) -> bool | None:
    """True when the root was built with the host's own rights; None where this root may not mount (a container's)."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    except OSError:
        return None
    _layer("a private root", _build_root, view)
    return True


def become_ordinary() -> None:
    """Be no longer root, where this process is."""
    if os.geteuid() != 0:
        return
    user = remedies.ORDINARY_USER
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError as error:
        # Inside a namespace that maps a single user, "root" is already somebody ordinary to the host.
        if error.errno not in (errno.EINVAL, errno.EPERM) or _host_user() == 0:
            raise unavailable("an ordinary user id", error) from error
    # Else /proc/self belongs to root, and the identity map cannot be written.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def _host_user() -> int:
    with open("/proc/self/uid_map") as lines:
        first, outside, _ = (int(word) for word in next(lines).split())
    return outside + os.geteuid() - first


def _map_identity(user: int, group: int) -> None:
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _build_root(view: View) -> None:
    """Put the new root together on ``_BASE``: copies of the folders' mounts, all read-only."""
    os.umask(0o022)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    plain = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
    trees = []
    for folder in view.folders:
        trees.append((syscalls.clone_mount(folder), folder, plain | syscalls.MOUNT_ATTR_NODEV, True))
    for path in view.files:
        trees.append((syscalls.clone_mount(path), path, plain | syscalls.MOUNT_ATTR_NODEV, False))
    for name in _DEVICES:
        trees.append((syscalls.clone_mount(f"/dev/{name}"), f"/dev/{name}", plain, False))
    syscalls.mount("tmpfs", _BASE, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=755")
    for path in (view.work, SHARED_MEMORY) if view.shared_memory else (view.work,):
        os.makedirs(_BASE + path, mode=0o755)
    for tree, path, attributes, folder in trees:
        target = _BASE + path
        if folder:
            os.makedirs(target, mode=0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            os.mknod(target, stat.S_IFREG | 0o444)
        syscalls.restrict_mount(tree, attributes)
        syscalls.attach_mount(tree, target)
        os.close(tree)
    for path, target in view.links:
        os.makedirs(os.path.dirname(_BASE + path), mode=0o755, exist_ok=True)
        os.symlink(target, _BASE + path)


def _pivot() -> None:
    # Mounts copied into a lesser namespace are locked; a recursive bind of the whole root is not.
    syscalls.mount(_BASE, _BASE, "", syscalls.MS_BIND | syscalls.MS_REC)
    os.chdir(_BASE)
    syscalls.pivot_root(".", ".")
    syscalls.detach_mount(".")
    os.chdir("/")
    syscalls.restrict_mount("/", syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)


def confine_template() -> None:
    """Called by the jail's first process: give up every right that preparing a child does not need."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.drop_capability_bounds()
    # To change the root is asked of whoever enters another mount namespace, as the keeper of a session does.
    syscalls.set_capabilities(keep=(syscalls.CAP_SYS_ADMIN, syscalls.CAP_SYS_CHROOT))
    seccomp.template_filter().install()
