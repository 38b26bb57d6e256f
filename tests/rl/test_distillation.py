"""Distillation against TRL's generalised Jensen-Shannon divergence, every case, and the policy-gradient form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ConfigError
from jaxrl.rl.distillation import (
    SAMPLED_LOSSES,
    Predictions,
    Taught,
    forward_kl_top,
    generalised_jsd,
    importance_weighted,
    minillm,
    minillm_single_step,
    on_policy,
)
from jaxrl.rl.tokens import Tokens, sampled

Golden = Callable[[str], list[dict[str, Any]]]


def test_every_case_of_trl(golden: Golden) -> None:
    checked = 0
    for case in golden("trl/distillation"):
        inputs, outputs, settings = case["inputs"], case["outputs"], case["settings"]
        valid = (np.asarray(inputs["labels"]) != -100).astype(np.float32)

        def loss(student: jax.Array, inputs: Any = inputs, settings: Any = settings, valid: Any = valid) -> jax.Array:
            return (
                generalised_jsd(Predictions(student, inputs["teacher_logits"]), **settings) * valid
            ).sum() / valid.sum()

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["student_logits"]))
        np.testing.assert_allclose(value, outputs["loss"], rtol=1e-5, atol=1e-6, err_msg=case["id"])
        np.testing.assert_allclose(gradient, outputs["grad"], rtol=1e-4, atol=1e-6, err_msg=case["id"])
        assert not np.asarray(gradient)[valid == 0].any()
        checked += 1
    assert checked == 30


def taught(
    logprobs: jax.Array, teacher: Any, behaviour: Any, mask: Any, divergences: jax.Array | None = None
) -> Taught:
    tokens: Tokens = sampled(
        jnp.asarray(mask),
        logprobs,
        proximal_logprobs=behaviour,
        behaviour_logprobs=behaviour,
        advantages=jnp.zeros_like(logprobs),
        segment_ids=jnp.ones(logprobs.shape, jnp.int32),
        entropy=jnp.zeros_like(logprobs),
    )
    return Taught(tokens, jnp.where(jnp.asarray(mask) > 0, teacher, 0.0), divergences)


def test_the_policy_gradient_form_is_its_formula_and_drops_tokens_that_fell() -> None:
    logprobs = np.log(np.array([[0.5, 0.5, 0.5, 0.5]], np.float32))
    behaviour = np.log(np.array([[0.5, 0.69, 0.71, 0.4]], np.float32))
    teacher = np.log(np.array([[0.9, 0.25, 0.25, np.nan]], np.float32))
    mask = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)

    def loss(logprobs: jax.Array) -> jax.Array:
        return on_policy(taught(logprobs, teacher, behaviour, mask), drop=0.2, ratio_penalty=0.1).loss.sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(logprobs)))[0]
    log_ratio, advantage = (logprobs - behaviour)[0], (teacher - logprobs)[0]
    wanted = [-np.exp(log_ratio[i]) * advantage[i] * (i < 2) + 0.2 * log_ratio[i] for i in range(3)]
    np.testing.assert_allclose(gradient, [*wanted, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["on_policy", "k2"])
def test_on_policy_forms_have_the_gradient_of_the_reverse_kl(name: str) -> None:
    """In expectation over all tokens the student may write."""
    logits, teacher = jnp.array([0.3, -0.5, 1.0]), jax.nn.log_softmax(jnp.array([-1.0, 0.4, 0.2]))

    def expected(student: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(student)
        behaviour = jax.lax.stop_gradient(own)
        record = taught(own[None], teacher[None], behaviour[None], jnp.ones((1, 3)))
        return (jnp.exp(behaviour) * SAMPLED_LOSSES[name](record).loss[0]).sum()

    wanted = jax.grad(lambda student: generalised_jsd(Predictions(student, teacher), beta=1.0))(logits)
    np.testing.assert_allclose(jax.grad(expected)(logits), wanted, rtol=1e-4, atol=1e-6)


def test_a_divergence_from_itself_is_zero_and_tokens_without_a_chance_add_nothing() -> None:
    logits = jnp.array([0.3, -jnp.inf, 1.0])
    for beta in (0.0, 0.3, 1.0):
        assert float(generalised_jsd(Predictions(logits, logits), beta=beta)) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"beta=1.5 .* between 0 and 1"):
        generalised_jsd(Predictions(logits, logits), beta=1.5)


@pytest.mark.parametrize("single_step", [False, True])
def test_minillm_credits_a_token_with_what_comes_after_it(single_step: bool) -> None:
    """Over trajectories of two tokens: the gradient of the KL of whole trajectories, which no sum over tokens is."""
    keys = jax.random.split(jax.random.key(0), 4)
    student = jax.random.normal(keys[0], (3,)), jax.random.normal(keys[1], (3, 3))
    teacher = jax.random.normal(keys[2], (3,)), jax.random.normal(keys[3], (3, 3))

    def both(policy: tuple[jax.Array, jax.Array]) -> jax.Array:
        """[9, 2] log-probabilities of first and second token of every trajectory."""
        first, second = (jax.nn.log_softmax(logits, axis=-1) for logits in policy)
        return jnp.stack([jnp.repeat(first, 3), second.reshape(-1)], axis=1)

    def expected(policy: tuple[jax.Array, jax.Array]) -> jax.Array:
        own = both(policy)
        chance = jax.lax.stop_gradient(jnp.exp(own.sum(axis=1)))
        pairs = zip(policy, teacher, strict=True)
        first, second = (generalised_jsd(Predictions(ours, theirs), beta=1.0) for ours, theirs in pairs)
        exact = jnp.stack([jnp.full(9, first), jnp.repeat(second, 3)], axis=1)
        record = taught(own, both(teacher), jax.lax.stop_gradient(own), jnp.ones((9, 2)), exact)
        loss = minillm_single_step if single_step else minillm
        return (chance * loss(record, length_normalised=False).loss.sum(axis=1)).sum()

    def divergence(policy: tuple[jax.Array, jax.Array]) -> jax.Array:
        whole = both(policy).sum(axis=1)
        return (jnp.exp(whole) * (whole - both(teacher).sum(axis=1))).sum()

    got, wanted = jax.grad(expected)(student), jax.grad(divergence)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


def test_the_divergence_of_the_likeliest_tokens() -> None:
    draw = np.random.default_rng(0)
    student, teacher = (jnp.asarray(draw.normal(size=(4, 7)), jnp.float32) for _ in range(2))
    whole = generalised_jsd(Predictions(student, teacher), beta=0.0, temperature=2.0)
    np.testing.assert_allclose(forward_kl_top(Predictions(student, teacher), k=9, temperature=2.0), whole, rtol=1e-5)
    own, other = (np.asarray(jax.nn.log_softmax(logits)) for logits in (student, teacher))
    for row, value in enumerate(forward_kl_top(Predictions(student, teacher), k=2)):
        best = np.argsort(other[row])[-2:]
        assert float(value) == pytest.approx((np.exp(other[row]) * (other[row] - own[row]))[best].sum(), rel=1e-5)
    with pytest.raises(ConfigError, match="k=0 must be at least 1"):
        forward_kl_top(Predictions(student, teacher), k=0)


LOGPROBS = np.array([[-1.0, -0.5, -9.0, -2.0, -0.1]], np.float32)
TEACHER = np.array([[-0.4, -1.5, -9.0, -1.0, -0.3]], np.float32)
SAMPLED = np.array([[1.0, 1.0, 0.0, 1.0, 1.0]], np.float32)  # a tool wrote the third


def test_minillm_is_a_mean_over_what_is_still_to_come_unless_told_otherwise() -> None:
    """On policy, discount ½, d = .6, -1, 1, -.2: worked by hand, with the sum over Σ ½^k of as many tokens."""
    record = taught(jnp.asarray(LOGPROBS), TEACHER, LOGPROBS, SAMPLED, jnp.full((1, 5), 0.7))
    sums = np.array([0.6 - 0.5 + 0.25 - 0.025, -1 + 0.5 - 0.05, 1 - 0.1, -0.2])
    counts = np.array([1.875, 1.75, 1.5, 1.0])
    got = np.asarray(minillm(record, discount=0.5).loss)[0, SAMPLED[0] > 0]
    np.testing.assert_allclose(got, -sums / counts, rtol=1e-5)
    got = np.asarray(minillm_single_step(record, discount=0.5).loss)[0, SAMPLED[0] > 0]
    np.testing.assert_allclose(got, 0.7 - (sums - [0.6, -1, 1, -0.2]) / counts, rtol=1e-5)


def test_what_comes_after_others_that_went_astray_counts_for_less() -> None:
    """|d| = .6, 1, 1, .2 of 2.8: weights 1 + gamma times what is left of it when a token begins."""
    drifted = LOGPROBS + np.array([[0.3, 0.0, 0.0, -0.2, 0.0]], np.float32)

    def loss(logprobs: jax.Array, gamma: float) -> jax.Array:
        return importance_weighted(taught(logprobs, TEACHER, LOGPROBS, SAMPLED), gamma=gamma).loss.sum()

    slopes = jax.jit(jax.grad(loss), static_argnums=1)
    for gamma, left in ((0.5, np.array([2.8, 2.2, 0, 1.2, 0.2]) / 2.8), (0.0, np.zeros(5))):
        wanted = -(1 + gamma * left) * (TEACHER - LOGPROBS)[0] * np.exp(drifted - LOGPROBS)[0] * SAMPLED[0]
        np.testing.assert_allclose(slopes(jnp.asarray(drifted), gamma)[0], wanted, rtol=1e-4, atol=1e-6)
