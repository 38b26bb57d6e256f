"""Corrections by name: each a function of ``Tokens`` whose keyword arguments are its settings.

A correction looks at k, the ratio of the proximal to the behaviour policy: what the trainer's numerics and the age of
the sampler's weights make of a token. It gives a constant of [B, T] that the policy loss is multiplied by, and never
changes a denominator, so what is left out makes nothing else count more.
"""

from collections.abc import Callable, Mapping

import jax

from jaxrl.rl.mismatch.measured import GAP_METRICS, correction_metrics, gap
from jaxrl.rl.mismatch.rejection import band, divergence, keep_all, off_policy_negatives, second_moment
from jaxrl.rl.mismatch.weights import icepop, kpop, tis, unweighted

__all__ = ["GAP_METRICS", "MISMATCH", "REJECTIONS", "correction_metrics", "gap"]

MISMATCH: Mapping[str, Callable[..., jax.Array]] = {
    "none": unweighted,
    "tis": tis,
    "icepop": icepop,
    "kpop": kpop,
}
"""How much a token counts."""

REJECTIONS: Mapping[str, Callable[..., jax.Array]] = {
    "none": keep_all,
    "band": band,
    "divergence": divergence,
    "opsm": off_policy_negatives,
    "m2po": second_moment,
}
"""Which tokens count at all."""
