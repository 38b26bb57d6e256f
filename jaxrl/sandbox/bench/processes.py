"""What /proc tells of processes and cores, for benchmarks and tests. Of a process that is gone it tells nothing."""

import os
import pathlib
from collections.abc import Iterable

_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") >> 10


def family(root: int) -> list[int]:
    """A process and all its descendants, dead ones that nobody has collected included."""
    return [root, *descendants(root)]


def descendants(root: int) -> list[int]:
    """Every process below this one, parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(parent(int(entry.name)), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def parent(pid: int) -> int:
    """0 for a process that is gone."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def state(pid: int) -> str:
    """Its letter as proc(5) has it, "Z" for one that is dead and not collected; "" for one that is gone."""
    return next(iter(stat(pid)), "")


def is_alive(pid: int) -> bool:
    return state(pid) not in ("", "Z")


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of these processes, with that of their dead children. Dead ones count nothing."""
    return sum(own_cpu_seconds(pid) + _TICK * sum(map(int, stat(pid)[13:15])) for pid in pids)


def own_cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, without its children."""
    total = 0
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
        total += int(_read(path).partition(" ")[0] or 0)
    return total * 1e-9


def busy_seconds(cores: Iterable[int]) -> float:
    """For how long these cores have worked, for whomever: other users and other guests of the machine included."""
    wanted = {f"cpu{core}" for core in cores}
    lines = (line.split() for line in pathlib.Path("/proc/stat").read_text().splitlines())
    busy = 0
    for name, *ticks in lines:
        if name in wanted:
            user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen, *_ = map(int, ticks)
            busy += user + nice + system + interrupts + soft_interrupts + stolen
    return busy * _TICK


def resident_kib(pid: int) -> int:
    fields = _read(pathlib.Path(f"/proc/{pid}/statm")).split()
    return int(fields[1]) * _PAGE_KIB if fields else 0


def rollup_kib(pid: int, field: str) -> int:
    """A sum over its mappings, "Rss" or "Pss" (each page's share by how many have it); 0 for a dead process."""
    for line in _read(pathlib.Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where the process is gone."""
    return _read(pathlib.Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
