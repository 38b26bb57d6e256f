"""A Ray cluster on this machine for tests, in a process whose network has nothing but a loopback device.

Ray takes the machine's first real address and finds clusters that other people run there; in a network of its own it
meets nobody. So the bodies of the tests run in that process too.
"""

import asyncio
import contextlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TextIO

import pytest

from jaxrl.sandbox import ClusterPool, syscalls
from jaxrl.sandbox.bench.processes import descendants
from tests.sandbox import own_network
from tests.sandbox.driver import LIMITS

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
_BODY_SECONDS = 280.0
_FAST_DETECTION = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_prestart_worker_first_driver": "0"}

Body = Callable[..., Awaitable[None]]


# In the process of pytest


class ClusterProcess:
    """Runs bodies of tests, which are found by their names, in the process that has the cluster."""

    def __init__(self) -> None:
        command = own_network.command(__file__)
        environment = os.environ | QUIET
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
    """A test whose body, a coroutine function, is given the nodes in the process where they live."""
    return _test(body, with_pool=False)


def on_common_pool(body: Body) -> Callable[[ClusterProcess], None]:
    """The same, for a body that is also given a pool over two nodes, which it leaves open and idle."""
    return _test(body, with_pool=True)


def _test(body: Body, with_pool: bool) -> Callable[[ClusterProcess], None]:
    def test(cluster: ClusterProcess) -> None:
        cluster.play(body.__module__, body.__name__)

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body, test.with_pool = body, with_pool
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
        """Make it so many nodes that run calls, and wait until Ray knows."""
        while len(self._nodes) > count:
            self.kill_node(-1)
        while len(self._nodes) < count:
            self.add_node()
        deadline = time.monotonic() + 60.0
        while sum(node["Alive"] for node in self._cluster.global_state.node_table()) != count + 1:
            assert time.monotonic() < deadline, "Ray does not notice which nodes there are"
            time.sleep(0.1)

    def add_node(self) -> None:
        """Returns when Ray knows it."""
        self._nodes.append(self._add(num_cpus=1))

    def kill_node(self, index: int, *, only_agent: bool = False) -> list[int]:
        """SIGKILL everything on the node, as when the machine dies, or just Ray's agent; the processes that it had."""
        node = self._nodes.pop(index)
        pids = self._below(node)
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in [] if only_agent else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

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


def output_for_us() -> TextIO:
    """Standard output as it was; what Ray prints there from now on goes to standard error."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


@contextlib.contextmanager
def temporary_folder() -> Iterator[pathlib.Path]:
    """A short path, for names of Unix sockets, that Ray uses in place of the machine's common one."""
    folder = tempfile.mkdtemp(prefix="jaxrl-ray-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder)


class Stage:
    """Where the bodies run: the nodes, and the pool that many of them share because it takes seconds to start."""

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes
        self._pool: ClusterPool | None = None

    async def play(self, module: str, name: str) -> dict[str, Any]:
        test = getattr(importlib.import_module(module), name)
        try:
            if test.with_pool:
                await asyncio.wait_for(test.body(self._nodes, await self._common_pool()), _BODY_SECONDS)
            else:
                await self.close()
                await asyncio.wait_for(test.body(self._nodes), _BODY_SECONDS)
        except (Exception, pytest.fail.Exception):
            return {"passed": False, "trace": traceback.format_exc()}
        return {"passed": True}

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

    async def _common_pool(self) -> ClusterPool:
        if self._pool is None:
            self._nodes.have(2)
            self._pool = ClusterPool(self._nodes.address, LIMITS, workers=1, slots=1, slow_slots=1, queue=3, preload=())
            await self._pool.start()
        return self._pool


async def serve(nodes: RayNodes, answers: TextIO) -> None:
    """Answer requests until an empty one, or until whoever asks has gone."""
    stage = Stage(nodes)
    while request := json.loads(await asyncio.to_thread(sys.stdin.readline) or "{}"):
        print(json.dumps(await stage.play(**request)), file=answers, flush=True)
    await stage.close()


def main() -> None:
    answers = output_for_us()
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # so that nothing gets out of sight
    with temporary_folder():
        nodes = RayNodes()
        asyncio.run(serve(nodes, answers))
        nodes.close()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    print(json.dumps({"processes": [_command(pid) for pid in descendants(os.getpid())]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
