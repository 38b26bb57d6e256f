"""The critic's loss against verl, every case."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rl.value_loss import clipped_value_loss
from tests.rl.rows import VERL_MODES, weights_of

Golden = Callable[[str], list[dict[str, Any]]]


def test_every_case_of_verl(golden: Golden) -> None:
    checked = 0
    for case in golden("verl/value_entropy"):
        if not case["id"].startswith("value/"):
            continue
        inputs, outputs = case["inputs"], case["outputs"]
        mask = np.asarray(inputs["response_mask"])

        def loss(values: jax.Array, case: Any = case, mask: Any = mask) -> tuple[jax.Array, jax.Array]:
            inputs, settings = case["inputs"], case["settings"]
            per_token, clipped = clipped_value_loss(
                values, inputs["values"], inputs["returns"], jnp.asarray(mask), clip=settings["cliprange_value"]
            )
            weights = weights_of(mask, VERL_MODES[settings["loss_agg_mode"]], mask.shape[1])
            return (per_token * weights).sum(), clipped

        (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(inputs["vpreds"]))
        np.testing.assert_allclose(value, outputs["loss"], rtol=1e-5, atol=1e-6, err_msg=case["id"])
        np.testing.assert_allclose(gradient, outputs["grad"], rtol=1e-4, atol=1e-6, err_msg=case["id"])
        np.testing.assert_allclose(clipped.sum() / mask.sum(), outputs["clipfrac"], rtol=1e-5, err_msg=case["id"])
        checked += 1
    assert checked == 30


def test_every_case_of_areal(golden: Golden) -> None:
    cases = [case for case in golden("areal/decoupled_ppo") if case["id"].startswith("critic/")]
    assert len(cases) == 4
    for case in cases:
        inputs = {name: np.asarray(value) for name, value in case["inputs"].items()}
        mask, huber = inputs["loss_mask"], {"mse": 0.0, "huber": 10.0}[case["settings"]["loss_fn_type"]]
        settings = {"clip": case["settings"]["value_eps_clip"], "huber": huber}

        def loss(values: jax.Array, inputs: Any = inputs, mask: Any = mask, settings: Any = settings) -> jax.Array:
            old, returns = inputs["old_value"], inputs["target_value"]
            per_token, _ = clipped_value_loss(values, old, returns, jnp.asarray(mask), **settings)
            return (per_token * weights_of(mask, "token")).sum()

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["value"]))
        np.testing.assert_allclose(value, case["outputs"]["loss"], rtol=1e-5, err_msg=case["id"])
        np.testing.assert_allclose(gradient, case["outputs"]["grad"], rtol=1e-4, atol=1e-6, err_msg=case["id"])


def test_beyond_huber_an_error_has_the_slope_of_its_size() -> None:
    errors, here = jnp.array([[0.5, -0.5, 3.0, -7.0]]), jnp.ones((1, 4))

    def loss(values: jax.Array) -> jax.Array:
        return clipped_value_loss(values, values, jnp.zeros((1, 4)), here, clip=0.1, huber=2.0)[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(errors), [[0.5, -0.5, 2.0, -2.0]])
    assert float(loss(errors)) == pytest.approx(0.125 + 0.125 + 4.0 + 12.0)


def test_a_masked_token_has_no_gradient_whatever_stands_there() -> None:
    nan = jnp.array([[np.nan, 1.0]])
    mask = jnp.array([[0.0, 1.0]])
    gradient = jax.grad(lambda v: clipped_value_loss(v, nan, nan, mask, clip=0.5)[0].sum())(jnp.array([[np.nan, 2.0]]))
    np.testing.assert_array_equal(gradient, [[0.0, 1.0]])
