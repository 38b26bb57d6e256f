"""From packed answers to the loss of ``jaxrl prefer``: which tokens are summed or scored, and what is shown of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, ModelConfig, PreferConfig
from jaxrl.mesh import to_compute
from jaxrl.model import logprob
from jaxrl.model.value import token_values
from jaxrl.records import Batch
from jaxrl.rl.methods import configured
from jaxrl.rl.preference import KINDS, VALUED
from jaxrl.rl.preference.records import Answers, Judged, Pairs, agreement, segment_sums, without_length
from jaxrl.rl.preference.scores import Scores, Steps
from jaxrl.rl.trial import described, tried
from jaxrl.train.update import LossFunction, Metrics

Loss = Callable[[Any], jax.Array]


def method(config: PreferConfig) -> Loss:
    """The loss that ``kind``, ``loss`` and ``loss_settings`` name.

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back one loss for each pair or answer.
    """
    if config.on_policy_weights and config.kind in VALUED:
        raise ConfigError(
            f"PreferConfig.on_policy_weights=True asks what a policy would write, and kind={config.kind!r} has none; "
            "set it to False"
        )
    loss = configured("PreferConfig.loss", KINDS[config.kind], config.loss, config.loss_settings)
    one, which = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.bool_)
    answers = Answers(one, one, one)
    seen = {
        "pairs": Pairs(answers, answers, one),
        "judged": Judged(answers, which, one, one),
        "reward": Scores(one, one, one),
        "process": Steps(one, which, one),
    }[config.kind]
    result = tried("PreferConfig.loss", config.loss, jax.eval_shape, loss, seen)
    if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != one.shape:
        raise ConfigError(
            f"PreferConfig.loss={config.loss!r} gave {described(result)} for 2 of kind {config.kind!r}; it must give "
            "a loss of shape (2,)"
        )
    return loss


def preference_loss(model: ModelConfig, config: PreferConfig, couples: int) -> LossFunction:
    """The mean of the loss over couples of answers, with the likelihood of chosen ones beside it.

    Args:
        couples: in a row at most.
    """
    of_couples = method(config)

    def loss(params: Any, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
        def score(params: Any) -> jax.Array:
            stats = logprob.sequence_logprobs(params, model, batch.tokens, batch.positions, batch.segment_ids)
            return jnp.where(batch.mask > 0, stats.logprobs, 0.0)

        def sums(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _couple_sums(values, batch, couples)

        logprobs = score(params)
        ratios = logprobs if reference is None else logprobs - jax.lax.stop_gradient(score(reference))
        weights = batch.mask
        if config.kind == "pairs" and config.length_weight != 1:
            weights = without_length(batch.mask, batch.segment_ids, 2 * couples, config.length_weight)
        fields = (sums(logprobs * weights), sums(ratios * weights), sums(batch.mask))
        first, second = (Answers(*(field[i] for field in fields)) for i in (0, 1))
        first, second = (side.replace(lengths=jnp.maximum(side.lengths, 1)) for side in (first, second))
        share, sign = sums(batch.rl_weights)[0], sums(batch.advantages)[0]
        present = (share > 0).astype(jnp.float32)
        seen = Pairs(first, second, present)
        if config.kind == "judged":
            seen = Judged(first, sign > 0, second.log_ratios, present)
        of_couple = jnp.where(present > 0, of_couples(seen), 0.0)
        if config.on_policy_weights:
            of_couple *= _on_policy(params, model, batch, logprobs, couples, both=config.kind == "pairs")
        nll = -(batch.ce_weights * logprobs).sum()
        counted = {"preference_loss": of_couple, **_shown(seen)}
        metrics = {name: ((values * present).sum(), present.sum()) for name, values in counted.items()}
        if config.sft_weight:
            metrics["chosen_nll"] = -(logprobs * (batch.ce_weights > 0)).sum(), (batch.ce_weights > 0).sum() * 1.0
        return (share * of_couple).sum() + nll, metrics

    return loss


def _on_policy(
    params: Any, model: ModelConfig, batch: Batch, logprobs: jax.Array, couples: int, *, both: bool
) -> jax.Array:
    """[rows x couples] how much the policy would write the first answer of a couple, times the second's if ``both``."""
    fixed = jax.lax.stop_gradient(params)
    squares = logprob.square_sums(fixed, model, batch.tokens, batch.positions, batch.segment_ids)
    log_squares = jnp.log(jnp.where(batch.mask > 0, squares, 1.0))
    each = agreement(logprobs, log_squares, batch.mask, batch.segment_ids, 2 * couples)
    first, second = (to_compute(each[:, side::2], (None, None)).reshape(-1) for side in (0, 1))
    return first * second if both else first


def _shown(seen: Pairs | Judged) -> dict[str, jax.Array]:
    """What is logged of each couple, in nats: whole answers' log-ratios, and whether they are on the right side."""
    if isinstance(seen, Judged):
        toward = jnp.where(seen.desirable, 1.0, -1.0) * seen.answers.log_ratios
        return {"margin": toward, "accuracy": (toward > 0) * 1.0, "kl_estimate": seen.unrelated}
    return {
        "margin": seen.margin,
        "accuracy": (seen.margin > 0) * 1.0,
        "chosen_log_ratio": seen.chosen.log_ratios,
        "rejected_log_ratio": seen.rejected.log_ratios,
    }


def score_loss(model: ModelConfig, config: PreferConfig, couples: int) -> LossFunction:
    """The mean of the loss over pairs of answers, or over steps, of a decoder with a value head.

    An answer's score is the value of its last token, a step's that of the step's last token.

    Args:
        couples: in a row at most; means nothing for steps.
    """
    of_scores = method(config)

    def loss(params: Any, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
        del reference
        values = token_values(params, model, batch.tokens, batch.positions, batch.segment_ids)
        if config.kind == "process":
            share, sign, seen_values = (
                to_compute(field, (None, None)).reshape(-1) for field in (batch.rl_weights, batch.advantages, values)
            )
            present = (share > 0).astype(jnp.float32)
            seen = Steps(jnp.where(share > 0, seen_values, 0.0), sign > 0, present)
            shown = {"accuracy": ((seen.logits > 0) == seen.right) * 1.0, "score": seen.logits}
        else:
            after = jnp.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
            ends = jnp.where(batch.segment_ids != after, values, 0.0)
            chosen, rejected = _couple_sums(ends, batch, couples)
            share = _couple_sums(batch.rl_weights, batch, couples)[0]
            present = (share > 0).astype(jnp.float32)
            seen = Scores(chosen, rejected, present)
            above = chosen - rejected
            shown = {"margin": above, "accuracy": (above > 0) * 1.0, "score": 0.5 * (chosen + rejected)}
        each = jnp.where(present > 0, of_scores(seen), 0.0)
        shown = {"preference_loss": each, **shown}
        metrics = {name: ((value * present).sum(), present.sum()) for name, value in shown.items()}
        return (share * each).sum(), metrics

    return loss


def _couple_sums(values: jax.Array, batch: Batch, couples: int) -> tuple[jax.Array, jax.Array]:
    """[rows x couples] sums over first and over second answers, on every device whole: some losses sort them."""
    both = to_compute(segment_sums(values, batch.segment_ids, 2 * couples), (None, None))
    return both[:, 0::2].reshape(-1), both[:, 1::2].reshape(-1)
