"""A policy that is its own teacher."""

import numpy as np

from jaxrl.rl.outcomes import Outcomes


def self_distillation(outcomes: Outcomes) -> list[np.ndarray]:
    """Log-probability of a token by the same policy when it is given a hint - that when it is not.

    On-policy distillation (``jaxrl.rl.distillation.on_policy``) from the policy itself, which knows more: the solution
    (self-distillation fine-tuning SDFT, OPSD of prime-rl: a demonstration), or how the problem was solved by another
    attempt, or what its own failed attempt was told (SDPO); see ``AlgorithmConfig.hint``. With ``loss = "reinforce"``
    the gradient is in expectation that of the KL(policy || policy with the hint), the latter held fixed. SDPO's release
    and TRL's trainers compare whole distributions, and keep an average of weights as the teacher; here it is the policy
    that begins the step, of sampled tokens alone.

    Args:
        outcomes: ``hint_gains``.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token, and all of it where there is no hint.

    Raises:
        ConfigError: no hints were given.
    """
    return [
        np.zeros(len(mask), np.float32) if gain is None else np.where(mask > 0, gain, 0.0).astype(np.float32)
        for gain, mask in zip(outcomes.need("hint_gains"), outcomes.masks, strict=True)
    ]
