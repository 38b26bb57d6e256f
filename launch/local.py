"""One run in several processes on this machine, to try out what many machines do.

    python launch/local.py 2 -- train quickstart --run runs/two
    python launch/local.py 4 --devices 2 -- train smoke        # on CPUs, with two virtual devices a process
    python launch/local.py 8 --gpus 1 -- train rstar2_14b      # a process for each of eight GPUs

Everything after ``--`` is given to ``jaxrl``. Ends with the first exit code that is not 0; Ctrl-C and SIGTERM reach all
processes.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence


def main() -> int:
    """Start the processes and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=at_least_one, help="how many")
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--devices", type=at_least_one, help="virtual CPU devices of each (default: what there is)")
    own.add_argument("--gpus", type=at_least_one, help="GPUs of each, which no other process sees")
    parser.add_argument("--port", type=int, help="of the coordinator (default: a free one)")
    parser.add_argument("verb", nargs="+", metavar="-- VERB ...", help="arguments of jaxrl")
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.devices:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}"
        environment["JAX_PLATFORMS"] = "cpu"
    environments = [
        environment | (own_gpus(index, options.gpus) if options.gpus else {}) for index in range(options.processes)
    ]
    return run(options.verb, options.port or free_port(), environments)


def at_least_one(text: str) -> int:
    """A number of processes or devices."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


def own_gpus(index: int, count: int) -> dict[str, str]:
    """What lets a process see ``count`` GPUs that no other one sees."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(index * count, (index + 1) * count)))}


def run(verb: list[str], port: int, environments: Sequence[Mapping[str, str]]) -> int:
    """A process of one run for each environment, until all have ended; the first exit code that is not 0."""
    processes: list[subprocess.Popen] = []
    heard: list[int] = []

    def pass_on(number: int, _: object) -> None:
        heard.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(environments))]
    command = [sys.executable, "-m", "jaxrl", *verb, *place, "--process"]
    for index, environment in enumerate(environments):
        processes.append(subprocess.Popen([*command, str(index)], env=environment))
        for number in heard:  # before this one was there
            processes[-1].send_signal(number)
    codes = [process.wait() for process in processes]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
