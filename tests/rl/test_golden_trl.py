"""Every recorded case of TRL's losses, values and gradients, against ours."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rl import divergence
from jaxrl.rl.entropy import most_uncertain
from jaxrl.rl.mismatch.rejection import off_policy_negatives
from jaxrl.rl.policy_losses import POLICY_LOSSES
from tests.rl.rows import close, padded, tokens_of, weights_of

Golden = Callable[[str], list[dict[str, Any]]]


@functools.cache
def trl_gradient(
    name: str,
    settings: tuple[tuple[str, Any], ...],
    beta: float,
    by_ratio: bool,
    share: float,
    off_policy: float | None,
    entropy_coefficient: float,
) -> Callable[..., Any]:
    """Value and gradients by log-probabilities and entropies of a loss with what TRL adds to it."""

    def total(logprobs: Any, entropies: Any, weights: Any, mask: Any, advantages: Any, rest: dict[str, Any]) -> Any:
        tokens = tokens_of(mask, logprobs, advantages, proximal=rest["old"], entropy=entropies)
        if name == "vespo":  # there the sampler's mismatch is part of the weight
            tokens = tokens.replace(
                proximal_logprobs=tokens.proximal_logprobs - jnp.log(jnp.maximum(rest["correction"], 1e-8)) * mask
            )
        keep = most_uncertain(tokens, share)
        loss = POLICY_LOSSES[name](tokens.only(keep), **dict(settings)).loss
        if off_policy is not None:
            loss = loss * off_policy_negatives(tokens, most=off_policy)
        if name != "vespo":
            loss = loss * rest["correction"]
        to_reference = divergence.kl(tokens.logprobs, rest["reference"], mask, "k3")
        if by_ratio:
            to_reference = to_reference * tokens.ratio_of(dict(settings).get("span", "token"))
        # TRL's bonus is a mean over the tokens that are trained on, whatever the loss is aggregated by; ours is
        # aggregated like the loss, over all sampled tokens.
        bonus = (entropies * keep).sum() / keep.sum()
        return (weights * (loss + beta * to_reference)).sum() - entropy_coefficient * bonus

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


TRL_MODES = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "vespo": "token",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
    "gmpo": "sequence",
    "rloo": "sequence",
}


def trl_loss(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our name and settings for a loss of TRL's."""
    options = case["settings"]
    high = options.get("epsilon_high", 0.2)
    spans = {"token": "token", "sequence": "geometric"}
    span = {"span": spans[options.get("importance_sampling_level", "token")]}
    if case["loss"] == "rloo":
        span = {"span": "product"}
    if case["loss"] == "cispo":
        return "cispo_absolute", span | {"cap": high}
    if case["loss"] == "sapo":
        positive, negative = (options.get(f"sapo_temperature_{sign}") for sign in ("pos", "neg"))
        return "sapo", span | {"temperature_positive": positive or 1.0, "temperature_negative": negative or 1.05}
    if case["loss"] == "vespo":
        ours = {"vespo_k_pos": "power_positive", "vespo_lambda_pos": "rate_positive"}
        ours |= {"vespo_k_neg": "power_negative", "vespo_lambda_neg": "rate_negative"}
        return "vespo", {ours[name]: value for name, value in options.items() if name in ours}
    if case["loss"] == "gmpo":
        return "gmpo", {"clip_low": options["epsilon_low"], "clip_high": high}
    settings = {"clip_low": options.get("epsilon_low", 0.2), "clip_high": high, "dual_clip": 0.0}
    return "ppo_clip", span | settings | {"ratio_cap": options.get("delta", 0.0)}


def trl_weights(case: dict[str, Any], mask: np.ndarray) -> np.ndarray:
    options, mode = case["settings"], TRL_MODES[case["loss"]]
    weights = weights_of(mask, mode, options.get("max_completion_length", 20))
    if mode != "token":  # TRL also divides by trajectories without a token
        weights = weights * (np.count_nonzero(mask.sum(axis=1)) / len(mask))
    if case["loss"] in ("dapo", "cispo", "vespo"):
        tokens = options.get("num_items_in_batch", mask.sum())
        steps = options.get("current_gradient_accumulation_steps", 1) / options.get("steps_per_generation", 1)
        return weights * mask.sum() / tokens / (steps if "steps_per_generation" in options else 1)
    return weights / options.get("current_gradient_accumulation_steps", 1)


def trl_mask(case: dict[str, Any]) -> np.ndarray:
    inputs = case["inputs"]
    with_tools = case["loss"] != "rloo" and case["settings"].get("use_tool_mask", True)
    return inputs["completion_mask"] * (inputs["tool_mask"] if with_tools else 1)


def trl_correction(case: dict[str, Any], mask: np.ndarray) -> np.ndarray:
    """[B, T] importance ratios to the sampler; vespo takes the one of a sequence once, not once a token."""
    span = case["settings"].get("is_ratio")
    if span is None:
        return np.ones(mask.shape)
    ratio = np.broadcast_to(case["inputs"][f"is_ratio_{span}"], mask.shape).astype(np.float64)
    if case["loss"] == "vespo":
        ratio = np.maximum(ratio, 1e-8)
        if span == "sequence":
            ratio = ratio ** (1 / np.maximum(mask.sum(axis=1, keepdims=True), 1))
    return np.where(mask > 0, ratio, 1.0)


def without_gradient(case: dict[str, Any], mask: np.ndarray) -> float:
    """What TRL's gmpo and rloo add for rows in which no token is left: -A times the ratio of nothing, a constant."""
    entropies, share = case["inputs"]["entropies"], case["settings"].get("top_entropy_quantile", 1.0)
    kept = mask * (entropies >= np.quantile(entropies[mask > 0], 1 - share))
    return -np.where(kept.any(axis=1), 0, case["inputs"]["advantages"]).mean()


def test_losses_match_trl(golden: Golden) -> None:
    cases = golden("trl/grpo_losses")
    assert len(cases) == 195
    for case in cases:
        case = case | {"loss": case["settings"].get("loss_type", case["loss"])}
        inputs, options, outputs = case["inputs"], case["settings"], case["outputs"]
        mask = trl_mask(case)
        name, settings = trl_loss(case)
        logprobs = inputs["per_token_logps"]
        old = inputs["old_per_token_logps"] if options.get("has_old", True) else logprobs
        compute = trl_gradient(
            name,
            tuple(settings.items()),
            options.get("beta", 0.0),
            options.get("use_bias_correction_kl", False),
            options.get("top_entropy_quantile", 1.0),
            options.get("off_policy_mask_threshold"),
            options.get("entropy_coef", 0.0) / options.get("current_gradient_accumulation_steps", 1),
        )
        rest = {
            "old": old,
            "reference": inputs["ref_per_token_logps"],
            "correction": trl_correction(case, mask),
        }
        rows = tuple(slice(size) for size in mask.shape)
        arrays = logprobs, inputs["entropies"], trl_weights(case, mask), mask, inputs["advantages"][:, None] * mask
        value, gradients = compute(
            *[padded(array, (8, 14)) for array in arrays],
            {key: padded(array, (8, 14)) for key, array in rest.items()},
        )
        gradient, entropy_gradient = (array[rows] for array in gradients)
        if case["loss"] in ("gmpo", "rloo"):
            value = value + without_gradient(case, mask)
        close(value, outputs["loss"], case["id"])
        close(gradient, outputs["grad"], case["id"], gradient=True)
        if "grad_entropies" in outputs:
            close(entropy_gradient, outputs["grad_entropies"], case["id"], gradient=True)
