"""Where the processes of one start meet, before jax's coordination service is there.

The service of a run outlives its first process by seconds. Who comes to it from another start is aborted by jax, and
so are those who are still there. So the first process listens itself at first, at the port that the service will have,
until all others have come; then the service is started, and all are let in.
"""

import contextlib
import socket
import sys
import time
from collections.abc import Iterable

KNOCK, OPEN = b"jaxrl process ", b"jaxrl: come in\n"
PATIENCE_SECONDS = 5.0
"""For somebody to answer, or to say who it is."""


def gathered(port: int, count: int) -> list[socket.socket]:
    """In the first of ``count`` processes: wait until all others have come; they are to be ``admit``-ted."""
    came: dict[int, socket.socket] = {}
    twice: set[int] = set()
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count) as door:
        while len(came) < count - 1:
            visitor, _ = door.accept()
            index = _who_knocks(visitor)
            if index is None or not 0 < index < count:
                visitor.close()
                continue
            if index in came:  # it was started once more, or another one takes itself for it, and they come by turns
                came[index].close()
                if index not in twice:
                    sys.stderr.write(f"jaxrl: process {index} came twice; was --process {index} given twice?\n")
                twice.add(index)
            came[index] = visitor
    return list(came.values())


def admit(visitors: Iterable[socket.socket]) -> None:
    """Let them in: the service listens."""
    for visitor in visitors:
        with contextlib.suppress(OSError):  # it has gone again, and jax will miss it
            visitor.sendall(OPEN)
        visitor.close()


def enter(address: str, index: int) -> None:
    """In every process but the first: come to the first one of this start, and wait until it lets in.

    Whoever else is there, such as the service of a former run that has not ended yet, is waited for.
    """
    told = False
    while (answer := _answer(address, index)) != OPEN:
        if not OPEN.startswith(answer) and not told:
            sys.stderr.write(
                f"jaxrl: process {index} waits: at {address} somebody answers who is not process 0 of this start, "
                "perhaps of a former run that has not ended yet, which takes it up to 30 s\n"
            )
            told = True
        time.sleep(0.2)


def _answer(address: str, index: int) -> bytes:
    """What is said at the door; nothing if there is nobody, or somebody who shuts it."""
    host, _, port = address.rpartition(":")
    said = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS) as door,
    ):
        door.sendall(KNOCK + b"%d\n" % index)
        door.settimeout(None)
        while said != OPEN and OPEN.startswith(said) and (more := door.recv(len(OPEN) - len(said))):
            said += more
    return said


def _who_knocks(visitor: socket.socket) -> int | None:
    visitor.settimeout(PATIENCE_SECONDS)
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < 64 and (more := visitor.recv(64)):
            said += more
    number = said.removeprefix(KNOCK).strip()
    return int(number) if said.startswith(KNOCK) and number.isdigit() else None
