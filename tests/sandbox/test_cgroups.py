"""Memory groups: found where the machine has them, made, counted and removed; also after a warden that was killed."""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox import cgroups, doctor
from jaxrl.sandbox.cgroups import CgroupsUnavailable, Group, Groups, Hierarchy, Place
from tests.sandbox.driver import LIMITS, Driver
from tests.sandbox.test_jail import ORDINARY, REPOSITORY, python
from tests.sandbox.test_languages import needs

PATIENT = dataclasses.replace(LIMITS, cpu_seconds=8.0, wall_seconds=20.0, memory_mib=64)


def test_version_1_and_2_side_by_side(tmp_path: pathlib.Path) -> None:
    """A host with systemd's hybrid layout: every controller in a tree of its own, and a tree of version 2 without."""
    (tmp_path / "memory/user/me").mkdir(parents=True)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "unified/user").mkdir(parents=True)
    mountinfo = f"""
21 1 8:1 / / rw - ext4 /dev/sda rw
35 23 0:1 / {tmp_path}/memory rw,nosuid shared:9 - cgroup cgroup rw,memory
36 23 0:2 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct
37 23 0:3 / {tmp_path}/systemd rw - cgroup cgroup rw,xattr,name=systemd
38 23 0:4 / {tmp_path}/unified rw - cgroup2 cgroup2 rw,nsdelegate""".lstrip()
    membership = "12:cpu,cpuacct:/\n9:memory:/user/me\n1:name=systemd:/user/a:b\n0::/user\n"
    top = str(tmp_path)
    assert cgroups.hierarchies(mountinfo, membership) == [
        Hierarchy(1, frozenset({"memory"}), f"{top}/memory", f"{top}/memory/user/me"),
        Hierarchy(1, frozenset({"cpu", "cpuacct"}), f"{top}/cpu", f"{top}/cpu"),
        Hierarchy(1, frozenset({"name=systemd"}), f"{top}/systemd", f"{top}/systemd"),
        Hierarchy(2, frozenset(), f"{top}/unified", f"{top}/unified/user"),
    ]
    place = cgroups.find(cgroups.hierarchies(mountinfo, membership))
    assert place.version == 1 and place.folders == {
        "memory": f"{top}/memory/user/me",
        "cpu": f"{top}/cpu",
        "pressure": f"{top}/unified/user",
    }


def test_a_container_sees_its_own_part_of_the_tree(tmp_path: pathlib.Path) -> None:
    """Without a cgroup namespace the mount's root is the container's group, and the path is the host's."""
    (tmp_path / "jobs").mkdir()
    mount = f"35 23 0:1 /docker/abc {tmp_path} rw - cgroup2 cgroup rw"
    for path, own in (("/docker/abc", ""), ("/docker/abc/jobs", "/jobs"), ("/docker/abc/gone", ""), ("/elsewhere", "")):
        (tree,) = cgroups.hierarchies(mount, f"0::{path}")
        assert tree.own == f"{tmp_path}{own}", path


def version_2(folder: pathlib.Path, handed_on: str = "") -> None:
    """The files by which the kernel presents a group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "cgroup.procs": "",
        "cgroup.controllers": "cpu memory pids",
        "cgroup.subtree_control": handed_on,
        "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
        "memory.max": "max",
        "memory.swap.max": "max",
        "pids.max": "max",
        "cpu.stat": "usage_usec 0\nuser_usec 0\nsystem_usec 0\n",
        "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 total=0\n",
    }.items():
        (folder / name).write_text(text)


def test_version_2_uses_the_nearest_group_that_hands_on_the_controller(tmp_path: pathlib.Path) -> None:
    """As under `systemd-run --scope`: the scope holds our process, so only a group above it can have such children."""
    version_2(tmp_path, "memory pids")
    version_2(tmp_path / "app.slice", "cpu memory pids")
    version_2(tmp_path / "app.slice/run.scope")
    (tmp_path / "app.slice/run.scope/cgroup.subtree_control").unlink()
    (tmp_path / "app.slice/run.scope/cgroup.subtree_control").mkdir()  # writing to it fails, as it does in the kernel
    tree = Hierarchy(2, frozenset(), str(tmp_path), str(tmp_path / "app.slice/run.scope"))
    place = cgroups.find([tree])
    assert (place.version, set(place.folders.values())) == (2, {str(tmp_path / "app.slice")})
    assert set(place.folders) == {"memory", "pids", "cpu", "pressure"}


def test_version_2_without_a_group_of_ours_is_refused_with_remedies(tmp_path: pathlib.Path) -> None:
    version_2(tmp_path / "only")
    (tmp_path / "only/cgroup.procs").unlink()
    tree = Hierarchy(2, frozenset(), str(tmp_path), str(tmp_path / "only"))
    with pytest.raises(CgroupsUnavailable, match="no group is writable.*systemd-run.*processes_without_cgroup"):
        cgroups.find([tree])
    with pytest.raises(CgroupsUnavailable, match="no control groups are mounted"):
        cgroups.find([])


def test_version_2_says_why_a_writable_group_is_of_no_use(tmp_path: pathlib.Path) -> None:
    """The kernel's own refusals, where no group further up is writable either."""
    version_2(tmp_path / "own")
    (tmp_path / "own/cgroup.controllers").write_text("cpu pids\n")
    tree = Hierarchy(2, frozenset(), str(tmp_path), str(tmp_path / "own"))
    with pytest.raises(CgroupsUnavailable, match="own is writable, but it has no memory controller.*user@.service"):
        cgroups.find([tree])
    (tmp_path / "own/cgroup.controllers").write_text("memory pids\n")
    (tmp_path / "own/cgroup.subtree_control").unlink()
    (tmp_path / "own/cgroup.subtree_control").mkdir()
    with pytest.raises(CgroupsUnavailable, match="own is writable, but it does not hand on the memory controller"):
        cgroups.find([tree])


def test_version_2_names_the_way_out_of_a_group_with_processes(place: Place) -> None:
    """As in a container whose first process is in the topmost group that is seen, and is the trainer."""
    if place.version == 1:
        pytest.skip("the memory controller is in version 1 here")
    groups = Groups(place)
    group = groups.take(64 << 20, 8)
    folder = group.folders["memory"]
    (door,) = group.doors()
    holder = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.write(door, b"0"))
    try:
        tree = Hierarchy(2, frozenset(), folder, folder)
        with pytest.raises(CgroupsUnavailable, match=r"processes are in it.*/main/cgroup.procs; done`") as refusal:
            cgroups.find([tree])
        assert pathlib.Path(folder, "cgroup.type").read_text() == "domain\n", "it is left as it was"
        subprocess.run(["sh", "-c", str(refusal.value).split("`")[1]], check=False)
        assert cgroups.find([tree]).folders["memory"] == folder, "what the message says helps"
    finally:
        holder.kill()
        holder.wait()
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f"{folder}/main")
        os.close(door)
        groups.give_back(group)
        groups.close()


def test_version_2_group(tmp_path: pathlib.Path) -> None:
    """Limits that are written, and what is read as the call's doing or the machine's."""
    version_2(tmp_path)
    group = Group(2, dict.fromkeys(("memory", "pids", "cpu", "pressure"), str(tmp_path)))

    def counts(oom: int, kills: int, micros: int = 0, stalled: int = 0) -> None:
        (tmp_path / "memory.events").write_text(f"low 0\nmax 7\noom {oom}\noom_kill {kills}\noom_group_kill 0\n")
        (tmp_path / "cpu.stat").write_text(f"usage_usec {micros}\nuser_usec 1\n")
        (tmp_path / "cpu.pressure").write_text(f"some avg10=1.50 avg60=0.00 total={stalled}\nfull avg10=0.00 total=9\n")

    counts(oom=3, kills=3, micros=5_000_000, stalled=2_000_000)
    group.begin(100 << 20, 33)
    written = {name: (tmp_path / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")}
    assert written == {"memory.max": str(100 << 20), "memory.swap.max": "0", "pids.max": "33"}
    assert (group.out_of_memory(), group.starved()) == (False, False), "what was before does not count"
    counts(oom=4, kills=3, micros=5_250_000, stalled=2_500_000)
    assert (group.out_of_memory(), group.starved()) == (False, False), "refused, but nobody died of it"
    assert (group.cpu_seconds(), group.waited_seconds()) == (0.25, 0.5)
    counts(oom=4, kills=4)
    assert (group.out_of_memory(), group.starved()) == (True, False)
    group.begin(100 << 20, 33)
    counts(oom=4, kills=5)
    assert (group.out_of_memory(), group.starved()) == (False, True), "killed, but not for its own limit"
    (tmp_path / "cgroup.procs").write_text("12\n34\n")
    assert group.processes() == [12, 34]
    (door,) = group.doors()
    os.write(door, b"0")
    os.close(door)
    assert (tmp_path / "cgroup.procs").read_text().startswith("0")
    (tmp_path / "cpu.pressure").unlink()  # a kernel without pressure accounting
    assert group.waited_seconds() is None
    group.close()


@pytest.fixture
def place() -> Place:
    needs()
    return cgroups.find()


def homes(place: Place) -> set[str]:
    """Folders of wardens, in every tree that is used."""
    folders = dict.fromkeys(place.folders.values())
    return {entry.path for folder in folders for entry in os.scandir(folder) if entry.name.startswith("jaxrl-")}


def test_groups_are_used_again_and_removed(place: Place) -> None:
    before = homes(place)
    groups = Groups(place)
    first = groups.take(64 << 20, 8)
    second = groups.take(64 << 20, 8)
    assert first.folders != second.folders and len(homes(place) - before) == groups.doors
    groups.give_back(first)
    assert groups.take(96 << 20, 9) is first, "with other limits"
    assert Groups(place).close() is None and len(homes(place) - before) == groups.doors, "another's sweep spares it"
    groups.close()
    assert homes(place) == before


def test_groups_are_abandoned_when_their_warden_is_dead_and_until_a_sweep(place: Place) -> None:
    before = homes(place)
    groups = Groups(place)
    groups.take(64 << 20, 8)
    (home,) = (path for path in homes(place) - before if path.startswith(place.folders["memory"]))
    assert home not in cgroups.abandoned()
    groups.close()
    pid = os.fork()
    if not pid:
        Groups(place).take(64 << 20, 8)
        os._exit(0)
    os.waitpid(pid, 0)
    (home,) = (path for path in homes(place) - before if path.startswith(place.folders["memory"]))
    assert home in cgroups.abandoned()
    cgroups.sweep(place)
    assert homes(place) == before and home not in cgroups.abandoned()


def test_two_may_look_for_abandoned_groups_at_the_same_time(place: Place) -> None:
    before = homes(place)
    pid = os.fork()
    if not pid:
        Groups(place)
        os._exit(0)
    os.waitpid(pid, 0)
    (home,) = (path for path in homes(place) - before if path.startswith(place.folders["memory"]))
    looking = os.open(home, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    try:
        assert home in cgroups.abandoned()
    finally:
        os.close(looking)
        cgroups.sweep(place)
    assert homes(place) == before


@pytest.mark.parametrize("removes", [False, True])
def test_a_new_folder_that_another_locks_first_is_left_to_nobody(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, removes: bool
) -> None:
    """One that looks, or one that sweeps, comes between the folder's making and its locking."""
    made: list[str] = []
    held: list[int] = []
    make = tempfile.mkdtemp

    def make_and_be_overtaken(prefix: str, dir: str) -> str:
        made.append(make(prefix=prefix, dir=dir))
        if len(made) == 1 and removes:
            os.rmdir(made[0])
        elif len(made) == 1:
            held.append(os.open(made[0], os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_SH)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_be_overtaken)
    before = len(os.listdir("/proc/self/fd"))
    groups = Groups(Place(1, {"memory": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir()] == [os.path.basename(made[1])]
    assert len(os.listdir("/proc/self/fd")) == before + len(held) + 1, "the lock"
    groups.close()
    assert list(tmp_path.iterdir()) == []
    for descriptor in held:
        os.close(descriptor)


def test_what_a_process_does_in_a_group_is_counted(place: Place) -> None:
    groups = Groups(place)
    group = groups.take(64 << 20, 8)
    for megabytes, killed in ((8, False), (200, True)):
        group.begin(64 << 20, 8)
        doors = group.doors()
        pid = os.fork()
        if not pid:
            for door in doors:
                os.write(door, b"0")
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
            bytearray(b"x") * (megabytes << 20)
            os._exit(0)
        for door in doors:
            os.close(door)
        _, status, usage = os.wait4(pid, 0)
        assert os.WIFSIGNALED(status) == killed
        assert (group.out_of_memory(), group.starved()) == (killed, False)
        seconds = group.cpu_seconds()
        assert seconds is None or 0.1 <= seconds < usage.ru_utime + usage.ru_stime + 0.1, "this process's, no other's"
    assert group.processes() == []
    groups.give_back(group)
    groups.close()


def test_waiting_for_a_core_is_counted(place: Place) -> None:
    """Two processes on one core wait for each other as long as both are there."""
    groups = Groups(place)
    group = groups.take(64 << 20, 8)
    children = []
    for _ in range(2):
        doors = group.doors()
        pid = os.fork()
        if not pid:
            for door in doors:
                os.write(door, b"0")
            os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            os._exit(0)
        for door in doors:
            os.close(door)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    waited = group.waited_seconds()
    groups.give_back(group)
    groups.close()
    if waited is None:
        pytest.skip("this kernel does not count pressure")
    assert waited > 0.1


def test_a_pool_leaves_no_group(place: Place) -> None:
    before = homes(place)
    with Driver(workers=1, slots=3, preload=()) as driver:
        for _ in range(3):
            assert driver.run("true", language="bash", limits=PATIENT).status is ToolStatus.OK
        held = homes(place) - before
        assert held and all(len(groups_in(home)) == 1 for home in held), "one at a time needs one group"
    assert homes(place) == before


def groups_in(home: str) -> list[str]:
    return [entry.name for entry in os.scandir(home) if entry.is_dir()]


def test_groups_of_a_killed_pool_are_removed_by_its_warden(place: Place) -> None:
    script = """
import asyncio, os, signal
from jaxrl.sandbox import Pool
async def use():
    async with Pool(workers=1, slots=1, preload=()) as pool:
        assert (await pool.run("true", language="bash")).status == "ok"
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(use())"""
    before = homes(place)
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 20.0
    while homes(place) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert homes(place) == before


def test_the_doctor_names_memory_groups_and_languages() -> None:
    findings = {finding.layer: finding for finding in doctor.examine()}
    needs("bash")
    assert findings["memory cgroup"].works and findings["memory cgroup"].detail.startswith("version ")
    assert findings["live session"].works, findings["live session"]
    assert findings["language bash"].detail == "/usr/bin/bash"
    assert not any(findings[name].needed for name in ("memory cgroup", "language bash", "language c++", "live session"))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the right to make cgroups away from root")
def test_the_doctor_names_the_remedy_where_there_is_no_group() -> None:
    script = "import dataclasses, json; from jaxrl.sandbox import doctor\n"
    script += "print(json.dumps({finding.layer: dataclasses.astuple(finding) for finding in doctor.examine()}))"
    found = python(ORDINARY, str(REPOSITORY), script)
    _, works, _, detail, remedy = found["memory cgroup"]
    assert not works and re.search(r"(is not|no group is) writable.*; calls that start processes need one", detail)
    assert remedy.startswith("as root make /sys/fs/cgroup writable")


def test_groups_of_a_killed_warden_are_removed(place: Place) -> None:
    """SIGKILL in the middle of a call: the call is tried again by the next warden, which removes what was left."""
    before = homes(place)
    with Driver(workers=1, slots=1, preload=()) as driver:
        driver.run("true", language="bash", limits=PATIENT)
        left = homes(place) - before
        call = asyncio.run_coroutine_threadsafe(
            driver.pool.run("sleep 0.5; echo done", language="bash", limits=PATIENT), driver.loop
        )
        while not any((pathlib.Path(home, "1/cgroup.procs")).read_text() for home in left):
            time.sleep(0.005)
        os.kill(driver.pool.warden_pid, signal.SIGKILL)
        result = call.result()
        assert (result.status, result.stdout) == (ToolStatus.OK, "done\n"), result
    assert left and homes(place) == before
