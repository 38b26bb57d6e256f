"""What processes tell each other between steps: small messages through jax's coordination service.

Messages wait on the host. Collectives of devices (``jax.experimental.multihost_utils``) would hold up everything behind
them on the devices, episodes included, until the slowest process has come, and would compile for each new size.
"""

import threading
import zlib
from typing import Any

import jax
from jax._src import distributed  # the service's key-value store has no public name; orbax takes it from here as well

SLICE_MILLISECONDS = 500
"""How long a wait goes on before Python can be interrupted."""
CHUNK_BYTES = 1 << 20
"""Largest single message; the service's transport refuses messages above some megabytes."""


def is_first() -> bool:
    """Whether this is the process that writes what a run has one of, and shows what it does."""
    return jax.process_index() == 0


def send(name: str, message: bytes) -> None:
    """Leave a message under a name that is used once."""
    packed = zlib.compress(message, level=1)
    chunks = [packed[start : start + CHUNK_BYTES] for start in range(0, len(packed), CHUNK_BYTES)]
    for number, chunk in enumerate(chunks[1:], 1):
        client().key_value_set_bytes(f"{name}/{number}", chunk)
    client().key_value_set_bytes(f"{name}/0", len(chunks).to_bytes(4, "big") + chunks[0])  # last: all are there now


def receive(name: str, unwanted: threading.Event | None = None) -> bytes:
    """Wait for the message of that name. Whoever never sends it has died, and then this process is stopped as well.

    Args:
        unwanted: set by whoever no longer waits for this thread.

    Raises:
        InterruptedError: the message came to be unwanted.
    """
    unwanted = unwanted or threading.Event()
    first = _wait_for(f"{name}/0", unwanted)
    count = int.from_bytes(first[:4], "big")
    return zlib.decompress(first[4:] + b"".join(_wait_for(f"{name}/{number}", unwanted) for number in range(1, count)))


def forget(name: str, notice: str = "") -> None:
    """Say that this process needs no message below this name any more. The last process to say so frees them all.

    Args:
        notice: one that was left of them.
    """
    if client().key_value_increment(f"{name}.forgotten", 1) == jax.process_count():
        client().key_value_delete(f"{name}/")
        client().key_value_delete(f"{name}.forgotten")
        if notice:
            client().key_value_delete(notice)


def leave_notice(name: str) -> None:
    """Leave a name that others look for."""
    client().key_value_set(name, "1")


def notices(folder: str) -> list[str]:
    """The names that were left below this one, which ends in a stroke; without it."""
    return [name.removeprefix(folder) for name, _ in client().key_value_dir_get(folder)]


def exchange(name: str, message: bytes) -> list[bytes]:
    """The messages of all processes, by process; all of them call this with the same name, which is used once."""
    if jax.process_count() == 1:
        return [message]
    send(f"{name}/{jax.process_index()}", message)
    messages = [receive(f"{name}/{process}") for process in range(jax.process_count())]
    forget(name)
    return messages


def client() -> Any:
    """Of the coordination service."""
    return distributed.global_state.client


def _wait_for(key: str, unwanted: threading.Event) -> bytes:
    while not unwanted.is_set():
        try:
            return client().blocking_key_value_get_bytes(key, SLICE_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise InterruptedError(f"nobody waits for message {key} any more")
