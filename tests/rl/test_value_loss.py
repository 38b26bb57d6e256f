"""The critic's loss against verl, every case."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.value_loss import clipped_value_loss

Golden = Callable[[str], list[dict[str, Any]]]


def weights_of(mask: np.ndarray, mode: str) -> np.ndarray:
    """Weights of verl's modes, as the trainer would make them."""
    if mode == "token-sum":
        return mask.astype(np.float32)
    name, length = {
        "token-mean": ("token", 0),
        "seq-mean-token-mean": ("sequence", 0),
        "seq-mean-token-sum": ("constant", 1),
        "seq-mean-token-sum-norm": ("constant", mask.shape[1]),
    }[mode]
    return np.stack(aggregation_weights(list(mask), name, length))


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
            return (per_token * weights_of(mask, settings["loss_agg_mode"])).sum(), clipped

        (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(inputs["vpreds"]))
        np.testing.assert_allclose(value, outputs["loss"], rtol=1e-5, atol=1e-6, err_msg=case["id"])
        np.testing.assert_allclose(gradient, outputs["grad"], rtol=1e-4, atol=1e-6, err_msg=case["id"])
        np.testing.assert_allclose(clipped.sum() / mask.sum(), outputs["clipfrac"], rtol=1e-5, err_msg=case["id"])
        checked += 1
    assert checked == 30


def test_a_masked_token_has_no_gradient_whatever_stands_there() -> None:
    nan = jnp.array([[np.nan, 1.0]])
    mask = jnp.array([[0.0, 1.0]])
    gradient = jax.grad(lambda v: clipped_value_loss(v, nan, nan, mask, clip=0.5)[0].sum())(jnp.array([[np.nan, 2.0]]))
    np.testing.assert_array_equal(gradient, [[0.0, 1.0]])
