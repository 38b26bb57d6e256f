"""Learning from a teacher: on demonstrations in the cold start, on the policy's own samples in reinforcement."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, DistillConfig, ModelConfig
from jaxrl.model import hf, logprob
from jaxrl.records import Batch
from jaxrl.rl.distillation import DECOMPOSED_LOSSES, WHOLE_LOSSES, Predictions, Taught, distillation, generalised_jsd
from jaxrl.rl.tokens import sampled
from jaxrl.train.attention import check_attention, try_attention
from jaxrl.train.session import Session, packed_sections
from jaxrl.train.update import Guides, LossFunction, Metrics

Stage = Literal["cold_start", "reinforcement"]


def distilled(session: Session, own: LossFunction, stage: Stage) -> tuple[LossFunction, Any]:
    """The loss of a stage with what the teacher adds to it, and the teacher's weights; ``own`` and None without one.

    Raises:
        ConfigError: a teacher with another vocabulary, a folder that holds none, or kernels that cannot compute it.
    """
    config = session.config.distill
    model = teacher_model(config, session.model, stage)
    if model is None:
        return own, None
    rows = packed_sections(session.config)
    check_attention(model, session.mesh, rows)
    try_attention(model, session.mesh, rows)
    _, teacher = hf.load_folder(config.teacher, model.param_dtype, mesh=session.mesh)
    temperature = session.config.engine.temperature if stage == "reinforcement" else 1.0
    return distillation_loss(own, (session.model, model), config, stage, temperature), teacher


def teacher_model(config: DistillConfig, student: ModelConfig, stage: Stage) -> ModelConfig | None:
    """The architecture of a stage's teacher, and how it is computed, which is as the student is; None without one.

    Raises:
        ConfigError: another vocabulary than the student's, or a folder that holds no model.
    """
    if not config.teacher or config.stages not in (stage, "both"):
        return None
    model = hf.read_config(config.teacher, base=student)  # computed as the student is
    model = dataclasses.replace(model, param_dtype=student.compute_dtype, path="")
    if model.vocab_size != student.vocab_size:
        raise ConfigError(
            f"DistillConfig.teacher={config.teacher!r} has a vocabulary of {model.vocab_size}, the policy one of "
            f"{student.vocab_size}; both must have the same tokenizer"
        )
    return model


def distillation_loss(
    own: LossFunction,
    models: tuple[ModelConfig, ModelConfig],
    config: DistillConfig,
    stage: Stage,
    temperature: float = 1.0,
) -> LossFunction:
    """The mean loss towards the teacher over the stage's tokens, and ``task_weight`` of the stage's own.

    Args:
        own: the stage's loss.
        models: of the policy and of the teacher.
        stage: the tokens are weighted by ``rl_weights`` in reinforcement, by ``ce_weights`` in the cold start.
        temperature: the sampler's, of log-probabilities of sampled tokens.
    """
    of_token = distillation(config)
    of_rows = functools.partial(_of_sampled, temperature=temperature, whole=config.loss in DECOMPOSED_LOSSES)
    if config.loss in WHOLE_LOSSES:
        of_rows = _of_whole

    def loss(params: Any, batch: Batch, guides: Guides) -> tuple[jax.Array, Metrics]:
        per_token, shown = of_rows(params, batch, guides.teacher, models, of_token)
        weights = batch.rl_weights if stage == "reinforcement" else batch.ce_weights
        there = batch.mask > 0
        total = (weights * jnp.where(there, per_token, 0.0)).sum()
        shown = {"distillation": per_token, **shown}
        metrics = {name: (jnp.where(there, x, 0.0).sum(), batch.mask.sum()) for name, x in shown.items()}
        if config.task_weight:
            own_total, own_metrics = own(params, batch, guides.reference)
            total, metrics = total + config.task_weight * own_total, own_metrics | metrics
        return total, metrics | {"loss": (total, jnp.zeros(()))}  # a sum: the weights divide it already

    return loss


def _of_whole(
    params: Any, batch: Batch, teacher: Any, models: tuple[ModelConfig, ModelConfig], of_token: Callable[..., jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B, T] of the whole distributions of every token."""
    rows = batch.tokens, batch.positions, batch.segment_ids
    compared = logprob.compared(
        params,
        models[0],
        teacher,
        models[1],
        rows,
        lambda own, theirs: of_token(Predictions(own, theirs)),
        experts=batch.experts,
        tree=batch.tree,
    )
    return compared, {}


def _of_sampled(
    params: Any,
    batch: Batch,
    teacher: Any,
    models: tuple[ModelConfig, ModelConfig],
    of_token: Callable[..., Any],
    *,
    temperature: float,
    whole: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B, T] of what both think of the sampled tokens, and if ``whole`` of all others in their places."""
    rows = batch.tokens, batch.positions, batch.segment_ids
    stats = logprob.sequence_logprobs(params, models[0], *rows, temperature, batch.experts, batch.tree)
    theirs = logprob.sequence_logprobs(teacher, models[1], *rows, temperature, tree=batch.tree).logprobs
    tokens = sampled(
        batch.mask,
        stats.logprobs,
        proximal_logprobs=batch.proximal_logprobs,
        behaviour_logprobs=batch.behaviour_logprobs,
        advantages=batch.advantages,
        segment_ids=batch.segment_ids,
        entropy=stats.entropy,
    )
    taught = Taught(tokens, jax.lax.stop_gradient(jnp.where(batch.mask > 0, theirs, 0.0)))
    if whole:
        divergence = functools.partial(generalised_jsd, beta=1.0, temperature=temperature)
        exact, _ = _of_whole(params, batch, teacher, models, divergence)
        taught = taught.replace(divergences=exact)
    result = of_token(taught)
    return result.loss, result.metrics
