"""A pool that runs untrusted code: Python in forks of warm, jailed interpreters, other languages as programs.

Each call has a world of its own and a result with a typed status; sessions keep theirs from cell to cell.

    from jaxrl.sandbox import Limits, Pool

    async with Pool(Limits(cpu_seconds=4, memory_mib=512)) as pool:
        result = await pool.run("import sympy; sympy.factorint(2**61 - 1)")

The pool is in the caller (asyncio). Its warden is trusted and outside the jail: slots, deadlines, output, verdicts.
Inside the jail, and without running user code themselves, stems and templates fork (``zygote``), and a keeper holds
each session. Calls that may start processes have a second jail. The helper processes import this package too, so names
are bound on first use: none of them ever loads jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl.sandbox.client import SandboxClient
    from jaxrl.sandbox.cluster import ClusterPool
    from jaxrl.sandbox.configured import pool_from_config
    from jaxrl.sandbox.jail import SandboxUnavailable
    from jaxrl.sandbox.languages import Language
    from jaxrl.sandbox.metrics import Metrics
    from jaxrl.sandbox.pool import Pool
    from jaxrl.sandbox.protocol import Limits
    from jaxrl.sandbox.remote_session import RemoteSession
    from jaxrl.sandbox.result import Result
    from jaxrl.sandbox.runner import Runner, RunnerSession
    from jaxrl.sandbox.session import Session
    from jaxrl.sandbox.wire import RunRequest

_HOMES = {
    "RemoteSession": "remote_session",
    "ClusterPool": "cluster",
    "Language": "languages",
    "Limits": "protocol",
    "Metrics": "metrics",
    "Pool": "pool",
    "Result": "result",
    "RunRequest": "wire",
    "Runner": "runner",
    "RunnerSession": "runner",
    "SandboxClient": "client",
    "SandboxUnavailable": "jail",
    "Session": "session",
    "pool_from_config": "configured",
}

__all__ = [
    "ClusterPool",
    "Language",
    "Limits",
    "Metrics",
    "Pool",
    "RemoteSession",
    "Result",
    "RunRequest",
    "Runner",
    "RunnerSession",
    "SandboxClient",
    "SandboxUnavailable",
    "Session",
    "pool_from_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
