"""Starting one of several processes of a run, and ending it with the others, however that comes about."""

import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping

import jax

from jaxrl.config import ConfigError
from jaxrl.processes import service
from jaxrl.processes.exchange import client, exchange

BEAT_SECONDS = 0.5
"""Between two signs of life of a process."""
PATIENCE_SECONDS = 10.0
"""Without a sign of life after which a process counts as dead."""
HEARTBEAT_SECONDS = 30
"""The same for jax's own watch, which ends a process without a word of ours; it is there for when ours hangs."""
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Take the place of the three options where those are not given."""
ALONE = ("coordinator_address should be defined", "must be called before any JAX calls")
"""In what jax says where nothing speaks of other processes, and where it was in use before there was any question."""
FAILED, INTERRUPTED = 1, 130
"""Exit codes of the command line."""
_ALIVE = "jaxrl/alive/"


@dataclasses.dataclass(frozen=True)
class Place:
    """One of the processes of a run. All None: as a TPU pod, Slurm or Open MPI says, or the only one."""

    coordinator: str | None  # host:port of process 0
    count: int | None
    index: int | None
    wait_seconds: int

    @property
    def name(self) -> str:
        return "this process" if self.index is None else f"process {self.index} of {self.count}"


def place(
    coordinator: str | None, count: int | None, index: int | None, wait_seconds: int, environment: Mapping[str, str]
) -> Place:
    """The place that options and environment name.

    Raises:
        ConfigError: some of the three are missing, or out of range.
    """
    options = dict(zip(VARIABLES, (coordinator, count, index), strict=True))
    given = {name: environment.get(name) if value is None else value for name, value in options.items()}
    address, count, index = given.values()
    if address is count is index is None:
        return Place(None, None, None, wait_seconds)
    if count in (1, "1"):
        return Place(None, 1, None, wait_seconds)
    if missing := [name for name, value in given.items() if value is None]:
        raise ConfigError(
            f"one of several processes needs --coordinator, --processes and --process, or {', '.join(VARIABLES)}; "
            f"{', '.join(missing)} is missing"
        )
    try:
        count, index = int(count), int(index)
    except ValueError as error:
        raise ConfigError(f"{VARIABLES[1]}={count} and {VARIABLES[2]}={index} must be whole numbers") from error
    if not 0 <= index < count:
        raise ConfigError(f"--process {index} is outside 0 ... {count - 1}: --processes is {count}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f'--coordinator "{address}" must be HOST:PORT, a free port of the machine of process 0')
    return Place(address, count, index, wait_seconds)


def run(here: Place, work: Callable[[], int]) -> int:
    """``work()`` as one of the processes of a run; returns its exit code once all are done.

    Where this is the only process, nothing but ``work()``. Otherwise a process that fails stops the others within
    a quarter of a minute, one that dies too; they say so on standard error and exit with its code, or 1, and this
    function does not return.
    """
    if not _met(here):
        return work()
    watch = _Watch()
    watch.start()
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
        code = FAILED
    if code == FAILED:
        # Devices that miss those of a dead process fail first: then the watch says so before this wait is over.
        time.sleep(PATIENCE_SECONDS + 4 * BEAT_SECONDS)
    if code:
        watch.leave(code)
    exchange("jaxrl/done", b"")
    watch.end()
    jax.distributed.shutdown()
    return code


def _met(here: Place) -> bool:
    """Join the others; False where there are none."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "TPU_WORKER_HOSTNAMES" not in os.environ
    if here.count == 1 or (here.coordinator is None and in_pod):  # there jax would need the cluster's permission to ask
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = threading.Timer(here.wait_seconds, _stop, [_nobody(here)])
    late.daemon = True
    late.start()
    try:
        with service.apart():
            jax.distributed.initialize(
                here.coordinator,
                here.count,
                here.index,
                # Slurm's environment would leave a process one device even where it is told its place.
                cluster_detection_method="deactivate" if here.coordinator else None,
                # Longer than the timer: when jax itself gives up, it aborts.
                initialization_timeout=here.wait_seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        if here.coordinator is None and any(words in str(error) for words in ALONE):
            return False
        raise OSError(
            f"{here.name} cannot join the others at {here.coordinator or 'the coordinator'}: {error}; is the port free?"
        ) from error
    finally:
        late.cancel()
    return jax.process_count() > 1


def _nobody(here: Place) -> str:
    return (
        f"{here.name} waited {here.wait_seconds} s at {here.coordinator or 'the coordinator'}, but not all came; is it "
        "the machine of process 0, is the port open, were all processes started with the same --processes? "
        "(--wait SECONDS waits longer)"
    )


class _Watch(threading.Thread):
    """Gives signs of life, and stops this process when another one gives none or says that it failed."""

    def __init__(self) -> None:
        super().__init__(name="jaxrl-watch", daemon=True)
        self._ended = threading.Event()
        self._seen = dict.fromkeys(map(str, range(jax.process_count())), ("", time.monotonic()))  # signs, since when

    def run(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._say(str(beat))
                signs = dict(client().key_value_dir_get(_ALIVE))
            except jax.errors.JaxRuntimeError as error:
                if not self._ended.is_set():
                    _stop(_stopped("process 0, which all others need, is gone", str(error)))
                return
            self._look({key.removeprefix(_ALIVE): sign for key, sign in signs.items()})

    def leave(self, code: int) -> None:
        """Tell the others that this process failed, and exit."""
        self._ended.set()
        self.join()
        self._say(f"failed {code}")
        _leave(code)

    def end(self) -> None:
        """All processes are done."""
        self._ended.set()
        self.join()

    def _say(self, sign: str) -> None:
        client().key_value_set(f"{_ALIVE}{jax.process_index()}", sign, allow_overwrite=True)

    def _look(self, signs: Mapping[str, str]) -> None:
        now = time.monotonic()
        for process, (last, since) in self._seen.items():
            sign = signs.get(process, "")
            if sign == f"failed {INTERRUPTED}":
                _stop(_stopped(f"process {process} was interrupted", "exit code 130"), INTERRUPTED)
            if sign.startswith("failed "):
                code = sign.removeprefix("failed ")
                message = _stopped(f"process {process} stopped with exit code {code}", "its own message says why")
                _stop(message, int(code))
            if sign != last:
                self._seen[process] = (sign, now)
            elif now - since > PATIENCE_SECONDS:
                _stop(_stopped(f"process {process} is gone", f"no sign of life for {PATIENCE_SECONDS:.0f} s"))


def _stopped(what: str, why: str) -> str:
    return (
        f"process {jax.process_index()} stops: {what} ({why}); start all processes again, and they go on from the last "
        "checkpoint"
    )


def _stop(message: str, code: int = FAILED) -> None:
    sys.stderr.write(f"jaxrl: {message}\n")
    _leave(code)


def _leave(code: int) -> None:
    """Exit, and do not wait for other threads: theirs may be devices of processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (own := service.of_this_process()) is not None:
        # The others still read from it why they stop; the first process of a container takes it along when it ends.
        own.leave(4 * BEAT_SECONDS)
        time.sleep(4 * BEAT_SECONDS)
    os._exit(code)
