"""From the names in ``AlgorithmConfig`` to functions, checked before anything is compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.advantages.running import Remembered
from jaxrl.rl.correction import correction
from jaxrl.rl.example import example
from jaxrl.rl.methods import configured
from jaxrl.rl.outcomes import CONTENTS, Outcomes, Recorded, of_trajectories
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.selection import chooser
from jaxrl.rl.selection.difficulty import EXTRA_SAMPLES
from jaxrl.rl.targets import TARGETS, keeps_reference
from jaxrl.rl.tokens import TokenLoss, Tokens, abstract_tokens
from jaxrl.rl.trial import described, numeric, tried

PolicyLoss = Callable[[Tokens], TokenLoss]
Advantage = Callable[[Outcomes], Remembered]

_FOR_ADVANTAGES = {
    "values": ("CriticConfig.enabled=True", "gae"),
    "greedy_rewards": ("AlgorithmConfig.greedy_baseline=True", "remax"),
    "reference_ratios": ("AlgorithmConfig.reference_ratios=True", "online_dpo"),
    "square_sums": ("AlgorithmConfig.square_sums=True", "optimal_token_baseline"),
    "hint_gains": ("AlgorithmConfig.hint", "self_distillation"),
}
"""What is computed for the advantage alone: the setting that has it done, and an advantage that looks at it."""


def policy_loss(config: AlgorithmConfig) -> PolicyLoss:
    """The loss that ``loss`` and ``loss_settings`` name.

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back one loss a token.
    """
    loss = configured("AlgorithmConfig.loss", POLICY_LOSSES, config.loss, config.loss_settings)
    tokens = abstract_tokens()
    result = tried("AlgorithmConfig.loss", config.loss, jax.eval_shape, loss, tokens)
    whole = isinstance(result, TokenLoss) and isinstance(result.metrics, dict)
    if not whole or getattr(result.loss, "shape", None) != tokens.mask.shape:
        raise ConfigError(
            f"AlgorithmConfig.loss={config.loss!r} gave {described(result)} for tokens of shape {tokens.mask.shape}; "
            "it must give a jaxrl.rl.tokens.TokenLoss with a loss of that shape and a dict of metrics"
        )
    return loss


def advantage(config: AlgorithmConfig, recorded: Recorded) -> Advantage:
    """The estimator that ``advantage`` and ``advantage_settings`` name; one without a memory gives back none.

    Args:
        config: see ``AlgorithmConfig``.
        recorded: what the trajectories of the run hold.

    Raises:
        ConfigError: see ``methods.configured`` and ``trial.tried``; or it needs what trajectories do not hold, passes
            over what single turns earned, or does not give back one entry a trajectory, of finite numbers.
    """
    estimator = configured("AlgorithmConfig.advantage", ADVANTAGES, config.advantage, config.advantage_settings)

    def estimate(outcomes: Outcomes) -> Remembered:
        values = estimator(outcomes)
        return values if isinstance(values, Remembered) else Remembered(values, {})

    outcomes = _example(recorded)
    values = _on_trial(config, estimate)(outcomes).values
    _check_entries(config.advantage, values, outcomes.masks)
    if recorded.turn_rewards:
        others = dataclasses.replace(outcomes, turn_rewards=[np.array([3.0, 0.0]), np.array([0.0, 5.0])])
        if _same(values, _on_trial(config, estimate)(others).values):
            raise ConfigError(
                f"AlgorithmConfig.advantage={config.advantage!r} passes over what single turns earn, which a component "
                "of RewardConfig.components rewards; take one that credits turns, such as gigpo, or another component"
            )
    if config.kl_coefficient and config.kl_placement == "reward":
        _check_charged(config.advantage, _on_trial(config, estimate), outcomes)
    return estimate


def _on_trial(config: AlgorithmConfig, estimate: Advantage) -> Advantage:
    return functools.partial(tried, "AlgorithmConfig.advantage", config.advantage, estimate)


def _check_entries(name: str, values: Any, masks: Sequence[np.ndarray]) -> None:
    """Refuse what is no finite entry for each of two trajectories."""
    key = f"AlgorithmConfig.advantage={name!r}"
    form = "one entry a trajectory, a number or an array with one for each of its tokens"
    if not np.iterable(values) or not all(map(numeric, values)):
        raise ConfigError(f"{key} gave {described(values)}; it must give {form}")
    shapes = [np.shape(value) for value in values]
    if len(shapes) != 2 or any(s not in ((), m.shape) for s, m in zip(shapes, masks, strict=True)):
        raise ConfigError(
            f"{key} gave entries of shapes {shapes} for trajectories of 3 and 4 tokens; it must give {form}"
        )
    for value, mask in zip(values, masks, strict=True):
        if not np.isfinite(np.where(mask > 0, value, 0.0)).all():
            raise ConfigError(f"{key} gave {value} for a trajectory of {len(mask)} tokens; it must be finite")


def _example(recorded: Recorded) -> Outcomes:
    """Two trajectories of 3 and 4 tokens, to try an advantage on; their contents are known."""
    trajectories, recorded = [example(0), example(1)], dataclasses.replace(recorded, contents=True)
    guessed = [np.zeros(one.mask.shape) for one in trajectories]
    outcomes = of_trajectories(trajectories, np.zeros(2, int), recorded, {}, guessed)
    return dataclasses.replace(
        outcomes,
        square_sums=guessed if recorded.square_sums else None,
        reference_ratios=np.zeros(2) if recorded.reference_ratios else None,
        hint_gains=guessed if recorded.hint_gains else None,
    )


def _same(values: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(value, other) for value, other in zip(values, others, strict=True))


def contents_asked(config: AlgorithmConfig, recorded: Recorded) -> frozenset[str]:
    """Those of ``CONTENTS`` that the advantage reads, whatever becomes of them; a copy of all fields reads all."""
    read: set[str] = set()

    class Watched(Outcomes):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    advantage(config, recorded)(Watched(**vars(_example(recorded))))
    return frozenset(CONTENTS) & read


def _check_used(config: AlgorithmConfig, recorded: Recorded) -> None:
    estimate, outcomes = _on_trial(config, advantage(config, recorded)), _example(recorded)
    by_token = [np.linspace(0.1, 0.8, len(mask)) ** 2 for mask in outcomes.masks]
    others = dict.fromkeys(("values", "square_sums", "hint_gains"), by_token)
    others |= dict.fromkeys(("greedy_rewards", "reference_ratios"), np.array([0.25, 0.5]))
    for field, (setting, such_as) in _FOR_ADVANTAGES.items():
        changed = dataclasses.replace(outcomes, **{field: others[field]})
        if getattr(recorded, field) and _same(estimate(outcomes).values, estimate(changed).values):
            raise ConfigError(
                f"{setting} is for advantages, but AlgorithmConfig.advantage={config.advantage!r} passes it over; "
                f"leave it out, or take an advantage such as {such_as}"
            )


def _check_charged(name: str, estimate: Advantage, outcomes: Outcomes) -> None:
    """Refuse an advantage that is the same whatever is subtracted from rewards."""
    cost = 3.0 * np.arange(1, len(outcomes.rewards) + 1)[::-1]
    charged = [
        rewards - (mask > 0) * each
        for rewards, mask, each in zip(outcomes.rewards_by_token(), outcomes.masks, cost, strict=True)
    ]
    others = dataclasses.replace(
        outcomes,
        rewards=outcomes.rewards - [each * (mask > 0).sum() for each, mask in zip(cost, outcomes.masks, strict=True)],
        token_rewards=charged,
    )
    if all(np.array_equal(a, b) for a, b in zip(estimate(outcomes).values, estimate(others).values, strict=True)):
        raise ConfigError(
            f"AlgorithmConfig.advantage={name!r} passes over the KL that AlgorithmConfig.kl_placement='reward' takes "
            "from rewards; set kl_placement='loss', kl_coefficient=0, or an advantage of rewards, such as grpo"
        )


def extra_samples(config: AlgorithmConfig) -> Callable[[np.ndarray], int] | None:
    """What ``extra_samples`` names: how many trajectories to add to a group, from the correctness of its first ones.

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back a count.
    """
    if not config.extra_samples:
        return None
    key = "AlgorithmConfig.extra_samples"
    method = configured(key, EXTRA_SAMPLES, config.extra_samples, config.extra_samples_settings)
    count = tried(key, config.extra_samples, method, np.array([True, False, False]))
    if not isinstance(count, int | np.integer) or count < 0:
        raise ConfigError(
            f"{key}={config.extra_samples!r} gave {described(count)}; it must give how many trajectories to add"
        )
    return method


def check(config: AlgorithmConfig, recorded: Recorded) -> None:
    """Refuse methods and settings that cannot be used. ``recorded`` is what the trajectories of the run hold.

    Raises:
        ConfigError: with the nearest valid name.
    """
    policy_loss(config)
    correction(config)
    _check_used(config, recorded)
    if config.loss == "luspo" and config.aggregation == "sequence_sum":
        raise ConfigError(
            "AlgorithmConfig.aggregation='sequence_sum' counts the length of a sequence a second time beside "
            "loss='luspo'; take aggregation='sequence', or loss='gspo'"
        )
    if config.loss in TARGETS and (config.rejection != "none" or config.top_entropy < 1):
        raise ConfigError(
            f"AlgorithmConfig.loss={config.loss!r} compares whole sequences, of which rejection={config.rejection!r} "
            f"and top_entropy={config.top_entropy} would leave parts out; set them to 'none' and 1"
        )
    if config.reference_every and not keeps_reference(config):
        raise ConfigError(
            f"AlgorithmConfig.reference_every={config.reference_every} moves a reference that nothing looks at; set "
            "kl_coefficient above 0"
        )
    if config.loss in TARGETS and (config.aggregation != "sequence" or config.mismatch != "none"):
        raise ConfigError(
            f"AlgorithmConfig.loss={config.loss!r} weighs the sequences of a group equally, which "
            f"aggregation={config.aggregation!r} and mismatch={config.mismatch!r} would not; set them to 'sequence' "
            "and 'none'"
        )
    if config.loss == "gvpo" and config.mask_out:
        raise ConfigError(
            f"AlgorithmConfig.mask_out={config.mask_out!r} would leave advantages that do not sum to 0 in a group, as "
            "loss='gvpo' needs them; set it to ()"
        )
    chooser(config)
    extra_samples(config)
