"""Worked numbers of losses and corrections, token by token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.rl import entropy
from jaxrl.rl.correction import correction
from jaxrl.rl.mismatch import REJECTIONS
from jaxrl.rl.mismatch.weights import icepop, kpop, tis
from jaxrl.rl.policy_losses import POLICY_LOSSES
from tests.rl.rows import tokens_of

PROXIMAL = -2.0


def loss_and_slope(name: str, ratio: float, advantage: float, **settings: Any) -> tuple[float, float]:
    """Of a single token whose proximal and behaviour log-probability is -2."""

    def loss(logprob: jax.Array) -> jax.Array:
        tokens = tokens_of(np.ones((1, 1)), logprob * jnp.ones((1, 1)), [[advantage]], proximal=[[PROXIMAL]])
        return POLICY_LOSSES[name](tokens, **settings).loss.sum()

    value, slope = jax.value_and_grad(loss)(jnp.float32(PROXIMAL + np.log(ratio)))
    return float(value), float(slope)


LOGPROB = PROXIMAL + np.log(2.0)  # at ratio 2
P, P_OLD = np.exp(LOGPROB), np.exp(PROXIMAL)


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "settings", "value", "slope"),
    [
        ("sapo", 1.0, -1.0, {}, 4 / 1.05 / 2, 1.0),
        ("sapo", 1.0, 1.0, {}, -2.0, -1.0),
        ("vespo", 1.0, 1.0, {}, 2.0, -1.0),
        ("cispo", 2.0, 1.0, {"clip_high": 0.28}, -1.28 * LOGPROB, -1.28),
        ("cispo_absolute", 2.0, 1.0, {"cap": 0.28}, -0.28 * LOGPROB, -0.28),  # the same number, another bound
        ("cispo_absolute", 2.0, 1.0, {}, -2.0 * LOGPROB, -2.0),
        ("reinforce_capped", 2.0, 1.0, {}, -LOGPROB, -1.0),
        ("reinforce", 2.0, 3.0, {}, -3 * LOGPROB, -3.0),
        ("topr", 2.0, 1.0, {}, -LOGPROB, -1.0),
        ("topr", 2.0, -1.0, {}, LOGPROB, 1.0),
        ("topr", 0.5, -1.0, {}, 0.5 * (PROXIMAL - np.log(2)), 0.5),
        ("dro", 2.0, 1.0, {"beta": 1.0}, -LOGPROB + 0.5 * np.log(2) ** 2, -1 + np.log(2)),
        ("ppo_clip", 5.0, -1.0, {"dual_clip": 0.0, "ratio_cap": 4.0}, 4.0, 0.0),
        ("dppo_tv", 2.0, 1.0, {"drop_high": P - P_OLD + 0.01}, -2 * LOGPROB, -2.0),
        ("dppo_tv", 2.0, 1.0, {"drop_high": P - P_OLD - 0.01}, 0.0, 0.0),
        ("dppo_tv", 2.0, -1.0, {"drop_high": 0.0}, 2 * LOGPROB, 2.0),  # pulled back, however far it rose
        ("dppo_tv", 2.0, 1.0, {"cap": 1.5}, -1.5 * LOGPROB, -1.5),
        ("prime_rl", 2.0, 1.0, {}, -2 + 1e-3 * np.log(2) ** 2, -2 + 2e-3 * np.log(2)),
        ("prime_rl", 2.0, 1.0, {"drop_high": 0.1}, 1e-3 * np.log(2) ** 2, 2e-3 * np.log(2)),
        ("prime_rl", 2.0, -1.0, {"drop_high": 0.1}, 2 + 1e-3 * np.log(2) ** 2, 2 + 2e-3 * np.log(2)),
        ("prime_rl_symmetric", 2.0, -1.0, {}, 1e-3 * np.log(2) ** 2, 2e-3 * np.log(2)),
        ("sppo", 2.0, 1.0, {"eta": 2.0}, (np.log(2) - 2) ** 2, 2 * (np.log(2) - 2)),
    ],
)
def test_worked_losses(
    name: str, ratio: float, advantage: float, settings: dict[str, float], value: float, slope: float
) -> None:
    np.testing.assert_allclose(loss_and_slope(name, ratio, advantage, **settings), (value, slope), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("product", "positive", "negative"), [(1.0, 1.0, 1.0), (0.5, 1.120, 0.340), (2.0, 0.199, 1.083)]
)
def test_the_weight_of_vespo(product: float, positive: float, negative: float) -> None:
    for advantage, expected in ((1.0, positive), (-1.0, negative)):
        assert abs(loss_and_slope("vespo", product, advantage)[1]) == pytest.approx(expected, abs=6e-4)


def test_the_length_of_luspo_is_that_of_the_sequence() -> None:
    mask = np.array([[1, 1, 0, 1, 1, 0]])
    tokens = tokens_of(mask, -mask, mask, proximal=-mask, segment_ids=[[1, 1, 1, 1, 2, 0]])
    np.testing.assert_allclose((POLICY_LOSSES["luspo"](tokens).loss * mask)[0], [-3, -3, 0, -3, -1, 0])
    kept = tokens.only(jnp.asarray([[1, 0, 0, 0, 1, 0]]))  # the denominator stays 3, and so does the length
    np.testing.assert_allclose(POLICY_LOSSES["luspo"](kept).loss[0], [-3, 0, 0, 0, -1, 0])


def test_kl_cov_penalises_its_share_of_equal_covariances_and_nothing_without_one() -> None:
    advantages, logprobs = (np.repeat([[1.0], [-1.0]], 4, axis=1), np.repeat([[-1.0], [-3.0]], 4, axis=1))
    tied = tokens_of(np.ones((2, 4)), logprobs, advantages, proximal=logprobs - 0.5)
    result = POLICY_LOSSES["kl_cov"](tied, share=0.25)
    np.testing.assert_array_equal(result.metrics["covariance_penalty_fraction"], [[1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(result.loss + tied.advantages * tied.ratio, [[0.5, 0.5, 0, 0], [0] * 4], atol=1e-6)
    for alike in (tied.replace(advantages=jnp.ones((2, 4))), tied.replace(advantages=-tied.advantages)):
        assert not POLICY_LOSSES["kl_cov"](alike, share=0.25).metrics["covariance_penalty_fraction"].any()


def judged(ratios: list[float], advantages: Any = None, proximal: Any = None) -> Any:
    """A sequence whose tokens have these ratios of the proximal to the behaviour policy."""
    ratios = np.array([ratios])
    proximal = np.full(ratios.shape, -1.0) if proximal is None else np.array([proximal])
    behaviour = proximal - np.log(ratios)
    advantages = np.ones(ratios.shape) if advantages is None else [advantages]
    return tokens_of(np.ones(ratios.shape), proximal, advantages, proximal=proximal, behaviour=behaviour)


def test_icepop_keeps_the_ratio_inside_its_band() -> None:
    weights = icepop(judged([0.3, 0.5 + 1e-6, 1.0, 5.0 - 1e-5, 5.1]))
    np.testing.assert_allclose(weights[0], [0, 0.5, 1, 5, 0], rtol=1e-5)


def test_truncation_by_token_sequence_and_geometric_mean() -> None:
    tokens = judged([4.0, 0.5, 1.0])
    np.testing.assert_allclose(tis(tokens)[0], [2, 0.5, 1], rtol=1e-5)
    np.testing.assert_allclose(tis(tokens, span="product", cap=10.0)[0], [2] * 3, rtol=1e-5)
    np.testing.assert_allclose(tis(tokens, span="geometric")[0], [2 ** (1 / 3)] * 3, rtol=1e-5)
    np.testing.assert_allclose(tis(tokens, normalize=True)[0], np.array([2, 0.5, 1]) * 3 / 3.5, rtol=1e-5)


def test_kpop_spares_rare_tokens_and_drops_common_ones_that_moved() -> None:
    """The same ratio of 2: d(0.002, 0.001) is 0.0004 nats, d(0.8, 0.4) is 0.33."""
    np.testing.assert_allclose(kpop(judged([2.0, 2.0], proximal=np.log([0.002, 0.8])))[0], [2, 0], rtol=1e-5)
    p, q = 0.5, 0.4  # just inside and just outside, by the larger of both directions
    bound = max(a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)) for a, b in ((p, q), (q, p)))
    one = judged([p / q], proximal=[np.log(p)])
    assert kpop(one, most=bound * 1.001)[0, 0] > 0 and kpop(one, most=bound * 0.999)[0, 0] == 0


def test_the_second_moment_falls_below_its_bound_by_leaving_out_the_largest() -> None:
    logs = np.array([0.1, -0.3, 0.2, 1.0])
    keep = REJECTIONS["m2po"](judged(np.exp(logs).tolist()), most=0.05)
    np.testing.assert_array_equal(keep[0], [1, 1, 1, 0])  # (0.01 + 0.09 + 0.04) / 3 < 0.05
    keep = REJECTIONS["m2po"](judged(np.exp(logs).tolist()), most=0.04)
    np.testing.assert_array_equal(keep[0], [1, 0, 1, 0])
    assert not REJECTIONS["m2po"](judged(np.exp(logs).tolist()), most=0.001).any()


def test_negatives_far_from_the_sampler_are_left_out_by_the_sequence() -> None:
    tokens = tokens_of(
        np.ones((1, 4)), [[-1.5, -1.0, -1.5, -1.0]], [[-1, -1, 1, 1]], behaviour=-np.ones((1, 4)),
        segment_ids=[[1, 1, 2, 2]],
    )  # fmt: skip
    np.testing.assert_array_equal(REJECTIONS["opsm"](tokens, most=0.2)[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(REJECTIONS["opsm"](tokens, most=0.3)[0], [1, 1, 1, 1])


def test_a_rejection_leaves_the_rest_as_it_was() -> None:
    """Tokens that are kept have the same loss and the denominators stand in weights that nobody changed."""
    tokens = judged([1.0, 3.0, 1.2, 0.2])
    config = AlgorithmConfig(proximal="recomputed", rejection="band", rejection_settings={"high": 2.0})
    corrected = correction(config)(tokens)
    before, after = (POLICY_LOSSES["ppo_clip"](record).loss for record in (tokens, corrected.tokens))
    np.testing.assert_array_equal(after[0], np.where([True, False, True, False], before[0], 0))
    kept, count = corrected.metrics["mismatch_kept"]
    assert (kept, count) == (2, 4)
    for name, share in (("p1", 0.01), ("p50", 0.5), ("p99", 0.99)):
        value, count = corrected.metrics[f"mismatch_{name}"]
        assert value / count == pytest.approx(np.exp(np.quantile(tokens.mismatch, share)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"top_entropy": 0.5}, 2), ({"proximal": "recomputed"}, 4), ({"proximal": "interpolated"}, 4)],
)
def test_whatever_comes_between_sampler_and_loss_is_reported(settings: dict[str, Any], kept: int) -> None:
    tokens = judged([1.0, 3.0, 1.2, 0.2]).replace(entropy=jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))
    metrics = correction(AlgorithmConfig(**settings))(tokens).metrics
    assert metrics["mismatch_kept"] == metrics["mismatch_weight"] == (kept, 4)
    assert {"mismatch_p1", "mismatch_p50", "mismatch_p99"} < metrics.keys()
    assert correction(AlgorithmConfig())(tokens).metrics == {}


def test_a_small_divergence_is_judged_by_more_than_rounding() -> None:
    """A log-ratio of 0.001 is 5e-7 nats, of which exp(d) - 1 - d in float32 is off by a tenth."""
    for estimator in ("k3", "k3_mirrored"):
        for sign in (1, -1):
            tokens = tokens_of([[1]], [[0.0]], [[1]], proximal=[[sign * 1e-3]], behaviour=[[0.0]])
            assert REJECTIONS["divergence"](tokens, estimator=estimator, most=5.02e-7).all()
            assert not REJECTIONS["divergence"](tokens, estimator=estimator, most=4.98e-7).any()


def test_without_a_proximal_policy_the_ratio_to_the_sampler_is_judged() -> None:
    tokens = tokens_of(np.ones((1, 2)), [[-1.0, -3.0]], np.ones((1, 2)), behaviour=[[-1.0, -1.0]])
    corrected = correction(AlgorithmConfig(rejection="band"))(tokens)
    np.testing.assert_array_equal(corrected.tokens.mask, [[1, 0]])
    weighted = correction(AlgorithmConfig(loss="reinforce", mismatch="tis"))(tokens)
    np.testing.assert_allclose(weighted.weights, [[1, np.exp(-2)]], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mismatch": "tis"}, "set AlgorithmConfig.proximal='recomputed'"),
        ({"mismatch": "tis", "proximal": "recomputed", "loss": "dppo_tv"}, "holds already; take the loss 'reinforce'"),
        ({"mismatch": "tsi"}, "AlgorithmConfig.mismatch='tsi' is no method; did you mean tis?"),
        ({"rejection": "band", "rejection_settings": {"low": 3.0}}, "low=3.0 and high=2.0 must rise"),
        ({"rejection": "opsm", "rejection_settings": {"moust": 3.0}}, "unknown key 'moust'"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        correction(AlgorithmConfig(**settings))


def test_the_most_uncertain_share_of_the_tokens() -> None:
    tokens = tokens_of(
        [[1, 1, 1, 1, 1, 0]], -np.ones((1, 6)), np.ones((1, 6)), proximal=-np.ones((1, 6)),
        entropy=[[0.1, 0.5, 0.2, 0.4, 0.3, 9.0]],
    )  # fmt: skip
    np.testing.assert_array_equal(entropy.most_uncertain(tokens, 0.5)[0], [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(entropy.most_uncertain(tokens, 0.2)[0], [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(entropy.most_uncertain(tokens, 1.0), tokens.mask)


def test_sums_and_means_over_a_sequence_are_those_of_its_sampled_tokens() -> None:
    ones = np.ones((1, 5))
    tokens = tokens_of([[1, 0, 1, 1, 0]], -ones, ones, proximal=-ones, segment_ids=[[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(tokens.over_sequence(jnp.asarray(ones)), [[2, 2, 2, 1, 1]])
    np.testing.assert_array_equal(tokens.mean_over_sequence(jnp.asarray([[1.0, 5, 3, 7, 9]])), [[2, 2, 2, 7, 7]])
