"""Which kernels ``ModelConfig.attention`` asks for: a name may be one for packed rows, for KV pages, or for both."""

from jaxrl.config import ModelConfig
from jaxrl_kernels.interval_attention.backends import BACKENDS as PACKED
from jaxrl_kernels.paged_attention.backends import BACKENDS as PAGED


def packed_implementation(config: ModelConfig) -> str:
    """What ``interval_attention`` is asked for: "auto" where the configured kernel is one for pages only."""
    return "auto" if config.attention in PAGED.keys() - PACKED.keys() else config.attention


def paged_implementation(config: ModelConfig) -> str:
    """What ``paged_attention`` is asked for: "auto" where the configured kernel is one for packed rows only."""
    return "auto" if config.attention in PACKED.keys() - PAGED.keys() else config.attention
