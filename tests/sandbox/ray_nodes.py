"""A Ray cluster on this machine for tests, in a process whose network has nothing but a loopback device.

Ray takes the machine's first real address and finds clusters that other people run there; in a network of its own it
meets nobody. That network is entered before Ray starts any thread, so the bodies of the tests run in that process too.
"""

import asyncio
import contextlib
import fcntl
import importlib
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from jaxrl.sandbox import syscalls
from tests.sandbox.driver import descendants

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
_BODY_SECONDS = 280.0
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40
_FAST_DETECTION = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_prestart_worker_first_driver": "0"}

Body = Callable[["RayNodes"], Awaitable[None]]


# In the process of pytest


class ClusterProcess:
    """Runs bodies of tests, which are found by their names, in the process that has the cluster."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.sandbox.ray_nodes"]
        environment = os.environ | _QUIET | {"PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def play(self, module: str, name: str) -> None:
        answer = self._ask({"module": module, "name": name})
        assert answer["passed"], answer["trace"]

    def close(self) -> dict[str, Any]:
        """End the cluster; what it left behind."""
        left = self._ask({})
        self._process.communicate()
        return left

    def _ask(self, request: dict[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process with the Ray cluster ended: {self._process.wait()}"
        return json.loads(line)


def in_cluster(body: Body) -> Callable[[ClusterProcess], None]:
    """A test whose body, a coroutine function, is given the cluster in the process where that lives."""

    def test(cluster: ClusterProcess) -> None:
        cluster.play(body.__module__, body.__name__)

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body = body
    return test


# In the process of the cluster


class RayNodes:
    """A head that runs no calls, and nodes that do."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.folder = pathlib.Path(os.environ["RAY_TMPDIR"]) / "ray"
        self.folder.mkdir()  # Ray notes the address there before it makes it
        self._cluster = Cluster()
        self._add(num_cpus=0, temp_dir=str(self.folder), _system_config=_FAST_DETECTION)
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def have(self, count: int) -> None:
        """Make it so many nodes that run calls."""
        while len(self._nodes) > count:
            self.kill_node(-1)
        while len(self._nodes) < count:
            self.add_node()

    def add_node(self) -> None:
        self._nodes.append(self._add(num_cpus=1))

    def kill_node(self, index: int) -> None:
        """SIGKILL the node's agent, and with it what it started."""
        node = self._nodes.pop(index)
        pids = self._below(node)
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in pids:  # on one machine nothing else ends them at the very same moment
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def actors(self, index: int) -> list[int]:
        """Process ids of the pools on a node."""
        return [pid for pid in self._below(self._nodes[index]) if _command(pid).startswith("ray::NodePool")]

    def all_actors(self) -> list[int]:
        return [pid for index in range(len(self._nodes)) for pid in self.actors(index)]

    def close(self) -> None:
        self._cluster.shutdown()

    def _add(self, **settings: Any) -> Any:
        return self._cluster.add_node(
            node_ip_address=LOOPBACK, object_store_memory=80 << 20, include_dashboard=False, **settings
        )

    def _below(self, node: Any) -> list[int]:
        raylet = node.all_processes["raylet"][0].process.pid
        return descendants(raylet)


def _command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def enter_own_network() -> None:
    user, group = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWNET | (0 if user == 0 else syscalls.CLONE_NEWUSER))
    if user != 0:
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP | _IFF_RUNNING))


@contextlib.contextmanager
def temporary_folder() -> Iterator[pathlib.Path]:
    """A short path, for names of Unix sockets, that Ray uses in place of the machine's common one."""
    folder = tempfile.mkdtemp(prefix="jaxrl-ray-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder)


def play(nodes: RayNodes, module: str, name: str) -> dict[str, Any]:
    body: Body = getattr(importlib.import_module(module), name).body

    async def bounded() -> None:
        await asyncio.wait_for(body(nodes), _BODY_SECONDS)

    try:
        asyncio.run(bounded())
    except Exception:
        return {"passed": False, "trace": traceback.format_exc()}
    return {"passed": True}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # so that nothing gets out of sight
    enter_own_network()
    with temporary_folder():
        nodes = RayNodes()
        for line in sys.stdin:
            request = json.loads(line)
            if not request:
                break
            print(json.dumps(play(nodes, **request)), file=answers, flush=True)
        nodes.close()
    print(json.dumps({"processes": [_command(pid) for pid in descendants(os.getpid())]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
