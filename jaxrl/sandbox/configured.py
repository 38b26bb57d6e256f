"""The pool that a run's configuration asks for."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from jaxrl.config import ConfigError, SandboxConfig
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.protocol import Limits

if TYPE_CHECKING:
    from jaxrl.sandbox.cluster import ClusterPool


def pool_from_config(config: SandboxConfig) -> "Pool | ClusterPool":
    """A pool of this machine, or of a cluster.

    Raises:
        ConfigError: a number is out of range; a module of ``preload`` or a folder of ``program_folders`` is not there;
            or Ray is not installed where it is needed.
    """
    if config.cluster:
        from jaxrl.sandbox.cluster import ClusterPool  # loads Ray's neighbours, which one machine does without

        make = functools.partial(ClusterPool, config.cluster)
    else:
        make = Pool
    try:
        return make(
            Limits(**{limit.name: getattr(config, limit.name) for limit in dataclasses.fields(Limits)}),
            workers=config.workers,
            slots=config.slots,
            slow_slots=config.slow_slots,
            queue=config.queue,
            preload=tuple(config.preload),
            program_folders=tuple(config.program_folders),
            session_memory_mib=config.session_memory_mib,
            processes_without_cgroup=config.processes_without_cgroup,
            unsafe=config.unsafe,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
