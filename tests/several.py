"""Starts several processes of one program for a test, and leaves none of them behind."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else gets meanwhile; jax's coordinator may listen on it."""
    with socket.socket() as held:
        for shared in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, shared, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """With so many virtual CPU devices in each process."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), *sys.path]),
    }


@contextlib.contextmanager
def started(command: list[str], devices: int) -> Iterator[subprocess.Popen[str]]:
    """A process with a group of its own; whatever of that group is left at the end is killed."""
    process = subprocess.Popen(
        command,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def finished(command: list[str], devices: int, seconds: float = 280) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process."""
    with started(command, devices) as process:
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err


def together(script: pathlib.Path, count: int, devices: int, *arguments: str) -> list[tuple[int, str, str]]:
    """The results of ``script PORT COUNT PROCESS arguments``, run as ``count`` processes."""
    with reserved_port() as port:
        return together_at(port, script, count, devices, *arguments)


def together_at(
    port: int, script: pathlib.Path, count: int, devices: int, *arguments: str
) -> list[tuple[int, str, str]]:
    """The same, at a port that is reserved already."""
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        runs = [
            threads.submit(
                finished, [sys.executable, str(script), str(port), str(count), str(process), *arguments], devices
            )
            for process in range(count)
        ]
        return [run.result() for run in runs]
