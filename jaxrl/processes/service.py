"""jax's coordination service in a process of its own, beside the first process of a run.

All processes need it: where it breaks off, jax aborts them at once, in words that say nothing of why. Apart, it
outlives the first process for as long as the others take to see that this one gives no sign of life.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from jax._src import distributed  # what starts the service has no public name
from jaxlib import _jax

from jaxrl.processes import door
from jaxrl.processes.service_process import READY

LINGER_SECONDS = 20
"""How long it outlives a first process that went without a word: twice as long as the others wait for a sign."""
REASON_CHARACTERS = 2000
"""How much is shown of what a service said that did not start."""


class Service:
    """In place of the object that jax makes with the same arguments.

    Args:
        options: plain values; which there are depends on the version of jax.

    Raises:
        OSError: it cannot listen at ``address``, with what it said; one that lingers there is waited for.
    """

    def __init__(self, address: str, count: int, **options: Any) -> None:
        check_port(address)
        script = [sys.executable, "-m", "jaxrl.processes.service_process"]
        command = [*script, address, str(count), json.dumps(options), str(LINGER_SECONDS)]
        # Whoever reads the standard error of this process to its end, or kills its group, has nothing of the service.
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        begun = self._process.stdout.readline() == READY
        if not begun:
            self._process.kill()
        said = "" if begun else self._process.stderr.read().decode(errors="replace").strip()
        self._process.stdout.close()
        self._process.stderr.close()
        if not begun:
            self._process.wait()
            raise OSError(f"the coordination service did not start at {address}: {said[-REASON_CHARACTERS:]}")

    def leave(self, seconds: float) -> None:
        """End it after so many seconds."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it is gone, or another thread has told it
            self._process.stdin.write(str(seconds).encode())
            self._process.stdin.close()

    def shutdown(self) -> None:
        """End it now."""
        self.leave(0)
        self._process.wait()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, ``jax.distributed.initialize`` starts its service in a process of its own, once all have come to its
    door; in the others it waits there."""
    serve, join = _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client

    def served(address: str, count: int, **options: Any) -> Service:
        check_port(address)
        visitors = door.gathered(_port(address), count)
        service = Service(address, count, **options)
        door.admit(visitors)
        return service

    def joined(address: str, index: int, **options: Any) -> Any:
        if index:
            door.enter(address, index)
        return join(address, index, **options)

    _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client = served, joined
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client = serve, join


def of_this_process() -> Service | None:
    """The service that this process started; the first does."""
    return distributed.global_state.service


def check_port(address: str) -> None:
    """Refuse a port that is taken; one that a former run's service still lingers at is waited for.

    Raises:
        OSError: with what to do.
    """
    port, given_up = _port(address), time.monotonic() + LINGER_SECONDS + 1
    told = False
    while True:
        try:
            # Without SO_REUSEPORT: jax's service sets it, so that one which listens already would share the port.
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > given_up:
                raise OSError(f"process 0 cannot listen at port {port}: {error}; take a free port") from error
        if not told:
            sys.stderr.write(
                f"jaxrl: process 0 waits up to {LINGER_SECONDS} s: port {port} is taken, perhaps by a former run that "
                "has not ended yet\n"
            )
            told = True
        time.sleep(0.2)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
