"""What comes between the record of sampled tokens and the policy loss: which of them count, and how much."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl.config import AlgorithmConfig, Config, ConfigError
from jaxrl.rl.entropy import most_uncertain
from jaxrl.rl.methods import configured
from jaxrl.rl.mismatch import MISMATCH, REJECTIONS, correction_metrics
from jaxrl.rl.policy_losses import AGAINST_BEHAVIOUR, POLICY_LOSSES, WITHOUT_RATIO
from jaxrl.rl.tokens import Tokens, abstract_tokens
from jaxrl.rl.trial import described, tried

RANKING = frozenset({"clip_cov", "kl_cov", "m2po"})
"""Losses and rejections that rank the tokens of a micro-batch."""


class Corrected(NamedTuple):
    """Tokens for a policy loss.

    Attributes:
        tokens: those that count; what is left out is as if it had not been sampled.
        weights: [B, T], a constant that the loss of a token is multiplied by.
        metrics: by name, as (sum, count).
    """

    tokens: Tokens
    weights: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


def correction(config: AlgorithmConfig) -> Callable[[Tokens], Corrected]:
    """What ``top_entropy``, ``mismatch`` and ``rejection`` make of tokens.

    Without a proximal policy of its own a ratio is judged against the sampler's, so that mismatch and the drift since
    then are judged together (verl's bypass mode).

    Raises:
        ConfigError: see ``methods.configured``; a method does not give back one number a token; or a loss whose ratio
            already holds the mismatch would be weighted by it once more.
    """
    weigh = configured("AlgorithmConfig.mismatch", MISMATCH, config.mismatch, config.mismatch_settings)
    reject = configured("AlgorithmConfig.rejection", REJECTIONS, config.rejection, config.rejection_settings)
    tokens = abstract_tokens()
    for field, name, method in (("mismatch", config.mismatch, weigh), ("rejection", config.rejection, reject)):
        result = tried(f"AlgorithmConfig.{field}", name, jax.eval_shape, method, tokens)
        if getattr(result, "shape", None) != tokens.mask.shape:
            raise ConfigError(
                f"AlgorithmConfig.{field}={name!r} gave {described(result)} for tokens of shape {tokens.mask.shape}; "
                "it must give an array of that shape"
            )
    _check_counted_once(config)
    changes_nothing = config.mismatch == config.rejection == "none"
    changes_nothing &= config.proximal == "behaviour" and config.top_entropy == 1

    def correct(tokens: Tokens) -> Corrected:
        if changes_nothing:
            return Corrected(tokens, tokens.mask, {})
        judged = tokens
        if config.proximal == "behaviour":
            judged = tokens.replace(proximal_logprobs=jax.lax.stop_gradient(tokens.logprobs))
        weights, keep = (jax.lax.stop_gradient(values(judged)) for values in (weigh, reject))
        keep *= most_uncertain(tokens, config.top_entropy)
        return Corrected(tokens.only(keep), weights, correction_metrics(judged, weights * keep))

    return correct


def _check_counted_once(config: AlgorithmConfig) -> None:
    if config.mismatch == "none" or config.loss not in POLICY_LOSSES or config.loss in WITHOUT_RATIO:
        return
    if config.proximal == "behaviour" or config.loss in AGAINST_BEHAVIOUR:
        remedy = "take the loss 'reinforce', or 'none' with a rejection"
        if config.loss not in AGAINST_BEHAVIOUR:
            remedy = f"set AlgorithmConfig.proximal='recomputed', {remedy}"
        raise ConfigError(
            f"AlgorithmConfig.mismatch={config.mismatch!r} would weigh by the sampler's mismatch what the ratio of "
            f"AlgorithmConfig.loss={config.loss!r} to the sampler holds already; {remedy}"
        )


def of_micro_batch(config: AlgorithmConfig) -> list[str]:
    """Settings whose ranks or means are over the tokens of a micro-batch, so that it matters how an update is cut."""
    found = {
        f"loss={config.loss!r}": config.loss in RANKING,
        f"rejection={config.rejection!r}": config.rejection in RANKING,
        f"mismatch_settings={config.mismatch_settings!r}": bool(config.mismatch_settings.get("normalize")),
        f"top_entropy={config.top_entropy}": config.top_entropy < 1,
    }
    return [f"AlgorithmConfig.{setting}" for setting, used in found.items() if used]


def of_narrow_pages(config: Config) -> str:
    """What to say before a run whose sampler keeps keys and values in fewer bits than training; "" if it does not."""
    algorithm, kept = config.algorithm, config.engine.kv_dtype
    if kept == "auto":
        return ""
    fields = ("mismatch", "rejection")
    used = [f"{field}={value!r}" for field in fields if (value := getattr(algorithm, field)) != "none"]
    remedy = (
        f"AlgorithmConfig.{' and '.join(used)} judges that gap"
        if used
        else "An importance correction takes it out: AlgorithmConfig.mismatch='tis' with proximal='recomputed', or "
        "rejection='band'"
    )
    return (
        f"EngineConfig.kv_dtype={kept!r} rounds keys and values in sampling and not in training: the recorded "
        f"log-probabilities are not those of the policy (logprob_gap), and no ratio is exactly 1. {remedy}"
    )
