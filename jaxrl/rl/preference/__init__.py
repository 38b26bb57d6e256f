"""Preference losses by name: each a function of a record of its kind whose keyword arguments are its settings."""

from collections.abc import Callable, Mapping

import jax

from jaxrl.config import PreferConfig
from jaxrl.rl.preference import margins, sides, unpaired
from jaxrl.rl.preference.scores import PROCESS_LOSSES, REWARD_LOSSES

PAIR_LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    "sigmoid": margins.sigmoid,
    "sigmoid_norm": margins.sigmoid_norm,
    "robust": margins.robust,
    "hinge": margins.hinge,
    "ipo": margins.ipo,
    "exo_pair": margins.exo_pair,
    "discopop": margins.discopop,
    "aot": margins.aot,
    "aot_unpaired": margins.aot_unpaired,
    "simpo": margins.simpo,
    "orpo": margins.orpo,
    "nca_pair": sides.nca_pair,
    "bco_pair": sides.bco_pair,
    "sppo_hard": sides.sppo_hard,
    "apo_zero": sides.apo_zero,
    "apo_down": sides.apo_down,
    "mpo": sides.mpo,
}
"""Of a chosen and a rejected answer to the same prompt."""

JUDGED_LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    "kto": unpaired.kto,
    "apo_zero_unpaired": unpaired.apo_zero_unpaired,
    "bco": unpaired.bco,
}
"""Of single answers that are good or bad."""

KINDS: Mapping[str, Mapping[str, Callable[..., jax.Array]]] = {
    "pairs": PAIR_LOSSES,
    "judged": JUDGED_LOSSES,
    "reward": REWARD_LOSSES,
    "process": PROCESS_LOSSES,
}
"""Losses by ``PreferConfig.kind``."""

VALUED = frozenset({"reward", "process"})
"""Kinds that train a decoder with a value head."""

REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Those that never look at a reference."""


def needs_reference(config: PreferConfig) -> bool:
    """Whether the policy that training began from must be kept."""
    return config.reference and config.kind not in VALUED and config.loss not in REFERENCE_FREE
