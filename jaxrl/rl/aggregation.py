"""The weights that turn per-token losses into one number.

The loss of an update is ``sum(weights * per_token)`` over all its micro-batches. The weights are made on the host,
once, from the masks of all its trajectories: the denominators are global, so the loss and its gradient do not depend on
how rows were packed or cut into micro-batches.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Aggregation = Literal["token", "token_sum", "sequence", "sequence_sum", "constant"]


def aggregation_weights(masks: Sequence[np.ndarray], mode: Aggregation, constant_length: int = 0) -> list[np.ndarray]:
    """Weight of every token such that the loss of an update is ``sum(weights * per_token)``.

    With n trajectories that have sampled tokens, m_i of them in trajectory i:

    * ``token``: 1 / sum(m). Every token counts the same (DAPO; rStar2-Agent, equation 6).
    * ``token_sum``: 1. Nothing is divided by, so the gradient grows with the batch.
    * ``sequence``: 1 / (n m_i). Every trajectory counts the same (GRPO).
    * ``sequence_sum``: 1 / n. The sum over a trajectory, as policy gradients are derived (REINFORCE, RLOO).
    * ``constant``: 1 / (n constant_length). A length-free denominator (Dr. GRPO, arXiv 2503.20783).

    Args:
        masks: [T_i] of each trajectory of one optimizer update, all of them: the denominators are global.
        mode: which of them.
        constant_length: tokens; only for ``constant``, usually the longest response allowed.

    Returns:
        [T_i] float32 for each trajectory, 0 where its mask is. Trajectories without a sampled token weigh nothing
        and are not counted.

    Raises:
        ValueError: ``constant`` without a positive length.
    """
    if mode == "constant" and constant_length < 1:
        raise ValueError(f"constant_length={constant_length} must be at least 1 token for constant aggregation")
    sampled = [np.asarray(mask) > 0 for mask in masks]
    lengths = np.array([mask.sum() for mask in sampled], np.int64)
    tokens, sequences = lengths.sum(), np.count_nonzero(lengths)
    weights = []
    for mask, length in zip(sampled, lengths, strict=True):
        denominator = {
            "token": tokens,
            "token_sum": 1,
            "sequence": sequences * length,
            "sequence_sum": sequences,
            "constant": sequences * constant_length,
        }[mode]
        weights.append((mask / max(denominator, 1)).astype(np.float32))
    return weights
