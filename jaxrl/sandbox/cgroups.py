"""A bound on the memory of all processes of a call together: Linux control groups, version 1 and 2.

RLIMIT_AS bounds one process, so a call that may start others needs this. A group is made once and used again by later
calls: removing one that has ever held a file's pages leaves it behind in the kernel until those are reclaimed.
From the kernel's documentation: admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

_PREFIX = "jaxrl-"  # of the folders that hold one warden's groups
_LAST_REQUEST = 4 << 20  # bytes, two huge pages: a group whose peak is so near its limit was refused more
_REMEDY = (
    "Remedies: as root make /sys/fs/cgroup writable (in Docker --privileged, or -v /sys/fs/cgroup:/sys/fs/cgroup:rw "
    "with --cgroupns=host); as an ordinary user start under `systemd-run --user --scope -p Delegate=yes`; or accept "
    "that only each process is bounded, not all of a call together: Pool(processes_without_cgroup=True), or "
    "`jaxrl sandbox serve --processes-without-cgroup`"
)


class CgroupsUnavailable(RuntimeError):
    """No memory group can be made here. The message says why and names the remedies."""


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """A mounted tree of groups."""

    version: int
    controllers: frozenset[str]  # of version 1; a tree of version 2 says itself what it has
    top: str  # where it is mounted
    own: str  # folder of the group that this process is in, or ``top`` where that is out of sight


def hierarchies(mountinfo: str, membership: str) -> list[Hierarchy]:
    """The trees in sight, from the texts of ``/proc/self/mountinfo`` and ``/proc/self/cgroup``."""
    paths = {}
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        paths[frozenset(names.split(",")) - {""}] = path
    found = []
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        root, top = mount.split()[3:5]
        name, _, options = kind.split()[:3]
        if name == "cgroup2":
            controllers: frozenset[str] = frozenset()
        elif name == "cgroup":
            words = frozenset(options.split(","))
            controllers = max((names for names in paths if names <= words), key=len, default=frozenset())
        else:
            continue
        path = paths.get(controllers, "/")
        below = os.path.relpath(path, root)
        own = top if below.startswith("..") else os.path.normpath(os.path.join(top, below))
        found.append(Hierarchy(2 if name == "cgroup2" else 1, controllers, top, own if os.path.isdir(own) else top))
    return found


def _seen_by_this_process() -> list[Hierarchy]:
    with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as membership:
        return hierarchies(mounts.read(), membership.read())


@dataclasses.dataclass(frozen=True)
class Place:
    """Where groups can be made: for each purpose a folder, the same one for all in version 2.

    ``folders`` has "memory" and, where the machine allows it, "pids" (a bound on their number), "cpu" (their time) and
    "pressure" (the time for which they waited for a core).
    """

    version: int  # of the memory controller's tree
    folders: dict[str, str]


def find(trees: list[Hierarchy] | None = None) -> Place:
    """The folders in which this process can make groups.

    Args:
        trees: what is mounted; None asks the kernel.

    Raises:
        CgroupsUnavailable: no memory controller may be used; says why.
    """
    trees = _seen_by_this_process() if trees is None else trees
    # A controller is in one tree only: in that of version 2 where it is in none of version 1.
    tree = next((tree for tree in trees if "memory" in tree.controllers), None)
    tree = tree or next((tree for tree in trees if tree.version == 2), None)
    if tree is None:
        why = "no control groups are mounted"
    elif tree.version == 1:
        if os.access(tree.own, os.W_OK):
            return Place(1, {"memory": tree.own, **_side_folders(trees)})
        why = f"{tree.own} is not writable"
    else:
        folder, why = _delegated(tree)
        if folder is not None:
            return Place(2, dict.fromkeys(("memory", "pids", "cpu", "pressure"), folder))
    raise CgroupsUnavailable(f"no memory cgroup can be made here: {why}. {_REMEDY}")


def _side_folders(trees: list[Hierarchy]) -> dict[str, str]:
    """What else version 1 offers; a tree of version 2 beside it counts time even without controllers."""
    folders = {}
    for tree in trees:
        if os.access(tree.own, os.W_OK):
            purposes = {"pids": "pids", "cpuacct": "cpu"}
            folders |= {purposes[name]: tree.own for name in tree.controllers & purposes.keys()}
            if tree.version == 2:
                folders = {"cpu": tree.own} | folders | {"pressure": tree.own}
    return folders


def _delegated(tree: Hierarchy) -> tuple[str | None, str]:
    """The nearest group upwards whose children can have a memory limit, or None and why there is none."""
    folder = tree.own
    why = f"from {tree.own} up to {tree.top} no group is writable"
    while True:
        if os.access(folder, os.W_OK) and os.access(f"{folder}/cgroup.procs", os.W_OK):
            refusal = _hand_on(folder)
            if not refusal:
                return folder, ""
            why = f"{folder} is writable, but {refusal}"
        if folder == tree.top or len(folder) <= len(tree.top):
            return None, why
        folder = os.path.dirname(folder)


def _hand_on(folder: str) -> str:
    """See to it that children of a group of version 2 have the memory controller; else why they cannot."""
    if "memory" not in _read(f"{folder}/cgroup.controllers").split():
        return (
            "it has no memory controller to hand on: the group above keeps it (for a user's groups, a drop-in of "
            "user@.service with Delegate=cpu memory pids gives it), or the kernel was started with "
            "cgroup_disable=memory"
        )
    path = f"{folder}/cgroup.subtree_control"
    if "memory" not in _read(path).split():
        try:
            _write(path, "+memory")
        except OSError as error:
            if error.errno == errno.EBUSY:
                return (
                    "processes are in it, and such a group hands on nothing: move them to one below it, first thing "
                    f"in a container, by `mkdir -p {folder}/main && for pid in $(cat {folder}/cgroup.procs); do "
                    f"echo $pid > {folder}/main/cgroup.procs; done`"
                )
            return f"it does not hand on the memory controller ({error.strerror})"
    # Never before: a group with processes in it hands on this controller, but is a threaded one from then on.
    if "pids" not in _read(path).split():
        with contextlib.suppress(OSError):
            _write(path, "+pids")
    return ""


class Group:
    """The processes of one call at a time.

    Args:
        place: gives the version.
        folders: of this group, by purpose as in ``Place``.
    """

    def __init__(self, version: int, folders: dict[str, str]) -> None:
        self._version = version
        self.folders = folders
        self._limits = (0, 0)
        self._start = _Counts()
        # Opened by us: the kernel asks who opened the file, so a process without rights can move itself.
        self._doors = [
            os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in dict.fromkeys(folders.values())
        ]

    def begin(self, memory: int, processes: int) -> None:
        """Set the limits for the next call (bytes; processes and threads at once), and count from here.

        Raises:
            OSError: the kernel cannot lower the limit, as something of the last call is still held.
        """
        if (memory, processes) != self._limits:
            self._limits = (0, 0)
            self._set_limits(memory, processes)
            self._limits = (memory, processes)
        if self._version == 1:
            _write(f"{self.folders['memory']}/memory.max_usage_in_bytes", "0")  # its peak, from here
        self._start = self._counts()

    def doors(self) -> tuple[int, ...]:
        """Descriptors for a process to write ``0`` to, which moves it here; the caller closes them."""
        return tuple(map(os.dup, self._doors))

    def processes(self) -> list[int]:
        """Process ids, in this process's own namespace."""
        return [int(word) for word in _read(f"{self.folders['memory']}/cgroup.procs").split()]

    def cpu_seconds(self) -> float | None:
        """CPU time of all processes, dead ones included, since ``begin``; None where the machine does not say."""
        return (self._counts().cpu - self._start.cpu) * 1e-9 if "cpu" in self.folders else None

    def waited_seconds(self) -> float | None:
        """For how long since ``begin`` one of them was ready but had no core; None where the machine does not say."""
        if "pressure" not in self.folders:
            return None
        text = _read(f"{self.folders['pressure']}/cpu.pressure")
        if not text:
            return None
        return (_stall(text) - self._start.waited) * 1e-6

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process since ``begin`` because this group reached its limit."""
        now = self._counts()
        return now.kills > self._start.kills and now.reached > self._start.reached

    def starved(self) -> bool:
        """Whether the kernel killed a process for want of memory elsewhere: in the machine, or in a group above."""
        now = self._counts()
        return now.kills > self._start.kills and now.reached == self._start.reached

    def close(self) -> None:
        for door in self._doors:
            os.close(door)
        self._doors = []

    def _set_limits(self, memory: int, processes: int) -> None:
        folder = self.folders["memory"]
        if self._version == 1:
            with_swap = f"{folder}/memory.memsw.limit_in_bytes"  # absent where the kernel does not count swap
            if os.path.exists(with_swap):
                _write(with_swap, "-1")  # never below the limit that follows
            _write(f"{folder}/memory.limit_in_bytes", str(memory))
            if os.path.exists(with_swap):
                _write(with_swap, str(memory))
        else:
            _write(f"{folder}/memory.max", str(memory))
            if os.path.exists(f"{folder}/memory.swap.max"):
                _write(f"{folder}/memory.swap.max", "0")
        if "pids" in self.folders and os.path.exists(f"{self.folders['pids']}/pids.max"):
            _write(f"{self.folders['pids']}/pids.max", str(processes))

    def _counts(self) -> "_Counts":
        memory, cpu = self.folders["memory"], self.folders.get("cpu", "")
        if self._version == 1:
            kills = _field(f"{memory}/memory.oom_control", "oom_kill")
            # Not failcnt: kernels of 2025 no longer count there.
            reached = int(_read(f"{memory}/memory.max_usage_in_bytes") or 0) > self._limits[0] - _LAST_REQUEST
        else:
            kills = _field(f"{memory}/memory.events", "oom_kill")
            reached = _field(f"{memory}/memory.events", "oom")
        text = _read(f"{cpu}/cpuacct.usage")
        time = int(text) if text else 1000 * _field(f"{cpu}/cpu.stat", "usage_usec") if cpu else 0
        pressure = _read(f"{self.folders['pressure']}/cpu.pressure") if "pressure" in self.folders else ""
        return _Counts(kills, reached, time, _stall(pressure))


@dataclasses.dataclass(frozen=True)
class _Counts:
    """What the kernel has counted since a group was made."""

    kills: int = 0  # processes of the group that were killed for want of memory anywhere
    reached: int = 0  # times that the group's own limit was reached
    cpu: int = 0  # nanoseconds
    waited: int = 0  # microseconds


class Groups:
    """One warden's groups. The folder that holds them is locked, so that others can tell a dead warden's from it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._idle: list[Group] = []
        self._taken: list[Group] = []
        self._made = 0
        sweep(place)
        self._name, self._lock = _claim(place)
        for folder in self._homes():
            os.makedirs(folder, exist_ok=True)
        if place.version == 2 and (refusal := _hand_on(self._home("memory"))):
            raise OSError(f"{self._home('memory')} cannot bound a call's memory: {refusal}")

    @property
    def doors(self) -> int:
        """How many descriptors ``Group.doors`` gives."""
        return len(self._homes())

    def take(self, memory: int, processes: int) -> Group:
        """An empty group with these limits.

        Raises:
            OSError: the kernel refuses to make one.
        """
        group = next((group for group in self._idle if not group.processes()), None)
        if group is None:
            group = self._make()
        else:
            self._idle.remove(group)
        try:
            group.begin(memory, processes)
        except OSError:
            self._idle.append(group)
            group = self._make()
            group.begin(memory, processes)
        self._taken.append(group)
        return group

    def give_back(self, group: Group) -> None:
        self._taken.remove(group)
        self._idle.append(group)

    def close(self) -> None:
        """Remove what can be removed; a group whose processes are still dying is left to the next ``sweep``."""
        sweep(self._place)
        for group in [*self._idle, *self._taken]:
            group.close()
        _remove(self._place, self._name)
        os.close(self._lock)

    def _home(self, purpose: str) -> str:
        return os.path.join(self._place.folders[purpose], self._name)

    def _homes(self) -> list[str]:
        return list(dict.fromkeys(map(self._home, self._place.folders)))

    def _make(self) -> Group:
        self._made += 1
        folders = {purpose: os.path.join(self._home(purpose), str(self._made)) for purpose in self._place.folders}
        for folder in dict.fromkeys(folders.values()):
            os.mkdir(folder)
        return Group(self._place.version, folders)


def sweep(place: Place) -> None:
    """Remove the groups of wardens that died without doing so."""
    for name, lock in _unlocked(place, fcntl.LOCK_EX):
        _remove(place, name)
        os.close(lock)


def abandoned() -> list[str]:
    """Folders of groups whose warden is gone; none where there are no control groups."""
    try:
        place = find()
    except CgroupsUnavailable:
        return []
    found = []
    for name, lock in _unlocked(place, fcntl.LOCK_SH):  # others may look at the same time
        found.append(os.path.join(place.folders["memory"], name))
        os.close(lock)
    return found


def _unlocked(place: Place, operation: int) -> Iterator[tuple[str, int]]:
    """Names of wardens' folders that nobody uses, and descriptors that lock them, as ``flock``'s operation says."""
    home = place.folders["memory"]
    for name in filter(lambda name: name.startswith(_PREFIX), os.listdir(home)):
        lock = None
        with contextlib.suppress(OSError):  # gone meanwhile
            lock = _lock(os.path.join(home, name), operation)
        if lock is not None:
            yield name, lock


def _claim(place: Place) -> tuple[str, int]:
    """Make a folder of a new name and lock it; the kernel lets go of the lock when this process ends."""
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=place.folders["memory"])
        with contextlib.suppress(FileNotFoundError):  # another's sweep came between
            os.chmod(path, 0o755)
            lock = _lock(path, fcntl.LOCK_EX)
            if lock is not None and os.path.isdir(path):
                return os.path.basename(path), lock
            if lock is not None:
                os.close(lock)
            os.rmdir(path)


def _lock(folder: str, operation: int) -> int | None:
    """A descriptor that locks a folder; None where another's does.

    Raises:
        OSError: it cannot be opened.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise
        return None
    return lock


def _remove(place: Place, name: str) -> None:
    """The memory controller's folder last, as it carries the lock."""
    for purpose in sorted(place.folders, key=lambda purpose: purpose == "memory"):
        home = os.path.join(place.folders[purpose], name)
        with contextlib.suppress(OSError):  # gone already, or a process in it is still dying
            for entry in _folders_in(home):
                os.rmdir(entry)
            os.rmdir(home)


def _folders_in(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _field(path: str, name: str) -> int:
    """A number from a file of "name number" lines; 0 where it is not there."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _stall(pressure: str) -> int:
    """Microseconds for which some process waited, from the text of ``cpu.pressure``; 0 where there is none."""
    some = next((line for line in pressure.splitlines() if line.startswith("some")), "total=0")
    return int(some.rpartition("total=")[2])


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
