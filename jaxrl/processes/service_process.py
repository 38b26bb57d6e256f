"""Run by ``service``: jax's coordination service alone, until who started it says how long it shall stay, or is gone.

``service_process ADDRESS COUNT OPTIONS LINGER``: options as jax gives them to its service, in JSON, and seconds.
"""

import json
import os
import signal
import sys
import time

from jaxlib import _jax  # alone: jax takes seconds to load

READY = b"ready\n"
"""Written to standard output once it listens; a number of seconds on standard input then ends it."""


def main() -> None:
    """Serve."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what ends the run ends this as well, but last
    address, count, options, linger = sys.argv[1:]
    service = _jax.get_distributed_runtime_service(address, int(count), **json.loads(options))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads it any more
    os.write(1, READY)
    seconds = os.read(0, 64)
    time.sleep(float(seconds or linger))
    if seconds:
        service.shutdown()
    os._exit(0)  # a service that others still use takes long to end


if __name__ == "__main__":
    main()
