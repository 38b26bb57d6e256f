"""Recorded losses of DARS, and the importance weights TRL puts on what vLLM sampled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rl.mismatch.weights import icepop, tis
from jaxrl.rl.policy_losses.clipped import ppo_clip
from tests.rl.rows import close, tokens_of, weights_of

Golden = Callable[[str], list[dict[str, Any]]]


def test_losses_of_dars(golden: Golden) -> None:
    """Its token-level loss divides by the padded length alone, and so grows with the batch: no aggregation here."""
    cases = [case for case in golden("dars/allocation") if case["id"].startswith("loss/")]

    def loss(logprobs: jax.Array, inputs: dict[str, Any], weights: np.ndarray, low: float, high: float) -> jax.Array:
        tokens = tokens_of(inputs["loss_mask"], logprobs, inputs["advantages"], proximal=inputs["proximal_logprobs"])
        return (weights * ppo_clip(tokens, clip_low=low, clip_high=high, dual_clip=0.0).loss).sum()

    for case in cases:
        inputs, settings = case["inputs"], case["settings"]
        low, high = (
            settings["cliprange"] if settings[side] < 0 else settings[side]
            for side in ("cliprange_low", "cliprange_high")
        )
        mask = inputs["loss_mask"]
        weights = mask / mask.shape[1] if settings["use_token_level_loss"] else weights_of(mask, "sequence")
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["logprobs"]), inputs, weights, low, high)
        close(value, case["outputs"]["loss"], case["id"])
        close(gradient, case["outputs"]["grad"], case["id"], gradient=True)
    assert len(cases) == 12


def test_importance_weights_of_trl(golden: Golden) -> None:
    cases = [case for case in golden("trl/advantages") if case["estimator"] == "vllm_is"]
    for case in cases:
        inputs, settings = case["inputs"], case["settings"]
        mask = np.array(inputs["completion_mask"]) * np.array(inputs["tool_mask"])
        proximal, behaviour = np.array(inputs["old_per_token_logps"]), np.array(inputs["sampling_per_token_logps"])
        tokens = tokens_of(mask, proximal, np.zeros_like(mask), proximal=proximal, behaviour=behaviour)
        level, action = settings["mode"].split("_")
        span, low, high = (
            {"token": "token", "sequence": "product"}[level],
            settings["clip_min"] or 0.0,
            settings["clip_max"],
        )
        if action == "truncate":
            got = tis(tokens, span=span, cap=high, floor=low)
        else:
            got = icepop(tokens, span=span, low=low, high=high)
        expected = np.broadcast_to(np.array(case["outputs"]["ratio"], np.float64), mask.shape)
        close(got * mask, expected * mask, case["id"])
    assert len(cases) == 12
