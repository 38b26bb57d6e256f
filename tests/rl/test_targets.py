"""Losses of whole groups: targets over all micro-batches of an update, and what the policy learns from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.data import packing
from jaxrl.records import Batch, Trajectory
from jaxrl.rl import algorithm, targets
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.outcomes import Recorded
from jaxrl.rl.tokens import sampled
from tests.rl.test_outcomes import trajectory

GROUPS = [0, 0, 0, 1, 1]
ADVANTAGES = np.array([0.5, -0.5, 0.25, 1.0, -1.0])


def played() -> list[Trajectory]:
    spans = [[[1, 2], [7], [3]], [[1]], [[4, 5, 6]], [[1, 2], [7, 7], [3]], [[2]]]
    return [trajectory(index, each, draw=group) for index, (each, group) in enumerate(zip(spans, GROUPS, strict=True))]


def packed(rows: int, order: Any = None) -> list[Batch]:
    chosen = played()
    weights = aggregation_weights([one.mask for one in chosen], "sequence")
    indices = range(len(chosen)) if order is None else order
    return packing.pack_trajectories(
        [chosen[i] for i in indices],
        [ADVANTAGES[i] for i in indices],
        [weights[i] for i in indices],
        rows=rows,
        row_tokens=7,
        groups=[GROUPS[i] for i in indices],
    )


def score(batch: Batch, seed: int) -> np.ndarray:
    """Log-probabilities that depend on the token and its trajectory alone, wherever they lie; nan where none is."""
    of_token = -0.3 - 0.1 * seed * batch.tokens - 0.05 * batch.positions - 0.02 * batch.advantages
    return np.where(batch.mask > 0, of_token, np.nan).astype(np.float32)


def of_update(name: str, rows: int, order: Any = None, **settings: float) -> tuple[float, dict[float, list]]:
    """Loss of an update, and the gradient by the advantage that a token had."""
    config = AlgorithmConfig(loss=name, loss_settings=settings)
    batches = packed(rows, order)
    logprobs = [score(batch, 1) for batch in batches]
    reference = [score(batch, 2) for batch in batches] if name in targets.AGAINST_REFERENCE else None
    loss_of_token = algorithm.policy_loss(config)
    total, slopes = 0.0, {}
    for old, batch, values in zip(
        batches, targets.completed(config, batches, logprobs, reference), logprobs, strict=True
    ):
        assert batch.groups is None

        def loss(logprobs: jax.Array, batch: Batch = batch) -> jax.Array:
            tokens = sampled(
                jnp.asarray(batch.mask),
                logprobs,
                proximal_logprobs=batch.proximal_logprobs,
                behaviour_logprobs=batch.behaviour_logprobs,
                advantages=batch.advantages,
                segment_ids=jnp.asarray(batch.segment_ids),
                entropy=jnp.zeros_like(logprobs),
            )
            return (batch.rl_weights * loss_of_token(tokens).loss).sum()

        value, slope = jax.value_and_grad(loss)(jnp.asarray(np.nan_to_num(values)))
        total += float(value)
        for advantage in ADVANTAGES:
            here = (batch.mask > 0) & (old.advantages == np.float32(advantage))
            slopes.setdefault(advantage, []).extend(np.asarray(slope)[here].tolist())
        assert not np.asarray(slope)[batch.mask == 0].any()
    return total, slopes


@pytest.mark.parametrize(
    ("name", "settings"), [("gvpo", {"beta": 0.7}), ("flowrl", {"beta": 1.5}), ("a_star_po", {"beta": 0.6})]
)
def test_neither_micro_batches_nor_order_change_anything(name: str, settings: dict[str, float]) -> None:
    whole, slopes = of_update(name, 5, **settings)
    for rows, order in ((1, None), (2, [4, 2, 0, 3, 1])):
        cut, others = of_update(name, rows, order, **settings)
        assert cut == pytest.approx(whole, rel=1e-5)
        for advantage, values in slopes.items():
            np.testing.assert_allclose(others[advantage], values, rtol=1e-4, atol=1e-6)


def test_gvpo_has_the_gradient_of_the_variance_of_reward_less_log_ratio() -> None:
    """Within a group, and with a gradient through the group's mean, which a constant mean leaves out: it cancels."""
    beta, groups, draw = 0.7, np.array(GROUPS), np.random.default_rng(0)
    rewards, drift = draw.normal(size=5), draw.normal(size=5)
    mean_of_group = (groups[:, None] == groups) / (groups[:, None] == groups).sum(axis=1)
    centred = rewards - mean_of_group @ rewards

    def loss(drift: jax.Array) -> jax.Array:
        difference = beta * drift - rewards
        return 0.5 * ((difference - mean_of_group @ difference) ** 2).mean()

    seen = targets.Sequences(groups, centred, drift, np.zeros(5), np.zeros(5), np.ones(5))
    residuals = beta * drift - targets.of_gvpo(seen, beta=beta)
    np.testing.assert_allclose(beta * residuals / 5, jax.grad(loss)(jnp.asarray(drift)), rtol=1e-4, atol=1e-6)


def test_drift_is_measured_from_where_the_proximal_policy_lies() -> None:
    """Worked from the tokens: what the proximal policy is moved towards the present one is no drift."""
    (batch,), draw = packed(5), np.random.default_rng(1)
    proximal, shares = (draw.normal(size=batch.mask.shape).astype(np.float32) for _ in range(2))
    moved = batch.replace(proximal_logprobs=proximal, proximal_shares=shares, behaviour_logprobs=proximal + 1)
    own, config = score(batch, 1), AlgorithmConfig(loss="gvpo", loss_settings={"beta": 0.7})
    (got,) = targets.completed(config, [moved], [own], None)
    places = [(batch.mask > 0) & (batch.advantages == np.float32(advantage)) for advantage in ADVANTAGES]
    drifts = np.array([((1 - shares) * (own - proximal))[here].sum() for here in places])
    for index, here in enumerate(places):
        mean = 0.7 * drifts[np.array(GROUPS) == GROUPS[index]].mean()
        np.testing.assert_allclose(got.advantages[here], ADVANTAGES[index] + mean, rtol=1e-5)


def test_flowrl_is_at_rest_where_the_policy_is_the_reference_times_the_exponent_of_the_reward() -> None:
    draw = np.random.default_rng(0)
    reference, advantages, groups = draw.normal(size=6), draw.normal(size=6), np.repeat([0, 1], 3)
    at_rest = reference + 2.0 * advantages + np.repeat([0.3, -1.2], 3)  # any constant of a group
    sequences = targets.Sequences(groups, advantages, np.zeros(6), at_rest, reference, np.ones(6))
    np.testing.assert_allclose(targets.of_flowrl(sequences, beta=2.0), at_rest)
    moved = targets.Sequences(groups, advantages, np.zeros(6), at_rest + np.eye(6)[0], reference, np.ones(6))
    residuals = moved.logprobs - targets.of_flowrl(moved, beta=2.0)
    np.testing.assert_allclose(residuals, [2 / 3, -1 / 3, -1 / 3, 0, 0, 0], atol=1e-12)


def test_a_star_po_fits_the_log_ratio_to_the_reference_to_the_advantage() -> None:
    """Worked from the tokens: the mean over sequences of (beta · Σ (logprob - reference logprob) - advantage)²."""
    (batch,), squares = packed(5), []
    own, theirs = score(batch, 1), score(batch, 2)
    for advantage in ADVANTAGES:
        here = (batch.mask > 0) & (batch.advantages == np.float32(advantage))
        squares.append((0.6 * (own - theirs)[here].sum() - advantage) ** 2)
    assert of_update("a_star_po", 5, beta=0.6)[0] == pytest.approx(np.mean(squares), rel=1e-5)


def test_what_would_leave_parts_of_sequences_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="compares whole sequences"):
        algorithm.check(AlgorithmConfig(loss="gvpo", rejection="band"), Recorded())
    with pytest.raises(ConfigError, match="compares whole sequences"):
        algorithm.check(AlgorithmConfig(loss="flowrl", top_entropy=0.2), Recorded())


@pytest.mark.parametrize("settings", [{"aggregation": "token"}, {"mismatch": "tis", "proximal": "recomputed"}])
def test_what_would_weigh_sequences_unequally_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="weighs the sequences of a group equally"):
        algorithm.check(AlgorithmConfig(loss="gvpo", **settings), Recorded())


def test_a_reference_moves_only_where_there_is_one() -> None:
    with pytest.raises(ConfigError, match="reference that nothing looks at"):
        algorithm.check(AlgorithmConfig(reference_every=5), Recorded())
    algorithm.check(AlgorithmConfig(loss="flowrl", aggregation="sequence", reference_every=5), Recorded())


def test_gvpo_takes_no_advantages_that_were_centred_over_others() -> None:
    with pytest.raises(ConfigError, match=r"mask_out=.* advantages that do not sum to 0"):
        config = AlgorithmConfig(loss="gvpo", aggregation="sequence", mask_out=("truncated",))
        algorithm.check(config, Recorded())
