"""What surrounds the policy loss of a batch: proximal policies, corrections, the KL's form, the entropy bonus."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig
from jaxrl.model import logprob, spec, transformer
from jaxrl.records import Batch
from jaxrl.train.update import policy_gradient_loss
from tests.train.test_update import MODEL, random_batch, score

SPECS = transformer.param_specs(MODEL)


@functools.cache
def params(seed: int) -> Any:
    return spec.initialize(SPECS, jax.random.key(seed))


def loss_of(algorithm: AlgorithmConfig, batch: Batch, reference: Any = None) -> tuple[float, dict[str, float]]:
    value, metrics = jax.jit(policy_gradient_loss(MODEL, algorithm, 1.0))(params(0), batch, reference)
    return float(value), {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(7, 4)


def test_a_proximal_policy_that_is_the_present_one_has_ratio_one(batch: Batch) -> None:
    """What is left of the clipped loss is then -A, and the mismatch goes into the weights."""
    algorithm = AlgorithmConfig(proximal="recomputed", mismatch="tis", mismatch_settings={"cap": 1.1})
    value, metrics = loss_of(algorithm, batch.replace(proximal_shares=np.ones_like(batch.mask)))
    ratio = np.exp(np.asarray(score(params(0), batch)) - batch.behaviour_logprobs)
    weights = np.minimum(ratio, 1.1)
    assert value == pytest.approx(-(batch.rl_weights * weights * batch.advantages).sum(), rel=1e-4)
    assert metrics["clip_fraction"] == 0 and metrics["mismatch_kept"] == 1
    assert metrics["mismatch_weight"] == pytest.approx((weights * batch.mask).sum() / batch.mask.sum(), rel=1e-4)
    assert metrics["mismatch_p50"] == pytest.approx(np.exp(np.median(np.log(ratio[batch.mask > 0]))), rel=1e-4)


def test_part_of_the_way_to_the_present_policy(batch: Batch) -> None:
    present = np.asarray(score(params(0), batch))
    between = 0.25 * batch.behaviour_logprobs + 0.75 * present
    algorithm = AlgorithmConfig(proximal="interpolated", loss="dro")
    moved, _ = loss_of(algorithm, batch.replace(proximal_shares=np.full_like(batch.mask, 0.75)))
    given, _ = loss_of(algorithm, batch.replace(proximal_logprobs=between * batch.mask))
    assert moved == pytest.approx(given, rel=1e-4)


def test_what_is_rejected_changes_no_other_token(batch: Batch) -> None:
    """The share of the denominator stays: the loss is that of the kept tokens with the weights they had."""
    settings = {"low": 0.7, "high": 1.3}
    value, metrics = loss_of(AlgorithmConfig(rejection="band", rejection_settings=settings), batch)
    ratio = np.exp(np.asarray(score(params(0), batch)) - batch.behaviour_logprobs)
    kept = (ratio >= 0.7) & (ratio <= 1.3)
    expected, _ = loss_of(AlgorithmConfig(), batch.replace(rl_weights=batch.rl_weights * kept))
    assert value == pytest.approx(expected, rel=1e-4)
    share = (kept * batch.mask).sum() / batch.mask.sum()
    assert metrics["mismatch_kept"] == pytest.approx(share) != 1


def test_the_entropy_bonus_is_subtracted_and_has_a_gradient(batch: Batch) -> None:
    paid = batch.replace(entropy_weights=batch.mask / 40, advantages=0 * batch.advantages)
    algorithm = AlgorithmConfig(entropy_coefficient=1.0)
    loss = policy_gradient_loss(MODEL, algorithm, 1.0)
    (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params(0), paid, None)
    total, count = metrics["entropy"]
    assert value == pytest.approx(-float(total) / 40, rel=1e-5) and count == batch.mask.sum()
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slope)) > 1e-5


def test_the_kl_is_multiplied_by_the_ratio_or_left_out_where_rewards_pay_it(batch: Batch) -> None:
    weighted = batch.replace(kl_weights=batch.rl_weights, advantages=0 * batch.advantages)
    settings = {"kl_coefficient": 0.5, "kl_estimator": "k2"}
    value, _ = loss_of(AlgorithmConfig(**settings, kl_by_ratio=True), weighted, params(1))
    present, reference = (np.asarray(score(params(seed), batch)) for seed in (0, 1))
    estimate = 0.5 * (present - reference) ** 2 * np.exp(present - batch.proximal_logprobs)
    assert value == pytest.approx(0.5 * (batch.rl_weights * estimate).sum(), rel=1e-4)
    value, metrics = loss_of(AlgorithmConfig(**settings, kl_placement="reward"), weighted, params(1))
    assert value == 0 and "kl_to_reference" not in metrics


def test_only_the_most_uncertain_tokens_are_trained_on(batch: Batch) -> None:
    value, _ = loss_of(AlgorithmConfig(top_entropy=0.3, loss="reinforce"), batch)
    stats = logprob.sequence_logprobs(params(0), MODEL, batch.tokens, batch.positions, batch.segment_ids)
    entropy, here = np.asarray(stats.entropy), batch.mask > 0
    chosen = here & (entropy >= np.quantile(entropy[here], 0.7))
    assert chosen.sum() == round(0.3 * here.sum())
    expected = -(batch.rl_weights * chosen * batch.advantages * np.asarray(stats.logprobs)).sum()
    assert value == pytest.approx(expected, rel=1e-4)


def test_metrics_of_a_loss_are_means_over_what_is_left(batch: Batch) -> None:
    settings = {"loss": "sapo", "rejection": "band", "rejection_settings": {"low": 0.7, "high": 1.3}}
    _, metrics = loss_of(AlgorithmConfig(**settings), batch)
    ratio = np.exp(np.asarray(score(params(0), batch)) - batch.behaviour_logprobs)
    kept = (batch.mask > 0) & (ratio >= 0.7) & (ratio <= 1.3)
    gate = 1 / (1 + np.exp(-np.where(batch.advantages > 0, 1.0, 1.05) * (ratio - 1)))
    assert metrics["gate"] == pytest.approx((4 * gate * (1 - gate))[kept].mean(), rel=1e-5) and kept.sum() < 20


def test_the_kl_takes_the_ratio_over_what_the_loss_takes_it(batch: Batch) -> None:
    weighted = batch.replace(kl_weights=batch.rl_weights, advantages=0 * batch.advantages)
    settings = {"kl_coefficient": 0.5, "kl_estimator": "k2", "kl_by_ratio": True}
    present, reference = (np.asarray(score(params(seed), batch)) for seed in (0, 1))
    logs = (present - batch.proximal_logprobs) * batch.mask
    ratio = np.exp(logs.sum(axis=1) / batch.mask.sum(axis=1))[:, None]
    expected = 0.5 * (batch.rl_weights * 0.5 * (present - reference) ** 2 * ratio).sum()
    for loss in ({"loss": "gspo"}, {"loss_settings": {"span": "geometric"}}):
        assert loss_of(AlgorithmConfig(**settings, **loss), weighted, params(1))[0] == pytest.approx(expected, rel=1e-4)
