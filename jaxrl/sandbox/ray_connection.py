"""This process's connection to Ray: there is one, whoever uses it."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import ray
import ray.exceptions

from jaxrl.sandbox.jail import SandboxUnavailable

_CONNECT_SECONDS = 30.0
_KNOCK_SECONDS = 5.0
_LOOK_SECONDS = 0.05


class Connection:
    """Ray's connection, made by the first user and closed by the last, unless it was there before."""

    def __init__(self) -> None:
        self._users: set[object] = set()
        self._is_ours = False
        self._changing = threading.Lock()  # users may live in several event loops

    async def enter(self, user: object, address: str) -> None:
        """Connect, unless this process already is.

        Raises:
            SandboxUnavailable: nothing answers at the address, or this process is connected to another cluster.
        """
        async with self._change():
            if not ray.is_initialized():
                await _connect(address)
                self._is_ours = True
            elif address != "auto" and not await _is_same(address, ray.get_runtime_context().gcs_address):
                connected = f"is connected to the Ray cluster at {ray.get_runtime_context().gcs_address!r}"
                raise SandboxUnavailable(f"this process {connected}, not {address!r}, and can be to one only: use that")
            self._users.add(user)

    async def leave(self, user: object) -> None:
        """The user needs it no more, if it ever did."""
        self._users.discard(user)
        async with self._change():
            if self._is_ours and not self._users:
                self._is_ours = False
                await asyncio.to_thread(ray.shutdown)

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        while not self._changing.acquire(blocking=False):
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            self._changing.release()


CONNECTION = Connection()  # as global as Ray's own


async def _is_same(address: str, other: str) -> bool:
    """Whether two addresses, as host:port, are those of one place."""
    (host, _, port), (other_host, _, other_port) = address.rpartition(":"), other.rpartition(":")
    resolve = asyncio.get_running_loop().getaddrinfo
    try:
        places = [{place[4][0] for place in await resolve(name, None)} for name in (host, other_host)]
    except OSError:
        return address == other
    return port == other_port and not places[0].isdisjoint(places[1])


async def _connect(address: str) -> None:
    remedy = 'start one with `ray start --head`, or set SandboxConfig.cluster="" to run on this machine alone'
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:  # Ray itself would go on asking for minutes
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), _KNOCK_SECONDS)
        except (OSError, ValueError) as error:
            reason = f"no Ray cluster answers at {address!r} ({error}); the address is host:port"
            raise SandboxUnavailable(f"{reason}; {remedy}") from error
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    try:
        await asyncio.wait_for(_initialize(address), _CONNECT_SECONDS)
    except TimeoutError as error:
        reason = f"what answers at {address!r} is no Ray cluster that lets us in within {_CONNECT_SECONDS:g} s"
        raise SandboxUnavailable(f"{reason}; {remedy}") from error
    except ray.exceptions.AuthenticationError as error:
        reason = " ".join(str(error).split())
        raise SandboxUnavailable(f"the Ray cluster at {address!r} does not let us in: {reason}") from error
    except (ConnectionError, RuntimeError) as error:
        raise SandboxUnavailable(f"cannot join the Ray cluster at {address!r}: {error}; {remedy}") from error


async def _initialize(address: str) -> None:
    """Connect in a thread of its own: Ray blocks, may do so for ever, and leaves SIGTERM's handler alone only there."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def work() -> None:
        outcome = None
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of any kind: whoever waits in the event loop is to meet it
            outcome = error
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=work, name="ray.init", daemon=True).start()
    await done
