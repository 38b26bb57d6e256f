"""A training run that kills itself with SIGKILL at a named point: ``killed_run.py POINT COUNT jaxrl-arguments...``."""

import os
import signal
import sys
from typing import Any

from jaxrl import cli, episodes
from jaxrl.train import checkpoint, update


def kill_on_call(owner: Any, name: str, count: int) -> None:
    """Replace ``owner.name`` so that the process dies as its ``count``-th call returns."""
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments, **keywords)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


POINTS = {
    "episodes": (episodes, "extract_answer"),
    "update": (update.Updater, "_accumulate"),
    "checkpoint": (checkpoint.Checkpoints, "save"),  # returns while the write goes on in the background
}

if __name__ == "__main__":
    kill_on_call(*POINTS[sys.argv[1]], int(sys.argv[2]))
    sys.exit(cli.main(sys.argv[3:]))
