"""Run by test_join.py as one of several processes: ``talking.py PORT COUNT PROCESS WHAT``.

``talk`` exchanges messages; ``fail``, ``raise`` and ``die`` do so in process 1, and ``die first`` in process 0, while
the others wait for a message that never comes.
"""

import json
import os
import signal
import sys
import threading
import time

import jax

from jaxrl.processes import join
from jaxrl.processes.exchange import client, exchange, receive, send


def talk() -> int:
    mine = f"from {jax.process_index()}".encode()
    messages = [message.decode() for message in exchange("names", mine)]
    large = os.urandom(3 << 20)
    sizes = [len(message) for message in exchange("large", large)]
    exchange("everybody is through", b"")
    time.sleep(1)  # what the last one frees is gone for all
    left = [key for name in ("names", "large") for key, _ in client().key_value_dir_get(name)]
    unwanted = threading.Event()
    threading.Timer(0.2, unwanted.set).start()
    try:
        receive("never sent", unwanted)
    except InterruptedError:
        print(json.dumps({"messages": messages, "sizes": sizes, "left": left, "devices": jax.device_count()}))
    return 0


def in_one_process(what: str) -> int:
    if jax.process_index() == (0 if what == "die first" else 1):
        send("ready", b"")
        if what.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise RuntimeError("a defect")
        return 2
    receive("ready")
    receive("never sent")
    return 0


if __name__ == "__main__":
    port, count, process = map(int, sys.argv[1:4])
    what = sys.argv[4]
    place = join.Place(f"127.0.0.1:{port}", count, process, 60)
    sys.exit(join.run(place, talk if what == "talk" else lambda: in_one_process(what)))
