"""Losses of tokens that somebody else wrote, and their weight beside the policy loss, against DataMind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import ConfigError, MixConfig
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.policy_losses.clipped import ppo_clip
from jaxrl.rl.supervised import SUPERVISED_LOSSES, demonstration_weight, supervised_loss
from jaxrl.rl.tokens import sampled

Golden = Callable[[str], list[dict[str, Any]]]
DATAMIND = {"mu": "nll", "IS": "dft", "phi": "chord_phi"}


def mix_of(settings: dict[str, Any]) -> MixConfig:
    return MixConfig(
        peak=settings["mu_peak"],
        valley=settings["mu_valley"],
        warmup_steps=settings["mu_warmup_steps"],
        decay_steps=settings["mu_decay_steps"],
    )


def mean_loss(logprobs: jax.Array, mask: np.ndarray, kind: str) -> jax.Array:
    per_token = SUPERVISED_LOSSES[DATAMIND[kind]](jnp.where(mask > 0, logprobs, 0.0))
    return (per_token * aggregation_weights([mask], "token")[0]).sum()


def policy_loss(case: dict[str, Any]) -> float:
    inputs, settings = case["inputs"], case["settings"]
    mask = inputs["pg_loss_mask"]
    tokens = sampled(
        jnp.asarray(mask),
        jnp.asarray(inputs["pg_logprobs"]),
        proximal_logprobs=inputs["pg_proximal_logprobs"],
        behaviour_logprobs=inputs["pg_proximal_logprobs"],
        advantages=inputs["pg_advantages"],
        segment_ids=jnp.ones(mask.shape, jnp.int32),
        entropy=jnp.zeros(mask.shape),
    )
    options = {
        "clip_low": settings["cliprange_low"],
        "clip_high": settings["cliprange_high"],
        "dual_clip": settings["clip_ratio_c"],
    }
    return float((ppo_clip(tokens, **options).loss * np.stack(aggregation_weights(list(mask), "token"))).sum())


def test_every_case_of_datamind(golden: Golden) -> None:
    checked = {"mu": 0, "sft": 0, "mix": 0}
    for case in golden("datamind/sft_rl_mix"):
        kind, settings, inputs, outputs = case["id"].split("/")[0], case["settings"], case["inputs"], case["outputs"]
        checked[kind] += 1
        if kind == "mu":
            got = [demonstration_weight(mix_of(settings), step) for step in inputs["step"]]
            np.testing.assert_allclose(got, outputs["mu"], rtol=1e-12)
            continue
        logprobs, mask = (np.asarray(inputs[name], np.float32) for name in ("token_logprob", "loss_mask"))
        loss, gradient = jax.value_and_grad(mean_loss)(jnp.asarray(logprobs), mask, settings["sft_loss_type"])
        np.testing.assert_allclose(loss, outputs["loss" if kind == "sft" else "sft_loss"], rtol=1e-5, atol=1e-6)
        if kind == "sft":
            np.testing.assert_allclose(gradient, outputs["grad"], rtol=1e-4, atol=1e-6)
            assert not np.asarray(gradient)[mask == 0].any()
            continue
        weight, policy = demonstration_weight(mix_of(settings), settings["step"]), policy_loss(case)
        np.testing.assert_allclose([weight, policy], [outputs["mu"], outputs["pg_loss"]], rtol=1e-5, atol=1e-6)
        total = (1 - weight) * policy + weight * float(loss)
        np.testing.assert_allclose(total, outputs["total"], rtol=1e-5, atol=1e-6)
    assert checked == {"mu": 3, "sft": 9, "mix": 36}


def test_the_schedule_has_its_published_values() -> None:
    steps = (0, 87.5, 175, 350, 1000)
    got = [demonstration_weight(MixConfig(), step) for step in steps]
    np.testing.assert_allclose(got, (0.9, 0.7755, 0.475, 0.05, 0.05), atol=5e-5)


@settings(deadline=None)
@given(st.floats(-30, 0))
def test_gradients_are_those_of_the_formulas(logprob: float) -> None:
    p = np.exp(np.float32(logprob))
    wanted = {"nll": -1.0, "dft": -p, "chord_phi": -p * (1 - p)}
    for name, loss in SUPERVISED_LOSSES.items():
        assert float(jax.grad(loss)(jnp.float32(logprob))) == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_a_loss_is_checked_where_it_is_named() -> None:
    with pytest.raises(ConfigError, match="SftConfig.loss='dtf' is no method; did you mean dft"):
        supervised_loss("SftConfig.loss", "dtf", {})
    with pytest.raises(ConfigError, match="nll has no settings"):
        supervised_loss("SftConfig.loss", "nll", {"beta": 0.1})


def test_a_loss_of_another_shape_is_refused(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mean(logprobs):\n    return -logprobs.mean()\n")
    with pytest.raises(ConfigError, match=r"gave an array of shape \(\) for .* it must give a loss of that shape"):
        supervised_loss("MixConfig.loss", f"{file}:mean", {})
