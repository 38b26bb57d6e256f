"""A pool that runs untrusted Python: one fork of a warm, jailed interpreter per call, a typed status per result.

    from jaxrl.sandbox import Limits, Pool

    async with Pool(Limits(cpu_seconds=4, memory_mib=512)) as pool:
        result = await pool.run("import sympy; sympy.factorint(2**61 - 1)")

Three kinds of process: the pool (in the caller, asyncio), the warden (trusted, outside the jail: slots, deadlines,
output, verdicts) and the zygote (inside the jail: forks, and runs no user code itself). The helper processes import
this package too, so names are bound on first use: neither warden nor zygote ever loads jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl.sandbox.client import SandboxClient
    from jaxrl.sandbox.cluster import ClusterPool
    from jaxrl.sandbox.jail import SandboxUnavailable
    from jaxrl.sandbox.languages import Language
    from jaxrl.sandbox.metrics import Metrics
    from jaxrl.sandbox.pool import Pool, Result, pool_from_config
    from jaxrl.sandbox.protocol import Limits
    from jaxrl.sandbox.runner import Runner
    from jaxrl.sandbox.session import Session
    from jaxrl.sandbox.wire import RunRequest

_HOMES = {
    "ClusterPool": "cluster",
    "Language": "languages",
    "Limits": "protocol",
    "Metrics": "metrics",
    "Pool": "pool",
    "Result": "pool",
    "RunRequest": "wire",
    "Runner": "runner",
    "SandboxClient": "client",
    "SandboxUnavailable": "jail",
    "Session": "session",
    "pool_from_config": "pool",
}

__all__ = [
    "ClusterPool",
    "Language",
    "Limits",
    "Metrics",
    "Pool",
    "Result",
    "RunRequest",
    "Runner",
    "SandboxClient",
    "SandboxUnavailable",
    "Session",
    "pool_from_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
